"""What a loader's worker process sends beside a batch, made light to send.

A tensor crosses between processes in shared memory of its own, with a file and a connection each. The hundreds of small
ones that a batch's priors, grids and rows hold took 0.13 s a step of 16 samples, so all of them travel in one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vdm_priors.grid import TokenGrid
from vdm_priors.prior import MotionPrior
from vlm_hooks.capture import CaptureRequest

HOLDERS = (TokenGrid, MotionPrior, CaptureRequest)  # whose fields hold tensors
ALIGNED = 8  # bytes: the largest number's


class _Place(NamedTuple):
    """Where in the freight a tensor is, in bytes, and what it is."""

    start: int
    dtype: torch.dtype
    shape: torch.Size


class Message:
    """Base of what is sent: its tensors, and those of the HOLDERS in it, are one tensor of bytes on the way."""

    def __getstate__(self) -> tuple[dict[str, Any], Tensor]:
        parts: list[Tensor] = [torch.empty(0, dtype=torch.uint8)]
        end = 0

        def load(tensor: Tensor) -> _Place:
            nonlocal end
            place = _Place(end, tensor.dtype, tensor.shape)
            numbers = tensor.detach().contiguous().flatten().view(torch.uint8)
            parts.append(nn.functional.pad(numbers, (0, -len(numbers) % ALIGNED)))
            end += len(parts[-1])
            return place

        return _changed(self.__dict__, Tensor, load), torch.cat(parts)

    def __setstate__(self, sent: tuple[dict[str, Any], Tensor]) -> None:
        state, freight = sent

        def unload(place: _Place) -> Tensor:
            size = prod(place.shape) * place.dtype.itemsize
            return freight[place.start : place.start + size].view(place.dtype).reshape(place.shape)

        self.__dict__.update(_changed(state, _Place, unload))


def _changed(value: Any, kind: type, change: Callable) -> Any:
    """The value with everything of a kind in it changed; it and its HOLDERS are left as they are."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {name: _changed(entry, kind, change) for name, entry in value.items()}
    if isinstance(value, list):
        return [_changed(entry, kind, change) for entry in value]
    if isinstance(value, HOLDERS):
        twin = copy.copy(value)
        twin.__dict__.update(_changed(value.__dict__, kind, change))
        return twin
    return value
