"""PriorStore: a folder of priors, keyed by a hash of everything that determines them.

Any number of processes may read and write one store: a prior appears whole or not at all, and
who writes a key twice writes the same content. An interrupted job makes the keys that are not
`in` the store, or do not `get`, and goes on (enhancer.filling.fill_store). `Claims` keep several
processes from making the same prior.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vdm_priors.errors import StoreError
from vdm_priors.prior import FORMAT, MotionPrior

SUFFIX = ".safetensors"
CLAIMS = ".claims"
HEADER_READ = 1 << 15  # bytes read at once: the whole header of most priors
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


@dataclass(frozen=True)
class PriorEntry:
    """A prior as its file's header describes it; the maps are not read and nothing is verified.

    model: "" where none made it; shape: frames, rows, columns of the grid; bytes: of the file;
    modified: seconds since 1970; provenance: without its long lists of numbers below the first
    level (head scores), which are no part of the header.
    """

    key: str
    source: str
    model: str
    text: str
    words: list[str]
    shape: tuple[int, int, int]
    bytes: int
    modified: float
    provenance: dict[str, Any]


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

    def entry(self, key: str) -> PriorEntry:
        """What the header of `key`'s file says. Raises StoreError if it is missing or cannot be understood."""
        path = self.path(key)
        try:
            header, status = _header(path)
            described = json.loads(header["__metadata__"][FORMAT])["prior"]
            provenance = described["provenance"]
            return PriorEntry(
                key=key,
                source=str(provenance.get("source", "")),
                model=str(provenance.get("model", "")),
                text=described["text"],
                words=[word["text"] for word in described["words"]],
                shape=tuple(header["maps"]["shape"][1:]),
                bytes=status.st_size,
                modified=status.st_mtime,
                provenance=provenance,
            )
        except OSError as error:
            raise StoreError(f"The prior {path} cannot be read ({error.strerror or error}).") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"The prior {path} is damaged or not a motion prior: its header is not readable."
            ) from error

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
        names = (entry.name for folder in self._folders() for entry in os.scandir(folder))
        keys = (name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX))
        return sorted(key for key in keys if KEY_PATTERN.fullmatch(key))

    def leftovers(self, age: float = 3600.0) -> list[Path]:
        """Temporary files of writes that were killed, last changed more than `age` seconds ago."""
        found = [Path(entry.path) for folder in self._folders() for entry in os.scandir(folder)
                 if entry.name.startswith(".") and entry.name.endswith(".tmp")]
        return sorted(path for path in found if time.time() - _modified(path) > age)

    def _folders(self) -> Iterator[str]:
        """The sub-folders by the keys' start. Raises StoreError if the store is not a folder that can be read."""
        try:
            entries = list(os.scandir(self.folder))
        except FileNotFoundError:
            return
        except OSError as error:
            raise StoreError(f"The prior store {self.folder} cannot be read ({error.strerror or error}).") from error
        yield from (entry.path for entry in entries if len(entry.name) == 2 and entry.is_dir())


class Claims:
    """Which process makes which prior of a store: `take` a key before making it, `release` it when it is stored.

    A claim is a lock on one byte of the empty file `.claims`, at an offset from the key's hash (POSIX record locks).
    The system ends it with its process, however that ends, so that none outlives a crash. Processes share claims, the
    threads of one process do not; one process opens a store's Claims once at a time, for closing ends all of them.
    Where the file system has no locks, StoreError; with needed=False every claim is granted there.
    """

    def __init__(self, folder: str | Path, needed: bool = True) -> None:
        self.path, self.needed = Path(folder) / CLAIMS, needed
        self._file = None

    def __enter__(self) -> Claims:
        try:
            self._file = open(self.path, "ab")
        except OSError as error:
            raise self._unusable(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def take(self, key: str) -> bool:
        """Claims the key for this process; False if another one has it."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _offset(key))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if self.needed:
                raise self._unusable(error) from error
        return True

    def release(self, key: str) -> None:
        """Gives the key up, whether it was made or not."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _offset(key))
        except OSError as error:
            if self.needed:
                raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> StoreError:
        return StoreError(
            f"The prior store's {self.path} cannot be locked ({error.strerror or error}), so that processes could not "
            f"share the work. Choose a store on a file system with locks that you may write to."
        )


def _offset(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:7], "big")


def _header(path: Path) -> tuple[dict[str, Any], os.stat_result]:
    """A safetensors header (8 bytes of its length, then JSON), and the file's status."""
    with open(path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        start = file.read(HEADER_READ)
        end = 8 + int.from_bytes(start[:8], "little")
        if not 8 < end <= status.st_size:
            raise ValueError("no header")
        while len(start) < end:
            more = file.read(end - len(start))
            if not more:
                raise ValueError("cut short")
            start += more
    return json.loads(start[8:end]), status


def _modified(path: Path) -> float:
    """Seconds since 1970; now for a file that is gone meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()
