"""The data of a run: its samples, the world that they may come from, and the hashes of what results depend on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enhancer.console import Console
from enhancer.data.samples import Problem, Sample, load_samples
from enhancer.extraction import used_teachers
from enhancer.processes import one_at_a_time
from enhancer.recipe_schema import EnhanceRecipe
from enhancer.runfolder import readable_write_errors
from enhancer.shipped import student_path, teacher_path
from enhancer.world import load_truth, make_world
from enhancer.world.make import finished
from vdm_priors.errors import UserError
from vdm_priors.fingerprint import fingerprint
from vdm_priors.store import content_key, file_digest


@dataclass
class Data:
    """Samples of a run: train, test, their folder, and the world's ground truth (None for other data)."""

    root: Path
    train: list[Sample]
    test: list[Sample]
    truth: Any
    problems: list[Problem]


def data_root(recipe: EnhanceRecipe) -> Path:
    """The folder of the data: data.root, or the folder of the recipe's own world."""
    if recipe.data.root is not None:
        return Path(recipe.data.root)
    return Path(recipe.output) / "worlds" / recipe.world.digest()[:12]


def prepare_data(recipe: EnhanceRecipe, console: Console, asked: bool = True) -> Data:
    """Makes the world if the recipe has one, and reads the samples."""
    root = data_root(recipe)
    if recipe.world is not None and not finished(root, recipe.world):
        with one_at_a_time(root), readable_write_errors(root), console.bar("making clips", unit="clip") as bar:
            make_world(root, recipe.world, progress=bar)
    data = read_data(recipe, asked)
    questions = f", {len(data.test)} test questions" if asked else ""
    console.note(f"{len(data.train)} training samples{questions} in {root}")
    return data


def read_data(recipe: EnhanceRecipe, asked: bool = True) -> Data:
    """The samples of data that is there. asked: False leaves the test questions out, which need not exist then."""
    root, settings = data_root(recipe), recipe.data
    train, problems = load_samples(root / settings.train, root, settings.format, training=True, several=True)
    test: list[Sample] = []
    if asked:
        test, test_problems = load_samples(root / settings.test, root, settings.format)
        without = [sample for sample in test if not sample.options]
        problems += test_problems
        problems += [Problem(sample.id, "a test question needs options to choose from") for sample in without]
        test = [sample for sample in test if sample.options]
        if not test:
            raise UserError(f"{root / settings.test}: no multiple-choice question in it; give rows with `options`.")
    truth = load_truth(root) if recipe.world is not None else None
    return Data(root, train[: settings.limit_train], test[: settings.limit_test], truth, problems)


def data_inputs(recipe: EnhanceRecipe, data: Data) -> tuple[dict[str, str], dict[str, str]]:
    """Hashes of the models and data that this recipe's results depend on, and the key and file that each stands for."""
    train, test = data.root / recipe.data.train, data.root / recipe.data.test
    hashes = {"student": fingerprint(student_path(recipe.student.model)), "train": file_digest(train)}
    named = {"student": f"student.model ({recipe.student.model})", "train": f"data.train ({train})",
             "test": f"data.test ({test})", "teacher": f"teacher.model ({recipe.teacher.model})"}
    if data.test:
        hashes["test"] = file_digest(test)
    teachers = [fingerprint(teacher_path(teacher.model)) for teacher in used_teachers(recipe).values()]
    if teachers:
        hashes["teacher"] = teachers[0] if len(teachers) == 1 else content_key(teachers=teachers)
    return hashes, named
