"""How far each place is from what it usually looks like: distance of every frame to the clip's median picture.

Finds what passes over a resting background, also while it stands still for a moment; a moving camera makes it useless.
"""

from __future__ import annotations

import cv2
import numpy as np

from enhancer.data.samples import Sample
from enhancer.sources import SourceContext
from enhancer.spatial_prior import Evidence, SpatialSource, without_grain
from enhancer.video.clip import Clip
from vdm_priors.grid import TokenGrid, frame_spans

RULE = 1      # raise it when the same clip would give another map: stored priors are then made anew
CELLS = 32    # rows and columns of the map, at most
GRAIN = 4.0   # grey levels: what coding alone changes


def build(context: SourceContext) -> SpatialSource:
    """Found by the file's name."""

    def measure(sample: Sample, clip: Clip) -> Evidence:
        usual = np.median(clip.frames, axis=0).astype(np.float32)
        distance = np.abs(clip.frames.astype(np.float32) - usual).mean(axis=-1)
        rows, columns = (min(CELLS, side) for side in distance.shape[1:])
        cells = np.stack([cv2.resize(frame, (columns, rows), interpolation=cv2.INTER_AREA) for frame in distance])
        grid = TokenGrid.regular(frame_spans(clip.times, clip.duration), rows, columns, clip.box)
        return Evidence(without_grain(cells, GRAIN), grid)

    return SpatialSource("background", RULE, context, measure)
