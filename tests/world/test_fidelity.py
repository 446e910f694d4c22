"""`enhancer world fidelity`: its cells, what they hold, and that it goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from enhancer.cli import app
from enhancer.video.clip import Sampling, read_clip
from enhancer.world import WorldSettings, make_world
from enhancer.world.fidelity import Cell, cells, difference, figures, markdown, measure_cells, shared_clips
from enhancer.world.measure import localisation
from enhancer.world.truth import load_truth
from tests.enhancer.tiny_run import teacher_folder
from tests.vdm_priors.tiny_teacher import tiny_teacher
from vdm_priors.errors import UserError
from vdm_priors.extract import ExtractionSettings, extract_priors

NOISE, DENOISE = Cell(2, "noise"), Cell(2, "denoise", memory=True, guidance=3.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, WorldSettings(train_clips=1, test_clips=12, frames=9, height=32, width=32))
    return folder


def test_the_table_has_every_way_once():
    table = cells()
    names = [cell.name for cell in table]
    assert len(table) == len(set(names)) == 4 * (2 + 3 * 3)
    assert {(c.steps, c.memory, c.guidance) for c in table if c.harvest_at == "denoise"} == {
        (steps, memory, guidance) for steps in (2, 5, 10, 25) for memory in (True, "kept", False) for guidance in (1, 3, 6)}
    assert all(c.memory is c.guidance is None for c in table if c.harvest_at != "denoise")
    ways = {c.memory: c.settings(ExtractionSettings()) for c in table if c.harvest_at == "denoise"}
    assert {way: (s.memory, s.memory_from) for way, s in ways.items()} == {
        True: (True, "forward"), "kept": (True, "inversion"), False: (False, "forward")}


def test_two_cells_hold_what_the_extraction_gives(world, tmp_path):
    teacher, truth, out = tiny_teacher(), load_truth(world), tmp_path / "f.json"
    document = measure_cells(teacher, world, truth, [NOISE, DENOISE], out, clips=2)
    assert json.loads(out.read_text()) == document and list(document["cells"]) == [NOISE.name, DENOISE.name]
    rows = [row for row in json.loads((world / "test.json").read_text())
            if row["question_type"] in ("MR", "LM", "AO", "RC")][:2]
    clips = [read_clip(world / row["video"], Sampling(frames=teacher.trained_frames)) for row in rows]
    texts = [row["conversations"][0]["value"].removeprefix("<video>\n") for row in rows]
    settings = ExtractionSettings(steps=2, harvest_at="denoise", memory=True, guidance=3.0, token_selection=False)
    assert shared_clips(document) == [row["id"] for row in rows]
    cell = figures(document["cells"][DENOISE.name], shared_clips(document))
    for direction in ("t2v", "v2t", "both"):
        priors = extract_priors(teacher, clips, texts, replace(settings, direction=direction))
        for kind, found in localisation(priors, [row["video"] for row in rows], truth).items():
            assert cell[direction][kind]["n"] == found["n"]
            assert cell[direction][kind]["auc"] == pytest.approx(found["auc"], abs=1e-5)
    psnr = sum(prior.provenance["reconstruction"]["psnr_db"] for prior in priors) / 2
    assert cell["psnr_db"] == pytest.approx(psnr, abs=0.006) and cell["cpu_seconds"] > 0
    assert figures(document["cells"][NOISE.name], shared_clips(document))["psnr_db"] is None
    table = out.with_suffix(".md").read_text()
    assert table == markdown(document) and "| denoise | 2 | on | 3 |" in table and "| noise | 2 |  |  |  |" in table


def test_the_interval_is_of_clips_and_a_mean_of_words():
    """Clips whose words agree: as many draws of clips as of anything else, and a wider interval than of their words."""
    values = [0.2, 0.4, 0.6, 0.8]
    cell = {"clips": {str(n): {"psnr_db": 10.0 + n, "cpu_seconds": 1.0, **{
        direction: {"nouns": [value] * 5, "motion": [None]} for direction in ("t2v", "v2t", "both")}}
        for n, value in enumerate(values)}}
    found = figures(cell, ["0", "1", "2", "3"])
    nouns = found["t2v"]["nouns"]
    assert found["psnr_db"] == 11.5 and nouns["auc"] == pytest.approx(0.5) and nouns["n"] == 20
    spread = 1.96 * (0.05 / 4) ** 0.5  # variance of the four values, by their number
    assert nouns["low"] == pytest.approx(0.5 - spread, abs=0.04)
    assert nouns["high"] == pytest.approx(0.5 + spread, abs=0.04)
    assert found["t2v"]["motion"] == {"auc": None, "low": None, "high": None, "n": 0}


def test_a_difference_is_paired_over_clips():
    """Clips differ much, ways little: the interval of the difference is that of the small one."""
    values = [0.2, 0.4, 0.6, 0.8]

    def cell(more):
        return {"clips": {str(n): {"t2v": {"nouns": [value + more, None], "motion": []}}
                          for n, value in enumerate(values)}}

    document = {"cells": {"a": cell(0.1), "b": cell(0.0)}}
    found = difference(document, ("a", "t2v"), ("b", "t2v"))
    assert [found[key] for key in ("difference", "low", "high")] == pytest.approx([0.1] * 3)
    with pytest.raises(ValueError, match="share no motion"):
        difference(document, ("a", "t2v"), ("b", "t2v"), "motion")


def test_it_goes_on_with_the_rest_and_refuses_figures_of_something_else(world, tmp_path, monkeypatch):
    teacher, truth, out, made = tiny_teacher(), load_truth(world), tmp_path / "f.json", []

    def measured(teacher, rows, world, truth, settings):
        made.append((settings.harvest_at, len(rows)))
        figures = {"nouns": [0.5], "motion": []}
        return {row["id"]: {"psnr_db": None, "cpu_seconds": 1.0, **{d: figures for d in ("t2v", "v2t", "both")}}
                for row in rows}

    monkeypatch.setattr("enhancer.world.fidelity._measured", measured)
    measure_cells(teacher, world, truth, [NOISE], out, clips=2)
    older = json.loads(out.read_text())
    del older["settings"]["mode"]  # written before there was this option
    out.write_text(json.dumps(older))
    document = measure_cells(teacher, world, truth, [NOISE, DENOISE], out, clips=2)
    assert made == [("noise", 2), ("denoise", 2)] and len(document["cells"]) == 2
    document = measure_cells(teacher, world, truth, [NOISE], out, clips=3)  # more clips: what is there stays
    assert made[2:] == [("noise", 1)] and len(shared_clips(document)) == 2
    with pytest.raises(UserError, match="differ in settings"):
        other = ExtractionSettings(seed=1, harvest_at="noise")
        measure_cells(teacher, world, truth, [NOISE], out, clips=2, settings=other)
    out.write_text("[]")
    with pytest.raises(UserError, match="is no fidelity table"):
        measure_cells(teacher, world, truth, [NOISE], out, clips=2)


def test_the_command(world, tmp_path):
    def call(*more):
        command = ["world", "fidelity", world, "--teacher", teacher_folder(), "--out", tmp_path / "f.json", *more]
        done = CliRunner().invoke(app, [str(part) for part in command], env={"COLUMNS": "200"})
        return done.exit_code, done.output

    code, said = call("--clips", 2, "--steps", "1", "--at", "noise,inversion")
    assert code == 0, said
    assert "noise, 1 step" in said and "inversion, 1 step" in said and "denoise" not in said
    assert len(json.loads((tmp_path / "f.json").read_text())["cells"]) == 2
    code, said = call("--at", "elsewhere")
    assert code == 2 and "denoise, inversion, noise" in said
    code, said = call("--steps", "two")
    assert code == 2 and "numbers with commas" in said
