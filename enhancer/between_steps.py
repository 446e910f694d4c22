"""What happens between the Trainer's steps: the aligner's step, the history's row, the checkpoint's last file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class BetweenSteps(TrainerCallback):
    """Calls an AlignedTrainer at the places that transformers' Trainer offers."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.learning_rate = 0.0
        self.began = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.aligner_steps = self.trainer.create_aligner_steps()
        if self.trainer.resumed_from is not None:
            self.trainer.aligner_steps.load(self.trainer.resumed_from)
        self.began = time.monotonic()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        group = self.trainer.optimizer.param_groups[0]
        self.learning_rate = group["lr"]
        self.trainer.aligner_steps.step(group["lr"] / group["initial_lr"])

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        self.trainer.finish_step(self.learning_rate, now - self.began)
        self.began = now

    def on_save(self, args, state, control, **kwargs):
        self.trainer.complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")
