"""What the report reads: a run folder as plain values, and what is not there.

Nothing here raises for a missing or damaged file: an interrupted run still deserves its page,
which names the gap.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

LABELS = {  # how the arms of the contract are called on the page: (label, what it is)
    "base": ("base model", "before fine-tuning"),
    "lambda0": ("λ = 0", "same data, answer loss only"),
    "vdm": ("VDM prior", "aligned to the video diffusion model"),
    "shuffled": ("shuffled prior", "aligned to another clip's prior"),
    "uniform": ("uniform prior", "aligned to a flat map"),
    "oracle": ("oracle prior", "aligned to the ground truth"),
}


@dataclass(frozen=True)
class Missing:
    """Something the page cannot show: the section's id and a sentence that says what and where."""

    section: str
    sentence: str


@dataclass
class SeedRun:
    """One trained student: arms/<arm>/seed<k>/."""

    seed: str
    history: list[dict]
    scores: dict
    train: dict


@dataclass
class RunFolder:
    """A run folder's files as values; `missing` grows while they are read."""

    folder: Path
    info: dict = field(default_factory=dict)
    recipe: str = ""
    table: dict = field(default_factory=dict)
    base_scores: dict = field(default_factory=dict)
    base_answers: list[dict] = field(default_factory=list)
    arms: dict[str, list[SeedRun]] = field(default_factory=dict)
    skipped: list[dict] = field(default_factory=list)
    priors: list[dict] = field(default_factory=list)
    examples: list[Path] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)


def read_run_folder(folder: Path) -> RunFolder:
    """Everything but the example tensors, which are read one at a time when they are drawn."""
    run = RunFolder(folder)
    run.info = _read_json(run, "run.json", "run", {})
    run.recipe = _read_text(run, "recipe.yaml", "run")
    run.table = _read_json(run, "table.json", "result", {})
    run.base_scores = _read_json(run, "base/scores.json", "result", {})
    run.base_answers = _read_json_lines(run, "base/answers.jsonl", "result")
    if (folder / "skipped.jsonl").exists():  # written by the first stage that skips something
        run.skipped = _read_json_lines(run, "skipped.jsonl", "skipped")
    run.priors = [row for row in _read_json(run, "priors.json", "run", []) if isinstance(row, dict)]
    for place in sorted((folder / "arms").glob("*/seed*"), key=_natural):
        if place.is_dir():
            run.arms.setdefault(place.parent.name, []).append(_read_seed(run, place))
    if not run.arms:
        run.missing.append(Missing("training", "No trained student: arms/ has no arm with a seed folder."))
    run.examples = sorted((folder / "examples").glob("*.safetensors"), key=_natural)
    if not run.examples:
        run.missing.append(Missing("examples", "No examples: examples/ has no .safetensors file."))
    return run


def label(arm: str) -> str:
    """The name of an arm on the page; an arm that the page does not know keeps its own."""
    return LABELS.get(arm, (arm, ""))[0]


def description(arm: str) -> str:
    """A few words that say what an arm is; empty for an arm that the page does not know."""
    return LABELS.get(arm, (arm, ""))[1]


def _read_seed(run: RunFolder, place: Path) -> SeedRun:
    inside = place.relative_to(run.folder).as_posix()
    return SeedRun(
        seed=place.name.removeprefix("seed"),
        history=_read_json_lines(run, f"{inside}/history.jsonl", "training"),
        scores=_read_json(run, f"{inside}/scores.json", "result", {}),
        train=_read_json(run, f"{inside}/train.json", "training", {}),
    )


def _read_text(run: RunFolder, name: str, section: str) -> str:
    try:
        return (run.folder / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        run.missing.append(Missing(section, f"{name} is missing."))
    except OSError as error:
        run.missing.append(Missing(section, f"{name} cannot be read: {error.strerror}."))
    return ""


def _read_json(run: RunFolder, name: str, section: str, empty: dict | list) -> dict | list:
    text = _read_text(run, name, section)
    if not text:
        return empty
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        run.missing.append(Missing(section, f"{name} is damaged (line {error.lineno}: {error.msg})."))
        return empty
    if not isinstance(value, type(empty)):
        run.missing.append(
            Missing(section, f"{name} holds a {type(value).__name__}, not a {type(empty).__name__}.")
        )
        return empty
    return value


def _read_json_lines(run: RunFolder, name: str, section: str) -> list[dict]:
    rows, damaged = [], 0
    for line in _read_text(run, name, section).splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged += 1
    if damaged:
        run.missing.append(Missing(section, f"{name}: {damaged} damaged line(s) left out."))
    return rows


def _natural(path: Path) -> list:
    """Sort key: 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.as_posix())]
