"""`job: adapter` in two processes on the CPU (gloo), as `accelerate launch` starts them: they train what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from enhancer.adapters.job import run_adapter
from enhancer.adapters.schema import AdapterRecipe
from enhancer.console import Console
from enhancer.recipe import build
from enhancer.runfolder import read_json, read_lines
from enhancer.world import WorldSettings, make_world
from tests.adapters.test_job import RAW

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = (
    "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "
    "--rdzv_backend c10d --main_process_port 0"
)  # of several processes it takes no more than their number; there is no GPU, and gloo connects them
TWICE = {"batch_size": 2, "weight_decay": 0.0, "warmup": 0.0, "log_every": 1}


def values(world: Path, output: Path, batch_size: int) -> dict:
    """An objective of the adapter's own, an answer stage, and the baseline's."""
    training = {**TWICE, "steps": 2, "batch_size": batch_size, "learning_rate_adapter": 1e-2}
    stages = [
        {"name": "warm-up", "objective": "classify", "text": "caption", "training": training},
        {"name": "tuning", "training": {**training, "learning_rate_llm": 1e-3}},
    ]
    return {
        **RAW,
        "output": str(output),
        "data": {"root": str(world)},
        "stages": stages,
        "baseline": {"frames": 2, "train": True},
    }


def weights(run: Path) -> dict:
    return {
        (stage.parent.name, file.name, name): value
        for stage in [*run.glob("stages/*/model"), *run.glob("baseline/*/model")]
        for file in stage.rglob("*.safetensors")
        for name, value in load_file(file).items()
    }


@pytest.mark.timeout(600)
def test_two_processes_train_what_one_does(tmp_path):
    """Half the samples each; every file is written once, and weights differ by the order of sums alone."""
    world = tmp_path / "world"
    make_world(world, WorldSettings(seed=3, train_clips=8, test_clips=4, questions={"LM": 1.0}))
    alone = run_adapter(build(AdapterRecipe, values(world, tmp_path / "alone", 4)), Console(quiet=True))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values(world, tmp_path / "both", 2)), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ENHANCER_TRACEBACK": "0"}
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCH.split(), "-m", "enhancer", "run", str(recipe), "-q"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    both = tmp_path / "both" / "tiny"
    assert read_json(both / "run.json", {})["status"] == "finished"
    mine, theirs = weights(both), weights(alone)
    assert mine.keys() == theirs.keys() and len(mine) > 100
    for name, value in theirs.items():
        # AdamW steps 1e-2 or 1e-3 whatever the gradient's size, so single weights with next to none go either way
        assert (mine[name].float() - value.float()).abs().mean() < 1e-4, name
    for stage in ("stages/1-warm-up", "stages/2-tuning", "baseline/1-tuning"):
        rows, reference = (read_lines(run / stage / "history.jsonl") for run in (both, alone))
        assert [row["step"] for row in rows] == [1, 2]
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in reference], rel=1e-3)
    table = read_json(both / "results.json", {})
    assert set(table["arms"]) == set(read_json(alone / "results.json", {})["arms"]) and len(table["arms"]) == 5
