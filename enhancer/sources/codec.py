"""The compressed video's own motion as a prior: no model, and hardly any time.

The map is how fast each cell moves beside the camera, which is fitted and taken away frame by frame. Where nothing
moves by itself, the camera's own motion is the map. Speeds up to a quarter of a pixel a frame are the vectors' own
grain and count as none. What the camera has just brought in over the edge refers to nothing, and is not known. With
`sources.camera: keep` the camera's motion stays in the map, and nothing is hidden for its sake.
"""

from __future__ import annotations

import numpy as np

from enhancer.data.samples import Sample
from enhancer.sources import SourceContext
from enhancer.spatial_prior import Evidence, SpatialSource, beside_camera, camera_settings, without_grain
from enhancer.video.clip import Clip
from enhancer.video.codec import MotionField
from enhancer.video.footage import coded_span

RULE = 1
GRAIN = 0.25  # px a frame


def speeds(field: MotionField, camera: str = "remove") -> tuple[np.ndarray, str]:
    """[T, R, C] float32 px/second, NaN where not known, and what they are of: "things" beside the camera, the "camera",
    or, with camera "keep", "all" that is seen to move."""
    length = np.hypot(*np.moveaxis(field.displacement, -1, 0))
    a_second = np.divide(field.magnitude, length, out=np.zeros_like(length), where=length > 0)  # frames a second
    seen = without_grain(length, GRAIN) * a_second
    if camera == "keep":
        return seen, "all"
    x, y = (edges[:-1] + np.diff(edges) / 2 for edges in (field.column_edges, field.row_edges))
    beside, fitted = beside_camera(field.displacement, field.valid, x, y, GRAIN)
    beside[_revealed(field, fitted)] = np.nan
    if np.nansum(beside) > 0:
        # a cell may be still while the camera moves, and say nothing of seconds: the clip's rate serves
        return beside * np.where(a_second > 0, a_second, np.median(a_second[a_second > 0])), "things"
    return seen, "camera"


def _revealed(field: MotionField, camera: np.ndarray) -> np.ndarray:
    """[T, R, C] bool: cells that refer to beyond the edge when moved as the camera is."""
    left, right, top, bottom = (
        edges[part] for edges in (field.column_edges, field.row_edges) for part in (slice(-1), slice(1, None))
    )
    height, width = field.size
    found = np.zeros(field.validity.shape, bool)
    for distance in np.moveaxis(field.reference, 1, 0):
        shift = camera * distance[..., None]
        found |= (left + shift[..., 0] < -GRAIN) | (right + shift[..., 0] > width + GRAIN)
        found |= (top[:, None] + shift[..., 1] < -GRAIN) | (bottom[:, None] + shift[..., 1] > height + GRAIN)
    return found


def build(context: SourceContext) -> SpatialSource:
    """Found by the file's name."""

    def measure(sample: Sample, clip: Clip) -> Evidence:
        field, _ = context.motion(*coded_span(sample.video, context.sampling.start, context.sampling.end))
        strength, moving = speeds(field, context.camera)
        return Evidence(strength, field.grid(), {**field.provenance, "of": moving}, field.notes)

    return SpatialSource("codec", RULE, context, measure, camera_settings(context))
