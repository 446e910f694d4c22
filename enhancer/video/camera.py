"""The camera's motion in a field of vectors: one similarity a frame, found by all cells and kept from those that agree.

A cell at (x, y) from the frame's middle moves by t + s (x, y) + r (−y, x): translation, zoom and turn, as a camera that
is panned, zoomed and rolled moves a far background. The fit is least squares with weights that fall with a cell's
distance from it (iteratively reweighted, Tukey's biweight; the scale is the median absolute residual), so that things
that move by themselves do not pull it along while they are the smaller part.
"""

from __future__ import annotations

import numpy as np

ITERATIONS = 15
TUKEY = 4.685  # in robust standard deviations: 95% efficient on normal residuals
MAD_TO_SIGMA = 1.4826
LEAST_SIGMA = 0.05  # px a frame: vectors are of quarters of a pixel
LEAST_CELLS = 12  # fewer say nothing about a whole frame


def camera_motion(displacement: np.ndarray, valid: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The fitted camera motion at every cell, [R, C, 2] in the unit of `displacement` [R, C, 2]; 0 where few cells are
    valid.

    valid [R, C] bool; x [C] and y [R]: cells' middles in pixels.
    """
    if valid.sum() < LEAST_CELLS:
        return np.zeros_like(displacement)
    scale = max(np.ptp(x), np.ptp(y), 1.0) / 2
    across, down = np.meshgrid((x - x.mean()) / scale, (y - y.mean()) / scale)
    one, none = np.ones_like(across), np.zeros_like(across)
    # [R, C, 2, 4]: rows for x and y; columns for translation x and y, zoom, turn
    design = np.stack(
        [np.stack([one, none, across, -down], axis=-1), np.stack([none, one, down, across], axis=-1)], axis=-2
    )
    a, b = design[valid], displacement[valid].astype(np.float64)
    fitted = np.array([*np.median(b, axis=0), 0.0, 0.0])
    for _ in range(ITERATIONS):
        off = np.hypot(*(b - a @ fitted).T)
        sigma = max(MAD_TO_SIGMA * float(np.median(off)), LEAST_SIGMA)
        weight = np.clip(1 - (off / (TUKEY * sigma)) ** 2, 0, None) ** 2
        weighted = a * weight[:, None, None]
        normal = np.einsum("nij,nik->jk", weighted, a) + 1e-9 * np.eye(4)
        fitted = np.linalg.solve(normal, np.einsum("nij,ni->j", weighted, b))
    return (design @ fitted).astype(displacement.dtype)
