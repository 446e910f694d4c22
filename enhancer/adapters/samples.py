"""Samples of a stage: questions as they are, or captions as the answers to one question; and labels of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from enhancer.adapters.schema import AdapterRecipe, StageSettings
from enhancer.data.samples import Problem, Sample, load_samples
from vdm_priors.errors import SampleError

NAMED = re.compile(r"the (?:camera|\w+ \w+) (.+)")  # a clause of the world's captions: who, and what it does


def captions(path: Path) -> dict[str, str]:
    """The `caption` of each row of a data file, by id. Raises SampleError where no row has any."""
    text = path.read_text(encoding="utf-8-sig")
    rows = (
        json.loads(text)
        if text.lstrip().startswith("[")
        else [json.loads(line) for line in text.split("\n") if line.strip()]
    )
    found = {
        str(row["id"]): row["caption"] for row in rows if isinstance(row, dict) and row.get("caption") and "id" in row
    }
    if not found:
        raise SampleError(
            f"{path}: no row has a `caption`, which a stage with `text: caption` learns. Give its captions as "
            "answers in a file of its own (stages.<name>.train) and leave `text` out."
        )
    return found


def samples_of(recipe: AdapterRecipe, stage: StageSettings, root: Path) -> tuple[list[Sample], list[Problem]]:
    """A stage's training samples. Raises SampleError where none is of the stage's types."""
    file = root / (stage.train or recipe.data.train)
    samples, problems = stage_samples(
        file, root, recipe.data.format, stage.text, recipe.caption_question, recipe.data.limit_train
    )
    return of_types(samples, stage, str(file)), problems


def of_types(samples: list[Sample], stage: StageSettings, where: str) -> list[Sample]:
    """The samples that a stage learns from, of those that lie at `where`. Raises SampleError where there are none."""
    if stage.types is None:
        return samples
    there = sorted({sample.question_type for sample in samples})
    chosen = [sample for sample in samples if sample.question_type in stage.types]
    if not chosen:
        raise SampleError(f"stages.{stage.name}.types: {where} has {', '.join(there)}, and none of {stage.types}.")
    return chosen


def stage_samples(
    path: Path, root: Path, form: str, text: str, question: str, limit: int | None
) -> tuple[list[Sample], list[Problem]]:
    """Training samples of a file; for "caption" each asks `question` and answers with the row's caption."""
    samples, problems = load_samples(path, root, form, training=True)
    samples = samples[:limit]
    if text == "caption":
        told = captions(path)
        problems += [Problem(s.id, "has no caption") for s in samples if s.id not in told]
        samples = [
            replace(s, question=question, answer=told[s.id].strip(), options=()) for s in samples if s.id in told
        ]
    return samples, problems


def labels_of(samples: Sequence[Sample]) -> dict[str, list[str]]:
    """What each sample says of motion: of a caption of clauses, what each thing and the camera do without their names;
    else the answer itself."""
    found = {}
    for sample in samples:
        clauses = [NAMED.fullmatch(clause.strip()) for clause in sample.answer.rstrip(".").split(",")]
        named = [clause[1] for clause in clauses if clause]
        found[sample.id] = sorted(set(named)) if named and len(named) == len(clauses) else [sample.answer]
    return found
