"""Training of an objective of the adapter's own (EMA's warm-up, CoPE's pre-training, HY-Himmel's alignment).

transformers' Trainer on the Objective, with what the answers' training has (enhancer/trainer.py): a learning rate for
each part, a history, and checkpoints of what is trained, known by what the training is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from enhancer.adapters.samples import labels_of
from enhancer.adapters.schema import StageSettings, StageTraining
from enhancer.checkpoints import CHECKPOINTS, MARKER, checkpoint_to_resume, identity, readable_state
from enhancer.data.samples import Problem, Sample
from enhancer.processes import Process
from enhancer.runfolder import read_json, write_json, write_lines
from enhancer.step_log import rows_until
from enhancer.tracking import close_tracker, tracker_callbacks
from enhancer.train_settings import AUTO, NEVER
from enhancer.trainer_arguments import training_arguments
from enhancer.training import HISTORY, Progress
from enhancer.video.clip import Sampling
from vdm_priors.errors import ClipError, SampleError, UserError
from vlm_hooks.adapters.base import Objective
from vlm_hooks.adapters.model import AdapterModel
from vlm_hooks.lora import load_trained, save_trained


def train_objective(
    model: AdapterModel,
    stage: StageSettings,
    samples: Sequence[Sample],
    reader: Any,
    folder: Path,
    seed: int,
    progress: Progress | None = None,
    held_out: Sequence[Sample] = (),
) -> tuple[list[Problem], dict[str, float]]:
    """Trains the model in place by the stage's objective, from its newest checkpoint.

    The samples that were left out, of `held_out` too, and the last row of history.jsonl, with what the objective gives on `held_out`, which
    it does not learn from, as "test_<name>". Raises UserError as `train`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    settings, process = stage.training, Process.this()
    objective = model.adapter.OBJECTIVES[stage.objective](model, labels_of([*samples, *held_out])).to(model.device)
    # without checkpoints nobody asks for it, and large models take seconds to hash
    kept = settings.save_every > 0 or (folder / CHECKPOINTS).exists() or settings.resume not in (AUTO, NEVER)
    described = identity(settings, samples, Sampling(), seed, process.count, objective, None) if kept else {}
    clips = Clips(samples, reader, objective.check)
    trainer = ObjectiveTrainer(objective, settings, clips, folder, seed, described, progress)
    with trainer.accelerator.main_process_first():  # which alone deletes those that shall not be resumed
        checkpoint = checkpoint_to_resume(folder / CHECKPOINTS, described, settings.resume)
    last = trainer.run(checkpoint)
    others = Clips(held_out, reader, objective.check)
    if process.rank == 0:
        found = measured(objective, others, settings.batch_size)
        last |= {f"test_{name}": value for name, value in found.items()}
    # each process reads its own share of the clips
    problems = gather_object([*clips.problems.values(), *others.problems.values()])
    return list(dict.fromkeys(problems)), last


def measured(objective: Objective, held_out: Clips, batch_size: int) -> dict[str, float]:
    """Means over whole batches of what the objective gives, without learning (over the only batch, where one is not
    filled): what compares a batch's samples depends on how many there are. Nothing without samples that can be used."""
    clips, found = held_out.usable(), []
    objective.eval()
    while rows := list(islice(clips, batch_size)):
        if len(rows) == batch_size or not found:
            batch = objective.batch([clip for clip, _ in rows], [sample for _, sample in rows])
            with torch.no_grad():
                found.append(objective(**{name: value.to(objective.model.device) for name, value in batch.items()}))
    return {name: float(torch.stack([row[name].float() for row in found]).mean()) for name in (found[0] if found else ())}


class Clips(Dataset):
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

    def usable(self) -> Iterator[tuple[Any, Sample]]:
        """Those that can be read and pass, in order."""
        for sample in self.samples:
            try:
                clip = self.reader.get(sample.video)
                self.check(clip)
            except (ClipError, SampleError) as error:
                self.problems[sample.id] = Problem(sample.id, str(error))
                continue
            yield clip, sample


class ObjectiveTrainer(Trainer):
    """The Trainer with a learning rate for each part of the model, and the head; what an objective gives is logged.

    Of several processes each has a batch of its own, in which objectives that compare samples compare them.
    """

    def __init__(
        self,
        objective: Objective,
        settings: StageTraining,
        clips: Clips,
        folder: Path,
        seed: int,
        identity: dict,
        progress: Progress | None,
    ) -> None:
        self.settings, self.identity = settings, identity
        arguments = training_arguments(settings, folder / CHECKPOINTS, seed, objective.model.device)
        arguments.logging_strategy, arguments.logging_steps = "steps", settings.log_every
        super().__init__(
            model=objective,
            args=arguments,
            train_dataset=clips,
            data_collator=lambda rows: objective.batch([clip for clip, _ in rows], [sample for _, sample in rows]),
        )
        self.history = _History(self, folder / HISTORY, progress)
        self.remove_callback(PrinterCallback)
        trackers = tracker_callbacks(settings.report_to, folder, self.is_world_process_zero())
        for callback in (self.history, *trackers):
            self.add_callback(callback)

    def run(self, checkpoint: Path | None) -> dict[str, float]:
        """Train to the end, from the checkpoint if there is one; the last row of the history."""
        host = self.model.model
        required = {name: p.requires_grad for name, p in host.named_parameters()}
        start = read_json(checkpoint / MARKER, {})["step"] if checkpoint else 0
        self.history.rewind(start)
        if self.settings.gradient_checkpointing:
            host.gradient_checkpointing_enable()
        try:
            if start >= self.settings.steps:  # the Trainer would add a step
                load_trained(self.model, checkpoint)
            else:
                with readable_state(checkpoint):
                    self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            close_tracker(self.settings.report_to)
            if self.settings.gradient_checkpointing:
                host.gradient_checkpointing_disable()
            for name, parameter in host.named_parameters():
                parameter.requires_grad_(required[name])
                parameter.grad = None
            host.eval()
        return self.history.last

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

    # ---- checkpoints: what is trained, and last of all what the training is ----------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        os.makedirs(output_dir, exist_ok=True)
        save_trained(self.model, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.model, Path(resume_from_checkpoint))

    def complete(self, checkpoint: Path) -> None:
        """Writes the marker, once every process has written its part."""
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            write_json(checkpoint / MARKER, {"identity": self.identity, "step": self.state.global_step})


class _History(TrainerCallback):
    """A row of history.jsonl each time the Trainer logs, and the progress."""

    def __init__(self, trainer: ObjectiveTrainer, path: Path, progress: Progress | None) -> None:
        self.trainer, self.path, self.progress = trainer, path, progress
        self.last: dict[str, float] = {}

    def rewind(self, steps: int) -> None:
        """Keeps the rows of the first steps; those after them come again."""
        rows = rows_until(self.path, steps)
        self.last = {name: value for name, value in (rows[-1] if rows else {}).items() if name != "step"}
        if self.trainer.is_world_process_zero():
            write_lines(self.path, rows)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            self.last = {name: float(value) for name, value in logs.items() if name != "epoch"}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **self.last}) + "\n")
            if self.progress:
                self.progress(state.global_step, state.max_steps, f"loss {self.last['loss']:.3f}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")
