"""Motion from the compressed video itself. `read_motion` is the way in; docs/codec.md says what it costs and how right it is.

streams (packets) → vectors (decoder) → blocks → references (how far away) → cells → assembly (MotionField)
                                    fallback (codecs without vectors) ↗              → accumulate, residual, overlay
"""

from enhancer.video.codec.accumulate import Accumulated, accumulate
from enhancer.video.codec.field import MotionField, Origin, Validity
from enhancer.video.codec.reading import read_motion
from enhancer.video.codec.residual import PredictionError, energy_map, prediction_errors

__all__ = ["Accumulated", "MotionField", "Origin", "PredictionError", "Validity", "accumulate", "energy_map", "prediction_errors",
           "read_motion"]
