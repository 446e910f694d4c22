"""Motion from the compressed video itself. `read_motion` is the way in; docs/codec.md says what it costs and gives.

streams (packets) → vectors (decoder) → blocks → references (how far away) → cells → assembly (MotionField)
fallback: vectors for codecs whose decoders export none. accumulate, residual, overlay: what is made of a field.
"""

from enhancer.video.codec.accumulate import Accumulated, accumulate
from enhancer.video.codec.field import MotionField, Origin, Validity
from enhancer.video.codec.reading import read_motion, read_motions
from enhancer.video.codec.residual import PredictionError, energy_map, prediction_errors

__all__ = [
    "Accumulated",
    "MotionField",
    "Origin",
    "PredictionError",
    "Validity",
    "accumulate",
    "energy_map",
    "prediction_errors",
    "read_motion",
    "read_motions",
]
