"""Qwen2.5-VL: visual tokens lie as in Qwen2-VL.

Its M-RoPE counts seconds: the processor gets the clip's true distance between frames (second_per_grid_ts), which is
their mean distance where they are uneven.
"""

from __future__ import annotations

from torch import Tensor

from vlm_hooks.families import qwen2_vl
from vlm_hooks.mrope import timed_positions
from vlm_hooks.streams import StreamPlaces

MODEL_TYPES = ("qwen2_5_vl",)


class Student(qwen2_vl.Student):
    """A Qwen2.5-VL model with its processor."""

    def stream_positions(self, places: StreamPlaces) -> Tensor:
        """See the base class. Its temporal axis counts `tokens_per_second` steps a second."""
        rate = self.model.config.vision_config.tokens_per_second
        # seconds are sums of binary fractions: one that is a hair short of a step is that step
        return timed_positions(places, lambda seconds: (seconds * rate + 1e-3).floor().long())
