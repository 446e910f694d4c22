"""Trackers that get the history's rows besides (training.report_to), by transformers' own callbacks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from enhancer.train_settings import TRACKERS
from vdm_priors.errors import UserError

TENSORBOARD = "tensorboard"  # its folder beside history.jsonl


def check_tracker(name: str) -> None:
    """UserError where the tracker's package is not installed."""
    if name in TRACKERS and importlib.util.find_spec(TRACKERS[name]) is None:
        raise UserError(f"training.report_to is {name}, which is not installed: `pip install "
                        f"{TRACKERS[name].replace('_', '-')}`, or set it to none: history.jsonl has every step anyway.")


def tracker_callbacks(name: str, folder: Path, writes: bool) -> list[Any]:
    """The callbacks of a tracker for a training in `folder`; writes: whether this process does (one of them does).

    TensorBoard's files go to <folder>/tensorboard, since the Trainer's own folder is deleted after a training.
    """
    if name != TENSORBOARD or not writes:
        return []  # the others' are made by the Trainer (TrainingArguments.report_to)
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(folder / TENSORBOARD)))]


def close_tracker(name: str) -> None:
    """Ends the run that a tracker would go on with in the next training of this process."""
    if name == "wandb":
        import wandb

        wandb.finish()
