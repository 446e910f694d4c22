"""What the codec's motion does not explain: the mean squared motion-compensated prediction error, as a prior.

It is high where things turn, deform, appear or are uncovered, and at their edges. It is not the residual that the
encoder wrote (enhancer/video/codec/residual.py).
"""

from __future__ import annotations

from enhancer.data.samples import Sample
from enhancer.sources import SourceContext
from enhancer.spatial_prior import Evidence, SpatialSource
from enhancer.video.clip import Clip
from enhancer.video.footage import coded_span

RULE = 1


def build(context: SourceContext) -> SpatialSource:
    """Found by the file's name."""

    def measure(sample: Sample, clip: Clip) -> Evidence:
        span = coded_span(sample.video, context.sampling.start, context.sampling.end)
        field, energy = context.motion(*span, energy=True)
        return Evidence(energy, field.grid(), field.provenance, field.notes)

    return SpatialSource("residual", RULE, context, measure)
