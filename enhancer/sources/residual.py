"""What the codec's motion does not explain: the mean squared motion-compensated prediction error, as a prior.

It is high where things turn, deform, appear or are uncovered, and at their edges. It is not the residual that the
encoder wrote (enhancer/video/codec/residual.py).
"""

from __future__ import annotations

from enhancer.data.samples import Sample
from enhancer.sources import SourceContext
from enhancer.spatial_prior import Evidence, SpatialSource
from enhancer.video.clip import Clip
from enhancer.video.codec import energy_map, read_motion
from enhancer.video.footage import coded_span

RULE = 1


def build(context: SourceContext) -> SpatialSource:
    """Found by the file's name."""

    def measure(sample: Sample, clip: Clip) -> Evidence:
        field = read_motion(*coded_span(sample.video, context.sampling.start, context.sampling.end))
        return Evidence(energy_map(field), field.grid(), field.provenance, field.notes)

    return SpatialSource("residual", RULE, context, measure)
