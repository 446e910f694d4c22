"""Errors that a user can act on.

Every message is one paragraph: what is wrong, where, and what to do.
The command line prints it without a traceback and exits with status 1.
"""

from __future__ import annotations


class UserError(ValueError):
    """Something a user gave is wrong: a path, a value, a file's content."""


class RecipeError(UserError):
    """A recipe has unknown keys, wrong types or values out of range."""


class ClipError(UserError):
    """A video file cannot be read as the clip that was asked for."""


class SampleError(UserError):
    """One data sample (question, answer, video) is not usable."""


class StoreError(UserError):
    """A stored prior is missing, damaged, or could not be written."""


class ModelError(UserError):
    """A model folder is of an unknown family, incomplete, or gave unusable numbers."""
