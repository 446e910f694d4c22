"""One stage of an adapter's chain: answers by the main job's training, or an objective of the adapter's own.

A stage's folder has history.jsonl while it runs, and the trained adapter (with its host, where that was trained) in
`model` once it is done; `stage.json` is written last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from enhancer.adapters.objective_training import train_objective
from enhancer.adapters.schema import ANSWER, StageSettings
from enhancer.data.samples import Problem, Sample
from enhancer.processes import Process
from enhancer.runfolder import read_json, write_json
from enhancer.training import Progress, remove_checkpoints, train
from vdm_priors.errors import UserError
from vlm_hooks.adapters.model import AdapterModel

DONE = "stage.json"


def is_done(folder: Path) -> bool:
    """Whether the stage of that folder was trained to its end."""
    return (folder / DONE).is_file()


def run_stage(
    model: AdapterModel,
    stage: StageSettings,
    samples: Sequence[Sample],
    reader: Any,
    folder: Path,
    seed: int,
    progress: Progress | None = None,
    priors: Callable | None = None,
    held_out: Sequence[Sample] = (),
) -> list[Problem]:
    """Trains the model in place and saves it; the samples that were left out. held_out: samples that an objective is
    measured on afterwards.

    Of several processes all must call it: they train the same model, and process 0 writes. Raises UserError as `train`.
    """
    started = time.monotonic()
    _check_rates(model, stage)
    if stage.objective == ANSWER:
        result = train(
            model.student,
            samples,
            stage.training,
            folder,
            priors=priors,
            frame_cache=reader,
            progress=progress,
            seed=seed,
        )
        problems, last = result.problems, {"answer_loss": result.history[-1]["ar_loss"]} if result.history else {}
    else:
        problems, last = train_objective(model, stage, samples, reader, folder, seed, progress, held_out)
    if Process.this().rank > 0:
        return problems
    reader.save(model.save_pretrained(folder / "model"))
    write_json(
        folder / DONE,
        {
            "name": stage.name,
            "objective": stage.objective,
            "steps": stage.training.steps,
            "seconds": round(time.monotonic() - started, 1),
            "samples": len(samples),
            **last,
        },
    )
    remove_checkpoints(folder)
    return problems


def stage_summary(folder: Path) -> dict:
    """What `run_stage` wrote of a finished stage."""
    return read_json(folder / DONE, {})


def _check_rates(model: AdapterModel, stage: StageSettings) -> None:
    own = model.adapter.parts()
    unknown = sorted(set(stage.training.rates) - set(own))
    if unknown:
        raise UserError(
            f"stages.{stage.name}.training.rates: the adapter {model.adapter.NAME} has no part "
            f"{', '.join(unknown)}; it has {', '.join(own)}."
        )
