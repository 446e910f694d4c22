"""Jobs: what a recipe's `job` key can name, and loading a recipe for its job.

A module of jobs defines `JOBS: dict[str, Job]` and is listed in JOB_MODULES. Modules are imported
in order until the job is found, so that a light command does not load what it does not need.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from enhancer.console import Console
from enhancer.recipe import build, nearest_name
from enhancer.recipe_files import find_recipe, read_raw
from vdm_priors.errors import RecipeError

JOB_MODULES = ("enhancer.pipeline", "enhancer.world.jobs", "enhancer.experiment.jobs", "enhancer.adapters.job", "enhancer.adapters.probe")
DEFAULT_JOB = "enhance"


@dataclass(frozen=True)
class Job:
    """One kind of job.

    schema: dataclass of the recipe; run(recipe, console, fresh=False) does the work and returns the
    run folder; validate(recipe, console) -> bool says before any model loads what the job would
    need, and whether it could run.
    """

    schema: type
    run: Callable[..., Path]
    validate: Callable[[Any, Console], bool]


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe with its job."""

    job: Job
    recipe: Any
    path: Path


def find_job(name: str) -> Job:
    """The job of that name; RecipeError with the nearest name."""
    known: list[str] = []
    for module in JOB_MODULES:
        if importlib.util.find_spec(module) is None:
            continue
        jobs = importlib.import_module(module).JOBS
        if name in jobs:
            return jobs[name]
        known += jobs
    nearest = nearest_name(str(name), known)
    hint = f"did you mean '{nearest}'?" if nearest else f"known jobs: {', '.join(known)}"
    raise RecipeError(f"job: there is no job '{name}'; {hint}")


def load_recipe(name: str | Path, overrides: list[str] = ()) -> LoadedRecipe:
    """Reads and checks a recipe given by path or shipped name; RecipeError lists every fault."""
    path = find_recipe(str(name))
    raw = read_raw(path, list(overrides))
    job = find_job(raw.get("job", DEFAULT_JOB))
    return LoadedRecipe(job, build(job.schema, raw, str(path)), path)
