"""The Trainer's arguments for our settings."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from enhancer.launch import check_launch, launch_file
from enhancer.tracking import TENSORBOARD, check_tracker
from enhancer.train_settings import TrainSettings

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def training_arguments(settings: TrainSettings, folder: Path, seed: int, device: torch.device) -> TrainingArguments:
    """The arguments; AlignedTrainer alone logs. Raises UserError as `check_launch` and `check_tracker`."""
    check_launch(settings, device.type)
    check_tracker(settings.report_to)
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
        dataloader_persistent_workers=settings.workers > 0,  # else every epoch decodes again and finds bad clips anew
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        logging_strategy="no",
        report_to=[] if settings.report_to in ("none", TENSORBOARD) else [settings.report_to],
        run_name="/".join(part for part in folder.absolute().parts[-5:-1] if part != "arms"),  # run/arm/seed
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
