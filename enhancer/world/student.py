"""Trains the embedded world's base student: it learns to see things, colours and squares, and nothing about motion.

The supervision is dense (every thing's first and last square), because a model this small stays at chance for
thousands of steps when only a one-word answer is supervised. transformers' Trainer runs it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from enhancer.video.clip import Sampling, read_clip
from enhancer.world.make import WorldSettings, clip_record, make_world
from enhancer.world.text import TYPES, vocabulary_text


@dataclass
class StudentTraining:
    """Settings of the base student's training."""

    world: WorldSettings = field(default_factory=lambda: WorldSettings(seed=11, train_clips=10000, test_clips=300))
    steps: int = field(default=3000, metadata={"help": "optimizer steps", "min": 1})
    batch_size: int = field(default=32, metadata={"help": "clips a step", "min": 1})
    learning_rate: float = field(default=2e-3, metadata={"help": "peak of the cosine schedule", "min": 0.0})
    frames: int = field(default=8, metadata={"help": "frames the student sees of a clip", "min": 2})
    hidden: int = field(default=128, metadata={"help": "width of the language model", "min": 32})
    layers: int = field(default=4, metadata={"help": "layers of the language model", "min": 1})
    vision_depth: int = field(default=2, metadata={"help": "layers of the vision tower", "min": 1})
    seed: int = field(default=0, metadata={"help": "seed of weights and data order"})
    bf16: bool = field(default=False, metadata={"help": "bfloat16 autocast; no gain on the CPUs we measured"})
    save_every: int = field(default=500, metadata={"help": "steps between checkpoints; a rerun continues from the last"})


class StaticClips(torch.utils.data.Dataset):
    """Question, answer and decoded frames (uint8) of every row of a conversations file."""

    def __init__(self, world: Path, name: str, frames: int):
        self.rows = json.loads((world / name).read_text(encoding="utf-8"))
        self.frames = [read_clip(world / row["video"], Sampling(frames=frames)).frames for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        human, answer = (turn["value"] for turn in self.rows[index]["conversations"])
        return {"frames": self.frames[index], "question": human.removeprefix("<video>\n"), "answer": answer}


class Collate:
    """Frames and text to a Qwen2.5-VL batch whose labels are the answer's tokens and the end of the turn."""

    def __init__(self, processor):
        self.processor = processor
        self.video = [{"type": "video"}]

    def __call__(self, rows: list[dict]) -> dict:
        template = self.processor.apply_chat_template
        prompts = [template([{"role": "user", "content": [*self.video, {"type": "text", "text": row["question"]}]}],
                            add_generation_prompt=True, tokenize=False) for row in rows]
        texts = [prompt + row["answer"] + "<|im_end|>" for prompt, row in zip(prompts, rows, strict=True)]
        batch = self.processor(text=texts, videos=[list(row["frames"]) for row in rows], return_tensors="pt", padding=True,
                               padding_side="right")
        labels = batch["input_ids"].clone()
        tokens = self.processor.tokenizer
        for n, row in enumerate(rows):
            answer = len(tokens(row["answer"] + "<|im_end|>")["input_ids"])
            length = int(batch["attention_mask"][n].sum())
            labels[n, : length - answer] = -100
            labels[n, length:] = -100
        return {**batch, "labels": labels}


class _Report(TrainerCallback):
    def __init__(self, progress):
        self.progress = progress

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.progress and logs and "loss" in logs:
            self.progress(state.global_step, state.max_steps, f"loss {logs['loss']:.3f}")


def corpus(world: WorldSettings, clips: int = 1500) -> list[str]:
    """Texts of the world for the tokenizer."""
    texts = vocabulary_text()
    for index in range(clips):
        record, question, static = clip_record(world, "train", index, TYPES[index % len(TYPES)])
        texts += [f"{question.text} {' '.join(question.options)}", f" {record['caption']}", " ".join(static)]
    return texts


def train_student(folder: Path, settings: StudentTraining, progress=None) -> Path:
    """World, tokenizer, untrained model, training, export to folder/model; continues after an interruption."""
    from transformers import AutoProcessor

    from vlm_hooks.families import load_student
    from vlm_hooks.small import build_small_student

    world, start = folder / "world", folder / "start"
    make_world(world, settings.world, progress, workers=2)
    if not (start / "config.json").is_file():
        build_small_student(start, corpus(settings.world), hidden=settings.hidden, layers=settings.layers,
                            vision_depth=settings.vision_depth, seed=settings.seed)
    student = load_student(start)
    data = StaticClips(world, "train_static.json", settings.frames)
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"), max_steps=settings.steps, per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate, lr_scheduler_type="cosine", warmup_steps=max(settings.steps // 20, 1),
        weight_decay=0.05, bf16=settings.bf16, use_cpu=True, seed=settings.seed, logging_steps=25, report_to=[],
        save_steps=settings.save_every, save_total_limit=1, disable_tqdm=True, remove_unused_columns=False,
        max_grad_norm=1.0, adam_beta2=0.98, dataloader_pin_memory=False,
    )
    trainer = Trainer(model=student.model, args=arguments, train_dataset=data, data_collator=Collate(student.processor),
                      callbacks=[_Report(progress)])
    trainer.train(resume_from_checkpoint=any((folder / "checkpoints").glob("checkpoint-*")))
    student.model.half().save_pretrained(folder / "model")
    AutoProcessor.from_pretrained(start).save_pretrained(folder / "model")
    (folder / "training.json").write_text(json.dumps(trainer.state.log_history, indent=1), encoding="utf-8")
    return folder / "model"
