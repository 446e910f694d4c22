"""One student of a run: train it, export it, ask it the test questions.

Everything is read from and written to the run folder, so that the same function serves this
process and a worker process (`python -m enhancer.pipeline_arm`). What is finished is not redone:
train.json marks a trained and exported student, scores.json an evaluated one.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch

from enhancer.console import Console
from enhancer.data.samples import Problem, Sample
from enhancer.evaluation.answering import ask
from enhancer.evaluation.scores import summarise
from enhancer.filling import stored_prior
from enhancer.processes import Process
from enhancer.recipe_schema import CONTROL, ArmSettings, EnhanceRecipe
from enhancer.runfolder import read_json, readable_write_errors, write_json, write_lines
from enhancer.shipped import student_path, torch_device
from enhancer.table import BASE
from enhancer.training import remove_checkpoints, train
from enhancer.video.clip import FrameCache
from enhancer.video.guard import clip_reader
from vdm_priors.errors import StoreError, UserError
from vdm_priors.prior import MotionPrior
from vdm_priors.store import PriorStore
from vlm_hooks.export import export, prove_export
from vlm_hooks.families import load_student

MUCH_WAITING = 0.2  # of a training's time; warned of above it
PROVED_ON = 2  # samples of the batch on which an export is compared; logits of large vocabularies take gigabytes


def arm_folder(run: Path, arm: str, seed: int | None) -> Path:
    """Where a student's files are; the base model has no seed."""
    return run / BASE if arm == BASE else run / "arms" / arm / f"seed{seed}"


def is_trained(run: Path, arm: str, seed: int) -> bool:
    """Whether this student was trained and exported."""
    return (arm_folder(run, arm, seed) / "train.json").is_file()


def is_evaluated(run: Path, arm: str, seed: int | None) -> bool:
    """Whether this student was asked all questions."""
    return (arm_folder(run, arm, seed) / "scores.json").is_file()


class StoredPriors:
    """The priors of one source of a run, by sample: called, the prior; `key`, its key in the store; None without."""

    def __init__(self, run: Path, recipe: EnhanceRecipe, label: str) -> None:
        self._store = PriorStore(store_folder(run, recipe))
        rows = read_json(run / "priors.json", [])
        self._keys = {row["sample_id"]: row["key"] for row in rows if row["source"] == label}

    def key(self, sample: Sample) -> str | None:
        """The store's key, which is a hash of all that determines the prior."""
        return self._keys.get(sample.id)

    def __call__(self, sample: Sample) -> MotionPrior | None:
        """Raises StoreError for a missing or damaged file."""
        key = self.key(sample)
        if key is None:
            return None
        try:
            return stored_prior(self._store, key)
        except StoreError as error:
            raise StoreError(f"{error} Run the same command again: damaged priors are made anew.") from error


def store_folder(run: Path, recipe: EnhanceRecipe) -> Path:
    """Where the run's priors are."""
    return Path(recipe.teacher.store) if recipe.teacher.store else run / "priors"


def loaded_student(folder: str, recipe: EnhanceRecipe) -> Any:
    """A student in the recipe's number type, on its device."""
    device = Process.this().device(torch_device(recipe.device))
    return load_student(folder, dtype=getattr(torch, recipe.student.dtype), device=device)


def train_arm(run: Path, recipe: EnhanceRecipe, arm: ArmSettings, seed: int, samples: list[Sample],
              console: Console) -> list[Problem]:
    """Trains and exports one student, unless that is done; returns the samples it had to leave out.

    Of several processes all train, and process 0 does the rest.
    """
    place = arm_folder(run, arm.name, seed)
    if is_trained(run, arm.name, seed):
        return []
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(seed)
    weight = recipe.weight(arm)
    alignment = dataclasses.replace(recipe.training.alignment, weight=weight)
    settings = dataclasses.replace(recipe.training, alignment=alignment)
    priors = StoredPriors(run, recipe, arm.spec().label) if weight > 0 else None
    student = loaded_student(student_path(recipe.student.model), recipe)
    with readable_write_errors(place), console.bar("train", settings.steps, "step") as bar:
        result = train(student, samples, settings, place, priors=priors, sampling=recipe.student.sampling.sampling(),
                       frame_cache=FrameCache(read=clip_reader(recipe.data.timeout, run)), progress=bar, seed=seed)
    if Process.this().rank > 0:
        return []
    if result.start_step:
        console.note(f"{arm.name}, seed {seed}: steps 1 to {result.start_step} were reused from a checkpoint")
    if result.waiting is not None and result.waiting > MUCH_WAITING:
        console.warn(f"{arm.name}, seed {seed}: {result.waiting:.0%} of the training's time went by waiting for "
                     f"batches: raise training.workers ({settings.workers}) where there are cores for them")
    with readable_write_errors(place):
        shutil.rmtree(place / "model", ignore_errors=True)
        export(student, place / "model")
    difference = _export_difference(student, place / "model", run, recipe, samples)
    remove_checkpoints(place)
    write_lines(place / "remarks.jsonl", [dataclasses.asdict(remark) for remark in result.remarks])
    write_json(place / "train.json", {
        "seconds": round(result.seconds, 2), "prior_source": None if arm.source == CONTROL else arm.spec().label,
        "lambda": weight, "seed": seed, "samples": len(samples), "left_out": len(result.problems),
        "remarks": len(result.remarks), "waiting_share": result.waiting, "export_max_difference": difference})
    return result.problems


def _export_difference(student: Any, folder: Path, run: Path, recipe: EnhanceRecipe, samples: list[Sample]) -> float:
    """Largest difference of the exported student's logits from the trained one's, on the first samples it can take.

    Raises ModelError where it is more than rounding; the training's checkpoints, if it keeps any, are still there then.
    """
    clips, prompts, frames = [], [], FrameCache(read=clip_reader(recipe.data.timeout, run))
    for sample in samples:
        try:
            prompt = student.prompt(sample.question).text
            clip = frames.get(sample.video, recipe.student.sampling.sampling())
            student.encode([clip], [prompt])
        except UserError:
            continue  # the training listed it among the samples that it left out
        clips.append(clip)
        prompts.append(prompt)
        if len(clips) == PROVED_ON:
            break
    return prove_export(student, folder, clips, prompts)


def evaluate_arm(run: Path, recipe: EnhanceRecipe, arm: str, seed: int | None, samples: list[Sample],
                 console: Console) -> None:
    """Asks one student (or the base model) the test questions, unless that is done."""
    place = arm_folder(run, arm, seed)
    if is_evaluated(run, arm, seed):
        return
    torch.set_num_threads(recipe.threads)
    folder = student_path(recipe.student.model) if arm == BASE else str(place / "model")
    student = loaded_student(folder, recipe)
    with console.bar("evaluate", len(samples), "question") as bar:
        frames = FrameCache(read=clip_reader(recipe.data.timeout, run))
        rows = ask(student, samples, recipe.evaluate, recipe.student.sampling.sampling(), frames, bar)
    write_lines(place / "answers.jsonl", rows)
    write_json(place / "scores.json", summarise(rows))
