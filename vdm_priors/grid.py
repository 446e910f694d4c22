"""TokenGrid: where cells lie in time and in the frame; `regrid` joins any two grids.

Latent tokens, codec blocks, visual tokens of a VLM and pixels are all cells with a span of
seconds and a box in the normalised source frame. A grid is the product of F spans, H row
intervals and W column intervals; tokens are ordered frame by frame, then row by row.

Legend: F frames, H rows, W columns of cells; a dash (F', H', W') marks the target grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WHOLE_FRAME = (0.0, 0.0, 1.0, 1.0)  # top, left, bottom, right
SHORTEST_SPAN = 1e-3  # seconds a lone frame of unknown duration lasts
REGRID_MODES = ("overlap", "trilinear")


@dataclass(frozen=True, eq=False)
class TokenGrid:
    """A product grid of F×H×W cells.

    spans [F, 2] seconds (start, end); row_edges [H+1] and column_edges [W+1] in the normalised
    source frame, whose inside is 0..1 (cells beyond it are padding); valid [F, H, W] is False
    where a cell holds no evidence. Raises ValueError if the shapes or the order do not fit.
    """

    spans: Tensor
    row_edges: Tensor
    column_edges: Tensor
    valid: Tensor

    def __post_init__(self) -> None:
        for name in ("spans", "row_edges", "column_edges"):
            value = torch.as_tensor(getattr(self, name), dtype=torch.float64).detach().cpu()
            if not value.isfinite().all():
                raise ValueError(f"TokenGrid: {name} must be finite, got {value.tolist()}.")
            object.__setattr__(self, name, value)
        valid = torch.as_tensor(self.valid, dtype=torch.bool).detach().cpu()
        object.__setattr__(self, "valid", valid)
        if self.spans.ndim != 2 or self.spans.shape[1] != 2 or len(self.spans) == 0:
            raise ValueError(f"TokenGrid: spans must be [F, 2], got {list(self.spans.shape)}.")
        if not (self.spans[:, 1] > self.spans[:, 0]).all():
            raise ValueError(
                f"TokenGrid: every span must end after its start, got {self.spans.tolist()}."
            )
        for name in ("row_edges", "column_edges"):
            edges = getattr(self, name)
            if edges.ndim != 1 or len(edges) < 2 or not (edges.diff() > 0).all():
                raise ValueError(
                    f"TokenGrid: {name} must be two or more rising numbers, got {edges.tolist()}."
                )
        if tuple(valid.shape) != self.shape:
            raise ValueError(
                f"TokenGrid: valid must be [F, H, W] = {list(self.shape)} like the spans and "
                f"edges, got {list(valid.shape)}."
            )

    @classmethod
    def regular(
        cls,
        spans: Tensor | Sequence[Sequence[float]],
        rows: int,
        columns: int,
        box: Sequence[float] = WHOLE_FRAME,
        valid: Tensor | None = None,
    ) -> TokenGrid:
        """Cells of equal size that fill `box` (top, left, bottom, right); all valid by default."""
        spans = torch.as_tensor(spans, dtype=torch.float64)
        top, left, bottom, right = (float(side) for side in box)
        if valid is None:
            valid = torch.ones(len(spans), rows, columns, dtype=torch.bool)
        return cls(
            spans,
            torch.linspace(top, bottom, rows + 1, dtype=torch.float64),
            torch.linspace(left, right, columns + 1, dtype=torch.float64),
            valid,
        )

    @property
    def frames(self) -> int:
        return len(self.spans)

    @property
    def rows(self) -> int:
        return len(self.row_edges) - 1

    @property
    def columns(self) -> int:
        return len(self.column_edges) - 1

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.frames, self.rows, self.columns

    @property
    def num_tokens(self) -> int:
        return self.frames * self.rows * self.columns

    @property
    def volumes(self) -> Tensor:
        """[F, H, W] float64: seconds × share of the frame that each cell spans."""
        spans, heights, widths = self.spans.diff(dim=1)[:, 0], self.row_edges.diff(), self.column_edges.diff()
        return spans[:, None, None] * heights[:, None] * widths

    def cell(self, index: int) -> tuple[tuple[float, float], tuple[float, float, float, float]]:
        """Span (start, end) in seconds and box (top, left, bottom, right) of token `index`."""
        if not 0 <= index < self.num_tokens:
            raise IndexError(f"TokenGrid: token {index} of a grid of {self.num_tokens} tokens.")
        frame, place = divmod(index, self.rows * self.columns)
        row, column = divmod(place, self.columns)
        start, end = self.spans[frame].tolist()
        top, bottom = self.row_edges[row : row + 2].tolist()
        left, right = self.column_edges[column : column + 2].tolist()
        return (start, end), (top, left, bottom, right)

    def to_dict(self) -> dict[str, Any]:
        """The grid in JSON types, exactly; `valid` is null where every cell is valid."""
        return {
            "spans": self.spans.tolist(),
            "row_edges": self.row_edges.tolist(),
            "column_edges": self.column_edges.tolist(),
            "valid": None if self.valid.all() else self.valid.int().tolist(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TokenGrid:
        """The grid that `to_dict` described."""
        spans = torch.tensor(data["spans"], dtype=torch.float64)
        rows, columns = data["row_edges"], data["column_edges"]
        valid = data["valid"]
        if valid is None:
            valid = torch.ones(len(spans), len(rows) - 1, len(columns) - 1)
        return cls(
            spans,
            torch.tensor(rows, dtype=torch.float64),
            torch.tensor(columns, dtype=torch.float64),
            torch.as_tensor(valid, dtype=torch.bool),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenGrid):
            return NotImplemented
        return all(
            torch.equal(getattr(self, name), getattr(other, name))
            for name in ("spans", "row_edges", "column_edges", "valid")
        )


def frame_spans(times: Sequence[float], duration: float | None = None) -> Tensor:
    """Span of time [N, 2] in seconds that each sampled frame stands for.

    A frame stands for the moments nearer to it than to another frame. The first reaches half a
    gap back (not before 0), the last half a gap on; where the clip's `duration` is known, the
    last reaches up to a whole gap on, as it is shown until the next would be, but not beyond
    the end. Frames of the same time share their span in equal parts. A single frame gets
    [t, t + duration], or a millisecond. Raises ValueError for no or falling times.
    """
    instants = torch.as_tensor(times, dtype=torch.float64)
    if instants.ndim != 1 or len(instants) == 0 or not instants.isfinite().all():
        raise ValueError(f"frame_spans: times must be one or more finite seconds, got {times}.")
    if not (instants.diff() >= 0).all():
        raise ValueError(f"frame_spans: times must not fall, got {instants.tolist()}.")
    distinct, counts = instants.unique_consecutive(return_counts=True)
    if len(distinct) == 1:
        start = float(distinct[0])
        edges = torch.tensor([start, start + (duration or SHORTEST_SPAN)], dtype=torch.float64)
    else:
        gaps = distinct.diff()
        first = distinct[0] - gaps[0] / 2
        if distinct[0] >= 0:
            first = first.clamp(min=0.0)
        last = distinct[-1] + gaps[-1] / 2
        if duration is not None and duration > distinct[-1]:
            last = (distinct[-1] + gaps[-1]).clamp(max=duration)
        edges = torch.cat([first[None], distinct[:-1] + gaps / 2, last[None]])
    spans = []
    for start, end, count in zip(edges[:-1], edges[1:], counts.tolist(), strict=True):
        parts = torch.lerp(start, end, torch.linspace(0, 1, count + 1, dtype=torch.float64))
        spans.append(torch.stack([parts[:-1], parts[1:]], dim=1))
    return torch.cat(spans)


def merge_spans(spans: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Spans [G, 2] from the first start to the last end of each group of frames.

    A causal VAE's latents: [[0], [1, 2, 3, 4], …]; temporal patches: [[0, 1], [2, 3], …].
    """
    if any(len(group) == 0 for group in groups):
        raise ValueError(f"merge_spans: every group needs a frame, got {groups}.")
    merged = [[spans[list(g), 0].min(), spans[list(g), 1].max()] for g in groups]
    return torch.tensor(merged, dtype=torch.float64).reshape(-1, 2)


def regrid(values: Tensor, source: TokenGrid, target: TokenGrid, mode: str = "overlap") -> Tensor:
    """Carry values [..., F, H, W] on `source` to `target`: [..., F', H', W'], differentiable.

    "overlap": values are mass; a target cell gets of every source cell the share that lies in
    it, mass · |s ∩ t| / |s|, so that all mass inside the target's valid cells is kept.
    "trilinear": values are samples at the cells' centres, interpolated in seconds and frame
    coordinates over the valid cells, constant beyond the outermost centres.
    Invalid source cells contribute nothing; invalid target cells are 0. Keeps the dtype.
    Raises ValueError for a wrong shape or mode.
    """
    if tuple(values.shape[-3:]) != source.shape:
        raise ValueError(
            f"regrid: values [..., F, H, W] of shape {list(values.shape)} do not lie on the source "
            f"grid of {list(source.shape)} cells."
        )
    if mode not in REGRID_MODES:
        raise ValueError(f"regrid: mode is one of {', '.join(REGRID_MODES)}, not {mode!r}.")
    # half types hold neither small masses nor their sums
    dtype = torch.promote_types(values.dtype, torch.float32)
    weigh = _overlap_weights if mode == "overlap" else _linear_weights
    matrices = [
        weigh(ours, theirs).to(values.device, dtype)
        for ours, theirs in zip(_intervals(source), _intervals(target), strict=True)
    ]
    valid = source.valid.to(values.device)
    # where, not a product: an invalid cell may hold NaN
    result = _apply(torch.where(valid, values.to(dtype), 0.0), matrices)
    if mode == "trilinear" and not source.valid.all():
        reached = _apply(valid.to(dtype), matrices)
        result = torch.where(reached > 0, result / reached.clamp(min=1e-12), 0.0)
    return torch.where(target.valid.to(values.device), result, 0.0).to(values.dtype)


def covered_share(source: TokenGrid, target: TokenGrid) -> Tensor:
    """[F', H', W'] float64 in 0..1: how much of every target cell valid source cells cover."""
    valid = torch.ones(target.shape, dtype=torch.bool)
    everywhere = TokenGrid(target.spans, target.row_edges, target.column_edges, valid)
    return regrid(source.volumes, source, everywhere) / target.volumes


def _intervals(grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Intervals [n, 2] of the three axes: time, rows, columns."""
    rows = torch.stack([grid.row_edges[:-1], grid.row_edges[1:]], dim=1)
    columns = torch.stack([grid.column_edges[:-1], grid.column_edges[1:]], dim=1)
    return grid.spans, rows, columns


def _overlap_weights(source: Tensor, target: Tensor) -> Tensor:
    """[n', n]: the share of each source interval that lies in each target interval."""
    start = torch.maximum(target[:, None, 0], source[None, :, 0])
    end = torch.minimum(target[:, None, 1], source[None, :, 1])
    return (end - start).clamp(min=0.0) / (source[:, 1] - source[:, 0])


def _linear_weights(source: Tensor, target: Tensor) -> Tensor:
    """[n', n]: linear interpolation from source centres at target centres, clamped at the ends."""
    centres, order = source.mean(dim=1).sort()
    wanted = target.mean(dim=1)
    weights = torch.zeros(len(target), len(source), dtype=torch.float64)
    index = torch.arange(len(target))
    above = torch.searchsorted(centres, wanted).clamp(max=len(centres) - 1)
    below = (above - 1).clamp(min=0)
    gap = (centres[above] - centres[below]).clamp(min=1e-12)
    share = ((wanted - centres[below]) / gap).clamp(0.0, 1.0)
    weights[index, order[below]] += 1 - share
    weights[index, order[above]] += share
    return weights


def _apply(values: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """The three axes' matrices [n', n] in turn on values [..., F, H, W]."""
    time, rows, columns = matrices
    values = torch.einsum("...fhw,tf->...thw", values, time)
    values = torch.einsum("...fhw,rh->...frw", values, rows)
    return torch.einsum("...fhw,cw->...fhc", values, columns)
