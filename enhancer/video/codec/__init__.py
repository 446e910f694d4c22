"""Motion from the compressed video itself. `read_motion` is the way in; docs/codec.md says what it costs and how right it is.

streams (packets) → vectors (decoder) → blocks → references (how far away) → cells → assembly (MotionField)
                                    fallback (codecs without vectors) ↗              → accumulate, residual
"""

from enhancer.video.codec.field import MotionField, Origin, Validity
from enhancer.video.codec.reading import read_motion

__all__ = ["MotionField", "Origin", "Validity", "read_motion"]
