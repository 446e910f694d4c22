"""`job: adapter_probe`: what a model that no one adapted makes of codec pictures, and of frames tiled into panels.

HY-Himmel's five conditions (appendix S) and its training-free baseline (appendix R) are the conditions of
recipes/adapters/himmel/probe*.yaml. Every condition answers the same questions; nothing is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rich.table
import torch

from enhancer.adapters.codec_pictures import KINDS, codec_clip
from enhancer.adapters.gops import GopReading, plan_gops, read_gops
from enhancer.adapters.schema import ReadingSettings
from enhancer.console import Console
from enhancer.data.samples import Sample, load_samples
from enhancer.evaluation.answering import ask
from enhancer.evaluation.scores import paired_difference, summarise
from enhancer.jobs import Job
from enhancer.run_data import data_root
from enhancer.processes import one_at_a_time
from enhancer.recipe import option
from enhancer.recipe_schema import NAME, DataSettings, EvaluateSettings
from enhancer.runfolder import RunFolder, read_json, read_lines, readable_write_errors, write_json, write_lines
from enhancer.shipped import student_path, torch_device
from enhancer.video.clip import Clip
from enhancer.world import WorldSettings, make_world
from enhancer.world.make import finished
from vdm_priors.errors import UserError
from vlm_hooks.families import find_family, load_student


@dataclass
class StockStudent:
    """The vision-language model, as it is."""

    model: str = option(
        "world", "the student: `world` is the small one shipped, else a transformers folder or hub name"
    )
    dtype: str = option(
        "float32", "number type of the weights; bfloat16 halves memory", choices=("float32", "bfloat16", "float16")
    )


@dataclass
class Condition:
    """One way to show a video."""

    name: str = option(help="the condition's row in the table", pattern=NAME)
    pictures: str = option(
        help="one letter a picture, in their order: " + ", ".join(f"{k} {v}" for k, v in KINDS.items()),
        pattern="[IMRP]+",
    )
    panel: list[int] = option([3, 3], "rows and columns of decoded pictures in a P")


@dataclass
class ProbeRecipe:
    """Codec pictures shown to an unadapted model."""

    job: str = option("adapter_probe", "which job the recipe describes", choices=("adapter_probe",))
    name: str = option(help="the run's name; its folder is <output>/<name>", pattern=NAME)
    output: str = option("runs", "folder that holds the run folders")
    seed: int = option(0, "seed of the bootstrap", min=0)
    device: str = option(
        "auto", "where the model computes: auto takes a GPU if there is one", pattern="auto|cpu|mps|cuda(:[0-9]+)?"
    )
    threads: int = option(1, "CPU threads", min=1, max=1024)
    world: WorldSettings | None = option(
        None, "make (or reuse) this synthetic world as the data; null reads existing data"
    )
    data: DataSettings = option(DataSettings())
    student: StockStudent = option(StockStudent())
    reading: ReadingSettings = option(ReadingSettings(gops=64))
    conditions: list[Condition] = option(help="rows of the table; the others are compared with the first")
    evaluate: EvaluateSettings = option(EvaluateSettings())

    def check(self) -> list[str]:
        """Faults between keys, as sentences with the dotted path."""
        names = [condition.name for condition in self.conditions]
        faults = [
            f"conditions.{n}: the name is used {names.count(n)} times" for n in sorted(set(names)) if names.count(n) > 1
        ]
        faults += [] if names else ["conditions: at least one is needed, e.g. `- {name: frames, pictures: IIIIIIII}`"]
        faults += [
            f"conditions.{c.name}.panel: must be rows and columns, 1 or more, not {c.panel}"
            for c in self.conditions
            if len(c.panel) != 2 or min(c.panel) < 1
        ]
        if self.world is None and self.data.root is None:
            faults.append("data.root: required unless `world` is given")
        return faults + (self.world.check() if self.world is not None else []) + self.reading.check()


class ConditionClips:
    """Clips of one condition, as `evaluate` takes them from a FrameCache. Each picture comes as often as the student's
    tower joins frames: it is a picture by itself."""

    def __init__(self, condition: Condition, reading: GopReading, repeats: int) -> None:
        self._condition, self._reading, self._repeats = condition, reading, repeats

    def get(self, video: Any, _sampling: Any) -> Clip:
        plan = plan_gops(video, self._reading)
        clip = codec_clip(
            list(read_gops(video, self._reading, plan=plan)),
            plan,
            self._condition.pictures,
            tuple(self._condition.panel),
        )
        clip.frames = np.repeat(clip.frames, self._repeats, axis=0)
        clip.times = [time for time in clip.times for _ in range(self._repeats)]
        return clip


def run(recipe: ProbeRecipe, console: Console, fresh: bool = False) -> Path:
    """Answers per condition in <run folder>/<condition>.jsonl, and table.json; a finished one is not asked again."""
    torch.set_num_threads(recipe.threads)
    folder = RunFolder.open(Path(recipe.output) / recipe.name, recipe, fresh=fresh)
    status = "failed"
    try:
        questions = _questions(recipe, console)
        student = load_student(
            student_path(recipe.student.model), getattr(torch, recipe.student.dtype), torch_device(recipe.device)
        )
        for condition in recipe.conditions:
            answers = folder.folder / f"{condition.name}.jsonl"
            if answers.is_file():
                continue
            clips = ConditionClips(condition, recipe.reading.gop_reading(), student.frames_per_token())
            with folder.step(condition.name), console.bar(condition.name, unit="question") as bar:
                rows = ask(student, questions, recipe.evaluate, cache=clips, progress=bar)
            write_lines(answers, rows)
        write_json(folder.folder / "table.json", _table(recipe, folder.folder))
        _show(folder.folder, console)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        folder.close(status)
    return folder.folder


def _questions(recipe: ProbeRecipe, console: Console) -> list[Sample]:
    """The test questions; the world is made where it is not there yet."""
    root, settings = data_root(recipe), recipe.data
    if recipe.world is not None and not finished(root, recipe.world):
        with one_at_a_time(root), readable_write_errors(root), console.bar("making clips", unit="clip") as bar:
            make_world(root, recipe.world, progress=bar)
    samples, _ = load_samples(root / settings.test, root, settings.format)
    return [sample for sample in samples if sample.options][: settings.limit_test]


def _table(recipe: ProbeRecipe, folder: Path) -> list[dict]:
    """One row a condition: its pictures, accuracy by question type and overall, and its lead over the first, paired."""
    answers = {condition.name: read_lines(folder / f"{condition.name}.jsonl") for condition in recipe.conditions}
    first = recipe.conditions[0].name
    rows = []
    for condition in recipe.conditions:
        summary = summarise(answers[condition.name])
        against = (
            paired_difference(answers[condition.name], answers[first], recipe.seed) if condition.name != first else None
        )
        rows.append({"condition": condition.name, "pictures": condition.pictures, **summary, "against_first": against})
    return rows


def _show(folder: Path, console: Console) -> None:
    rows = read_json(folder / "table.json", [])
    table = rich.table.Table(title="What an unadapted model makes of codec pictures")
    for column in ("condition", *rows[0]["types"], "overall", "95%", "against the first"):
        table.add_column(column)
    for row in rows:
        overall, against = row["overall"], row["against_first"]
        table.add_row(
            row["condition"],
            *(f"{100 * kind['accuracy']:.0f}" for kind in row["types"].values()),
            f"{100 * overall['accuracy']:.1f}",
            f"{100 * overall['low']:.0f} to {100 * overall['high']:.0f}",
            "" if against is None else f"{100 * against['difference']:+.1f} (p {against['p']:.2g})",
        )
    console.print(table)


def validate(recipe: ProbeRecipe, console: Console) -> bool:
    """Says what would be asked, and whether the data and the model are there."""
    faults = []
    if recipe.world is None:
        try:
            questions = len(_questions(recipe, console))
        except UserError as error:
            faults.append(str(error))
    else:
        questions = min(recipe.world.test_clips, recipe.data.limit_test or recipe.world.test_clips)
    try:
        find_family(student_path(recipe.student.model))
    except UserError as error:
        faults.append(f"student.model: {error}")
    for fault in faults:
        console.print(f"✗ {fault}", style="red", markup=False)
    if not faults:
        console.print(
            f"✓ {questions} questions under {len(recipe.conditions)} conditions can be asked",
            style="green",
            markup=False,
        )
    return not faults


JOBS = {"adapter_probe": Job(ProbeRecipe, run, validate)}
