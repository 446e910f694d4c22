"""PriorStore: a folder of priors, keyed by a hash of everything that determines them.

Any number of processes may read and write one store: a prior appears whole or not at all, and
who writes a key twice writes the same content. An interrupted job makes the keys that are not
`in` the store, or do not `get`, and goes on (enhancer.sources.fill_store).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from vdm_priors.errors import StoreError
from vdm_priors.prior import MotionPrior

SUFFIX = ".safetensors"
KEY_LENGTH = 32
KEY_PATTERN = re.compile(r"[0-9A-Za-z_-]{3,128}")  # no dot, no slash: a key stays in the folder


def content_key(**parts: Any) -> str:
    """Key [32 hex digits] of everything that determines a prior: SHA-256 of canonical JSON.

    Parts are JSON types (tuples count as lists); their order does not matter. Raises TypeError
    or ValueError for anything else, for it might read the same for different content.
    """
    try:
        text = json.dumps(
            parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"content_key: {', '.join(sorted(parts))}: {error}") from error
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:KEY_LENGTH]


def file_digest(path: str | Path) -> str:
    """SHA-256 (hex) of a file's content, remembered while its size and time stay the same.

    Raises StoreError if the file cannot be read.
    """
    path = Path(path)
    try:
        status = path.stat()
        return _digest(str(path.resolve()), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise StoreError(
            f"The file {path} cannot be read ({error.strerror or error}). Check the path and its "
            f"permissions."
        ) from error


@lru_cache(maxsize=65536)
def _digest(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PriorStore:
    """Priors in `folder`, one safetensors file each, in sub-folders by the key's start."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        """The file of `key`, whether it exists or not. Raises StoreError for an unusable key."""
        if not KEY_PATTERN.fullmatch(key):
            raise StoreError(
                f"{key!r} cannot be a key of the prior store {self.folder}: use letters, digits, "
                f"- and _ only (`content_key` makes keys)."
            )
        return self.folder / key[:2] / f"{key}{SUFFIX}"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def get(self, key: str) -> MotionPrior:
        """The prior of `key`. Raises StoreError naming the file if missing or damaged."""
        return MotionPrior.load(self.path(key))

    def put(self, key: str, prior: MotionPrior) -> None:
        """Store `prior` whole or not at all; replaces an older one.

        Raises StoreError if it cannot be written (a full disk, say) and leaves nothing behind.
        """
        prior.save(self.path(key))

    def prepare(self) -> None:
        """Make the folder. Raises StoreError if nothing can be written there, before work is done for it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            reason = "" if os.access(self.folder, os.W_OK) else "no permission, or mounted read-only"
        except OSError as error:
            reason = error.strerror or str(error)
        if reason:
            raise StoreError(
                f"The prior store {self.folder} cannot be written ({reason}). Choose a folder that "
                f"you may write to."
            )

    def discard(self, key: str) -> None:
        """Delete the prior of `key` if there is one. Raises StoreError if it cannot be deleted."""
        path = self.path(key)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"The prior {path} cannot be deleted ({error.strerror or error}). Check the "
                f"folder's permissions."
            ) from error

    def keys(self) -> list[str]:
        """All keys, sorted."""
        return sorted(path.name[: -len(SUFFIX)] for path in self.folder.glob(f"??/[!.]*{SUFFIX}"))
