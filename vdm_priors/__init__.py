"""The teacher: video diffusion models -> motion priors, and what a prior is.

Importing this package, or its modules `errors`, `words`, `grid`, `prior`, `store`,
`heads` and `tokens`, loads no model library.
"""

from __future__ import annotations

from vdm_priors.errors import (
    ClipError,
    ModelError,
    RecipeError,
    SampleError,
    StoreError,
    UserError,
)

__all__ = [
    "ClipError",
    "ModelError",
    "RecipeError",
    "SampleError",
    "StoreError",
    "UserError",
]
