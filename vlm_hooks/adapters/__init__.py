"""Codec adapters over a stock host: one file each, found by its NAME.

An adapter's file has a class Adapter (base.py) with a NAME and its own Config. `AdapterModel` (model.py) wraps the
host; its `student` (student.py) is what the rest of the package reads sequences from.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from vdm_priors.errors import UserError

if TYPE_CHECKING:
    from vlm_hooks.adapters.base import Adapter

CORE = ("base", "checkpoint", "inputs", "model", "student")  # files of this folder that are no adapter


def known_adapters() -> dict[str, type[Adapter]]:
    """Name -> class, for every adapter's file of this folder. What an adapter alone needs lies in files of its own name
    with more behind it (cope_encoder.py), which have no Adapter."""
    names = [info.name for info in pkgutil.iter_modules(__path__) if info.name not in CORE]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {
        module.Adapter.NAME: module.Adapter
        for module in modules
        if "Adapter" in vars(module) and module.Adapter.__module__ == module.__name__
    }


def find_adapter(name: str) -> type[Adapter]:
    """The adapter of that name. Raises UserError with the known ones."""
    known = known_adapters()
    if name not in known:
        raise UserError(f"There is no codec adapter {name!r}; known: {', '.join(sorted(known))}.")
    return known[name]
