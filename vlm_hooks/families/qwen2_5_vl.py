"""Qwen2.5-VL: visual tokens lie as in Qwen2-VL.

Its M-RoPE counts seconds: the processor gets the clip's true distance between frames (second_per_grid_ts), which is
their mean distance where they are uneven.
"""

from __future__ import annotations

from vlm_hooks.families import qwen2_vl

MODEL_TYPES = ("qwen2_5_vl",)


class Student(qwen2_vl.Student):
    """A Qwen2.5-VL model with its processor."""
