"""MotionPrior: where a video diffusion model (or another source) sees each word's motion.

The contract between teachers and students, and its file: one safetensors file with the maps
in float16, long lists of numbers of the provenance as tensors beside them, and everything else
as JSON in the header, so that thousands of head scores cost nothing where headers alone are read.
Loading runs no code.

Legend: N words, F frames, H rows, W columns of the prior's grid.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from vdm_priors.errors import StoreError
from vdm_priors.grid import TokenGrid
from vdm_priors.words import Word

FORMAT = "motion-prior"
VERSION = 2
READABLE = (1, 2)  # 1 had all of the provenance in the header
LONG = 32  # numbers; shorter lists stay in the header
LISTED = "provenance"  # first part of a list's tensor name; the keys that lead to it follow, slashes between
STORED_PEAK = 15  # a word's largest stored value is in [2^14, 2^15): within float16's 65504


@dataclass
class MotionPrior:
    """Evidence per word over the cells of a grid.

    text: the shared text; words: N words of it; maps [N, F, H, W] float32, non-negative mass as
    harvested (not normalised); grid: where the cells lie; weight [N] in [0, 1]: confidence per
    word, 1 where unknown; provenance: how the prior was made, in JSON types.
    """

    text: str
    words: list[Word]
    maps: Tensor
    grid: TokenGrid
    weight: Tensor
    provenance: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        """Raises ValueError naming the part of the prior that breaks the contract."""
        for word in self.words:
            if not word.text or self.text[word.start : word.end] != word.text:
                raise ValueError(
                    f"MotionPrior: word {word.text!r} is not at characters "
                    f"{word.start}:{word.end} of {self.text!r}."
                )
        expected = (len(self.words), *self.grid.shape)
        if tuple(self.maps.shape) != expected or self.maps.dtype != torch.float32:
            raise ValueError(
                f"MotionPrior: maps must be float32 [N, F, H, W] = {list(expected)}, got "
                f"{self.maps.dtype} {list(self.maps.shape)}."
            )
        if not (self.maps.isfinite() & (self.maps >= 0)).all():
            raise ValueError("MotionPrior: maps must be finite and not negative.")
        if tuple(self.weight.shape) != (len(self.words),):
            raise ValueError(
                f"MotionPrior: weight must be [N] = [{len(self.words)}], got "
                f"{list(self.weight.shape)}."
            )
        if not ((self.weight >= 0) & (self.weight <= 1)).all():
            raise ValueError(
                f"MotionPrior: weight must lie in 0..1, got {self.weight.tolist()}."
            )
        _to_json(self.provenance, "provenance")

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all.

        Maps are rounded to float16 relative to their word's largest value (11 bits; 2^-39 of it
        still counts). Raises ValueError if the prior is invalid, StoreError if the file cannot
        be written.
        """
        self.validate()
        maps = self.maps.detach().cpu().double()
        peak = maps.flatten(1).amax(dim=1) if maps.numel() else maps.new_zeros(len(maps))
        mantissa, exponent = torch.frexp(peak)
        # a power of two above the *rounded* peak, so that saving a loaded prior changes nothing
        exponent = exponent + ((mantissa * 2**11).round() == 2**11).int() - STORED_PEAK
        scale = torch.ldexp(torch.ones_like(peak), torch.where(peak > 0, exponent, 0))
        tensors = {
            "maps": (maps / scale[:, None, None, None]).half(),
            "scale": scale,
            "weight": self.weight.detach().cpu().float(),
        }
        provenance, lists = _without_long_lists(self.provenance, LISTED)
        tensors.update(lists)
        described = {
            "text": self.text,
            "words": [asdict(word) for word in self.words],
            "grid": self.grid.to_dict(),
            "provenance": provenance,
        }
        header = {
            "version": VERSION,
            "checksum": _checksum(tensors, described),
            "prior": described,
        }
        # one key: safetensors writes several in random order; equal priors make equal files
        metadata = {FORMAT: _to_json(header, "prior", separators=(",", ":"))}
        _write_atomically(Path(path), save_tensors(tensors, metadata))

    @classmethod
    def load(cls, path: str | Path) -> MotionPrior:
        """Read a file that `save` wrote. Raises StoreError naming a missing or damaged file."""
        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StoreError(
                f"The prior {path} cannot be read ({error.strerror or error}). Check the path and "
                f"its permissions, or extract the prior again."
            ) from error
        try:
            tensors = load_tensors(data)
            header = json.loads(_metadata(data)[FORMAT])
            if header["version"] not in READABLE:
                raise ValueError(f"it has version {header['version']}; {' and '.join(map(str, READABLE))} can be read")
            described = header["prior"]
            if header["checksum"] != _checksum(tensors, described):
                raise ValueError("its checksum does not fit its content")
            _put_lists_back(described["provenance"], tensors)
            maps = tensors["maps"].double() * tensors["scale"][:, None, None, None]
            prior = cls(
                text=described["text"],
                words=[Word(**word) for word in described["words"]],
                maps=maps.float(),
                grid=TokenGrid.from_dict(described["grid"]),
                weight=tensors["weight"],
                provenance=described["provenance"],
            )
            prior.validate()
        except (SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
            raise StoreError(
                f"The prior {path} is damaged or not a motion prior ({error}). Delete the file "
                f"and extract the prior again."
            ) from error
        return prior


def _without_long_lists(value: dict[str, Any], path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A copy without the long lists of numbers below its first level, and these as tensors by their path.

    What stands on the first level is what the index of a store looks at (PriorEntry.provenance).
    """
    rest, lists = {}, {}
    for key, item in value.items():
        rest[key], below = item, f"{path}/{key}"
        if isinstance(item, dict) and "/" not in str(key):
            rest[key], found = _without_long_lists(item, below)
            lists.update(found)
        elif path != LISTED and "/" not in str(key) and (tensor := _exact_tensor(item)) is not None:
            del rest[key]
            lists[below] = tensor
    return rest, lists


def _exact_tensor(item: Any) -> Tensor | None:
    """A long list of numbers of one type as a tensor that holds exactly these; None for anything else."""
    if not isinstance(item, list) or len(item) < LONG or len(kinds := set(map(type, item))) > 1:
        return None
    if kinds == {bool}:
        return torch.tensor(item)
    if kinds == {int} and max(map(abs, item)) < 2**63:
        return torch.tensor(item)
    if kinds == {float}:
        exact = torch.tensor(item, dtype=torch.float64)
        return exact.float() if torch.equal(exact.float().double(), exact) else exact
    return None


def _put_lists_back(provenance: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Undoes `_without_long_lists`."""
    for name, tensor in tensors.items():
        first, *path = name.split("/")
        if first == LISTED and path:
            parent = provenance
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = tensor.tolist()


def _to_json(value: Any, name: str, separators: tuple[str, str] | None = None) -> str:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False, separators=separators)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"MotionPrior: {name} must hold JSON types with finite numbers only ({error})."
        ) from error


def _metadata(data: bytes) -> dict[str, str]:
    """The header's metadata: 8 bytes of length, then JSON (safetensors' format)."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__", {})


def _checksum(tensors: dict[str, Tensor], described: dict[str, Any]) -> str:
    """safetensors notices a missing end but not a flipped bit; this notices both."""
    digest = hashlib.sha256(_to_json(described, "prior").encode("utf-8"))
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary name in the same folder, flush to the disk, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise StoreError(
            f"The prior {path} cannot be written ({error.strerror or error}). Check that the "
            f"folder is writable and the disk has {len(data):,} bytes free, then run again: what "
            f"is finished is kept."
        ) from error
    finally:  # after an error or an interruption; a renamed file is no longer there
        _remove_quietly(temporary)


def _remove_quietly(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # the error that led here says more than this one would
