"""What the examples look at: a few labelled clips of the embedded world, made on the spot in seconds.

Put your own video in the place of `sample.video`, and your own question; nothing else changes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from enhancer.data.samples import Sample, load_samples
from enhancer.world.make import WorldSettings, make_world

FOLDER = Path(tempfile.gettempdir()) / "motion-enhancer-examples"
SETTINGS = WorldSettings(seed=3, train_clips=6, test_clips=6, questions={"LM": 1.0})  # "Which way does the … move?"


def world() -> Path:
    """The folder of the clips; made by the first call, found there by later ones."""
    folder = FOLDER / SETTINGS.digest()[:12]
    make_world(folder, SETTINGS)
    return folder


def samples(split: str = "train") -> list[Sample]:
    """Questions about the clips, with their answers and videos."""
    found, problems = load_samples(world() / f"{split}.json")
    assert not problems, problems
    return found
