"""The jobs that make the shipped models, a few steps long: they end in folders that the loaders read, and they continue."""

from __future__ import annotations

import shutil

import pytest
import torch

from enhancer.training import AlignmentSettings, TrainSettings
from enhancer.world.make import WorldSettings
from enhancer.world.student import StudentTraining, train_student
from enhancer.world.teacher import TeacherTraining, cover, train_teacher
from enhancer.world.truth import load_truth
from vdm_priors.families import load_teacher
from vlm_hooks.families import load_student

TINY = WorldSettings(seed=6, train_clips=8, test_clips=1)


def weights(folder):
    model = load_student(folder).model
    return torch.cat([parameter.detach().flatten().float() for parameter in model.parameters()])


def test_the_student_is_trained_in_rounds_and_continues(tmp_path):
    training = TrainSettings(steps=2, batch_size=4, learning_rate_llm=1e-3, learning_rate_merger=1e-3,
                             learning_rate_vision=1e-3, alignment=AlignmentSettings(weight=0.0))
    settings = StudentTraining(world=TINY, training=training, rounds=2, vision_steps=2, vision_batch=2, hidden=32, layers=1,
                               vision_depth=1)
    model = train_student(tmp_path, settings)
    trained = weights(model)
    stages = [weights(tmp_path / "start"), weights(tmp_path / "seeing"), weights(tmp_path / "round0" / "model")]
    assert all(not torch.equal(one, other) for one, other in zip(stages, [*stages[1:], trained], strict=True))
    shutil.rmtree(tmp_path / "round1")  # as if it had been stopped there: the first round is kept
    shutil.rmtree(model)
    assert torch.equal(weights(train_student(tmp_path, settings)), trained)


def test_the_teacher_is_trained_and_continues(tmp_path):
    settings = TeacherTraining(world=TINY, vae_steps=2, vae_batch=2, steps=2, batch_size=2, bf16=False)
    folder = train_teacher(tmp_path, settings)
    teacher = load_teacher(folder)
    assert teacher.trained_frames == 9
    before = (tmp_path / "vae.safetensors").read_bytes()
    shutil.rmtree(folder)
    train_teacher(tmp_path, settings)
    assert (tmp_path / "vae.safetensors").read_bytes() == before and (folder / "model_index.json").is_file()


def test_cover_is_the_share_of_things_in_each_latent_cell(tmp_path):
    from enhancer.world.make import make_world

    make_world(tmp_path, TINY)
    truth = load_truth(tmp_path)
    times = [n * 17 / 8 / 9 for n in range(9)]
    share = cover(truth, [{"video": "train-00000.mp4"}], times, 16)
    assert share.shape == (1, 3, 16, 16) and 0 <= float(share.min()) and float(share.max()) <= 1
    from enhancer.world.render import render_masks

    seen = render_masks(truth.scene("train-00000.mp4"), 0).any(axis=0)
    for row, column in ((0, 0), (7, 8), (15, 3)):
        cell = seen[4 * row:4 * row + 4, 4 * column:4 * column + 4]
        assert float(share[0, 0, row, column]) == pytest.approx(cell.mean())
