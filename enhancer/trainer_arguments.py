"""The Trainer's arguments for our settings, and the errors of a launch that cannot work."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from transformers import TrainingArguments

from enhancer.processes import Process
from enhancer.train_settings import TrainSettings, launch_file
from vdm_priors.errors import UserError

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
START = "start with `torchrun --nproc-per-node N -m enhancer train RECIPE` (or `accelerate launch --num_processes N -m ...`)"


def training_arguments(settings: TrainSettings, folder: Path, seed: int, device: torch.device) -> TrainingArguments:
    """The arguments; nothing is reported but through our own history. Raises UserError as `check_launch`."""
    check_launch(settings, device.type)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 1,
        save_total_limit=2,  # the newest may still be incomplete
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=True,  # vision towers have layers that a model never asks
        fsdp=bool(settings.fsdp),
        fsdp_config=launch_file(settings.fsdp, "training.fsdp") if settings.fsdp else None,
        deepspeed=launch_file(settings.deepspeed, "training.deepspeed") if settings.deepspeed else None,
        seed=seed,
        data_seed=seed,
    )
    if arguments.n_gpu > 1:
        # DataParallel cannot carry the capture; several GPUs take torchrun or accelerate launch
        arguments._n_gpu = 1
    return arguments


def check_launch(settings: TrainSettings, device: str) -> None:
    """UserError where there are fewer GPUs than processes, or nothing to shard over, or a library is missing."""
    process = Process.this()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", process.count))
    if device == "cuda" and here > torch.cuda.device_count():
        raise UserError(f"{here} processes were started on this machine, which has {torch.cuda.device_count()} GPUs: a training "
                        f"takes one GPU a process. Start at most {torch.cuda.device_count()}, and raise training.accumulate for "
                        "the same number of samples a step.")
    for key in ("fsdp", "deepspeed"):
        if getattr(settings, key) and process.count == 1:
            raise UserError(f"training.{key} shards the model over several processes, but there is one: {START}, or set "
                            f"training.{key} to null.")
    if settings.deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise UserError("training.deepspeed is set, but DeepSpeed is not installed: `pip install deepspeed`, or shard with "
                        "training.fsdp.")
