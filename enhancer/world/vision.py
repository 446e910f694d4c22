"""Warm start of the student's vision tower on the world's masks: which colour and shape is in each quarter of a cell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from enhancer.muon import MuonAdamW, is_hidden_matrix
from enhancer.video.clip import FrameCache, Sampling
from enhancer.world.render import render_masks
from enhancer.world.scene import COLOURS, SHAPES
from enhancer.world.truth import WorldTruth

KINDS = (*COLOURS, *SHAPES)


class LabelledClips(torch.utils.data.Dataset):
    """Frames uint8 [N, H, W, 3] and labels [T, 4 * kinds]: share of each half-cell that a colour or shape covers."""

    def __init__(self, videos: list[Path], truth: WorldTruth, frames: int, cell: int, cache: FrameCache):
        self.videos, self.truth, self.cell, self.cache = videos, truth, cell, cache
        self.sampling = Sampling(frames=frames)

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict:
        clip = self.cache.get(self.videos[index], self.sampling)
        scene = self.truth.scene(self.videos[index].name)
        maps = np.zeros((len(clip.times), len(KINDS), scene.height, scene.width), dtype=np.float32)
        for n, time in enumerate(clip.times):
            for thing, mask in zip(scene.things, render_masks(scene, round(time * scene.fps)), strict=True):
                maps[n, KINDS.index(thing.colour)] += mask
                maps[n, KINDS.index(thing.shape)] += mask
        half, rows, columns = self.cell // 2, scene.height // self.cell, scene.width // self.cell
        pairs = maps.reshape(len(maps) // 2, 2, len(KINDS), rows, 2, half, columns, 2, half).mean(axis=(1, 5, 8))
        labels = pairs.transpose(0, 2, 4, 1, 3, 5).reshape(-1, len(KINDS) * 4)  # token order: time, row, column
        return {"frames": clip.frames, "labels": torch.from_numpy(labels.clip(0, 1))}


class _Report(TrainerCallback):
    def __init__(self, progress):
        self.progress = progress

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.progress and logs and "loss" in logs:
            self.progress(state.global_step, state.max_steps, f"vision loss {float(logs['loss']):.4f}")


def warm_up(student, videos: list[Path], truth: WorldTruth, folder: Path, *, steps: int, batch: int, rate: float, seed: int,
            frames: int, cell: int, cache: FrameCache, progress=None) -> float:
    """Train the vision tower and merger in place by MuonAdamW; returns the last logged loss.

    Shapes are what takes long: of the half-cells that one thing fills, 85% are told right after 3000 steps of 8 clips, and
    44% after 1000 steps of 16 with AdamW, which takes as long as 1900 steps of 8 (chance 25).
    """
    from vlm_hooks.vision_warmup import CellLabels

    def collate(rows: list[dict]) -> dict:
        inputs = student.processor.video_processor([list(row["frames"]) for row in rows], return_tensors="pt",
                                                   do_sample_frames=False)
        return {"pixel_values_videos": inputs["pixel_values_videos"], "video_grid_thw": inputs["video_grid_thw"],
                "labels": torch.stack([row["labels"] for row in rows])}

    torch.manual_seed(seed)
    module = CellLabels(student.model, 4 * len(KINDS))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch, learning_rate=rate,
        lr_scheduler_type="cosine", warmup_steps=max(steps // 20, 1), use_cpu=True, seed=seed,
        logging_steps=min(25, steps), report_to=[], save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        dataloader_pin_memory=False)
    data = LabelledClips(videos, truth, frames, cell, cache)
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: [*module.head.parameters()]}
    for name, parameter in student.model.model.visual.named_parameters():
        groups[is_hidden_matrix(name, parameter)].append(parameter)
    optimizer = MuonAdamW([{"params": chosen, "muon": muon} for muon, chosen in groups.items()], lr=rate, weight_decay=0.01)
    trainer = Trainer(model=module, args=arguments, train_dataset=data, data_collator=collate, optimizers=(optimizer, None),
                      callbacks=[_Report(progress)])
    trainer.remove_callback(PrinterCallback)  # progress says the same, readably
    trainer.train()
    return next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry)
