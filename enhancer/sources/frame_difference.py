"""The plainest measure of motion: how much each place changes from a sampled frame to the next.

Mean absolute difference of grey levels; a camera's motion counts as change everywhere. The first frame has none.
"""

from __future__ import annotations

import cv2
import numpy as np

from enhancer.data.samples import Sample
from enhancer.sources import SourceContext
from enhancer.spatial_prior import Evidence, SpatialSource, without_grain
from enhancer.video.clip import Clip
from vdm_priors.grid import TokenGrid, frame_spans

RULE = 1
CELLS = 32  # rows and columns that frames are brought to, at most
GRAIN = 1.0  # grey levels: what coding alone changes


def build(context: SourceContext) -> SpatialSource:
    """Found by the file's name."""

    def measure(sample: Sample, clip: Clip) -> Evidence:
        greys = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32) for picture in clip.frames]
        rows, columns = (min(CELLS, side) for side in greys[0].shape)
        changes = [
            cv2.resize(cv2.absdiff(before, now), (columns, rows), interpolation=cv2.INTER_AREA)
            for before, now in zip(greys, greys[1:], strict=False)
        ]
        strength = np.stack([np.full((rows, columns), np.nan, np.float32), *changes])
        grid = TokenGrid.regular(frame_spans(clip.times, clip.duration), rows, columns, clip.box)
        return Evidence(without_grain(strength, GRAIN), grid)

    return SpatialSource("frame_difference", RULE, context, measure)
