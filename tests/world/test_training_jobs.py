"""The jobs that make the shipped models, a few steps long: they end in folders that the loaders read, and they continue."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from enhancer.data.samples import Sample
from enhancer.training import AlignmentSettings, TrainSettings
from enhancer.world.make import WorldSettings, clip_record
from enhancer.world.scene import COLOURS, SHAPES
from enhancer.world.student import Round, StudentTraining, asked, train_student
from enhancer.world.teacher import TeacherTraining, cover, train_teacher
from enhancer.world.truth import load_truth
from vdm_priors.errors import UserError
from vdm_priors.families import load_teacher
from vlm_hooks.families import load_student

RECIPE = """
job: world_student
name: tiny
output: {output}
threads: 1
training:
  world: {{seed: 6, train_clips: 8, test_clips: 1, all_pairs: true}}
  rounds: [{{steps: 2, short: 0.5}}]
  vision_steps: 2
  vision_batch: 2
  hidden: 32
  layers: 1
  vision_depth: 1
  training: {{steps: 2, batch_size: 4, alignment: {{weight: 0.0}}}}
"""
TINY = WorldSettings(seed=6, train_clips=8, test_clips=1)


def weights(folder):
    model = load_student(folder).model
    return torch.cat([parameter.detach().flatten().float() for parameter in model.parameters()])


def test_the_student_is_trained_in_rounds_and_continues(tmp_path):
    training = TrainSettings(steps=2, batch_size=4, learning_rate_llm=1e-3, learning_rate_merger=1e-3,
                             learning_rate_vision=1e-3, alignment=AlignmentSettings(weight=0.0))
    settings = StudentTraining(world=TINY, training=training, rounds=[Round(2, 0.0, 0.0), Round(2, 1.0, 0.0)],
                               vision_steps=2, vision_batch=2, hidden=32, layers=1, vision_depth=1)
    model = train_student(tmp_path, settings)
    trained = weights(model)
    stages = [weights(tmp_path / "start"), weights(tmp_path / "seeing"), weights(tmp_path / "round0" / "model")]
    assert all(not torch.equal(one, other) for one, other in zip(stages, [*stages[1:], trained], strict=True))
    shutil.rmtree(tmp_path / "round1")  # as if it had been stopped there: the first round is kept
    shutil.rmtree(model)
    assert torch.equal(weights(train_student(tmp_path, settings)), trained)


def test_a_round_draws_different_samples_with_its_shares():
    kinds = ("places", "short", "description")
    samples = [Sample(f"{n}-{kind}", Path("clip.mp4"), kind, "yes", (), kind) for n in range(40) for kind in kinds]
    drawn = asked(samples, Round(2, short=0.6, description=0.3), seed=3)
    assert len({sample.id for sample in drawn}) == len(drawn)
    assert [sum(sample.question_type == kind for sample in drawn) for kind in kinds] == [7, 40, 20]
    assert drawn != asked(samples, Round(2, short=0.6, description=0.3), seed=4)
    assert {sample.question_type for sample in asked(samples, Round(2, 1.0, 0.0), seed=3)} == {"short"}


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


@pytest.fixture
def enhancer(tmp_path):
    """Runs the command line on the tiny student's recipe: (exit code, output)."""
    from typer.testing import CliRunner

    from enhancer.cli import app

    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.format(output=tmp_path / "runs"))

    def run(command, *more):
        result = CliRunner().invoke(app, [command, str(recipe), *more])
        return result.exit_code, result.output

    return run


def test_the_job_keeps_a_run_folder_and_refuses_to_mix_recipes(enhancer, tmp_path):
    code, output = enhancer("run")
    assert code == 0, output
    folder = tmp_path / "runs" / "tiny"
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished" and record["seconds"]["training"] > 0 and "torch" in record["versions"]
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["training"]["world"]["all_pairs"] is True
    trained = weights(folder / "model")

    code, output = enhancer("run", "training.seed=1")
    assert code == 1 and "training.seed" in output and "--fresh" in output
    code, output = enhancer("run", "training.seed=1", "--fresh")
    assert code == 0, output
    assert not torch.equal(weights(folder / "model"), trained)


def test_validate_says_what_is_needed_and_what_cannot_work(enhancer, tmp_path):
    code, output = enhancer("validate")
    assert code == 0 and "clips to make: 9 of 17 frames of 64 x 64" in output and "disk for clips" in output
    assert not (tmp_path / "runs").exists()
    code, output = enhancer("validate", "training.world.height=33")
    assert code == 1 and "33" in output


def test_a_teacher_that_cannot_be_trained_is_refused_before_clips_are_made(tmp_path):
    settings = TeacherTraining(world=replace(TINY, width=48, frames=5), tokenizer=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"width is 48.*frames is 5.*tokenizer: there is no folder"):
        train_teacher(tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()


def test_all_pairs_are_in_every_split_only_where_asked(tmp_path):
    def seen(split, all_pairs):
        settings = replace(TINY, all_pairs=all_pairs)
        scenes = [clip_record(settings, split, n, "LM")[0]["scene"]["things"] for n in range(60)]
        return {(thing["colour"], thing["shape"]) for things in scenes for thing in things}

    everything = {(colour, shape) for colour in COLOURS for shape in SHAPES}
    assert seen("train", True) == seen("test", True) == everything
    assert not seen("train", False) & seen("test", False)
