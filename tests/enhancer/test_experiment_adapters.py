"""Matrices with codec adapters as students: their cells, hashes, stages after a kill, and the reference."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from enhancer.console import Console
from enhancer.data.samples import load_samples
from enhancer.experiment import adapted
from enhancer.experiment.cells import control_of, make_cells
from enhancer.experiment.pool import training_key, trained_at
from enhancer.experiment.run import run_compare
from enhancer.experiment.schema import CompareRecipe
from enhancer.run_data import data_root
from enhancer.recipe import build
from enhancer.runfolder import read_json, read_lines
from enhancer.world import make_world
from vdm_priors.errors import RecipeError, UserError

EMA = {
    "job": "adapter",
    "name": "ema",
    "adapter": "ema",
    "world": {},
    "settings": {"cells": 8, "patch": 4, "width": 16, "heads": 2, "pooling": 2, "layers": 1, "fusion_heads": 2, "prompt": ""},
    "reading": {"size": [64, 64], "key_interval": 9},
    "stages": [
        {"name": "warm-up", "objective": "classify", "text": "caption", "training": {"steps": 1, "batch_size": 2}},
        {"name": "tuning", "training": {"steps": 1, "batch_size": 2, "warmup": 0.0, "learning_rate_llm": 1e-3}},
    ],
}
BASE = {
    "name": "base",
    "device": "cpu",
    "world": {"seed": 3, "train_clips": 2, "test_clips": 4, "questions": {"LM": 1.0}},
    "teacher": {"text": "question"},
    "student": {"sampling": {"frames": 4}},
    "training": {"steps": 1, "batch_size": 2, "alignment": {"aligner": "identity", "compare_on": "student"}},
    "arms": [{"name": "lambda0"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "ema.yaml").write_text(yaml.safe_dump(EMA))
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    return folder


def matrix(folder, *levels, **changes):
    values = {
        "name": "m",
        "base": str(folder / "base.yaml"),
        "output": str(folder / "runs"),
        "seeds": [0],
        "axes": [{"name": "student", "levels": [{"name": f"{n}", "set": keys} for n, keys in enumerate(levels)]}],
    }
    return build(CompareRecipe, {**values, **changes})


def ema(folder, **keys):
    return {"adapter": str(folder / "ema.yaml"), **keys}


def test_an_adapters_cell_has_the_bases_data_and_its_own_stages(folder):
    recipe = matrix(folder, {}, ema(folder), ema(folder, **{"arm.source": "oracle", "adapter.stages.tuning.training.steps": 7}))
    plain, alone, aligned = make_cells(recipe)
    assert plain.adapter is None and alone.is_control and not aligned.is_control
    assert [stage.training.steps for stage in aligned.adapter.stages] == [1, 7]
    assert aligned.adapter.world == plain.recipe.world and aligned.adapter.host == "world"
    assert control_of(aligned).adapter is aligned.adapter


def test_what_a_level_gets_wrong_of_an_adapter_is_said(folder):
    captions = {**EMA, "stages": [{"name": "only", "text": "caption"}]}
    (folder / "captions.yaml").write_text(yaml.safe_dump(captions))
    wrong = [
        ({"adapter.settings.width": 8}, "sets adapter.settings.width=8, but no `adapter`"),
        (ema(folder, **{"adapter.world.seed": 8}), "adapter.world.seed=8, which the matrix's base decides"),
        (ema(folder, **{"adapter.settings.widht": 8}), "did you mean 'width'"),
        ({"adapter": str(folder / "base.yaml")}, "a recipe of the job 'enhance'"),
        ({"adapter": str(folder / "captions.yaml"), "arm.source": "oracle"}, "no stage of .* learns the questions' answers"),
    ]
    for keys, message in wrong:
        with pytest.raises(RecipeError, match=message):
            make_cells(matrix(folder, keys))
    with pytest.raises(RecipeError, match="reference: no cell is called 'frames'; they are 0"):
        make_cells(matrix(folder, {}, reference="frames"))


def test_what_determines_an_adapters_weights_is_in_its_hash(folder):
    def key(keys, priors=None, **of_matrix):
        [cell] = make_cells(matrix(folder, keys, **of_matrix))
        root = data_root(cell.recipe)
        make_world(root, cell.recipe.world)
        samples, _ = load_samples(root / "train.json", root)
        return training_key(cell, root, samples, priors and {sample.id: priors for sample in samples})

    alone = key(ema(folder))
    assert alone != key({})
    assert alone == key(ema(folder, **{"training.steps": 9, "student.sampling.frames": 2}))  # of frames alone
    assert alone == key(ema(folder, **{"adapter.stages.tuning.training.save_every": 5}))
    changes = {"stages.tuning.types": ["LM"], "stages.tuning.training.steps": 9, "settings.width": 8,
               "reading.key_interval": 4, "caption_question": "And?"}
    assert len({alone, *(key(ema(folder, **{f"adapter.{name}": value})) for name, value in changes.items())}) == 6
    assert len({alone, key(ema(folder), "a"), key(ema(folder), "b")}) == 3


def test_a_stage_learns_from_questions_of_its_types_alone(folder):
    other = ema(folder, **{"adapter.stages.tuning.types": ["CM"]})  # the base's questions are all LM
    with pytest.raises(UserError, match=r"stages.tuning.types: the matrix's data has LM, and none of \['CM'\]"):
        run_compare(matrix(folder, other, name="types"), Console(quiet=True))


def test_stages_are_not_trained_twice_and_only_questions_are_aligned(folder, monkeypatch):
    """A kill in the second stage; then the whole matrix, with frames as the reference; then other questions."""
    from enhancer.adapters import stages

    levels = {}, {**ema(folder), "arm.source": "oracle"}
    recipe = matrix(folder, *levels, reference="0", keep_students=False)
    whole, seen = stages.run_stage, []

    def counted(model, stage, *rest):
        seen.append(stage.name)
        if len(seen) == 2:
            raise UserError("the disk is full")
        return whole(model, stage, *rest)

    monkeypatch.setattr(stages, "run_stage", counted)
    with pytest.raises(UserError, match="the disk is full"):
        run_compare(recipe, Console(quiet=True))
    first = sorted(seen)
    assert first == ["tuning", "tuning", "warm-up", "warm-up"] and len(seen) == 4  # λ = 0 and its aligned twin
    where = run_compare(recipe, Console(quiet=True))
    assert seen[4:] == ["tuning"]  # the killed student's second stage alone

    plan, table = read_json(where / "plan.json", {}), read_json(where / "table.json", {})
    assert [row["name"] for row in table["rows"]] == ["before training", "λ = 0 · 1", "0", "1"]
    assert table["reference"] == "0" and [row["reference"] is None for row in table["rows"]] == [True, False, True, False]
    assert table["rows"][3]["against"] == "λ = 0 · 1" and table["rows"][3]["cost"]["tokens"] != table["rows"][2]["cost"]["tokens"]
    aligned = make_cells(recipe)[1]
    asked = (where / plan["pool"]).resolve() / plan["cells"][1]["asked"]
    place = trained_at(asked.parents[1], aligned.recipe, 0)
    assert (asked / adapted.FILE).is_file() and not (place / "model").exists()
    rows = {row["source"] for row in read_json(asked.parents[1] / "priors.json", [])}
    losses = [row["alignment_loss"] for row in read_lines(place / "stages" / "2-tuning" / "history.jsonl")]
    assert rows == {"oracle"} and len(losses) == 1 and losses[0] > 0
    assert "alignment_loss" not in json.dumps(read_lines(place / "stages" / "1-warm-up" / "history.jsonl"))

    other = dataclasses.replace(recipe, set={"evaluate.protocol": "letter"})
    run_compare(other, Console(quiet=True))
    assert seen[5:] == ["warm-up", "tuning"] * 2  # weights were not kept, so those students are trained anew
