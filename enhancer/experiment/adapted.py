"""Cells whose student is a codec adapter (`set: {adapter: RECIPE}`): the adapter's own stages, on the matrix's data.

The recipe of `job: adapter` says which adapter, its settings, how clips are read and the chain of stages. Data, host,
questions and λ are the cell's, so that an adapter, its aligned twin and frames alone differ in nothing else. The
alignment loss is added in the stages that learn the questions' answers: priors are of the questions' words.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

from enhancer.adapters.schema import ANSWER, AdapterRecipe, StageSettings
from enhancer.console import Console
from enhancer.data.samples import Problem, Sample
from enhancer.recipe import build, to_plain
from enhancer.recipe_files import apply_override, find_recipe, read_raw
from enhancer.recipe_schema import EnhanceRecipe
from enhancer.runfolder import readable_write_errors, write_json
from enhancer.train_settings import UNCHANGING
from vdm_priors.errors import RecipeError

KEY = "adapter"  # names the adapter's recipe; with a dot behind it, begins the keys of that recipe
PARTS = ("adapter", "settings", "reading", "stages", "caption_question")  # what a cell takes from it
FILE = "adapter.yaml"
QUESTION = "question"


def adapter_recipe(name: str, changes: list[str], cell: EnhanceRecipe, source: str) -> AdapterRecipe:
    """The recipe of a cell's adapter on the cell's data and host; RecipeError where it cannot be.

    name: a recipe of `job: adapter`; changes: `key=value` of its keys; source: what messages call the cell.
    """
    path = find_recipe(name)
    raw = read_raw(path)
    if raw.get("job") != "adapter":
        raise RecipeError(f"{source} sets adapter to {path}, which is a recipe of the job '{raw.get('job', 'enhance')}'.")
    raw = copy.deepcopy(raw)
    for change in changes:
        if change.partition("=")[0].split(".")[0] not in PARTS[1:]:
            raise RecipeError(
                f"{source} sets adapter.{change}, which the matrix's base decides; of an adapter's recipe a level sets "
                f"{', '.join(PARTS[1:])}."
            )
        apply_override(raw, change)
    plain = to_plain(cell)
    common = {key: plain[key] for key in ("name", "output", "world", "data", "device", "threads", "evaluate")}
    own = {key: raw[key] for key in PARTS if key in raw}
    host = {"host": cell.student.model, "dtype": cell.student.dtype}
    made = build(AdapterRecipe, {"job": "adapter", "baseline": None, **own, **common, **host}, f"{source}, its adapter")
    if cell.weight(cell.arms[0]) > 0 and not any(_asks(stage) for stage in made.stages):
        raise RecipeError(f"{source} is aligned, but no stage of {path} learns the questions' answers.")
    return made


def adapter_key(recipe: AdapterRecipe, root: Path, ids: set[str]) -> dict[str, Any]:
    """What determines an adapter's trained weights beside the student, the questions and the alignment.

    ids: of the samples that the cell is trained on.
    """
    stages = []
    for stage in recipe.stages:
        training = dataclasses.asdict(stage.training)
        training.pop("alignment")
        plain = {key: value for key, value in training.items() if key not in UNCHANGING}
        taught = [] if _asks(stage) else [[s.id, s.question, s.answer] for s in _samples(recipe, stage, root, ids)]
        chosen = [stage.types] if _asks(stage) and stage.types is not None else []
        stages.append([stage.objective, stage.text, plain, taught, *chosen])
    return {
        "adapter": recipe.adapter,
        "settings": dataclasses.asdict(recipe.config()),
        "reading": dataclasses.asdict(recipe.reading),
        "stages": stages,
    }


def train_adapter(
    folder: Path, cell: EnhanceRecipe, recipe: AdapterRecipe, seed: int, root: Path, samples: list[Sample], console: Console
) -> list[Problem]:
    """Trains one adapter through its stages, unless that is done; returns the samples it had to leave out.

    folder: the training's folder in the pool, with priors.json; samples: those of the stages that ask the questions.
    A finished stage is not trained again.
    """
    import torch

    from enhancer.adapters.reading import ClipReader
    from enhancer.adapters.samples import of_types
    from enhancer.adapters.stages import is_done, run_stage
    from enhancer.arms import StoredPriors, arm_folder, is_trained
    from vlm_hooks.adapters import find_adapter
    from vlm_hooks.adapters.model import AdapterModel

    arm = cell.arms[0]
    place, weight = arm_folder(folder, arm.name, seed), cell.weight(arm)
    if is_trained(folder, arm.name, seed):
        return []
    started = time.monotonic()
    priors = StoredPriors(folder, cell, arm.spec().label) if weight > 0 else None
    places = [place / "stages" / f"{number}-{stage.name}" for number, stage in enumerate(recipe.stages, start=1)]
    done = [at for at in places if is_done(at) and (at / "model").is_dir()]
    torch.manual_seed(seed)
    model = (
        load_adapter(done[-1] / "model", recipe)
        if done
        else AdapterModel.create(host_path(recipe), find_adapter(recipe.adapter), recipe.config(), **_loading(recipe))
    )
    reader, problems = ClipReader(recipe.reading), []
    for stage, at in zip(recipe.stages[len(done) :], places[len(done) :], strict=True):
        asks = _asks(stage)
        ids = {sample.id for sample in samples}
        taught = of_types(samples, stage, "the matrix's data") if asks else _samples(recipe, stage, root, ids)
        alignment = dataclasses.replace(cell.training.alignment, weight=weight if asks else 0.0)
        stage = dataclasses.replace(stage, training=dataclasses.replace(stage.training, alignment=alignment))
        with readable_write_errors(at), console.bar(stage.name, stage.training.steps, "step") as bar:
            problems += run_stage(model, stage, taught, reader, at, seed, bar, priors if asks else None)
    with readable_write_errors(place):
        shutil.rmtree(place / "model", ignore_errors=True)
        (places[-1] / "model").rename(place / "model")
        write_json(
            place / "train.json",
            {
                "seconds": round(time.monotonic() - started, 2),
                "prior_source": None if weight == 0 else arm.spec().label,
                "lambda": weight,
                "seed": seed,
                "samples": len(samples),
                "left_out": len(problems),
            },
        )
    for at in places[:-1]:
        shutil.rmtree(at / "model", ignore_errors=True)
    return problems


def load_adapter(folder: Path, recipe: AdapterRecipe) -> Any:
    """A trained adapter on its host."""
    from vlm_hooks.adapters.model import AdapterModel

    return AdapterModel.from_pretrained(host_path(recipe), folder, **_loading(recipe))


def host_path(recipe: AdapterRecipe) -> str:
    """The host's folder or hub name."""
    from enhancer.shipped import student_path

    return student_path(recipe.host)


def _loading(recipe: AdapterRecipe) -> dict[str, Any]:
    import torch

    from enhancer.shipped import torch_device

    return {"dtype": getattr(torch, recipe.dtype), "device": torch_device(recipe.device)}


def _asks(stage: StageSettings) -> bool:
    """Whether a stage learns the answers of the cell's own questions."""
    return stage.objective == ANSWER and stage.text == QUESTION and stage.train is None


def _samples(recipe: AdapterRecipe, stage: StageSettings, root: Path, ids: set[str]) -> list[Sample]:
    """What another stage learns: of the cell's own file its clips alone."""
    from enhancer.adapters.samples import samples_of

    samples, _ = samples_of(recipe, stage, root)
    return samples if stage.train else [sample for sample in samples if sample.id in ids]
