"""The pool: students and answers under hashes of all that determines them, so that no matrix trains one twice.

<pool>/priors/                                  one prior store for all
<pool>/students/<hash>/                         a training: priors.json, train_ids.json, and its students
    arms/<arm>/seed<k>/                         as in a run folder: train.json, history.jsonl, model/
    asked/<hash>/recipe.yaml, seed<k>/          how they were asked, and answers.jsonl, scores.json
    asked/<hash>/adapter.yaml                   of codec adapters: their own recipe
<pool>/base/<hash>/asked/<hash>/                a model before training, likewise
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from enhancer.data.samples import Picture, Sample
from enhancer.experiment.adapted import FILE as ADAPTER_FILE
from enhancer.experiment.adapted import adapter_key
from enhancer.experiment.cells import Cell
from enhancer.recipe import to_yaml
from enhancer.recipe_schema import EnhanceRecipe
from enhancer.runfolder import read_json, read_lines, write_json, write_text
from enhancer.shipped import student_path
from enhancer.table import BASE
from enhancer.train_settings import UNCHANGING
from enhancer.video.footage import Footage, Video, files_of
from vdm_priors.fingerprint import fingerprint
from vdm_priors.store import content_key

LOGGED_ONLY = "gradient_norms"  # of the alignment: changes no weight
KEPT_FILES = ("answers.jsonl", "scores.json")


@dataclass(frozen=True)
class Work:
    """One training of the pool and how its students are asked; `seeds` of the base model is (None,)."""

    recipe: EnhanceRecipe
    student: Path
    asked: Path
    seeds: tuple[int | None, ...]

    @property
    def is_base(self) -> bool:
        return self.seeds == (None,)

    def place(self, seed: int | None) -> Path:
        """Where a student's training is."""
        return trained_at(self.student, self.recipe, seed)

    def answers(self, seed: int | None) -> list[dict]:
        """The rows of a student that was asked, none before."""
        return read_lines(answered_at(self.asked, seed) / "answers.jsonl") if self.is_finished(seed) else []

    def trained(self, seed: int | None) -> dict[str, Any]:
        """train.json of a student, empty before it was trained."""
        return read_json(self.place(seed) / "train.json", {})

    def is_finished(self, seed: int | None) -> bool:
        """Whether this student was trained and has answered."""
        return (answered_at(self.asked, seed) / "scores.json").is_file()


def trained_at(student: Path, recipe: EnhanceRecipe, seed: int | None) -> Path:
    """The folder of a student of a training."""
    return student / BASE if seed is None else student / "arms" / recipe.arms[0].name / f"seed{seed}"


def answered_at(asked: Path, seed: int | None) -> Path:
    """The folder of a student's answers."""
    return asked / (BASE if seed is None else f"seed{seed}")


def work_of(
    pool: Path, cell: Cell, root: Path, train: list[Sample], test: list[Sample], priors: list[dict], seeds: list[int]
) -> Work:
    """The training of a cell; its files for the workers are written.

    root: of the data; train: the samples it is trained on; priors: rows of priors.json.
    """
    label = None if cell.is_control else cell.arm.spec().label
    keys = None if label is None else {row["sample_id"]: row["key"] for row in priors if row["source"] == label}
    student = pool / "students" / training_key(cell, root, train, keys)
    work = Work(cell.recipe, student, student / "asked" / asking_key(cell.recipe, test), tuple(seeds))
    write_json(student / "train_ids.json", [sample.id for sample in train])
    write_json(student / "priors.json", [row for row in priors if row["source"] == label])
    write_text(work.asked / "recipe.yaml", to_yaml(cell.recipe))
    if cell.adapter is not None:
        write_text(work.asked / ADAPTER_FILE, to_yaml(cell.adapter))
    return work


def base_work(pool: Path, cell: Cell, test: list[Sample]) -> Work:
    """The cell's model before training."""
    recipe = cell.recipe
    model = (
        pool / BASE / content_key(student=fingerprint(student_path(recipe.student.model)), dtype=recipe.student.dtype)
    )
    work = Work(recipe, model, model / "asked" / asking_key(recipe, test), (None,))
    write_text(work.asked / "recipe.yaml", to_yaml(recipe))
    return work


def training_key(cell: Cell, root: Path, samples: list[Sample], priors: dict[str, str] | None) -> str:
    """Hash of what determines a cell's trained weights, but for the seed.

    priors: keys in the store by sample, None for λ = 0, where nothing of the alignment counts. Clips count by name and
    size: hashing them all would take longer than some trainings (a prior's key has their content).
    """
    recipe = cell.recipe
    settings = dataclasses.asdict(recipe.training)
    alignment = {**settings.pop("alignment"), "weight": recipe.weight(cell.arm)}
    alignment.pop(LOGGED_ONLY, None)
    student = {"student": fingerprint(student_path(recipe.student.model))}
    if cell.adapter is None:
        student |= {
            "read": _without(dataclasses.asdict(recipe.student), "model"),
            "training": {key: value for key, value in settings.items() if key not in UNCHANGING},
        }
    else:
        student |= {"dtype": recipe.student.dtype, "adapter": adapter_key(cell.adapter, root, {s.id for s in samples})}
    return content_key(
        version=version("motion-enhancer"),
        **student,
        alignment=None if priors is None else alignment,
        samples=[
            [*_described(s), *(None if priors is None else priors.get(view.id) for view in s.views())] for s in samples
        ],
    )


def asking_key(recipe: EnhanceRecipe, samples: list[Sample]) -> str:
    """Hash of the questions and of how they are asked."""
    return content_key(
        questions=[[*_described(s), list(s.options), s.question_type] for s in samples],
        protocol=recipe.evaluate.protocol,
        sampling=dataclasses.asdict(recipe.student.sampling),
        **({"new_tokens": recipe.evaluate.new_tokens} if recipe.evaluate.protocol == "generate" else {}),
    )


def _without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


def _described(sample: Sample) -> list:
    beside = [_shown(one.footage if isinstance(one, Picture) else one) for one in sample.shown]
    return [sample.id, _shown(sample.video), sample.question, sample.answer, *beside]


def _shown(video: Video) -> list:
    files = [[file.name, file.stat().st_size] for file in files_of(video)]
    return [files, video.start, video.end, video.fps] if isinstance(video, Footage) else files
