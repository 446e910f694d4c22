"""Motion-salient text tokens: which tokens' attention moves over the video (MTTI).

Source: MotionEnhancer, Motion-salient Text Token Identification (METHOD.md, step 3).
Legend: T text tokens or words, F frames, H rows, W columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def motion_terms(t2v: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean [T] and fluctuation [T], the two terms of the motion score, of t2v [T, F, H, W].

    With A[t, f] the attention averaged over the frame's cells (over those of `valid` [F, H, W]
    where given; frames without any are left out):
    mean_t = mean_f A[t, f]; fluctuation_t = 1/(F−1) Σ_f |A[t, f+1] − A[t, f]|, 0 for one frame.
    """
    if t2v.ndim != 4:
        raise ValueError(f"motion_terms: t2v must be [T, F, H, W], got {list(t2v.shape)}.")
    per_frame_tf = _frame_means(t2v, valid)
    fluctuation = torch.zeros_like(per_frame_tf[:, 0])
    if per_frame_tf.shape[1] > 1:
        fluctuation = per_frame_tf.diff(dim=1).abs().mean(dim=1)
    return per_frame_tf.mean(dim=1), fluctuation


def motion_scores(t2v: Tensor, valid: Tensor | None = None) -> Tensor:
    """Motion score MS(t) [T] of text-to-vision attention t2v [T, F, H, W]: mean + fluctuation."""
    mean, fluctuation = motion_terms(t2v, valid)
    return mean + fluctuation


def select_tokens(scores: Tensor, ratio: float = 0.5, eligible: Tensor | None = None) -> Tensor:
    """Bool [T]: the ⌈ratio·n⌉ best of the n eligible tokens (default all), ties by position.

    Raises ValueError for a ratio outside (0, 1] and for scores that are not finite.
    """
    return keep_top(scores, ratio, eligible)


def keep_top(scores: Tensor, ratio: float, eligible: Tensor | None = None) -> Tensor:
    """Bool [n]: the ⌈ratio · n⌉ highest of the eligible scores; of equal ones the earlier."""
    if scores.ndim != 1 or not scores.isfinite().all():
        raise ValueError(
            f"Selecting the best needs one finite score each, got {list(scores.shape)}: {scores}."
        )
    if not 0 < ratio <= 1:
        raise ValueError(f"The ratio to select must lie in (0, 1], got {ratio}.")
    if eligible is None:
        eligible = torch.ones_like(scores, dtype=torch.bool)
    if eligible.shape != scores.shape:
        raise ValueError(
            f"One eligible flag is needed for each of {len(scores)} scores, got "
            f"{list(eligible.shape)}."
        )
    candidates = eligible.to(scores.device).nonzero().flatten()
    count = math.ceil(ratio * len(candidates) - 1e-9)  # 0.1 · 30 is a little more than 3
    order = scores[candidates].argsort(descending=True, stable=True)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[candidates[order[:count]]] = True
    return kept


def _frame_means(t2v: Tensor, valid: Tensor | None) -> Tensor:
    """[T, F]: mean over each frame's (valid) cells; F shrinks by frames without valid cells."""
    if valid is None:
        return t2v.mean(dim=(2, 3))
    if valid.shape != t2v.shape[1:]:
        raise ValueError(
            f"motion_terms: valid must be [F, H, W] = {list(t2v.shape[1:])}, got "
            f"{list(valid.shape)}."
        )
    valid = valid.to(t2v.device)
    cells = valid.sum(dim=(1, 2))
    if not cells.any():
        raise ValueError("motion_terms: no cell is valid.")
    sums = torch.where(valid, t2v, 0.0).sum(dim=(2, 3))
    return sums[:, cells > 0] / cells[cells > 0]
