"""Blocks: the decoder's vector records as columns, and their place on a regular grid of 8 × 8 pixel cells.

FFmpeg exports blocks of 16×16, 16×8, 8×16 and 8×8 pixels, so cells of 8 lose nothing. A block's displacement is that of
the source against the block, in pixels: src = block + motion. What it means as motion of the scene needs the
reference's distance (references.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from enhancer.video.codec.vectors import DecodedFrame

CELL = 8  # pixels
FIRST, SECOND = 0, 1  # reference lists: mostly of the past, mostly of the future
FARTHEST = 2048.0  # pixels; longer vectors are beyond every level's limit and come from damage


@dataclass
class Blocks:
    """B blocks of one frame. column, row [B]: of the top left cell; wide, high [B]: in cells; list [B]: FIRST or
    SECOND;
    motion [B, 2] float32: source minus block (x, y) in pixels."""

    column: np.ndarray
    row: np.ndarray
    wide: np.ndarray
    high: np.ndarray
    list: np.ndarray
    motion: np.ndarray

    def __len__(self) -> int:
        return len(self.column)

    @property
    def corner(self) -> np.ndarray:
        """[B, 2] top left pixel (x, y)."""
        return CELL * np.stack([self.column, self.row], axis=1)

    def at_cells(self, list_: int, shape: tuple[int, int]) -> np.ndarray:
        """[R, C] number of the block of that list at each cell, −1 where there is none."""
        found = np.full((shape[0] + 1, shape[1] + 1), -1, np.int32)  # a block may reach over the edge by a cell
        of_list = self.list == list_
        for high, wide in ((h, w) for h in (1, 2) for w in (1, 2)):
            which = np.flatnonzero(of_list & (self.high == high) & (self.wide == wide))
            row, column = self.row[which], self.column[which]
            for down in range(high):
                for right in range(wide):
                    found[row + down, column + right] = which
        return found[: shape[0], : shape[1]]


def blocks_of(frame: DecodedFrame) -> Blocks:
    """The frame's records that can be vectors of its picture; none for an I-frame."""
    records = frame.vectors
    if records is None or not len(records):
        return Blocks(*np.zeros((5, 0), np.int32), np.zeros((0, 2), np.float32))
    wide, high = records["w"].astype(np.int32), records["h"].astype(np.int32)
    left, top = records["dst_x"] - wide // 2, records["dst_y"] - high // 2  # dst is the block's centre
    scale = np.maximum(records["motion_scale"], 1).astype(np.float32)
    motion = np.stack([records["motion_x"] / scale, records["motion_y"] / scale], axis=1).astype(np.float32)
    sound = (
        (left >= 0)
        & (top >= 0)
        & (left < frame.width)
        & (top < frame.height)
        & (wide >= CELL)
        & (high >= CELL)
        & (np.abs(motion) < FARTHEST).all(axis=1)
    )
    pick = np.flatnonzero(sound)
    return Blocks(
        left[pick] // CELL,
        top[pick] // CELL,
        np.minimum(wide[pick] // CELL, 2),
        np.minimum(high[pick] // CELL, 2),
        np.where(records["source"][pick] < 0, FIRST, SECOND),
        motion[pick],
    )


def grid_shape(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of cells that cover a frame."""
    return -(-height // CELL), -(-width // CELL)
