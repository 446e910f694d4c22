"""Matrices: cells, what they share, what a kill leaves, several processes' work, and the shipped ones."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from enhancer.cli import app
from enhancer.console import Console
from enhancer.experiment import run as run_module
from enhancer.experiment.cells import control_of, make_cells
from enhancer.experiment.plan import rotated
from enhancer.experiment.pool import answered_at, training_key, trained_at
from enhancer.experiment.run import run_compare
from enhancer.experiment.schema import CompareRecipe
from enhancer.jobs import load_recipe
from enhancer.processes import Process
from enhancer.recipe import build
from enhancer.recipe_files import list_recipes
from enhancer.runfolder import read_json, write_json, write_lines
from vdm_priors.errors import RecipeError, UserError

sys.path.insert(0, str(Path(__file__).parent))
from tiny_run import recipe_values, write_data  # noqa: E402

SOURCES = {
    "name": "source",
    "levels": [{"name": "none"}, {"name": "change", "set": {"arm.source": "frame_difference"}}],
}
WEIGHTS = {
    "name": "λ",
    "levels": [{"name": f"λ {weight}", "set": {"training.alignment.weight": weight}} for weight in (1, 5)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    write_data(folder / "data", train=2, test=2)
    (folder / "base.yaml").write_text(yaml.safe_dump(recipe_values(folder)))
    return folder


def matrix(folder, **changes):
    values = {
        "name": "m",
        "base": str(folder / "base.yaml"),
        "output": str(folder / "runs"),
        "seeds": [0, 1],
        "set": {"training": {"steps": 1}},
        "axes": [SOURCES, WEIGHTS],
    }
    return build(CompareRecipe, {**values, **changes})


@pytest.fixture
def counted(monkeypatch):
    """Students that take no time: a worker's files are written, and every call is noted."""
    calls = []

    def finish(asked, seed, console, keep=True):
        recipe = yaml.safe_load((asked / "recipe.yaml").read_text())
        calls.append((recipe["arms"][0]["name"], seed, asked.parents[1].name))
        place = answered_at(asked, seed)
        rows = [
            {"id": str(n), "question_type": "MR", "options": ["a", "b"], "correct": (n + (seed or 0)) % 3 > 0}
            for n in range(6)
        ]
        if seed is not None:
            write_json(
                asked.parents[1] / "arms" / recipe["arms"][0]["name"] / f"seed{seed}" / "train.json", {"seconds": 2.0}
            )
        write_lines(place / "answers.jsonl", rows)
        write_json(place / "scores.json", {})

    monkeypatch.setattr(run_module, "finish_student", finish)
    return calls


# ---- cells ---------------------------------------------------------------------------------------


def test_a_product_has_every_combination_and_one_at_a_time_each_change_alone(folder):
    cells = make_cells(matrix(folder))
    assert [cell.name for cell in cells] == ["none · λ 1", "none · λ 5", "change · λ 1", "change · λ 5"]
    assert [cell.recipe.training.alignment.weight for cell in cells] == [1, 5, 1, 5]
    assert [cell.is_control for cell in cells] == [True, True, False, False]
    assert {cell.recipe.training.steps for cell in cells} == {1} and {cell.recipe.examples for cell in cells} == {0}
    assert cells[2].recipe.teacher.store == str(folder / "runs" / "shared" / "priors")
    alone = make_cells(matrix(folder, design="one_at_a_time"))
    assert [cell.name for cell in alone] == ["default", "source: change", "λ: λ 5"]
    assert [cell.recipe.arms[0].source for cell in alone] == ["none", "frame_difference", "none"]


def test_faults_of_cells_are_told_together_once_each(folder):
    axis = {
        "name": "x",
        "levels": [
            {"name": "good"},
            {"name": "bad", "set": {"training.stepz": 2}},
            {"name": "worse", "set": {"arm.source": "vdn", "training.batch_size": 0}},
        ],
    }
    with pytest.raises(RecipeError) as caught:
        make_cells(matrix(folder, axes=[axis, WEIGHTS]))
    text = str(caught.value)
    assert (
        "'bad · λ 1'" in text
        and "did you mean 'training.steps'" in text
        and "'worse · λ 1'" in text
        and "between 1 and 4096" in text
    )
    assert text.count("stepz") == 1
    raw = {"training.alignment": {"normalize": "none", "sharpen": 2.0}}
    with pytest.raises(RecipeError, match="training.alignment: sharpen loses the scale of a prior: set normalize to row"):
        make_cells(matrix(folder, set=raw))
    with pytest.raises(RecipeError, match="training.alignment: loss js compares distributions"):
        make_cells(matrix(folder, set={"training.alignment": {"normalize": "none", "loss": "js"}}))
    with pytest.raises(RecipeError, match="sets seeds, which the matrix decides"):
        make_cells(matrix(folder, set={"seeds": [3]}))
    with pytest.raises(RecipeError, match="axes.x.levels.a: the name is used twice"):
        matrix(folder, axes=[{"name": "x", "levels": [{"name": "a"}, {"name": "a"}]}])


def test_only_what_determines_the_weights_is_in_a_trainings_hash(folder):
    from enhancer.data.samples import load_samples

    none, _, one, five = make_cells(matrix(folder))
    samples, _ = load_samples(folder / "data" / "train.json")
    priors = {sample.id: "key" for sample in samples}
    assert training_key(none, folder, samples, None) == training_key(control_of(five), folder, samples, None)
    assert len({training_key(cell, folder, samples, priors) for cell in (one, five)}) == 2
    assert training_key(one, folder, samples, priors) != training_key(one, folder, samples, {**priors, samples[0].id: "other"})
    assert training_key(one, folder, samples, priors) != training_key(one, folder, samples[:1], priors)

    def changed(**training):
        return dataclasses.replace(
            one, recipe=dataclasses.replace(one.recipe, training=dataclasses.replace(one.recipe.training, **training))
        )

    assert training_key(changed(workers=3, save_every=2), folder, samples, priors) == training_key(one, folder, samples, priors)
    assert training_key(changed(batch_size=1), folder, samples, priors) != training_key(one, folder, samples, priors)


@pytest.mark.parametrize("shipped", [r for r in list_recipes() if r.name.startswith("compare/")], ids=lambda r: r.name)
def test_shipped_matrices_have_cells(shipped):
    recipe = load_recipe(shipped.path).recipe
    cells = make_cells(recipe)
    assert len(cells) >= 4 and len({cell.name for cell in cells}) == len(cells)
    assert len(recipe.seeds) >= 5 or recipe.name not in ("compare-sources", "compare-selection", "compare-steps")
    assert any(not cell.is_control for cell in cells)


# ---- one experiment ------------------------------------------------------------------------------


def test_nothing_is_trained_twice_by_one_matrix_or_by_the_next(folder, counted):
    run_compare(matrix(folder, pool=str(folder / "pool1")), Console(quiet=True))
    # the base model, λ = 0 once for both levels of λ, and two aligned students, with two seeds
    assert sorted(calls[:2] for calls in counted if calls[1] is not None) == sorted(
        [("lambda0", 0), ("lambda0", 1), *[("frame_difference", seed) for seed in (0, 1)] * 2]
    )
    assert counted[0][:2][1] is None and len(counted) == 7
    run_compare(matrix(folder, pool=str(folder / "pool1")), Console(quiet=True))
    assert len(counted) == 7
    three = {**WEIGHTS, "levels": [*WEIGHTS["levels"], {"name": "λ 9", "set": {"training.alignment.weight": 9}}]}
    run_compare(
        matrix(folder, pool=str(folder / "pool1"), name="wider", axes=[SOURCES, three], seeds=[0, 1, 2]),
        Console(quiet=True),
    )
    assert [call[:2] for call in counted[7:]] == [("frame_difference", 0), ("frame_difference", 1), ("lambda0", 2)] + [
        ("frame_difference", 2)
    ] * 3
    table = read_json(folder / "runs" / "wider" / "table.json", {})
    assert [row["name"] for row in table["rows"]] == [
        "before training",
        "none",
        "change · λ 1",
        "change · λ 5",
        "change · λ 9",
    ]
    assert table["rows"][2]["difference"]["per_seed"] == [0, 0, 0] and table["rows"][2]["against"] == "none"
    assert table["rows"][2]["cost"]["training"] == 2.0 and table["rows"][2]["cost"]["bytes"] > 0


def test_a_killed_experiment_continues_and_a_failed_student_stops_no_other(folder, counted, monkeypatch):
    recipe, finish = matrix(folder, pool=str(folder / "pool2"), name="killed"), run_module.finish_student

    def killed(asked, seed, console, keep=True):
        if len(counted) == 3:
            raise KeyboardInterrupt
        finish(asked, seed, console, keep)

    monkeypatch.setattr(run_module, "finish_student", killed)
    with pytest.raises(KeyboardInterrupt):
        run_compare(recipe, Console(quiet=True))
    assert read_json(recipe.folder / "run.json", {})["status"] == "interrupted" and len(counted) == 3
    code = CliRunner().invoke(app, ["report", str(recipe.folder)]).exit_code
    page = (recipe.folder / "report.html").read_text()
    assert code == 0 and "Not everything is here" in page and "change · λ 5 with seed 0, seed 1: no answers yet" in page

    def failing(asked, seed, console, keep=True):
        if seed == 1 and "source: frame_difference" in (asked / "recipe.yaml").read_text():
            raise UserError("the disk is full")
        finish(asked, seed, console, keep)

    monkeypatch.setattr(run_module, "finish_student", failing)
    with pytest.raises(UserError, match=r"(?s)2 students did not finish.*the disk is full.*same command again"):
        run_compare(recipe, Console(quiet=True))
    assert read_json(recipe.folder / "run.json", {})["status"] == "incomplete" and len(counted) == 5
    monkeypatch.setattr(run_module, "finish_student", finish)
    run_compare(recipe, Console(quiet=True))
    assert len(counted) == 7 and len(set(counted)) == 7
    assert read_json(recipe.folder / "run.json", {})["status"] == "finished"


def test_another_jobs_folder_is_not_taken(folder, counted):
    write_json(folder / "runs" / "taken" / "run.json", {"name": "taken", "status": "finished"})
    with pytest.raises(UserError, match="holds a run of another job"):
        run_compare(matrix(folder, name="taken"), Console(quiet=True))


def test_launched_processes_begin_at_their_own_share():
    shares = [rotated(list(range(7)), Process(rank, 3, rank)) for rank in range(3)]
    assert shares == [[0, 3, 6, 1, 4, 2, 5], [1, 4, 2, 5, 0, 3, 6], [2, 5, 0, 3, 6, 1, 4]]
    assert rotated([1, 2], Process()) == [1, 2]


def test_real_students_from_priors_to_the_page(folder):
    recipe = matrix(folder, name="real", pool=str(folder / "pool3"), seeds=[0], axes=[SOURCES], keep_students=False)
    where = run_compare(recipe, Console(quiet=True))
    plan, table = read_json(where / "plan.json", {}), read_json(where / "table.json", {})
    assert [row["name"] for row in table["rows"]] == ["before training", "none", "change"] and table["missing"] == []
    assert table["rows"][2]["difference"]["seeds"] == 1 and "nothing is claimed" in " ".join(table["sentences"])
    assert table["rows"][2]["cost"]["seconds"] > 0 and table["rows"][2]["cost"]["training"] > 0
    pool = (where / plan["pool"]).resolve()
    assert not list(pool.glob("students/*/arms/*/seed0/model")) and list(
        pool.glob("students/*/arms/*/seed0/history.jsonl")
    )
    # a worker process makes the same answers, whatever a launcher has said to it
    asked = pool / plan["cells"][1]["asked"]
    before = (answered_at(asked, 0) / "answers.jsonl").read_text()
    shutil.rmtree(answered_at(asked, 0))
    done = subprocess.run(
        [sys.executable, "-m", "enhancer.experiment.work", str(asked), "0", "keep", "-"],
        capture_output=True,
        text=True,
        env={**os.environ, "RANK": "1", "WORLD_SIZE": "2"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "peak_mb" in json.loads(done.stdout.splitlines()[-1])
    assert (answered_at(asked, 0) / "answers.jsonl").read_text() == before
    place = trained_at(asked.parents[1], make_cells(recipe)[1].recipe, 0)
    assert (place / "model" / "model.safetensors").is_file()
    # a pool that is moved with its matrix is found
    moved = folder / "elsewhere"
    shutil.move(pool, moved / "pool3"), shutil.move(where, moved / "runs" / "real")
    assert CliRunner().invoke(app, ["report", str(moved / "runs" / "real")]).exit_code == 0
    assert "Not everything is here" not in (moved / "runs" / "real" / "report.html").read_text()


def test_the_command_takes_several_matrices_and_refuses_other_recipes(folder, counted):
    for name in ("one", "two"):
        values = {
            "job": "compare",
            "name": name,
            "base": str(folder / "base.yaml"),
            "output": str(folder / "runs"),
            "axes": [SOURCES],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    result = CliRunner().invoke(
        app, ["compare", str(folder / "one.yaml"), str(folder / "two.yaml"), "seeds=[0,1]", "--quiet"]
    )
    assert result.exit_code == 0 and len(counted) == 5, result.output
    page = (folder / "runs" / "compare.html").read_text()
    assert page.count("<article") == 2 and "http" not in page.replace("http-equiv", "")
    shutil.rmtree(folder / "runs" / "shared" / "students")
    result = CliRunner().invoke(app, ["compare", str(folder / "one.yaml"), "--report-only", "--quiet"])
    assert result.exit_code == 0 and "no answers yet" in result.output and len(counted) == 5
    result = CliRunner().invoke(app, ["compare", "quickstart"], env={"COLUMNS": "200"})
    assert result.exit_code == 2 and "enhancer ls compare" in result.output
