"""Motion masks: which keys show a query's place at other moments, as predicates on (query rows, key cells).

`mask(query_index, grid)` compares the given queries [R] with all S cells; nothing of S×S exists unless all
rows are asked for at once.

Legend: R query rows, S = F·P vision tokens (frame-major: i = f·P + p), F frames, P places of a frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vdm_priors.grid import TokenGrid

MASKS = ("place", "band")
BAND_UNITS = ("frames", "places")
BAND_ORDERS = ("frame", "place")


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
        _, place_r = frame_and_place(query_index, grid)
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
        return _among_valid(near_rp[:, None, :].expand(-1, grid.frames, -1), query_index, grid, self.own_frame)


@dataclass(frozen=True)
class BandMask:
    """SparseVideoGen's temporal band (arXiv 2502.01776): keys whose place in *raster order* is near the query's.

    order "frame": |p_q − p_k| < w in every pair of frames, an F×F grid of P×P blocks with a band each
    (attention-gym's closed form). order "place": the band in SparseVideoGen's own temporal layout j = p·F + f,
    |j_q − j_k| < w·F, which is the same but for edges that slant with f.
    unit "frames": w = width·P/F, as there, where a band is `width` frames' tokens wide (rounded down to whole
    places in order "frame"); unit "places": w = width. w is at least 1, and so M never lacks the query's own place.
    Raster distance runs on at row ends, so the band is no neighbourhood in the picture: MotionMask is. The
    attention sink and the blocks of 128 tokens, which serve SparseVideoGen's kernels, are left out.
    """

    width: float = 2.0
    unit: str = "frames"
    order: str = "frame"
    own_frame: bool = True

    def __post_init__(self) -> None:
        if not self.width > 0:
            raise ValueError(f"BandMask: width must be positive, got {self.width}.")
        for name, known in (("unit", BAND_UNITS), ("order", BAND_ORDERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"BandMask: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")

    def __call__(self, query_index: Tensor, grid: TokenGrid) -> Tensor:
        """Bool [R, S]: see MotionMask."""
        places = grid.rows * grid.columns
        width = self.width * places / grid.frames if self.unit == "frames" else self.width
        frame_r, place_r = frame_and_place(query_index, grid)
        apart_rp = place_r[:, None] - torch.arange(places, device=query_index.device)
        if self.order == "frame":
            whole = int(width) if self.unit == "frames" else width
            near_rfp = (apart_rp.abs() < max(whole, 1))[:, None, :].expand(-1, grid.frames, -1)
        else:
            frames_rf = frame_r[:, None] - torch.arange(grid.frames, device=query_index.device)
            apart_rfp = apart_rp[:, None, :] * grid.frames + frames_rf[:, :, None]
            near_rfp = apart_rfp.abs() < max(width, 1) * grid.frames
        return _among_valid(near_rfp, query_index, grid, self.own_frame)


def frame_and_place(index: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
    """Frame and place (raster order within the frame) of token indices."""
    places = grid.rows * grid.columns
    return index // places, index % places


def _among_valid(near_rfp: Tensor, query_index: Tensor, grid: TokenGrid, own_frame: bool) -> Tensor:
    """[R, S]: `near` without invalid cells and, where asked, without the queries' own frames."""
    if not own_frame:
        frame_r, _ = frame_and_place(query_index, grid)
        frames = torch.arange(grid.frames, device=query_index.device)
        near_rfp = near_rfp & (frame_r[:, None] != frames)[:, :, None]
    valid_s = grid.valid.flatten().to(query_index.device)
    return near_rfp.flatten(1) & valid_s & valid_s[query_index][:, None]
