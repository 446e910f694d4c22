"""Confidence of a prior: how concentrated its maps are, and how mobile.

The paper names confidence gating as future work: a student should align less to a diffuse prior. Both measures
lie in 0..1, are 0 for a uniform map and 1 for all mass in one cell, do not depend on a map's scale, and fall
as it is mixed with a uniform one. A map holds mass: uniform is what gives cells mass by their volume.

Legend: N words, F frames, H rows, W columns of the prior's grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdm_priors.grid import TokenGrid

CONFIDENCES = ("none", "concentration", "mobility", "both")


def concentration(maps: Tensor, grid: TokenGrid) -> Tensor:
    """[N] float64: 1 − H(p) / H(p, q) of maps [N, F, H, W] made distributions p over the valid cells.

    q is the cells' share of the valid volume and H(p, q) = −Σ p log q; for cells of equal volume this is
    1 − H(p)/log n, one minus the normalised entropy. 0 for a map without mass and a grid of one valid cell.
    """
    _check(maps, grid)
    mass = maps.double()[:, grid.valid.to(maps.device)]
    volume = grid.volumes[grid.valid].to(maps.device)
    p = mass / mass.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    cross = -(p * (volume / volume.sum()).log()).sum(dim=1)
    entropy = -torch.special.xlogy(p, p).sum(dim=1)
    return _share(cross - entropy, cross)


def mobility(maps: Tensor, grid: TokenGrid) -> Tensor:
    """[N] float64: how much of maps [N, F, H, W] changes from a frame to the next, Σ|d' − d| / Σ(d' + d).

    d and d' are a cell's mass per volume in two consecutive frames, summed over all such pairs that are valid.
    MTTI's fluctuation relative to its mean, but cell by cell, since a thing that only moves keeps its frame's mean.
    0 for a map without mass and for one frame.
    """
    _check(maps, grid)
    # where, not a product: an invalid cell may hold NaN
    density = torch.where(grid.valid.to(maps.device), maps.double(), 0.0) / grid.volumes.to(maps.device)
    pairs = (grid.valid[1:] & grid.valid[:-1]).to(maps.device)
    change = (density.diff(dim=1).abs() * pairs).sum(dim=(1, 2, 3))
    total = ((density[:, 1:] + density[:, :-1]) * pairs).sum(dim=(1, 2, 3))
    return _share(change, total)


def word_weights(maps: Tensor, grid: TokenGrid, kind: str) -> Tensor:
    """Weight [N] float32 in 0..1 of each word for the student's alignment; kind is one of CONFIDENCES."""
    if kind not in CONFIDENCES:
        raise ValueError(f"word_weights: kind is one of {', '.join(CONFIDENCES)}, not {kind!r}.")
    weight = torch.ones(len(maps), dtype=torch.float64)
    if kind in ("concentration", "both"):
        weight = weight * concentration(maps, grid).cpu()
    if kind in ("mobility", "both"):
        weight = weight * mobility(maps, grid).cpu()
    return weight.float()


def confidence_report(maps: Tensor, grid: TokenGrid) -> dict[str, dict[str, float | list[float]]]:
    """Both measures of the prior (its words' mean) and of each word, for the provenance."""
    report = {}
    for name, measure in (("concentration", concentration), ("mobility", mobility)):
        per_word = measure(maps, grid)
        mean = float(per_word.mean()) if len(per_word) else 0.0
        report[name] = {"prior": mean, "words": per_word.tolist()}
    return report


def _check(maps: Tensor, grid: TokenGrid) -> None:
    if maps.ndim != 4 or tuple(maps.shape[1:]) != grid.shape:
        raise ValueError(
            f"confidence: maps must be [N, F, H, W] on the grid {list(grid.shape)}, got {list(maps.shape)}."
        )


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole within 0..1 against rounding, and 0 where there is nothing."""
    safe = torch.where(whole > 0, whole, 1.0)
    return torch.where(whole > 0, part / safe, 0.0).clamp(0, 1)
