"""MotionClips' arrays as padded tensors, where what is not known is a mask.

Legend: B clips, M moments of a clip, R × C motion cells, H × W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdm_priors.errors import SampleError
from vlm_hooks.adapters.inputs import Motion, MotionClip
from vlm_hooks.adapters.model import COUNTS

CELL = 8  # pixels of a motion cell's side


def steps_of(clip: MotionClip, motion: Motion) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [M, R, C, 2] and residuals [M, H, W, 3] of what follows one of the clip's key frames; M may be 0.

    Raises SampleError where there are vectors and no residuals.
    """
    height, width = clip.frames.shape[1:3]
    if not len(motion.times):  # a picture's blank motion has no size of its own
        return np.zeros((0, height // CELL, width // CELL, 2), np.float32), np.zeros((0, height, width, 3), np.float32)
    if motion.residuals is None:
        raise SampleError(
            "The clip has motion vectors and no residuals, which this adapter reads: make it with keyed_clip "
            "or anchored_clip."
        )
    return motion.vectors, motion.residuals


def vector_tensor(vectors: np.ndarray) -> Tensor:
    """[M, R, C, 2] with NaN where not known -> float32 [M, R, C, 3]: right, down (0 there), and whether it is known."""
    known = np.isfinite(vectors).all(-1, keepdims=True)
    return torch.from_numpy(np.concatenate([np.where(known, vectors, 0), known], axis=-1).astype(np.float32))


def error_tensor(residuals: np.ndarray) -> Tensor:
    """[M, H, W, 3] in −1..1 with NaN where not known -> float16 [M, 3, H, W], 0 there.

    float16 keeps all of 8 bits' differences apart, and a minute of them in half the memory.
    """
    return torch.from_numpy(np.nan_to_num(residuals).astype(np.float16)).movedim(3, 1).contiguous()


def padded(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[M, …] of several clips -> [B, most M, …] with zeros, and [B, most M] bool: what there is. One row at least."""
    most = max(1, *(len(tensor) for tensor in tensors))
    values = tensors[0].new_zeros(len(tensors), most, *tensors[0].shape[1:])
    known = torch.zeros(len(tensors), most, dtype=torch.bool)
    for row, tensor in enumerate(tensors):
        values[row, : len(tensor)] = tensor
        known[row, : len(tensor)] = True
    return values, known


def frame_inputs(model: Any, clips: Sequence[Any]) -> dict[str, Tensor]:
    """What an AdapterModel's `frame_tokens` takes: the tower's inputs for the clips' frames as it shows them."""
    shown = [model.adapter.shown(clip) for clip in clips]
    return {**model.base.frame_inputs(shown), COUNTS: torch.tensor([len(clip.frames) for clip in shown])}
