"""Motion-sensitive heads: which heads of a video diffusion model follow places over time (MHS).

    metrics = head_metrics(attention, grid, mask, rows)      # [H, R, S] at once, or in chunks of rows:
    taken = HeadAccumulator(grid, mask, rows)
    for chosen, attention in chunks: taken.add(attention, chosen)
    metrics = taken.statistics().metrics()

Source: MotionEnhancer, Motion-sensitive Head Selection (METHOD.md, step 2).
Legend: H heads, S = F·P vision tokens (frame-major: i = f·P + p), F frames, P places of a
frame, R query rows, r rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdm_priors.errors import ModelError
from vdm_priors.grid import TokenGrid
from vdm_priors.masks import BandMask, MotionMask, frame_and_place
from vdm_priors.row_sums import Neighbourhoods, row_sums
from vdm_priors.tokens import keep_top

CHUNK_ELEMENTS = {"cpu": 2**19}  # attention values worked on at once: a CPU is fastest within its cache

__all__ = [
    "BandMask", "HeadAccumulator", "HeadMetrics", "MotionMask", "RowStatistics", "head_metrics", "row_statistics",
    "sample_rows", "select_heads",
]


@dataclass
class HeadMetrics:
    """The paper's three metrics, float64 [H] each."""

    dfc: Tensor
    tcs: Tensor
    dsr: Tensor

    def score(self) -> Tensor:
        """[H]: sum of the three metrics, each standardised over heads (0 where all agree)."""
        return sum(_standardise(metric) for metric in (self.dfc, self.tcs, self.dsr))


@dataclass(frozen=True, eq=False)
class RowStatistics:
    """All that the three metrics need of query rows `rows` [R], a few numbers a row instead of its S.

    mass, inside, outside float64 [H, R]: ΣA, Σ_M A² and Σ_notM A² over the valid keys;
    same_place [H, R, F]: A between the query and its own place in every frame, 0 at invalid keys;
    own_frame: whether D holds the query itself.
    """

    rows: Tensor
    mass: Tensor
    inside: Tensor
    outside: Tensor
    same_place: Tensor
    grid: TokenGrid
    own_frame: bool

    @classmethod
    def of_layers(cls, layers: Sequence[RowStatistics]) -> RowStatistics:
        """The same rows' statistics of several layers' heads, one after the other."""
        first = layers[0]
        parts = {
            name: torch.cat([getattr(layer, name) for layer in layers])
            for name in ("mass", "inside", "outside", "same_place")
        }
        return cls(first.rows, **parts, grid=first.grid, own_frame=first.own_frame)

    def metrics(self, weight: Tensor | None = None) -> HeadMetrics:
        """DFC, TCS and DSR as `head_metrics` defines them; weight [R] counts rows more or less often.

        Raises ModelError naming the head if attention was NaN or infinite.
        """
        broken = ~self.mass.isfinite().all(dim=1)
        if broken.any():
            raise ModelError(
                f"The attention of head {int(broken.nonzero()[0])} holds NaN or infinite values, so that it "
                f"cannot be scored. Run the teacher in float32, or check its weights."
            )
        frame_r, place_r = frame_and_place(self.rows, self.grid)
        valid_sf = self.grid.valid.flatten(1).t().to(self.rows.device)[place_r]  # [R, F]: the keys of same_place
        ones_r = torch.ones(len(self.rows), dtype=torch.float64, device=self.rows.device)
        weight_r = ones_r if weight is None else weight.to(ones_r)

        # sums, not matrix products: a head's numbers must not depend on its place among the heads
        inside_h, outside_h, mass_h = (
            (part * weight_r).sum(dim=1) for part in (self.inside, self.outside, self.mass)
        )
        # attention wholly inside M has the largest contrast, yet a finite one
        floor_h = 1e-12 * (inside_h + outside_h)
        dfc_h = torch.where(inside_h > 0, inside_h / torch.maximum(outside_h, floor_h), 0.0)

        tau_h = mass_h / (weight_r.sum() * int(self.grid.valid.sum()))
        tau_h11 = tau_h.to(self.same_place.dtype)[:, None, None]
        tcs_h = self._run_length((self.same_place > tau_h11) & valid_sf, place_r, weight_r)

        diagonal_rf = valid_sf.clone()
        if not self.own_frame:
            diagonal_rf[torch.arange(len(frame_r), device=frame_r.device), frame_r] = False
        count = (diagonal_rf.sum(dim=1) * weight_r).sum()
        above_h = (((self.same_place >= tau_h11) & diagonal_rf).sum(dim=2) * weight_r).sum(dim=1)
        dsr_h = above_h / count if count > 0 else torch.zeros_like(above_h)
        return HeadMetrics(dfc_h.cpu(), tcs_h.cpu(), dsr_h.cpu())

    def _run_length(self, above_hrf: Tensor, place_r: Tensor, weight_r: Tensor) -> Tensor:
        """TCS [H]: mean over places of the mean length of their rows' runs above τ."""
        starts_hrf = above_hrf.clone()
        starts_hrf[..., 1:] &= ~above_hrf[..., :-1]
        places = self.grid.rows * self.grid.columns
        length_hp, runs_hp = (
            weight_r.new_zeros(len(above_hrf), places).index_add_(1, place_r, marks.sum(dim=2) * weight_r)
            for marks in (above_hrf, starts_hrf)
        )
        mean_hp = torch.where(runs_hp > 0, length_hp / runs_hp.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        # a place counts as much as the most counted of its rows, and not without any
        weight_p = weight_r.new_zeros(places).scatter_reduce_(0, place_r, weight_r, "amax")
        return (mean_hp * weight_p).sum(dim=1) / weight_p.sum()


class HeadAccumulator:
    """RowStatistics of attention that comes a chunk of rows at a time.

    Holds [H, R, F] numbers, never S columns. A row that is added again (of another layer or
    forward) is averaged: its mass and its same-place entries are those of the mean map, so that
    τ, TCS and DSR are exactly the mean map's; its energies are the mean of the maps' energies,
    since those of a mean map would need all of its S columns at once.
    """

    def __init__(self, grid: TokenGrid, mask: MotionMask | BandMask = MotionMask(), rows: Tensor | None = None) -> None:
        """`rows` [R]: the token indices that will be added (None: all). Invalid cells among them are left out."""
        rows = torch.arange(grid.num_tokens) if rows is None else rows.cpu()
        self.grid, self.mask = grid, mask
        self.rows = rows[grid.valid.flatten()[rows]]
        if len(self.rows) == 0:
            raise ValueError("head_metrics: no query row lies on a valid cell of the grid.")
        self._slot = torch.full((grid.num_tokens,), -1)  # of a token index among `rows`
        self._slot[self.rows] = torch.arange(len(self.rows))
        self._times = torch.zeros(len(self.rows), dtype=torch.float64)
        self._sums: Tensor | None = None  # [3, H, R]: mass, inside, outside
        self._same_place: Tensor | None = None
        self._near: Neighbourhoods | None = None

    def add(self, attention: Tensor, rows: Tensor) -> None:
        """Take rows [r] (token indices) of attention [H, r, S]. Raises ValueError for what does not fit."""
        grid = self.grid
        if attention.ndim != 3 or attention.shape[1:] != (len(rows), grid.num_tokens):
            raise ValueError(
                f"head_metrics: attention must be [H, R, S] with R = {len(rows)} query rows and S = "
                f"{grid.num_tokens} cells of the grid {list(grid.shape)}, got {list(attention.shape)}."
            )
        rows = rows.cpu()
        kept = grid.valid.flatten()[rows]
        if not kept.all():
            rows, attention = rows[kept], attention[:, kept.to(attention.device)]
        if len(rows) == 0:
            return
        slot = self._slot[rows]
        if (slot < 0).any():
            raise ValueError(f"HeadAccumulator: rows {rows[slot < 0][:5].tolist()} are none of those it was made for.")
        self._prepare(len(attention), attention.dtype, attention.device)
        self._times.index_add_(0, slot, torch.ones(len(slot), dtype=torch.float64))

        device = attention.device
        slot, rows = slot.to(device), rows.to(device)
        places = grid.rows * grid.columns
        valid_s = None if grid.valid.all() else grid.valid.flatten().to(device)
        inside_rs = self.mask(rows, grid).to(self._same_place.dtype)
        column_rf = (rows % places)[:, None] + torch.arange(grid.frames, device=device) * places
        # b heads at a time bound the temporaries, float64 [b, r, S]
        heads_at_once = max(1, CHUNK_ELEMENTS.get(device.type, 2**25) // inside_rs.numel())
        for first in range(0, len(attention), heads_at_once):
            block = slice(first, first + heads_at_once)
            a_brs = attention[block].to(self._same_place.dtype)
            if valid_s is not None:
                a_brs = torch.where(valid_s, a_brs, 0.0)
            energy_brs = a_brs.square()
            within_brs = energy_brs * inside_rs
            parts = (a_brs, within_brs, energy_brs - within_brs)  # the last is exact: energy or 0
            # made double before, not in, the sum: four times as fast on a CPU
            sums = torch.stack([part.double().sum(dim=2) for part in parts])
            self._sums[:, block].index_add_(2, slot, sums)
            same_brf = a_brs.gather(2, column_rf.expand(len(a_brs), -1, -1))
            self._same_place[block].index_add_(1, slot, same_brf)

    def reads_queries(self, device: torch.device) -> bool:
        """Whether `add_queries` is to be used: M holds a small part of the keys of each row."""
        if self._near is None:
            self._near = Neighbourhoods.of(self.mask, self.grid, self.rows.to(device))
        return self._near.narrow

    def add_queries(
        self, q_hsd: Tensor, shown_hsd: Sequence[Tensor], lse_hs: Tensor, scale: float,
        rest_hnd: Tensor | None = None, rest_bias_n: Tensor | None = None,
    ) -> None:
        """Take all rows at once, by what they follow from (see `row_sums`); None of their columns exist."""
        sums, same_place = row_sums(q_hsd, shown_hsd, lse_hs, scale, self._near, rest_hnd, rest_bias_n)
        self._prepare(len(q_hsd), same_place.dtype, q_hsd.device)
        self._times += 1
        self._sums += sums
        self._same_place += same_place

    def statistics(self) -> RowStatistics:
        """Of the rows that were added. Raises ValueError if none was."""
        seen = self._times > 0
        if self._sums is None or not seen.any():
            raise ValueError("head_metrics: no query row lies on a valid cell of the grid.")
        device = self._sums.device
        times = self._times[seen].to(device)
        mass, inside, outside = self._sums[..., seen.to(device)] / times
        same_place = self._same_place[:, seen.to(device)] / times.to(self._same_place.dtype)[:, None]
        return RowStatistics(
            self.rows[seen].to(device), mass, inside, outside, same_place, self.grid, self.mask.own_frame
        )

    def _prepare(self, heads: int, dtype: torch.dtype, device: torch.device) -> None:
        if self._sums is None:
            dtype = torch.promote_types(dtype, torch.float32)  # half types hold no small energies
            self._sums = torch.zeros(3, heads, len(self.rows), dtype=torch.float64, device=device)
            self._same_place = torch.zeros(heads, len(self.rows), self.grid.frames, dtype=dtype, device=device)
        elif heads != len(self._same_place):
            raise ValueError(f"HeadAccumulator: {len(self._same_place)} heads were added before, now {heads}.")


def head_metrics(
    attention: Tensor,
    grid: TokenGrid,
    mask: MotionMask | BandMask = MotionMask(),
    rows: Tensor | None = None,
) -> HeadMetrics:
    """DFC, TCS and DSR of vision-to-vision attention [H, R, S], one each per head.

    `rows` [R] are the query rows' token indices; None means all S. Over the valid cells:
    DFC = Σ_M A² / Σ_notM A²;
    TCS: in the row that query (f, p) has of A_p [F, F] (place p in every frame), the runs of
    consecutive A > τ, τ = mean(A); the mean length of a place's runs (0 without any), averaged
    over the places that have rows;
    DSR = #{D: A ≥ τ} / |D|, D the query's own place in the mask's frames.
    Sampled rows estimate the three from the rows at hand. An empty M or D gives 0.
    Raises ValueError if the shapes do not fit, ModelError for NaN or infinite attention.
    """
    return row_statistics(attention, grid, mask, rows).metrics()


def row_statistics(
    attention: Tensor,
    grid: TokenGrid,
    mask: MotionMask | BandMask = MotionMask(),
    rows: Tensor | None = None,
) -> RowStatistics:
    """The statistics of attention [H, R, S] that is there at once; see `head_metrics`."""
    rows = torch.arange(grid.num_tokens) if rows is None else rows
    taken = HeadAccumulator(grid, mask, rows)
    taken.add(attention, rows)
    return taken.statistics()


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


def _standardise(metric: Tensor) -> Tensor:
    """(x − mean)/std over heads; 0 where they differ by rounding only."""
    deviation = metric - metric.mean()
    std = metric.std(correction=0)
    if std <= 1e-9 * metric.abs().max():
        return torch.zeros_like(metric)
    return deviation / std
