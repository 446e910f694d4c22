"""From a frame's blocks and their references' distances to one motion a cell.

A block's vector to a reference d frames away (d negative in the past) says that its content moves by motion / d a
frame. Where both lists have a vector, the two are averaged, by confidence and by how well each predicts the block.
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
    """One decoded frame with its cells; rank: its place in the order of presentation. Its vectors are dropped by
    then."""

    frame: DecodedFrame
    rank: int
    cells: Cells
    origin: Origin


def empty_cells(shape: tuple[int, int], validity: Validity) -> Cells:
    """[R, C] cells that all have the same reason for having no motion."""
    return Cells(
        np.full((*shape, 2), np.nan, np.float32),
        np.full((*shape, 2), np.nan, np.float32),
        np.full(shape, validity, np.int8),
        np.zeros((2, *shape), np.int8),
        np.full(shape, np.nan, np.float32),
    )


def cells_of(
    blocks: Blocks, resolved: Resolved, height: int, width: int, seconds_to: Callable[[np.ndarray], np.ndarray]
) -> Cells:
    """Cells of a frame of height × width pixels. seconds_to: from distances [B] in frames to seconds, of the same sign.

    A cell is INTER where a vector of known reference stays in the picture (the block's centre does), else OUT_OF_FRAME
    where one leaves it, INVALID where no vector's reference is known, INTRA where there is no vector.
    """
    cells = empty_cells(grid_shape(height, width), Validity.INTRA)
    if not len(blocks):
        return cells
    weight, rates = _weights(blocks, resolved, height, width), _rates(blocks, resolved, seconds_to)
    columns = np.concatenate([rates * weight[:, None], weight[:, None]], axis=1).astype(np.float32)
    columns[weight == 0] = 0
    # one row more, for cells without a block
    columns, distance = np.vstack([columns, np.zeros((1, 6), np.float32)]), np.append(resolved.distance, 0)
    numbers = [blocks.at_cells(side, cells.validity.shape) for side in (FIRST, SECOND)]
    sums = columns[numbers[0]] + columns[numbers[1]]
    for side in (FIRST, SECOND):
        cells.reference[side] = distance[numbers[side]]
        cells.validity[numbers[side] >= 0] = Validity.INVALID
    cells.validity[cells.reference.any(axis=0)] = Validity.OUT_OF_FRAME
    known = sums[..., 5] > 0
    cells.validity[known] = Validity.INTER
    mean = sums[known][:, :5] / sums[known][:, 5:]
    cells.displacement[known], cells.velocity[known], cells.confidence[known] = mean[:, :2], mean[:, 2:4], mean[:, 4]
    return cells


def _weights(blocks: Blocks, resolved: Resolved, height: int, width: int) -> np.ndarray:
    """[B] how much a vector counts beside the other list's; 0 where its reference is unknown or it leaves the
    picture."""
    end = np.minimum(blocks.corner + CELL * np.stack([blocks.wide, blocks.high], axis=1), (width, height))
    source = (blocks.corner + end) / 2 + blocks.motion  # the middle of the block's visible part
    inside = (source >= 0).all(axis=1) & (source < (width, height)).all(axis=1)
    trusted = np.nan_to_num(resolved.confidence, nan=1.0) + LEAST_WEIGHT
    return np.where((resolved.distance != 0) & inside, trusted / (1 + resolved.difference) ** 2, 0)


def _rates(blocks: Blocks, resolved: Resolved, seconds_to: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """[B, 5] px/frame (x, y), px/second (x, y) and confidence."""
    frames = np.where(resolved.distance != 0, resolved.distance, 1)[:, None]
    seconds = seconds_to(frames)
    seconds = np.where(seconds == 0, np.nan, seconds)
    return np.concatenate([blocks.motion / frames, blocks.motion / seconds, resolved.confidence[:, None]], axis=1)
