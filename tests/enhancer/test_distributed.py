"""Trainings of the shipped student in several processes, and killed ones: the trained student is the same.

Two processes on the CPU (gloo) under torchrun and accelerate launch; FSDP2 as tests/enhancer/train_child.py says, and
DeepSpeed where it is installed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from enhancer.checkpoints import CHECKPOINTS
from enhancer.cli import app
from enhancer.launch import check_launch, launch_file
from enhancer.runfolder import read_json, read_lines
from enhancer.shipped import student_path
from enhancer.train_settings import TrainSettings
from tests.enhancer.test_training import write_video
from tests.enhancer.tiny_run import recipe_values
from tests.enhancer.train_child import ANSWERS, CUT, SETTINGS, SHARDING, run
from vdm_priors.errors import RecipeError, UserError

CHILD = Path(__file__).with_name("train_child.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--rdzv_backend", "c10d",
              "--main_process_port", "0"]
SINGLE = replace(SETTINGS, batch_size=4)


def environment() -> dict[str, str]:
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with clips."""
    folder = tmp_path_factory.mktemp("trainings")
    for n in range(len(ANSWERS)):
        write_video(folder / f"{n}.mp4", n)
    return folder


@pytest.fixture(scope="module")
def alone(root):
    """The same training in this process, with the batches of two."""
    run(root, root / "alone", SINGLE)
    return root / "alone"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# -- one process, killed ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_a_random_step_and_resumed_is_bit_for_bit_the_same(root, alone):
    """Data order, optimizer, aligner and history included; its checkpoints come at other steps than the reference's."""
    folder, step = root / "slow", random.randint(4, 18)
    command = [sys.executable, str(CHILD), str(root), "slow"]
    child = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    while len(read_lines_safely(folder / "history.jsonl")) < step:
        assert child.poll() is None, "the training ended before it was killed"
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    settings = replace(SINGLE, save_every=3, log_every=1)
    identity = json.loads(next(folder.glob(f"{CHECKPOINTS}/*/complete.json")).read_text())["identity"]
    assert identity["training"]["steps"] == 20
    start = run(root, folder, settings)
    assert 0 < start <= step + 1
    ours, theirs = weights(folder), weights(alone)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    aligners = [load_file(place / CHECKPOINTS / "checkpoint-20" / "aligner.safetensors") for place in (folder, alone)]
    assert all(torch.equal(aligners[0][name], aligners[1][name]) for name in aligners[1]) and len(aligners[1]) > 12
    for row, reference in zip(read_lines(folder / "history.jsonl"), read_lines(alone / "history.jsonl"), strict=True):
        for key in ("step", "loss", "alignment_loss", "video_mass", "learning_rate"):
            assert row[key] == reference[key], key


def read_lines_safely(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


# -- two processes ----------------------------------------------------------------------


def launch(root: Path, *modes: str) -> Path:
    """Trains them under torchrun and resumes them under accelerate launch."""
    for launcher, suffix in ((TORCHRUN, ""), (ACCELERATE, "-resumed")):
        command = [*launcher, str(CHILD), str(root), *(f"{mode}{suffix}" for mode in modes)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return root


@pytest.fixture(scope="module")
def launched(root):
    """With copies (DDP) and shards (FSDP2)."""
    return launch(root, "ddp", "fsdp2")


@pytest.fixture(scope="module")
def launched_with_deepspeed(root):
    """With shards of gradients and optimizer (ZeRO-2), and of weights too (ZeRO-3)."""
    return launch(root, "zero2", "zero3", "zero3lora")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_does_and_resume_it(launched, alone, mode):
    whole, resumed = launched / mode, launched / f"{mode}-resumed"
    assert largest_difference(whole, resumed) <= 1e-6
    # 20 steps of AdamW at 3e-3 on sums in another order
    start = load_file(Path(student_path("world")) / "model.safetensors")
    moved = max(float((start[name] - tensor).abs().max()) for name, tensor in weights(alone).items())
    assert largest_difference(whole, alone) <= 0.02 * moved
    rows, reference = read_lines(whole / "history.jsonl"), read_lines(alone / "history.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 21))  # written once
    for row, other in zip(rows, reference, strict=True):
        for key in ("ar_loss", "alignment_loss", "video_mass"):
            assert row[key] == pytest.approx(other[key], rel=2e-2), (row["step"], key)
        assert row["words_matched"] == other["words_matched"]
        if mode == "ddp" and other["ar_grad_norm"] is not None:
            for key in ("ar_grad_norm", "alignment_grad_norm"):
                assert row[key] == pytest.approx(other[key], rel=5e-2)
    assert rows[0]["ar_loss"] == pytest.approx(reference[0]["ar_loss"], rel=1e-5)
    assert [row["loss"] for row in read_lines(resumed / "history.jsonl")][:CUT] == [row["loss"] for row in rows][:CUT]
    assert "motion_capture" not in (whole / "model" / "config.json").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed (pip install deepspeed)")
@pytest.mark.parametrize("mode", ["zero2", "zero3", "zero3lora"])
def test_deepspeed_trains_what_one_process_does_and_resumes_it(launched_with_deepspeed, alone, root, mode):
    if mode == "zero3lora":
        alone = root / "alone-lora"
        run(root, alone, replace(SINGLE, lora=SHARDING[mode]["lora"]))
    whole, resumed = (launched_with_deepspeed / name for name in (mode, f"{mode}-resumed"))
    assert largest_difference(whole, resumed) <= 1e-6
    start = load_file(Path(student_path("world")) / "model.safetensors")
    moved = max(float((start[name] - tensor).abs().max()) for name, tensor in weights(alone).items())
    assert largest_difference(whole, alone) <= 0.005 * moved
    for row, other in zip(read_lines(whole / "history.jsonl"), read_lines(alone / "history.jsonl"), strict=True):
        for key in ("loss", "ar_loss", "alignment_loss", "video_mass"):
            assert row[key] == pytest.approx(other[key], rel=1e-5), (row["step"], key)
        assert row["words_matched"] == other["words_matched"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_run_under_accelerate_launch(tmp_path):
    """The whole job: extraction shared, students trained together, one process writes, evaluates and reports."""
    world = {"train_clips": 8, "test_clips": 2, "frames": 5, "height": 32, "width": 32}
    arms = [{"name": "lambda0"}, {"name": "oracle", "source": "oracle"}]
    shared = dict(world=world, data={}, arms=arms, examples=0, device="cpu")
    values = recipe_values(tmp_path, **shared, parallel_arms=2)
    values["training"].update(steps=3, batch_size=2, save_every=2)
    path = tmp_path / "r.yaml"
    path.write_text("# Purpose: a test\n" + yaml.safe_dump(values))
    command = [*ACCELERATE, "-m", "enhancer", "run", str(path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("report:") == 1 and done.stdout.count("exported students") == 1  # said once
    place = tmp_path / "runs" / "tiny"
    assert read_json(place / "run.json", {})["status"] == "finished" and (place / "report.html").is_file()
    single = recipe_values(tmp_path, **shared, name="single")
    single["training"].update(steps=3, batch_size=4)
    path.write_text("# Purpose: a test\n" + yaml.safe_dump(single))
    from typer.testing import CliRunner

    assert CliRunner().invoke(app, ["train", str(path)]).exit_code == 0
    for arm in ("lambda0", "oracle"):
        ours, theirs = (tmp_path / "runs" / name / "arms" / arm / "seed0" for name in ("tiny", "single"))
        assert len(read_lines(ours / "history.jsonl")) == 3
        assert read_json(ours / "train.json", {})["export_max_difference"] == 0.0
        assert largest_difference(ours, theirs) < 1e-4
        assert read_json(ours / "scores.json", {})["overall"]["n"] > 0 and not (theirs / "scores.json").exists()
    assert read_lines(place / "arms" / "oracle" / "seed0" / "history.jsonl")[0]["alignment_loss"] > 0


# -- launches that cannot work ----------------------------------------------------------


def test_too_few_gpus_and_nothing_to_shard_over(monkeypatch):
    for key in ("fsdp", "deepspeed"):
        with pytest.raises(UserError, match=f"training.{key} shards the model over several processes.*torchrun"):
            check_launch(TrainSettings(**{key: "launch/x.json"}), "cpu")
    for name, value in {"RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="4 processes were started on this machine, which has 2 GPUs"):
        check_launch(TrainSettings(), "cuda")
    check_launch(TrainSettings(), "cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install deepspeed"):
        check_launch(TrainSettings(deepspeed="launch/zero2.json"), "cpu")


def test_launch_files():
    with pytest.raises(ValueError, match="set one of them"):
        TrainSettings(fsdp="a", deepspeed="b")
    with pytest.raises(RecipeError, match="training.fsdp: there is no file 'x.json'.*launch/fsdp2.json"):
        launch_file("x.json", "training.fsdp")
    assert launch_file("launch/fsdp2.json", "k") == launch_file("recipes/launch/fsdp2.json", "k")
    assert launch_file("launch/fsdp2.json", "k")["version"] == 2
    for stage in (2, 3):
        settings = launch_file(f"launch/zero{stage}.json", "k")
        assert settings["zero_optimization"]["stage"] == stage
        assert "optimizer" not in settings and "scheduler" not in settings  # ours have a learning rate a part
    assert launch_file("launch/zero3.json", "k")["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
