"""Measures against ground truth: the AUC by counting pairs, and whole reports on the shipped models."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from enhancer.cli import app
from enhancer.world import WorldSettings, load_truth, make_world
from enhancer.video.clip import Sampling, read_clip
from enhancer.world.measure import auc, head_localisation, localisation
from enhancer.world.static import SQUARES, static_samples
from enhancer.world.text import END, TYPES, place
from vdm_priors.extract import ExtractionSettings, extract_priors
from vdm_priors.grid import TokenGrid, frame_spans
from vdm_priors.prior import MotionPrior
from vdm_priors.words import split_words


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, WorldSettings(seed=4, train_clips=0, test_clips=12))
    return folder


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=25))
def test_auc_counts_pairs(cells):
    scores, positive = torch.tensor([float(s) for s, _ in cells]), torch.tensor([p for _, p in cells])
    pairs = [(a > b) + 0.5 * (a == b) for a, p in cells for b, q in cells if p and not q]
    expected = sum(pairs) / len(pairs) if pairs else math.nan
    assert auc(scores, positive) == pytest.approx(expected, nan_ok=True)


def test_ground_truth_localises_perfectly_and_its_opposite_not_at_all(world):
    truth = load_truth(world)
    rows = [row for row in json.loads((world / "test.json").read_text()) if row["question_type"] in ("MR", "LM")]
    grid = TokenGrid.regular(frame_spans([n / 4 for n in range(8)], 17 / 8), 8, 8)
    texts = [row["conversations"][0]["value"].removeprefix("<video>\n") for row in rows]
    videos = [row["video"] for row in rows]
    maps = [truth.evidence(v, t, split_words(t), grid) for v, t in zip(videos, texts, strict=True)]
    volumes = grid.volumes.float()
    for sign, expected in ((1.0, 1.0), (-1.0, 0.0)):
        priors = [MotionPrior(t, split_words(t), (m / volumes).max() * volumes + sign * m, grid, torch.ones(len(m)))
                  for t, m in zip(texts, maps, strict=True)]
        found = localisation(priors, videos, truth)
        assert found["nouns"]["n"] == 2 * len(rows) and found["nouns"]["auc"] == pytest.approx(expected, abs=1e-6)
        assert found["motion"]["auc"] == pytest.approx(expected, abs=1e-6)


def test_static_questions_have_their_true_answer_among_the_options(world):
    truth = load_truth(world)
    samples = static_samples(world, truth)
    assert {s.question_type for s in samples} >= {"shape", "number", "first square", "last square"}
    for sample in samples:
        scene = truth.scene(sample.video.name)
        assert sample.answer in sample.options
        if sample.question_type == "last square":
            thing = next(t for t in scene.things if t.name in sample.question)
            assert sample.options == SQUARES and sample.answer == place(scene, thing, END)


def test_heads_are_measured_in_the_regime_of_the_priors(world, monkeypatch):
    """One head of one layer: its map in head_localisation is the one that priors of these settings are the mean of."""
    from tests.vdm_priors.tiny_teacher import tiny_teacher

    teacher, truth = tiny_teacher(layers=1, heads=1), load_truth(world)
    rows = [row for row in json.loads((world / "test.json").read_text()) if row["question_type"] in ("MR", "LM")][:2]
    found = []
    base = ExtractionSettings(steps=2, head_selection=False, token_selection=False, token_unit="word", reconstruction=False)
    for changes in ({}, {"guidance": 1.0}, {"memory": False}, {"steps": 3}, {"harvest_at": "inversion"}):
        settings = replace(base, **changes)
        heads = head_localisation(teacher, rows, world, truth, settings)
        for corner in ("t2v", "v2t"):
            clips = [read_clip(world / row["video"], Sampling(frames=9)) for row in rows]
            texts = [row["conversations"][0]["value"].removeprefix("<video>\n") for row in rows]
            priors = extract_priors(teacher, clips, texts, replace(settings, direction=corner))
            said = localisation(priors, [row["video"] for row in rows], truth)["nouns"]["auc"]
            assert heads[corner] == [[pytest.approx(said, abs=6e-4)]]
        found.append((heads["t2v"], heads["v2t"]))
    assert all(other != found[0] for other in found[1:])


def test_the_command_measures_the_shipped_models(world, tmp_path):
    out = tmp_path / "figures.json"
    result = CliRunner().invoke(app, ["world", "measure", str(world), "--teacher", "world", "--student", "world",
                                      "--clips", "4", "--out", str(out)])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert set(TYPES) <= set(report["student"]) and all(0 < row["chance"] < 1 for row in report["student"].values())
    teacher = report["teacher"]
    assert teacher["clips"] == 4 and 15 < teacher["vae_psnr_db"] < 50 and 5 < teacher["reconstruction_psnr_db"] < 50
    for corner in ("t2v", "v2t"):
        heads = torch.tensor(teacher["heads_noise"][corner])
        assert heads.shape == (6, 4) and bool(((heads >= 0) & (heads <= 1)).all())
        for at in ("denoise", "inversion", "noise"):
            assert 0 <= teacher[f"prior_{corner}_{at}"]["nouns"]["auc"] <= 1
    assert "t2v" in result.output and "noise" in result.output
