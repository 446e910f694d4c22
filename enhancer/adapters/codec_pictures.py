"""What a codec says of a video, as pictures: for models that were never told about motion (HY-Himmel, appendices R, S).

Legend: h × w pixels of a picture, r × c motion cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from enhancer.adapters.gops import CELL, Gop, GopPlan
from enhancer.video.clip import Clip
from vdm_priors.errors import ClipError

KINDS = {"I": "decoded pictures", "M": "motion vectors", "R": "prediction errors", "P": "panels of decoded pictures"}
LARGEST = 0.1  # share of the frame, moved in a step, that is drawn in full colour
GAIN = 4  # prediction errors are mostly a few grey levels


def vector_picture(displacement: np.ndarray, valid: np.ndarray, largest: float = LARGEST) -> np.ndarray:
    """uint8 [h, w, 3] of displacement [r, c, 2] in shares of the frame: the direction is the hue, how far the colour's
    depth; what rests is white, and what is not known black."""
    angle = np.degrees(np.arctan2(displacement[..., 1], displacement[..., 0])) % 360
    depth = np.clip(np.hypot(displacement[..., 0], displacement[..., 1]) / largest, 0, 1)
    hsv = np.stack([angle, depth, valid], axis=-1).astype(np.float32)
    rgb = (255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)).round().astype(np.uint8)
    return np.repeat(np.repeat(rgb, CELL, axis=0), CELL, axis=1)


def error_picture(error: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] of a prediction error, int16: grey is none, lighter and darker what came and went."""
    return np.clip(128 + GAIN * error, 0, 255).astype(np.uint8)


def panel(pictures: Sequence[np.ndarray], rows: int, columns: int) -> np.ndarray:
    """uint8 [h, w, 3]: rows × columns pictures of that size side by side, row by row, each scaled down to its part."""
    height, width = pictures[0].shape[:2]
    across = [width * (n + 1) // columns - width * n // columns for n in range(columns)]
    down = [height * (n + 1) // rows - height * n // rows for n in range(rows)]
    return np.concatenate(
        [
            np.concatenate(
                [
                    cv2.resize(pictures[r * columns + c], (across[c], down[r]), interpolation=cv2.INTER_AREA)
                    for c in range(columns)
                ],
                axis=1,
            )
            for r in range(rows)
        ]
    )


def codec_clip(gops: Sequence[Gop], plan: GopPlan, pattern: str, panels: tuple[int, int] = (3, 3)) -> Clip:
    """A clip of one picture for each letter of `pattern` (see KINDS), in its order.

    Pictures of a kind are spread evenly over the video by themselves, as in the paper: of "IMIM", both I and M span
    it all. A panel shows panels[0] × panels[1] decoded pictures. Each stands at the time of its (first) picture. Raises
    ClipError where vectors or errors are asked for and the video has none.
    """
    pictures = [(float(time), shown) for gop in gops for time, shown in zip(gop.times, gop.pictures, strict=True)]
    steps = [(float(gop.times[n + 1]), gop, n) for gop in gops for n in range(gop.steps)]
    if not pictures:
        raise ClipError(f"{plan.index.path}: not one picture can be decoded: the file is damaged. Copy it again.")
    if not steps and set(pattern) & {"M", "R"}:
        raise ClipError(f"{plan.index.path}: has no motion to draw: " + "; ".join(plan.notes or ("nothing decodes",)))
    rows, columns = panels

    def spread(found: list, count: int) -> list:
        return [found[n] for n in np.linspace(0, len(found) - 1, count).round().astype(int)]

    tiles = spread(pictures, pattern.count("P") * rows * columns)
    made = {
        "I": spread(pictures, pattern.count("I")),
        "M": [
            (t, vector_picture(gop.displacement[n], gop.valid[n])) for t, gop, n in spread(steps, pattern.count("M"))
        ],
        "R": [(t, error_picture(gop.error[n])) for t, gop, n in spread(steps, pattern.count("R"))],
        "P": [
            (tiles[n][0], panel([shown for _, shown in tiles[n : n + rows * columns]], rows, columns))
            for n in range(0, len(tiles), rows * columns)
        ],
    }
    queues = {kind: iter(values) for kind, values in made.items()}
    chosen = [next(queues[letter]) for letter in pattern]
    return Clip(
        plan.index.path,
        np.stack([shown for _, shown in chosen]),
        [time for time, _ in chosen],
        plan.index.duration,
        notes=list(plan.notes),
    )
