"""Motion-sensitive heads: which heads of a video diffusion model follow places over time (MHS).

Source: MotionEnhancer, Motion-sensitive Head Selection (METHOD.md, step 2).
Legend: H heads, S = F·P vision tokens (frame-major: i = f·P + p), F frames, P places of a
frame, R query rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vdm_priors.errors import ModelError
from vdm_priors.grid import TokenGrid
from vdm_priors.tokens import keep_top


@dataclass(frozen=True)
class MotionMask:
    """The motion mask M: the same place in other frames.

    radius: how far, in rows and in columns (Chebyshev, no wrap-around at a row's end), a key may
    lie from the query's place; own_frame: whether keys of the query's own frame belong to it.
    The diagonal region D is M of radius 0: exactly the same place.
    """

    radius: int = 1
    own_frame: bool = True

    def __post_init__(self) -> None:
        if self.radius < 0:
            raise ValueError(f"MotionMask: radius must not be negative, got {self.radius}.")

    def __call__(self, query_index: Tensor, grid: TokenGrid) -> Tensor:
        """Bool [R, S]: whether each key belongs to the mask of each query (token indices [R]).

        Invalid cells belong to no mask, as queries or as keys.
        """
        frame_r, place_r = _frame_and_place(query_index, grid)
        row_r, column_r = place_r // grid.columns, place_r % grid.columns
        row_p, column_p = torch.meshgrid(
            torch.arange(grid.rows, device=query_index.device),
            torch.arange(grid.columns, device=query_index.device),
            indexing="ij",
        )
        near_rp = ((row_r[:, None] - row_p.flatten()).abs() <= self.radius) & (
            (column_r[:, None] - column_p.flatten()).abs() <= self.radius
        )
        # places repeat in every frame: [R, P] comparisons suffice, never [R, S] distances
        mask_rfp = near_rp[:, None, :].expand(-1, grid.frames, -1)
        if not self.own_frame:
            frames = torch.arange(grid.frames, device=query_index.device)
            mask_rfp = mask_rfp & (frame_r[:, None] != frames)[:, :, None]
        valid_s = grid.valid.flatten().to(query_index.device)
        return mask_rfp.flatten(1) & valid_s & valid_s[query_index][:, None]

    def diagonal(self) -> MotionMask:
        """The region D of this mask."""
        return MotionMask(radius=0, own_frame=self.own_frame)


@dataclass
class HeadMetrics:
    """The paper's three metrics, float64 [H] each."""

    dfc: Tensor
    tcs: Tensor
    dsr: Tensor

    def score(self) -> Tensor:
        """[H]: sum of the three metrics, each standardised over heads (0 where all agree)."""
        return sum(_standardise(metric) for metric in (self.dfc, self.tcs, self.dsr))


def head_metrics(
    attention: Tensor,
    grid: TokenGrid,
    mask: MotionMask = MotionMask(),
    rows: Tensor | None = None,
) -> HeadMetrics:
    """DFC, TCS and DSR of vision-to-vision attention [H, R, S], one each per head.

    `rows` [R] are the query rows' token indices; None means all S. Over the valid cells:
    DFC = Σ_M A² / Σ_notM A²;
    TCS: in the row that query (f, p) has of A_p [F, F] (place p in every frame), the runs of
    consecutive A > τ, τ = mean(A); the mean length of a place's runs (0 without any), averaged
    over the places that have rows;
    DSR = #{D: A ≥ τ} / |D|.
    Sampled rows estimate the three from the rows at hand. An empty M or D gives 0.
    Raises ValueError if the shapes do not fit, ModelError for NaN or infinite attention.
    """
    if rows is None:
        rows = torch.arange(grid.num_tokens)
    rows = rows.to(attention.device)
    if attention.ndim != 3 or attention.shape[1:] != (len(rows), grid.num_tokens):
        raise ValueError(
            f"head_metrics: attention must be [H, R, S] with R = {len(rows)} query rows and S = "
            f"{grid.num_tokens} cells of the grid {list(grid.shape)}, got {list(attention.shape)}."
        )
    valid_s = grid.valid.flatten().to(attention.device)
    kept = valid_s[rows]
    if not kept.any():
        raise ValueError("head_metrics: no query row lies on a valid cell of the grid.")
    if not kept.all():
        rows, attention = rows[kept], attention[:, kept]
    inside_rs = mask(rows, grid)
    diagonal_rs = mask.diagonal()(rows, grid)
    # one head at a time bounds memory to a few [R, S]
    per_head = [
        _metrics_of_head(head, a_rs, grid, rows, valid_s, inside_rs, diagonal_rs)
        for head, a_rs in enumerate(attention)
    ]
    dfc, tcs, dsr = torch.tensor(per_head, dtype=torch.float64).unbind(dim=1)
    return HeadMetrics(dfc, tcs, dsr)


def select_heads(metrics: HeadMetrics, ratio: float = 0.5) -> Tensor:
    """Bool [H]: the ⌈ratio · H⌉ heads of the highest score, ties by index."""
    return keep_top(metrics.score(), ratio)


def sample_rows(grid: TokenGrid, rows: int | str, seed: int) -> Tensor:
    """Sorted token indices of `rows` valid cells ("all": every one), spread evenly over frames.

    Every frame gives the same number (±1), or all of its valid cells where it has fewer. The
    same seed gives the same rows.
    """
    if rows != "all" and (isinstance(rows, (str, bool)) or rows < 1):
        raise ValueError(f"sample_rows: rows must be a positive number or 'all', got {rows!r}.")
    valid_fp = grid.valid.flatten(1)
    if rows == "all" or rows >= int(valid_fp.sum()):
        return valid_fp.flatten().nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    lots = torch.rand(valid_fp.shape, generator=generator, dtype=torch.float64)
    # each frame draws an order of its valid cells; all first draws precede all second ones
    rank = torch.where(valid_fp, lots, 2.0).argsort(dim=1).argsort(dim=1)
    tie = torch.randperm(grid.frames, generator=generator)[:, None]
    order = (rank * grid.frames + tie).masked_fill(~valid_fp, torch.iinfo(torch.int64).max)
    return order.flatten().argsort()[:rows].sort().values


def _metrics_of_head(
    head: int,
    a_rs: Tensor,
    grid: TokenGrid,
    rows: Tensor,
    valid_s: Tensor,
    inside_rs: Tensor,
    diagonal_rs: Tensor,
) -> tuple[float, float, float]:
    """(DFC, TCS, DSR) of one head; all of `rows` are valid."""
    a_rs = torch.where(valid_s, a_rs.float() if a_rs.dtype.itemsize < 4 else a_rs, 0.0)
    tau = float(a_rs.sum(dtype=torch.float64)) / (len(rows) * int(valid_s.sum()))
    if not abs(tau) < float("inf"):
        raise ModelError(
            f"The attention of head {head} holds NaN or infinite values, so that it cannot be "
            f"scored. Run the teacher in float32, or check its weights."
        )
    energy_rs = a_rs.square()
    inside = float((energy_rs * inside_rs).sum(dtype=torch.float64))
    outside = float((energy_rs * ~inside_rs).sum(dtype=torch.float64))
    # attention wholly inside M has the largest contrast, yet a finite one
    floor = 1e-12 * (inside + outside)
    dfc = inside / max(outside, floor) if inside > 0 else 0.0

    tcs = _run_length(a_rs, grid, rows, valid_s, tau)
    dsr = float(a_rs[diagonal_rs].ge(tau).double().mean()) if diagonal_rs.any() else 0.0
    return dfc, tcs, dsr


def _run_length(a_rs: Tensor, grid: TokenGrid, rows: Tensor, valid_s: Tensor, tau: float) -> float:
    """TCS of one head: mean over places of the mean length of their rows' runs above τ."""
    _, place_r = _frame_and_place(rows, grid)
    places = grid.rows * grid.columns
    column_rf = place_r[:, None] + torch.arange(grid.frames, device=rows.device) * places
    above_rf = (a_rs.gather(1, column_rf) > tau) & valid_s[column_rf]
    starts_rf = above_rf.clone()
    starts_rf[:, 1:] &= ~above_rf[:, :-1]
    length_p, runs_p, rows_p = (
        torch.zeros(places, dtype=torch.float64, device=rows.device).index_add_(0, place_r, count)
        for count in (
            above_rf.sum(dim=1).double(),
            starts_rf.sum(dim=1).double(),
            torch.ones(len(rows), dtype=torch.float64, device=rows.device),
        )
    )
    mean_p = length_p / runs_p.clamp(min=1.0)
    return float(mean_p[rows_p > 0].mean())


def _frame_and_place(index: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
    places = grid.rows * grid.columns
    return index // places, index % places


def _standardise(metric: Tensor) -> Tensor:
    """(x − mean)/std over heads; 0 where they differ by rounding only."""
    deviation = metric - metric.mean()
    std = metric.std(correction=0)
    if std <= 1e-9 * metric.abs().max():
        return torch.zeros_like(metric)
    return deviation / std
