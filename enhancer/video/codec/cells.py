"""From a frame's blocks and their references' distances to one motion a cell.

A block's vector to a reference d frames away (d negative in the past) says that its content moves by motion / d a frame.
Where both lists have a vector, the two are averaged by confidence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from enhancer.video.codec.blocks import CELL, FIRST, SECOND, Blocks, grid_shape
from enhancer.video.codec.field import Origin, Validity
from enhancer.video.codec.references import Resolved
from enhancer.video.codec.vectors import DecodedFrame

LEAST_WEIGHT = 1e-3  # of a vector whose reference is a guess, beside a better one


@dataclass
class Cells:
    """One frame's part of a MotionField, with the same names, units and shapes without T."""

    displacement: np.ndarray
    velocity: np.ndarray
    validity: np.ndarray
    reference: np.ndarray
    confidence: np.ndarray


@dataclass
class FrameMotion:
    """One decoded frame with its cells; rank: its place in the order of presentation. Its vectors are dropped by then."""

    frame: DecodedFrame
    rank: int
    cells: Cells
    origin: Origin


def empty_cells(shape: tuple[int, int], validity: Validity) -> Cells:
    """[R, C] cells that all have the same reason for having no motion."""
    return Cells(np.full((*shape, 2), np.nan, np.float32), np.full((*shape, 2), np.nan, np.float32),
                 np.full(shape, validity, np.int8), np.zeros((2, *shape), np.int8), np.full(shape, np.nan, np.float32))


def cells_of(blocks: Blocks, resolved: Resolved, height: int, width: int, seconds_to: Callable[[np.ndarray], np.ndarray]) -> Cells:
    """Cells of a frame of height × width pixels. seconds_to: from distances [B] in frames to seconds, of the same sign.

    A cell is INTER where a vector of known reference stays in the picture (the block's centre does), else OUT_OF_FRAME where
    one leaves it, INVALID where no vector's reference is known, INTRA where there is no vector.
    """
    cells = empty_cells(grid_shape(height, width), Validity.INTRA)
    if not len(blocks):
        return cells
    painted = [_painted(blocks, resolved, cells.validity.shape, height, width, seconds_to, side) for side in (FIRST, SECOND)]
    weights, totals = [], np.zeros((*cells.validity.shape, 5), np.float32)
    seen = np.zeros(cells.validity.shape, bool)
    for side, (values, used, inside) in enumerate(painted):
        confidence = values[..., 4]
        weight = np.where(used & inside, np.nan_to_num(confidence, nan=1.0) + LEAST_WEIGHT, 0).astype(np.float32)
        totals += np.where(weight[..., None] > 0, weight[..., None] * values[..., :5], 0)
        weights.append(weight)
        cells.reference[side] = np.where(used, values[..., 5], 0)
        seen |= used | ~np.isnan(values[..., 5])
    weight = weights[0] + weights[1]
    known = weight > 0
    mean = totals[known] / weight[known][:, None]
    cells.displacement[known], cells.velocity[known], cells.confidence[known] = mean[:, :2], mean[:, 2:4], mean[:, 4]
    used = painted[0][1] | painted[1][1]
    cells.validity[seen] = Validity.INVALID
    cells.validity[used] = Validity.OUT_OF_FRAME
    cells.validity[known] = Validity.INTER
    return cells


def _painted(blocks: Blocks, resolved: Resolved, shape: tuple[int, int], height: int, width: int,
             seconds_to: Callable[[np.ndarray], np.ndarray], side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """values [R, C, 5 and the distance], used [R, C] bool, inside [R, C] bool of one list."""
    distance = resolved.distance.astype(np.float32)
    known = resolved.distance != 0
    a_frame = np.where(known, distance, np.nan)[:, None]
    a_second = np.where(known, seconds_to(resolved.distance), np.nan).astype(np.float32)[:, None]
    size = CELL * np.stack([blocks.wide, blocks.high], axis=1)
    source = blocks.corner + size / 2 + blocks.motion
    inside = (source >= 0).all(axis=1) & (source[:, 0] < width) & (source[:, 1] < height)
    columns = [blocks.motion / a_frame, blocks.motion / a_second, resolved.confidence[:, None], distance[:, None],
               known[:, None], inside[:, None]]
    canvas = np.full((*shape, 8), np.nan, np.float32)
    canvas = blocks.painted(np.concatenate(columns, axis=1).astype(np.float32), blocks.list == side, canvas)
    return canvas[..., :6], canvas[..., 6] == 1, canvas[..., 7] == 1
