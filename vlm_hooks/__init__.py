"""The student: reading and aligning a vision-language model's attention.

Only this package imports transformers' model classes; import its modules directly
(`vlm_hooks.capture`, `vlm_hooks.alignment`, `vlm_hooks.families`, …).
"""

from __future__ import annotations
