"""How a training was launched: its settings files, and what cannot work as it was started."""

from __future__ import annotations

import importlib.util
import json
import os
from functools import partial
from pathlib import Path

from enhancer.processes import Process
from enhancer.recipe_files import recipes_folder
from enhancer.tracking import check_tracker
from enhancer.train_settings import TrainSettings
from vdm_priors.errors import RecipeError, UserError

START = "start with `torchrun --nproc-per-node N -m enhancer train RECIPE`"


def launch_file(name: str, key: str) -> dict:
    """A JSON file of launch settings, given by path or by its name among the shipped recipes (launch/fsdp2.json).

    Raises RecipeError, with the recipe's `key`, where there is none or it is not readable.
    """
    candidates = [Path(name), recipes_folder() / name, recipes_folder() / Path(name.removeprefix("recipes/"))]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        shipped = ", ".join(sorted(f"launch/{path.name}" for path in (recipes_folder() / "launch").glob("*.json")))
        raise RecipeError(f"{key}: there is no file {name!r}; shipped with the recipes are {shipped}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RecipeError(f"{key}: {path} is not readable JSON ({error}).") from error


def processes_of_training(settings: TrainSettings) -> int:
    """Processes that train a student: those of this launch; to shard, else a GPU each, or 8 where there is none."""
    import torch

    count = Process.this().count
    if count == 1 and settings.sharded:
        return torch.cuda.device_count() if torch.cuda.device_count() > 1 else 8
    return count


def launch_faults(settings: TrainSettings) -> list[str]:
    """What a training's keys name that is not there: a file of launch settings, a tracker's package."""
    checks = [partial(launch_file, name, f"training.{key}")
              for key, name in (("fsdp", settings.fsdp), ("deepspeed", settings.deepspeed)) if name]
    faults = []
    for check in (*checks, partial(check_tracker, settings.report_to)):
        try:
            check()
        except UserError as error:
            faults.append(str(error))
    return faults


def check_launch(settings: TrainSettings, device: str) -> None:
    """UserError where there are fewer GPUs than processes, or nothing to shard over, or a library is missing."""
    import torch

    process = Process.this()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", process.count))
    if device == "cuda" and here > torch.cuda.device_count():
        raise UserError(f"{here} processes were started on this machine, which has {torch.cuda.device_count()} GPUs: a "
                        f"training takes one GPU a process. Start at most {torch.cuda.device_count()}, and raise "
                        "training.accumulate for the same number of samples a step.")
    for key in ("fsdp", "deepspeed"):
        if getattr(settings, key) and process.count == 1:
            raise UserError(f"training.{key} shards the model over several processes, but there is one: {START}, or "
                            f"set training.{key} to null.")
    if settings.deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise UserError("training.deepspeed is set, but DeepSpeed is not installed: `pip install deepspeed`, or shard "
                        "with training.fsdp.")
