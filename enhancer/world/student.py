"""Trains the embedded world's base student: it learns to see things, colours and squares, and nothing about motion.

The supervision is dense (every thing's first and last square), because a model this small stays at chance for
thousands of steps when only a one-word answer is supervised. First the vision tower learns what each cell holds
(vision.py), then the whole model learns captions: the main job's training with λ = 0.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from enhancer.data.samples import load_samples
from enhancer.training import AlignmentSettings, TrainSettings, train
from enhancer.video.clip import FrameCache, Sampling
from enhancer.world.make import WorldSettings, clip_record, make_world
from enhancer.world.text import TYPES, vocabulary_text
from enhancer.world.truth import load_truth
from enhancer.world.vision import warm_up

CELL = 16  # pixels of a visual token's side: patch 8, merged by 2


def _world() -> WorldSettings:
    return WorldSettings(seed=11, train_clips=10000, test_clips=300)


def _training() -> TrainSettings:
    return TrainSettings(steps=3600, learning_rate_llm=2e-3, learning_rate_merger=1e-3, learning_rate_vision=5e-4,
                         weight_decay=0.05, warmup=0.05, save_every=200, alignment=AlignmentSettings(weight=0.0))


@dataclass
class StudentTraining:
    """Settings of the base student: its world, its size and its training."""

    world: WorldSettings = field(default_factory=_world)
    training: TrainSettings = field(default_factory=_training)
    vision_steps: int = field(default=700, metadata={"help": "steps of the vision tower's warm start", "min": 1})
    vision_batch: int = field(default=16, metadata={"help": "clips a step of the warm start", "min": 1})
    vision_rate: float = field(default=2e-3, metadata={"help": "peak learning rate of the warm start", "min": 0})
    frames: int = field(default=8, metadata={"help": "frames the student sees of a clip", "min": 2})
    hidden: int = field(default=128, metadata={"help": "width of the language model", "min": 32})
    layers: int = field(default=4, metadata={"help": "layers of the language model", "min": 1})
    vision_depth: int = field(default=2, metadata={"help": "layers of the vision tower", "min": 1})
    seed: int = field(default=0, metadata={"help": "seed of weights and data order"})


def corpus(world: WorldSettings, clips: int = 1500) -> list[str]:
    """Texts of the world, to train the small tokenizer on."""
    texts = vocabulary_text()
    for index in range(clips):
        record, question, static = clip_record(world, "train", index, TYPES[index % len(TYPES)])
        texts += [f"{question.text} {' '.join(question.options)}", f" {record['caption']}", " ".join(static)]
    return texts


def train_student(folder: Path, settings: StudentTraining, progress=None) -> Path:
    """World, tokenizer, untrained model, training, float16 export to folder/model; continues after an interruption."""
    from vlm_hooks.families import load_student
    from vlm_hooks.small import build_small_student

    world, start, partial = folder / "world", folder / "start", folder / "start.part"
    seeing = folder / "seeing"
    make_world(world, settings.world, progress, workers=2)
    if not start.is_dir():
        build_small_student(partial, corpus(settings.world), hidden=settings.hidden, layers=settings.layers,
                            vision_depth=settings.vision_depth, seed=settings.seed)
        partial.rename(start)
    cache = FrameCache(2 << 30)
    if not seeing.is_dir():
        student = load_student(start)
        videos = sorted((world / "videos").glob("train-*.mp4"))
        warm_up(student, videos, load_truth(world), folder / "vision", steps=settings.vision_steps,
                batch=settings.vision_batch, rate=settings.vision_rate, seed=settings.seed, frames=settings.frames,
                cell=CELL, cache=cache, progress=progress)
        student.model.save_pretrained(partial)
        student.processor.save_pretrained(partial)
        partial.rename(seeing)
    student = load_student(seeing)
    samples, _ = load_samples(world / "train_static.json", world)
    train(student, samples, settings.training, folder, sampling=Sampling(frames=settings.frames),
          frame_cache=cache, progress=progress, seed=settings.seed)
    model = folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    student.model.half().save_pretrained(model)
    student.processor.save_pretrained(model)
    return model
