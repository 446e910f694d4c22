"""One stage of an adapter's chain: answers by the main job's training, or an objective of the adapter's own.

A stage's folder has history.jsonl while it runs, and the trained adapter (with its host, where that was trained) in
`model` once it is done; `stage.json` is written last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from enhancer.adapters.samples import labels_of
from enhancer.adapters.schema import ANSWER, StageSettings, StageTraining
from enhancer.data.samples import Problem, Sample
from enhancer.processes import Process
from enhancer.runfolder import read_json, write_json
from enhancer.trainer_arguments import training_arguments
from enhancer.training import HISTORY, remove_checkpoints, train
from vdm_priors.errors import ClipError, SampleError, UserError
from vlm_hooks.adapters.base import Objective
from vlm_hooks.adapters.model import AdapterModel

DONE = "stage.json"
Progress = Callable[[int, int, str], None]


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
) -> list[Problem]:
    """Trains the model in place and saves it; the samples that were left out.

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
        problems, last = _train_objective(model, stage, samples, reader, folder, seed, progress)
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


# ---- an objective of the adapter's own -----------------------------------------------------------


class _Clips(Dataset):
    """(clip, sample) of the samples that can be read and that `check` lets pass; the next one stands in for another."""

    def __init__(self, samples: Sequence[Sample], reader: Any, check: Callable[[Any], None]) -> None:
        self.samples, self.reader, self.check = samples, reader, check
        self.problems: dict[str, Problem] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Sample]:
        for offset in range(len(self.samples)):
            sample = self.samples[(index + offset) % len(self.samples)]
            try:
                clip = self.reader.get(sample.video)
                self.check(clip)
                return clip, sample
            except (ClipError, SampleError) as error:
                self.problems[sample.id] = Problem(sample.id, str(error))
        raise SampleError(
            f"None of the {len(self.samples)} clips can be used: {next(iter(self.problems.values())).reason}"
        )


class _History(TrainerCallback):
    """A row of history.jsonl each time the Trainer logs, and the progress."""

    def __init__(self, path: Path, progress: Progress | None) -> None:
        self.path, self.progress = path, progress
        self.last: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            self.last = {name: float(value) for name, value in logs.items() if name != "epoch"}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **self.last}) + "\n")
            if self.progress:
                self.progress(state.global_step, state.max_steps, f"loss {self.last['loss']:.3f}")


class ObjectiveTrainer(Trainer):
    """The Trainer with a learning rate for each part of the model, and the head; what an objective gives is logged.

    Of several processes each has a batch of its own, in which objectives that compare samples compare them.
    """

    def __init__(self, objective: Objective, settings: StageTraining, **rest: Any) -> None:
        self.settings = settings
        self._parts: dict[str, float] = {}
        super().__init__(model=objective, **rest)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            objective, settings = self.model, self.settings
            inside = {id(parameter) for parameter in objective.model.parameters()}
            members = {part: [p for _, p in named] for part, named in objective.model.student.parts().items()}
            members["head"] = [p for p in objective.parameters() if id(p) not in inside]
            groups = []
            for part, parameters in members.items():
                rate = settings.rate(part)
                for parameter in parameters:
                    parameter.requires_grad_(rate > 0)
                for matrices, decay in ((True, settings.weight_decay), (False, 0.0)):
                    chosen = [p for p in parameters if rate > 0 and (p.ndim > 1) == matrices]
                    groups += [{"params": chosen, "lr": rate, "weight_decay": decay}] if chosen else []
            optimizer, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer(groups, **arguments)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        found = model(**inputs)
        if not torch.isfinite(found["loss"]):
            raise UserError(
                f"The loss became {float(found['loss'].detach())} at step {self.state.global_step + 1}: lower the "
                "stage's learning rates."
            )
        self._found = {name: value.detach().float() for name, value in found.items() if name != "loss"}
        return (found["loss"], found) if return_outputs else found["loss"]

    def log(self, logs: dict[str, float], *rest: Any, **further: Any) -> None:
        if "loss" in logs:
            found = self.accelerator.reduce(self._found, "mean")  # of the processes
            logs = {**logs, **{name: float(value) for name, value in found.items()}}
        super().log(logs, *rest, **further)


def _train_objective(
    model: AdapterModel,
    stage: StageSettings,
    samples: Sequence[Sample],
    reader: Any,
    folder: Path,
    seed: int,
    progress: Progress | None,
) -> tuple[list[Problem], dict[str, float]]:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    objective = model.adapter.OBJECTIVES[stage.objective](model, labels_of(samples)).to(model.device)
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    clips, history = _Clips(samples, reader, objective.check), _History(folder / HISTORY, progress)
    arguments = training_arguments(stage.training, folder, seed, model.device)
    arguments.save_strategy, arguments.logging_strategy, arguments.logging_steps = (
        "no",
        "steps",
        stage.training.log_every,
    )
    trainer = ObjectiveTrainer(
        objective,
        stage.training,
        args=arguments,
        train_dataset=clips,
        callbacks=[history],
        data_collator=lambda rows: objective.batch([clip for clip, _ in rows], [sample for _, sample in rows]),
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
            parameter.grad = None
        model.eval()
    problems = gather_object(list(clips.problems.values()))  # each process reads its own share of the clips
    return list(dict.fromkeys(problems)), history.last
