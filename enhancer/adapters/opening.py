"""Adapters' folders for commands that look at models: the adapter on its host, and how its clips are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from enhancer.adapters.reading import ClipReader
from enhancer.shipped import student_path
from vlm_hooks.adapters.checkpoint import SETTINGS, needed_host
from vlm_hooks.adapters.model import AdapterModel


def is_adapter(folder: str | Path) -> bool:
    """Whether the folder holds an adapter, and not a whole model."""
    return (Path(folder) / SETTINGS).is_file()


def open_adapter(folder: Path, host: str | None = None, **loading: Any) -> tuple[AdapterModel, ClipReader]:
    """The adapter of a folder and its reader of clips.

    host: the one that it was made for; None takes the one in the folder, or else the one whose name stands there.
    loading: `load_student`'s. Raises ModelError.
    """
    reader = ClipReader.of(folder)  # before gigabytes are loaded
    name = needed_host(folder) if host is None else host
    return AdapterModel.from_pretrained(None if name is None else student_path(name), folder, **loading).eval(), reader
