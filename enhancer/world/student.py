"""Trains the embedded world's base student: it learns to see things, colours and squares, and nothing about motion.

The supervision is dense (every thing's first and last square), because a model this small stays at chance for
thousands of steps when only a one-word answer is supervised. First the vision tower learns what each cell holds
(vision.py), then the whole model learns captions: the main job's training with λ = 0. It does so in rounds, each on a
world of its own with a fresh rise and fall of the learning rates (warm restarts, Loshchilov & Hutter 2017), so that it
meets new clips and cannot learn them by heart.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from enhancer.data.samples import Sample, load_samples
from enhancer.training import AlignmentSettings, TrainSettings, train
from enhancer.video.clip import FrameCache, Sampling
from enhancer.world.make import WorldSettings, clip_record, make_world
from enhancer.world.text import TYPES, vocabulary_text
from enhancer.world.truth import load_truth
from enhancer.world.vision import warm_up

CACHE = 2 << 30  # bytes of decoded clips kept in memory
CELL = 16  # pixels of a visual token's side: patch 8, merged by 2


def _world() -> WorldSettings:
    """All colour-shape pairs: from some only, the student learns that the others do not exist."""
    return WorldSettings(seed=11, train_clips=10000, test_clips=300, all_pairs=True)


def _training() -> TrainSettings:
    return TrainSettings(steps=1600, optimizer="muon", learning_rate_llm=4e-3, learning_rate_merger=2e-3,
                         learning_rate_vision=1e-3, weight_decay=0.05, warmup=0.05, save_every=200,
                         alignment=AlignmentSettings(weight=0.0))


@dataclass
class Round:
    """One training of the base student, on a world of its own."""

    steps: int = field(default=1600, metadata={"help": "optimiser steps", "min": 1})
    short: float = field(default=0.4, metadata={
        "help": "share of short questions among the samples: one colour, shape, number or square", "min": 0, "max": 1})
    description: float = field(default=0.3, metadata={
        "help": "share of samples in which the things are to be named, with their squares; the rest asks for the squares "
                "of named things", "min": 0, "max": 1})


def _rounds() -> list[Round]:
    """All three kinds of questions all the time: squares of named things teach to see, descriptions to read names off the
    clip, and short answers, whose few tokens count little beside those, how questions are answered."""
    return [Round(), Round(1200)]


@dataclass
class StudentTraining:
    """Settings of the base student: its world, its size and its training."""

    world: WorldSettings = field(default_factory=_world)
    training: TrainSettings = field(default_factory=_training)
    rounds: list[Round] = field(default_factory=_rounds, metadata={
        "help": "trainings one after the other; round k's world has the seed world.seed + k, its steps replace training.steps"})
    vision_steps: int = field(default=3000, metadata={"help": "steps of the vision tower's warm start", "min": 1})
    vision_batch: int = field(default=8, metadata={"help": "clips a step of the warm start", "min": 1})
    vision_rate: float = field(default=4e-3, metadata={"help": "peak learning rate of the warm start", "min": 0})
    frames: int = field(default=8, metadata={"help": "frames the student sees of a clip", "min": 2})
    hidden: int = field(default=128, metadata={"help": "width of the language model", "min": 32})
    layers: int = field(default=4, metadata={"help": "layers of the language model", "min": 1})
    vision_depth: int = field(default=2, metadata={"help": "layers of the vision tower", "min": 1})
    seed: int = field(default=0, metadata={"help": "seed of weights and data order"})

    def check(self) -> list[str]:
        """Faults between keys, as sentences with the dotted path."""
        faults = [] if self.rounds else ["training.rounds: at least one round is needed"]
        return faults + [f"training.rounds.{n}: short and description are shares of the same samples; {one.short:g} and "
                         f"{one.description:g} are more than 1" for n, one in enumerate(self.rounds)
                         if one.short + one.description > 1]


def corpus(world: WorldSettings, clips: int = 1500) -> list[str]:
    """Texts of the world, to train the small tokenizer on."""
    texts = vocabulary_text()
    for index in range(clips):
        record, question, static = clip_record(world, "train", index, TYPES[index % len(TYPES)])
        texts += [f"{question.text} {' '.join(question.options)}", f" {record['caption']}",
                  *(" ".join(pair) for pair in static.values())]
    return texts


def train_student(folder: Path, settings: StudentTraining, progress=None) -> Path:
    """Worlds, tokenizer, untrained model, trainings, float16 export to folder/model; continues after an interruption."""
    from vlm_hooks.families import load_student
    from vlm_hooks.small import build_small_student

    start, partial, seeing = folder / "start", folder / "start.part", folder / "seeing"
    if not start.is_dir():
        build_small_student(partial, corpus(settings.world), hidden=settings.hidden, layers=settings.layers,
                            vision_depth=settings.vision_depth, seed=settings.seed)
        partial.rename(start)
    if not seeing.is_dir():
        world, student = _world_of_round(folder, settings, 0, progress), load_student(start)
        videos = sorted((world / "videos").glob("train-*.mp4"))
        warm_up(student, videos, load_truth(world), folder / "vision", steps=settings.vision_steps,
                batch=settings.vision_batch, rate=settings.vision_rate, seed=settings.seed, frames=settings.frames,
                cell=CELL, cache=FrameCache(CACHE), progress=progress)
        _save(student, seeing)
    before = seeing
    for number, one in enumerate(settings.rounds):
        after = folder / f"round{number}"
        if not (after / "model").is_dir():
            world = _world_of_round(folder, settings, number, progress)
            samples, _ = load_samples(world / "train_static.json", world)
            student = load_student(before)
            chosen = asked(samples, one, settings.seed + number)
            train(student, chosen, replace(settings.training, steps=one.steps), after, sampling=Sampling(frames=settings.frames),
                  frame_cache=FrameCache(CACHE), progress=progress, seed=settings.seed + number)
            _save(student, after / "model")
        before = after / "model"
    model = folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    student = load_student(before)
    student.model.half()
    _save(student, model)
    return model


def asked(samples: list[Sample], one: Round, seed: int) -> list[Sample]:
    """As many different samples as have the round's shares: of the commonest kind every one, of the others a part.

    Few samples seen often are learnt by heart: with one sample a clip, five times, colours stayed at what guessing among
    the things of the clip gives.
    """
    shares = {"places": 1 - one.short - one.description, "short": one.short, "description": one.description}
    draw, chosen = random.Random(seed), []
    for kind, share in shares.items():
        of_kind = [sample for sample in samples if sample.question_type == kind]
        chosen += draw.sample(of_kind, round(len(of_kind) * share / max(shares.values())))
    return sorted(chosen, key=lambda sample: sample.id)


def _world_of_round(folder: Path, settings: StudentTraining, number: int, progress) -> Path:
    world = folder / f"world{number}"
    make_world(world, replace(settings.world, seed=settings.world.seed + number), progress, workers=2)
    return world


def _save(student, folder: Path) -> None:
    """Model and processor, complete or not there."""
    partial = folder.with_name(f"{folder.name}.part")
    student.model.save_pretrained(partial)
    student.processor.save_pretrained(partial)
    partial.rename(folder)
