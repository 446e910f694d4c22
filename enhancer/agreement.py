"""How near a motion map comes to the ground truth, and to another source's map: measures on one common grid.

AUC, normalised scanpath saliency and KL divergence as for saliency maps (Bylinskii et al., "What do different
evaluation metrics tell us about saliency models?", TPAMI 2019), the ground truth in the place of the fixations, and
the distance of the centres of mass frame by frame. Cells that a source knows nothing of are left out of both maps.

Legend: F frames, H rows, W columns of the common grid; a cell's volume is seconds × share of the frame.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from enhancer.world.measure import COVERED, auc
from vdm_priors.errors import SampleError
from vdm_priors.grid import TokenGrid, covered_share, regrid
from vdm_priors.prior import MotionPrior
from vdm_priors.words import Word

MEASURES = ("auc", "nss", "kl", "centre")
KNOWN = 0.5  # of a cell, at least
UNIFORM_SHARE = 0.01  # of both maps' mass in the KL divergence: a cell without any would make it infinite
DIGITS = 6  # of a density, relative to the highest: cells that regridding alone sets apart are ties
DRAWS = 2000  # of clips, for an interval


@dataclass(frozen=True, eq=False)
class GridMap:
    """mass [F, H, W] float64, not negative; volume [F, H, W] float64: the known part of each cell, 0 where the map says
    nothing."""

    mass: np.ndarray
    volume: np.ndarray

    @property
    def valid(self) -> np.ndarray:
        """[F, H, W] bool."""
        return self.volume > 0

    @property
    def density(self) -> np.ndarray:
        """[F, H, W] float64: mass by volume, the highest 1; NaN where not valid."""
        density = np.divide(self.mass, self.volume, out=np.full(self.mass.shape, np.nan), where=self.valid)
        highest = np.nanmax(density, initial=0.0)
        return np.round(density / highest, DIGITS) if highest > 0 else density


def on_grid(mass: Tensor, source: TokenGrid, grid: TokenGrid) -> GridMap:
    """mass [F', H', W'] on the cells of `source`, carried to `grid`; a cell counts where at least half of it is known."""
    share = covered_share(source, grid)
    known = replace(grid, valid=grid.valid & (share >= KNOWN))
    volume = torch.where(known.valid, share * grid.volumes, 0.0)
    return GridMap(regrid(mass.double(), source, known).numpy(), volume.numpy())


def words_map(prior: MotionPrior, words: list[Word]) -> Tensor:
    """[F, H, W] float64: the mean map of the prior's words that are among `words` (same text and place), each of
    mass 1. Raises SampleError where it has none of them, or no mass for any.
    """
    wanted = {(word.text, word.start) for word in words}
    rows = [row for row, word in enumerate(prior.words) if (word.text, word.start) in wanted]
    maps = torch.where(prior.grid.valid, prior.maps[rows].double(), 0.0)
    sums = maps.sum(dim=(1, 2, 3))
    if not (sums > 0).any():
        raise SampleError(f"its prior has none of the words {', '.join(word.text for word in words)}")
    return (maps[sums > 0] / sums[sums > 0, None, None, None]).mean(dim=0)


# ---- a map against the ground truth --------------------------------------------------------------

def agreement(found: GridMap, truth: GridMap, grid: TokenGrid) -> dict[str, float | list[float]]:
    """All MEASURES of a map, "known" (the share of the grid that it speaks of) and "centre_over_time" ([F]).

    AUC and NSS are NaN where the truth covers every known cell: there is no other place to tell it from. Raises
    SampleError where one of the maps has no mass on the cells that both know.
    """
    both = found.valid & truth.valid
    found, truth = (GridMap(np.where(both, m.mass, 0), np.where(both, m.volume, 0)) for m in (found, truth))
    if not (found.mass.sum() > 0 and truth.mass.sum() > 0):
        raise SampleError("its prior and the ground truth have no cell with mass in common")
    volume, density = found.volume[both], found.density[both]
    p, q = found.mass[both] / found.mass.sum(), truth.mass[both] / truth.mass.sum()
    positive = truth.density[both] >= COVERED
    told = not positive.all()
    centres = centre_errors(found, truth, grid)
    return {
        "auc": auc(torch.from_numpy(density), torch.from_numpy(positive)) if told else float("nan"),
        "nss": nss(density, q, volume) if told else float("nan"),
        "kl": kl_divergence(p, q, volume),
        "centre": float(np.nanmean(centres)),
        "known": float(both.mean()),
        "centre_over_time": centres.tolist(),
    }


def nss(density: np.ndarray, truth: np.ndarray, volume: np.ndarray) -> float:
    """Normalised scanpath saliency: the density in standard deviations over the volume, at the truth's mass (all [C],
    truth's sum 1). 0 is chance, and what a map has that is the same everywhere."""
    weight = volume / volume.sum()
    mean = weight @ density
    deviation = np.sqrt(weight @ (density - mean) ** 2)
    return float(truth @ (density - mean) / deviation) if deviation > 1e-9 else 0.0


def kl_divergence(found: np.ndarray, truth: np.ndarray, volume: np.ndarray) -> float:
    """KL(truth ‖ found) in nats of distributions [C], both mixed with UNIFORM_SHARE of the uniform one."""
    uniform = UNIFORM_SHARE * volume / volume.sum()
    p, q = (uniform + (1 - UNIFORM_SHARE) * mass for mass in (found, truth))
    return float(q @ np.log(q / p))


def centre_errors(found: GridMap, truth: GridMap, grid: TokenGrid) -> np.ndarray:
    """[F] distance of the maps' centres of mass in fractions of the frame; NaN in frames where the truth has no mass.

    In a frame of which the found map knows cells but has no mass on any, its centre is that of the cells it knows.
    """
    y, x = (0.5 * (edges[1:] + edges[:-1]).numpy() for edges in (grid.row_edges, grid.column_edges))
    still = found.mass.sum(axis=(1, 2), keepdims=True) <= 0
    ours, theirs = _centres(np.where(still, found.volume, found.mass), x, y), _centres(truth.mass, x, y)
    return np.hypot(*(ours - theirs))


def _centres(mass: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[2, F]: x and y of each frame's centre of mass, NaN without mass."""
    total = mass.sum(axis=(1, 2))
    total = np.where(total > 0, total, np.nan)
    return np.stack([(mass.sum(axis=1) @ x) / total, (mass.sum(axis=2) @ y) / total])


# ---- two maps, and many clips --------------------------------------------------------------------

def rank_correlation(first: GridMap, second: GridMap) -> float:
    """Spearman's correlation of two maps' densities over the cells that both know; NaN where one is the same there
    everywhere."""
    both = first.valid & second.valid
    a, b = (_ranks(m.density[both]) for m in (first, second))
    a, b = a - a.mean() if len(a) else a, b - b.mean() if len(b) else b
    spread = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread > 0 else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def mean_interval(values: list[float], seed: int = 0) -> dict[str, float | int | None]:
    """Mean of the values that are known, with a 95% percentile bootstrap over clips: {"mean", "low", "high", "n"}; the
    interval is null for fewer than two, the mean for none."""
    known = np.array([value for value in values if np.isfinite(value)])
    if len(known) < 2:
        return {"mean": float(known[0]) if len(known) else None, "low": None, "high": None, "n": len(known)}
    drawn = np.random.default_rng(seed).integers(len(known), size=(DRAWS, len(known)))
    low, high = np.percentile(known[drawn].mean(axis=1), [2.5, 97.5])
    return {"mean": float(known.mean()), "low": float(low), "high": float(high), "n": len(known)}
