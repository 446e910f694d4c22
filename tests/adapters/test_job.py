"""`job: adapter`: its recipes, its reading of clips, and a chain that goes on where it was interrupted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

import enhancer.adapters.chain as chain
from enhancer.adapters.arms import ARMS, unused_motion
from enhancer.adapters.reading import ClipReader, partners
from enhancer.adapters.reencode import reencoded
from enhancer.adapters.samples import labels_of, samples_of, stage_samples
from enhancer.adapters.schema import AdapterRecipe, ReadingSettings
from enhancer.console import Console
from enhancer.data.samples import Sample
from enhancer.jobs import load_recipe
from enhancer.recipe import build
from enhancer.video.codec import read_motion
from enhancer.video.footage import Footage
from enhancer.world import WorldSettings, make_world
from enhancer.world.make import write_clip
from vdm_priors.errors import ClipError, RecipeError, SampleError, UserError
from vlm_hooks.adapters.inputs import MotionClip
from vlm_hooks.adapters.model import AdapterModel

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "adapters"
RAW = {
    "job": "adapter",
    "name": "tiny",
    "adapter": "ema",
    "device": "cpu",
    "settings": {
        "cells": 8,
        "patch": 4,
        "width": 16,
        "heads": 2,
        "pooling": 2,
        "layers": 1,
        "fusion_heads": 2,
        "prompt": "",
    },
    "reading": {"size": [64, 64], "key_interval": 9},
    "stages": [
        {
            "name": "warm-up",
            "objective": "classify",
            "text": "caption",
            "test": "test.json",
            "training": {"steps": 1, "batch_size": 2},
        },
        {"name": "tuning", "training": {"steps": 2, "batch_size": 2, "warmup": 0.0, "learning_rate_llm": 1e-3}},
    ],
    "baseline": {"frames": 2, "train": False},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "world"
    make_world(folder, WorldSettings(seed=3, train_clips=4, test_clips=6, questions={"LM": 1.0}))
    return folder


def recipe(world: Path, tmp_path: Path, **changes) -> AdapterRecipe:
    return build(AdapterRecipe, {**RAW, "output": str(tmp_path), "data": {"root": str(world)}, **changes})


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipes_are_whole(path):
    """Each is read and checked; the small ones share their world, so that adapters are compared on the same clips."""
    loaded = load_recipe(path).recipe
    if isinstance(loaded, AdapterRecipe):
        assert loaded.config() and loaded.adapter == path.parent.name
        assert loaded.world is None or loaded.world.digest()[:12] == "530532d21cd6"


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"adapter": "emma"}, "adapter: There is no codec adapter 'emma'"),
        ({"settings": {"layer": 2}}, "settings.layer: unknown key; did you mean 'layers'"),
        ({"settings": {"fusion": "cross"}}, "settings.fusion: must be one of crossattn"),
        ({"stages": [{"name": "a", "objective": "pretraining"}]}, "ema has answer, classify, not 'pretraining'"),
        ({"stages": [{"name": "a"}, {"name": "a"}]}, "stages.a: the name is used 2 times"),
        ({"stages": [{"name": "a", "training": {"alignment": {"weight": 1.0}}}]}, "alignment.weight: needs `priors`"),
        ({"stages": [{"name": "a", "training": {"fsdp": "x.json"}}]}, "stages.a.training: an adapter's stages train whole"),
        (
            {"stages": [{"name": "a", "objective": "classify", "training": {"lora": {"rank": 2}}}]},
            "stages.a.training: lora and optimizer are of answer stages; classify trains",
        ),
        ({"stages": [{"name": "a", "test": "test.json"}]}, "stages.a.test: answers are measured by the run's own"),
        ({"reading": {"fps": 4.0}}, "reading.fps: only a new encoding"),
        ({"reading": {"size": [60, 60]}}, "multiples of 8"),
    ],
)
def test_what_a_recipe_gets_wrong_is_said_with_its_key(world, tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        recipe(world, tmp_path, **changes)


def test_a_new_encoding_has_key_frames_where_they_are_wanted(tmp_path):
    """EMA's: a key frame every 4 frames, P-frames that refer to the one before; and fewer frames a second."""
    frames = np.zeros((10, 64, 64, 3), np.uint8)
    frames[:, 16:48, 16:48] = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    path = tmp_path / "clip.mp4"
    write_clip(path, np.stack([np.roll(frame, 2 * n, axis=1) for n, frame in enumerate(frames)]), 8.0)
    with reencoded(path, 4) as file:
        field = read_motion(file, 0, None)
        assert field.keys.nonzero()[0].tolist() == [0, 4, 8] and "B" not in field.kinds
        moved = field.displacement[1:4, 3:5, 3:5, 0]
        np.testing.assert_allclose(moved, 2.0, atol=0.3)
    with reencoded(path, 4, fps=4.0) as file:
        np.testing.assert_allclose(read_motion(file, 0, None).times, np.arange(5) / 4, atol=1e-6)
    assert not file.exists()


def test_clips_are_read_once_and_exchanged_within_their_kind(world):
    samples, _ = stage_samples(world / "test.json", world, "auto", "question", "", None)
    reader = ClipReader(ReadingSettings(size=[64, 64], key_interval=9))
    clip = reader.get(samples[0].video)
    assert isinstance(clip, MotionClip) and len(clip.times) == 2 and clip.origin == "reencoded"
    assert reader.get(samples[0].video) is clip
    found = partners(samples, reader, seed=0)
    assert set(found) == set(found.values()) == {s.video for s in samples} and all(a != b for a, b in found.items())


def test_a_picture_is_one_gop_that_nothing_follows(tmp_path):
    """EMA's instruction data has pictures; lists of them are videos without a codec's motion, and refused."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    for clips in ("keyed", "anchored"):
        reader = ClipReader(ReadingSettings(clips=clips, size=[32, 64], key_interval=9))
        clip = reader.get(Footage((tmp_path / "a.png",), fps=2.0))
        assert clip.origin == "none" and clip.times == [0.0] and [len(m.times) for m in clip.motion] == [0]
        expected = pixels[..., ::-1].reshape(32, 2, 64, 2, 3).mean((1, 3))
        assert clip.frames.shape == (1, 32, 64, 3) and np.abs(clip.frames[0] - expected).max() <= 1
    with pytest.raises(ClipError, match="not spans or lists of pictures"):
        reader.get(Footage((tmp_path / "a.png", tmp_path / "a.png"), fps=2.0))


def test_labels_are_what_captions_say_of_motion():
    told = Sample(
        "a", Path("a.mp4"), "What happens?", "the red disc slides left, the blue cross rests, the camera moves in."
    )
    assert labels_of([told])["a"] == ["moves in", "rests", "slides left"]
    assert labels_of([replace(told, answer="Pushing something, slowly")])["a"] == ["Pushing something, slowly"]


def test_captions_are_asked_for(world):
    samples, problems = stage_samples(world / "train.json", world, "auto", "caption", "What happens?", 3)
    assert len(samples) == 3 and not problems and {s.question for s in samples} == {"What happens?"}
    assert all("the camera" in s.answer for s in samples)
    rows = json.loads((world / "train.json").read_text())
    assert samples[0].answer == rows[0]["caption"]


def test_a_stage_may_learn_from_some_question_types_alone(world, tmp_path):
    loaded = recipe(world, tmp_path, stages=[{"name": "a", "types": ["LM"]}, {"name": "b", "types": ["CM", "MR"]}])
    samples, _ = samples_of(loaded, loaded.stages[0], world)
    assert len(samples) == 4 and {s.question_type for s in samples} == {"LM"}
    with pytest.raises(SampleError, match="stages.b.types: .*train.json has LM, and none of"):
        samples_of(loaded, loaded.stages[1], world)


def test_a_chain_goes_on_where_it_was_interrupted(world, tmp_path, monkeypatch):
    """Stopped in the second stage; the same command trains that one alone, and asks all arms."""
    loaded = recipe(world, tmp_path)
    ran, real = [], chain.run_stage

    def stopped(model, stage, *rest):
        ran.append(stage.name)
        if stage.name == "tuning" and ran.count("tuning") == 1:
            raise KeyboardInterrupt
        return real(model, stage, *rest)

    monkeypatch.setattr(chain, "run_stage", stopped)
    from enhancer.adapters.job import run_adapter

    with pytest.raises(KeyboardInterrupt):
        run_adapter(loaded, Console(quiet=True))
    folder = run_adapter(loaded, Console(quiet=True))
    assert ran == ["warm-up", "tuning", "tuning"]
    warmed = json.loads((folder / "stages" / "1-warm-up" / "stage.json").read_text())
    assert warmed["test_loss"] > 0 and 0 <= warmed["test_accuracy"] <= 1
    table = json.loads((folder / "results.json").read_text())
    assert set(table["arms"]) == set(ARMS) - {"frames"}  # baseline.train is false
    assert {arm["overall"]["n"] for arm in table["arms"].values()} == {6}
    assert table["arms"]["adapter"]["tokens"] == 8 and table["arms"]["host"]["tokens"] == 16
    last = AdapterModel.from_pretrained(None, folder / "stages" / "2-tuning" / "model")
    assert last.adapter.NAME == "ema"
    assert run_adapter(loaded, Console(quiet=True)) == folder and len(ran) == 3  # all is done


@pytest.mark.parametrize(
    "adapter, settings, reading, stages",
    [
        ("te_fusion", {"k": 2}, {"clips": "frames", "frames": 4}, ["warm-up", "tuning"]),
        ("ema", RAW["settings"], RAW["reading"], ["tuning"]),
    ],
)
def test_the_baseline_goes_through_the_stages_that_need_frames_alone(world, tmp_path, adapter, settings, reading, stages):
    """TE Fusion's warm-up reads what the tower makes of frames, which the host has too; EMA's reads vectors."""
    both = [{**stage, "training": {**stage["training"], "learning_rate_vision": 1e-3}} for stage in RAW["stages"]]
    frozen = {"name": "alone", "objective": "classify", "training": {"steps": 1}}  # teaches the host nothing
    changes = dict(adapter=adapter, settings=settings, reading=reading, stages=[frozen, *both])
    own, theirs = chain.chains(recipe(world, tmp_path, **changes, baseline={"frames": 2}))
    assert [stage.name for stage in own.stages] == ["alone", "warm-up", "tuning"]
    assert [stage.name for stage in theirs.stages] == stages and theirs.first == 3
    _, untrained = chain.chains(recipe(world, tmp_path, **changes, baseline={"frames": 2, "train": False}))
    _, nobody = chain.chains(recipe(world, tmp_path, **changes, baseline=None))
    assert untrained.stages == nobody.stages == []


def test_motion_that_is_not_used_is_said():
    assert (
        unused_motion({"adapter_minus": {"still": {"overall": {"difference": 0.2, "low": 0.1, "high": 0.3}}}}) is None
    )
    said = unused_motion({"adapter_minus": {"still": {"overall": {"difference": 0.01, "low": -0.02, "high": 0.04}}}})
    assert "does not use its motion" in said and "-2.0 to 4.0" in said
    assert unused_motion({"adapter_minus": {}}) is None


def test_rates_of_unknown_parts_are_refused(world, tmp_path):
    bad = {"name": "a", "training": {"steps": 1, "rates": {"moton": 1e-3}}}
    with pytest.raises(UserError, match="no part moton; it has motion, fusion"):
        from enhancer.adapters.job import run_adapter

        run_adapter(recipe(world, tmp_path, stages=[bad]), Console(quiet=True))
