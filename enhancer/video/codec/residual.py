"""Motion-compensated prediction error: the decoded frame minus its reference warped by the vectors.

It is not the residual that the encoder wrote, which no stock FFmpeg gives out: that one is against the encoder's own
prediction, this one against the one that the vectors alone make. It shows what motion does not explain.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from enhancer.video.codec.field import MotionField
from enhancer.video.codec.pictures import pictures_of


@dataclass
class PredictionError:
    """Of one frame: rgb int16 [H, W, 3] signed, 0 where not known; known [H, W] bool; energy [R, C] float32: mean
    square over pixels and colours, NaN where the cell has no motion."""

    frame: int
    time: float
    rgb: np.ndarray
    known: np.ndarray
    energy: np.ndarray


def prediction_errors(field: MotionField, workers: int | None = None) -> Iterator[PredictionError]:
    """One for each decoded row of the field, in order; its file is decoded again. Only frames within reach of the
    field's references are held."""
    reach = int(np.abs(field.reference).max())
    held: OrderedDict[int, np.ndarray] = OrderedDict()
    waiting: list[int] = []
    for row, picture in pictures_of(field, workers or 1):
        held[row] = picture
        waiting.append(row)
        while waiting and waiting[0] + reach <= row:
            yield _error(field, waiting.pop(0), held)
        while next(iter(held)) < row - 2 * reach:
            held.popitem(last=False)
    for row in waiting:
        yield _error(field, row, held)


def energy_map(field: MotionField, workers: int | None = None) -> np.ndarray:
    """[T, R, C] float32 mean squared prediction error, NaN where not known."""
    energy = np.full(field.validity.shape, np.nan, np.float32)
    for error in prediction_errors(field, workers):
        energy[error.frame] = error.energy
    return energy


def _error(field: MotionField, row: int, pictures: dict[int, np.ndarray]) -> PredictionError:
    """Where both lists predict a cell, their mean is the prediction."""
    height, width = field.size
    rows, columns = (np.diff(edges).astype(int) for edges in (field.row_edges, field.column_edges))

    def per_pixel(cells: np.ndarray) -> np.ndarray:
        return np.repeat(np.repeat(cells, rows, axis=0), columns, axis=1)

    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    displacement = per_pixel(np.nan_to_num(field.displacement[row]))
    total, count = np.zeros((height, width, 3), np.float32), np.zeros((height, width, 1), np.float32)
    for distances in field.reference[row]:
        for distance in np.unique(distances[distances != 0]):
            picture = pictures.get(row + int(distance))
            if picture is None:
                continue
            there = per_pixel((distances == distance) & field.valid[row])[..., None]
            place = [at + displacement[..., axis] * float(distance) for axis, at in ((0, x), (1, y))]
            warped = cv2.remap(picture, *place, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            total += np.where(there, warped, 0)
            count += there
    known = count[..., 0] > 0
    predicted = total / np.maximum(count, 1)
    rgb = np.where(known[..., None], np.rint(pictures[row] - predicted), 0).astype(np.int16)
    squares = np.square(rgb.astype(np.float32)).mean(axis=2)
    starts = np.cumsum(rows) - rows, np.cumsum(columns) - columns
    sums, counts = (
        np.add.reduceat(np.add.reduceat(v, starts[0], axis=0), starts[1], axis=1)
        for v in (squares * known, known.astype(np.float32))
    )
    energy = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(np.float32)
    return PredictionError(row, float(field.times[row]), rgb, known, energy)
