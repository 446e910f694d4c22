"""`enhancer world make`."""

from __future__ import annotations

from pathlib import Path

from enhancer.console import Console
from enhancer.recipe import build
from enhancer.recipe_files import apply_override
from enhancer.runfolder import readable_write_errors
from enhancer.world import WorldSettings, make_world


def make(folder: Path, overrides: list[str], console: Console) -> None:
    """Makes a world with the settings given as KEY=VALUE."""
    raw: dict = {}
    for override in overrides:
        apply_override(raw, override)
    settings = build(WorldSettings, raw, "the world's settings")
    with readable_write_errors(folder), console.bar("making clips", unit="clip") as bar:
        make_world(folder, settings, progress=bar)
    console.print(f"{folder}: {settings.train_clips} training, {settings.validation_clips} validation and "
                  f"{settings.test_clips} test clips", markup=False)
