"""Does a student see? Questions that one frame answers, with their options, about the clips of a world.

Squares are asked for the first and the last eighth of a clip among the 64 of the board ("c4"); chance is 1/64.
"""

from __future__ import annotations

import json
from pathlib import Path

from enhancer.data.samples import Sample
from enhancer.world.scene import COLOURS, SHAPES
from enhancer.world.text import END, NUMBERS, START, place
from enhancer.world.truth import WorldTruth

SQUARES = tuple(f"{column}{row}" for row in range(1, 9) for column in "abcdefgh")


def static_samples(world: Path, truth: WorldTruth, split: str = "test", limit: int | None = None) -> list[Sample]:
    """Colour, shape, number, and first and last square of the first-named thing of every clip of a split."""
    rows = json.loads((world / f"{split}.json").read_text(encoding="utf-8"))[:limit]
    samples = []
    for row in rows:
        scene = truth.scene(row["video"])
        thing = scene.things[0]
        asked = [("shape", f"What shape is the {thing.colour} thing?", thing.shape, SHAPES),
                 ("number", "How many things are there?", NUMBERS[len(scene.things) - 1], NUMBERS),
                 ("first square", f"Where is the {thing.name} at the start?", place(scene, thing, START), SQUARES),
                 ("last square", f"Where is the {thing.name} at the end?", place(scene, thing, END), SQUARES)]
        if sum(other.shape == thing.shape for other in scene.things) == 1:
            asked.append(("colour", f"What colour is the {thing.shape}?", thing.colour, COLOURS))
        samples += [Sample(f"{row['id']}-{kind.replace(' ', '-')}", world / row["video"], text, answer, tuple(options), kind)
                    for kind, text, answer, options in asked]
    return samples
