"""What a loader's worker process sends beside a batch, made light to send.

A tensor crosses between processes in shared memory of its own, with a file and a connection each. The hundreds of small
ones that a batch's priors, grids and rows hold took 0.13 s a step of 16 samples, so they travel as arrays in the message.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdm_priors.grid import TokenGrid
from vdm_priors.prior import MotionPrior
from vlm_hooks.capture import CaptureRequest

HOLDERS = (TokenGrid, MotionPrior, CaptureRequest)  # whose fields hold tensors


class Message:
    """Base of what is sent: its tensors, and those of the HOLDERS in it, are arrays on the way."""

    def __getstate__(self) -> dict[str, Any]:
        return _changed(self.__dict__, Tensor, Tensor.numpy)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(_changed(state, np.ndarray, torch.from_numpy))


def _changed(value: Any, kind: type, change: Callable) -> Any:
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
