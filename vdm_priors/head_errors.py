"""How far the heads' metrics would move had other query rows been drawn.

Rows are a sample, stratified over frames and drawn without replacement (`sample_rows`). Its errors are
estimated from the sample itself by the stratified delete-a-group jackknife (Kott 2001, "The delete-a-group
jackknife", J. Official Statistics 17): each frame's rows fall at random into G groups, the metrics are taken
again without one group at a time, and variance = (G−1)/G Σ_g (θ_g − θ)².

Legend: H heads, R query rows, G groups, F frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vdm_priors.heads import HeadMetrics, RowStatistics
from vdm_priors.tokens import keep_top

GROUPS = 20  # an error estimated from G groups is itself good to about 1/√(2(G−1)), here 16%
DRAWS = 200  # for the expected number of exchanged heads


@dataclass
class SamplingErrors:
    """Standard errors, float64 [H] each, of the three metrics and of the score that sums them.

    exchanged: how many of the selected heads another draw of as many rows is expected to exchange.
    """

    dfc: Tensor
    tcs: Tensor
    dsr: Tensor
    score: Tensor
    exchanged: float


def sampling_errors(statistics: RowStatistics, ratio: float = 0.5, groups: int = GROUPS) -> SamplingErrors | None:
    """Errors of metrics from sampled rows, and of the selection of the ⌈ratio·H⌉ best heads.

    0 everywhere if the rows are all valid cells; None if they are too few to tell (a frame that has
    one sampled row but more valid cells). The same rows give the same errors.
    """
    drawn_f, cells_f = _rows_of_frames(statistics)
    partial_f = (drawn_f > 0) & (drawn_f < cells_f)
    if not partial_f.any():
        none = torch.zeros(len(statistics.mass), dtype=torch.float64)
        return SamplingErrors(none, none, none, none, exchanged=0.0)
    # rows drawn without replacement leave this share of the variance (finite population correction)
    left = 1 - float(drawn_f[partial_f].sum() / cells_f[partial_f].sum())
    groups = min(groups, int(drawn_f[partial_f].min()))
    if groups < 2:
        return None
    full = statistics.metrics()
    replicates = [statistics.metrics(weight) for weight in _replicate_weights(statistics, partial_f, groups)]
    factor = (left * (groups - 1) / groups) ** 0.5

    def deviations(of: str) -> Tensor:
        """[G, H], whose squares sum to the variance."""
        values = [(m.score() if of == "score" else getattr(m, of)) for m in (full, *replicates)]
        return factor * (torch.stack(values)[1:] - values[0])

    errors = {name: deviations(name).square().sum(dim=0).sqrt() for name in ("dfc", "tcs", "dsr", "score")}
    return SamplingErrors(**errors, exchanged=_exchanged(full, deviations("score"), ratio))


def _rows_of_frames(statistics: RowStatistics) -> tuple[Tensor, Tensor]:
    """[F] sampled rows and [F] valid cells of each frame."""
    grid = statistics.grid
    frame_r = statistics.rows.cpu() // (grid.rows * grid.columns)
    return torch.bincount(frame_r, minlength=grid.frames), grid.valid.flatten(1).sum(dim=1)


def _replicate_weights(statistics: RowStatistics, partial_f: Tensor, groups: int) -> Tensor:
    """[G, R]: how much each row counts where a group is left out: its share goes to the rest of its frame.

    The rows of frames that are not sampled but whole are in no group.
    """
    grid, rows = statistics.grid, statistics.rows.cpu()
    frame_r = rows // (grid.rows * grid.columns)
    generator = torch.Generator().manual_seed(0)
    weights_gr = torch.ones(groups, len(rows), dtype=torch.float64)
    dealt = 0
    for frame in partial_f.nonzero().flatten().tolist():
        own = (frame_r == frame).nonzero().flatten()
        # at random: dealt out in order, neighbours would part and make the groups more alike than draws are
        own = own[torch.randperm(len(own), generator=generator)]
        group = (dealt + torch.arange(len(own))) % groups
        dealt += len(own)
        kept_g = len(own) - torch.bincount(group, minlength=groups)
        weights_gr[:, own] = (len(own) / kept_g.double())[:, None]
        weights_gr[group, own] = 0.0
    return weights_gr


def _exchanged(full: HeadMetrics, deviations_gh: Tensor, ratio: float) -> float:
    """Mean number of selected heads that leave, over scores of other draws, which vary as the jackknife says.

    The scores at hand differ by sampling too, and so by more than the true ones. What another draw gives is
    therefore expected at k·score (James-Stein shrinkage, k the share of the scores' variance over heads that
    sampling does not explain), with variance (1 + k) times that of one draw.
    """
    score = full.score()
    explained = float(deviations_gh.square().sum(dim=0).mean() / score.square().mean().clamp(min=1e-12))
    k = max(0.0, 1 - explained)
    selected = keep_top(score, ratio)
    generator = torch.Generator().manual_seed(0)
    noise_dg = torch.randn(DRAWS, len(deviations_gh), generator=generator, dtype=torch.float64)
    draws_dh = k * score + (1 + k) ** 0.5 * noise_dg @ deviations_gh
    return sum(int((selected & ~keep_top(drawn, ratio)).sum()) for drawn in draws_dh) / DRAWS
