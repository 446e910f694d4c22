"""`enhancer world fidelity`: its cells, what they hold, and that it goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from enhancer.cli import app
from enhancer.video.clip import Sampling, read_clip
from enhancer.world import WorldSettings, make_world
from enhancer.world.fidelity import Cell, cells, markdown, measure_cells
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
    assert len(table) == len(set(names)) == 4 * (2 + 2 * 3)
    assert {(c.steps, c.memory, c.guidance) for c in table if c.harvest_at == "denoise"} == {
        (steps, memory, guidance) for steps in (2, 5, 10, 25) for memory in (True, False) for guidance in (1, 3, 6)}
    assert all(c.memory is c.guidance is None for c in table if c.harvest_at != "denoise")


def test_two_cells_hold_what_the_extraction_gives(world, tmp_path):
    teacher, truth, out = tiny_teacher(), load_truth(world), tmp_path / "f.json"
    document = measure_cells(teacher, world, truth, [NOISE, DENOISE], out, clips=2)
    assert json.loads(out.read_text()) == document and list(document["cells"]) == [NOISE.name, DENOISE.name]
    rows = [row for row in json.loads((world / "test.json").read_text())
            if row["question_type"] in ("MR", "LM", "AO", "RC")][:2]
    clips = [read_clip(world / row["video"], Sampling(frames=teacher.trained_frames)) for row in rows]
    texts = [row["conversations"][0]["value"].removeprefix("<video>\n") for row in rows]
    settings = ExtractionSettings(steps=2, harvest_at="denoise", memory=True, guidance=3.0, token_selection=False)
    cell = document["cells"][DENOISE.name]
    for direction in ("t2v", "v2t", "both"):
        priors = extract_priors(teacher, clips, texts, replace(settings, direction=direction))
        assert cell[direction] == localisation(priors, [row["video"] for row in rows], truth)
    psnr = sum(prior.provenance["reconstruction"]["psnr_db"] for prior in priors) / 2
    assert cell["psnr_db"] == pytest.approx(psnr, abs=0.006) and cell["seconds"] > 0
    assert document["cells"][NOISE.name]["psnr_db"] is None
    table = out.with_suffix(".md").read_text()
    assert table == markdown(document) and "| denoise | 2 | on | 3 |" in table and "| noise | 2 |  |  |  |" in table


def test_it_goes_on_with_the_rest_and_refuses_figures_of_something_else(world, tmp_path, monkeypatch):
    teacher, truth, out, made = tiny_teacher(), load_truth(world), tmp_path / "f.json", []
    monkeypatch.setattr("enhancer.world.fidelity._measured", lambda *rest: made.append(rest[-1]) or {
        "psnr_db": None, "seconds": 1.0, **{d: {"nouns": {"auc": 0.5, "n": 1}, "motion": {"auc": None, "n": 0}}
                                            for d in ("t2v", "v2t", "both")}})
    measure_cells(teacher, world, truth, [NOISE], out, clips=2)
    document = measure_cells(teacher, world, truth, [NOISE, DENOISE], out, clips=2)
    assert [settings.harvest_at for settings in made] == ["noise", "denoise"] and len(document["cells"]) == 2
    with pytest.raises(UserError, match="differ in clips: give another file"):
        measure_cells(teacher, world, truth, [NOISE], out, clips=3)
    with pytest.raises(UserError, match="differ in settings"):
        measure_cells(teacher, world, truth, [NOISE], out, clips=2, settings=ExtractionSettings(seed=1, harvest_at="noise"))
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
