"""`enhancer store ls|verify|gc` on stores with whole, damaged, unused and half-written files."""

from __future__ import annotations

import json
import os

import pytest
import torch
import yaml
from typer.testing import CliRunner

from enhancer.cli import app
from enhancer.console import Console
from enhancer.data.samples import load_samples
from enhancer.filling import fill_store
from enhancer.pipeline import run_enhance
from enhancer.jobs import load_recipe
from enhancer.runfolder import read_json, write_json
from enhancer.sources import SourceContext, build_source
from enhancer.video.clip import Sampling
from enhancer.world import WorldSettings, load_truth, make_world
from vdm_priors.grid import TokenGrid
from vdm_priors.prior import MotionPrior
from vdm_priors.store import PriorStore, content_key
from vdm_priors.words import split_words


def call(*arguments, columns=120):
    environment = {"COLUMNS": str(columns), "ENHANCER_TRACEBACK": "0"}
    result = CliRunner().invoke(app, ["store", *map(str, arguments)], env=environment)
    return result.exit_code, result.output


def put(store: PriorStore, text: str, source: str = "vdm", model: str = "tiny") -> str:
    words = split_words(text)
    grid = TokenGrid.regular([(0.0, 1.0), (1.0, 2.0)], 4, 5)
    key = content_key(text=text, source=source, model=model)
    store.put(key, MotionPrior(text, words, torch.ones(len(words), 2, 4, 5), grid, torch.ones(len(words)),
                               {"source": source, **({"model": model} if model else {})}))
    return key


@pytest.fixture
def store(tmp_path):
    return PriorStore(tmp_path / "priors")


@pytest.fixture
def keys(store):
    return [put(store, "the red ball rolls"),
            put(store, "a Blue cube jumps up and then down the long stairs again and again"),
            put(store, "the red ball rolls", "oracle", ""), put(store, "nothing moves", "vdm", "other")]


# ---- ls ------------------------------------------------------------------------------------------

def test_ls_shows_a_line_a_prior(store, keys):
    code, text = call("ls", store.folder)
    assert code == 0 and "4 priors" in text
    lines = text.splitlines()
    assert lines[0].split() == ["key", "source", "model", "text", "grid", "words", "size", "age"]
    row = next(line for line in lines if line.startswith(keys[0][:12]))
    assert row.split()[1:3] == ["vdm", "tiny"] and "the red ball rolls" in row and "2×4×5" in row and " kB" in row
    assert row.split()[-5] == "4"  # words
    assert all(len(line) <= 120 for line in lines)
    assert all(len(line) <= 90 for line in call("ls", store.folder, columns=90)[1].splitlines())


@pytest.mark.parametrize("filters, found", [
    (["--source", "oracle"], {2}), (["--model", "tiny"], {0, 1}), (["--text", "blue CUBE"], {1}),
    (["--source", "vdm", "--text", "red"], {0}),
    (["--source", "shuffled"], set())])
def test_ls_filters(store, keys, filters, found):
    rows = [json.loads(line) for line in call("ls", store.folder, "--json", *filters)[1].splitlines()]
    assert {row["key"] for row in rows} == {keys[n] for n in found}


def test_ls_json_has_whole_values(store, keys):
    rows = {row["key"]: row for row in map(json.loads, call("ls", store.folder, "--json")[1].splitlines())}
    row, path = rows[keys[1]], store.path(keys[1])
    assert row["words"][:3] == ["a", "Blue", "cube"] and row["grid"] == [2, 4, 5]
    assert row["bytes"] == path.stat().st_size
    assert row["modified"] == path.stat().st_mtime and rows[keys[2]]["model"] == ""


def test_ls_counts_what_it_cannot_read(store, keys):
    store.path(keys[0]).write_bytes(b"damaged")
    code, text = call("ls", store.folder)
    assert code == 0 and "3 priors" in text and "1 more are damaged" in text
    assert len(call("ls", store.folder, "--json")[1].splitlines()) == 3


def test_a_folder_that_is_not_there_is_told(tmp_path):
    for command in ("ls", "verify", "gc"):
        code, text = call(command, tmp_path / "gone")
        assert code == 1 and "There is no folder" in text
    (tmp_path / "empty").mkdir()
    assert call("ls", tmp_path / "empty")[0] == 0 and call("verify", tmp_path / "empty")[0] == 0


# ---- verify --------------------------------------------------------------------------------------

def test_verify_finds_and_deletes_the_damaged_ones(store, keys):
    assert call("verify", store.folder) == (0, "4 of 4 priors are whole, 0 damaged\n")
    flipped = bytearray(store.path(keys[1]).read_bytes())
    flipped[-3] ^= 1
    store.path(keys[1]).write_bytes(bytes(flipped))
    store.path(keys[3]).write_bytes(b"")
    code, text = call("verify", store.folder)
    assert code == 1 and "2 of 4 priors are whole, 2 damaged" in text
    assert all(str(store.path(keys[n])) in text for n in (1, 3)) and str(store.path(keys[0])) not in text
    assert len(store.keys()) == 4
    code, text = call("verify", store.folder, "--delete")
    assert code == 0 and "deleted" in text and sorted(store.keys()) == sorted([keys[0], keys[2]])


def test_verify_finds_a_prior_of_another_key(store, keys):
    prior = store.get(keys[0])
    prior.provenance["key"] = keys[0]
    store.put(keys[0], prior)
    store.put("f" * 32, prior)  # as after renaming the file
    code, text = call("verify", store.folder, columns=400)
    assert code == 1 and "4 of 5 priors are whole, 1 damaged" in text and f"its own key is {keys[0]}" in text


# ---- gc ------------------------------------------------------------------------------------------

def make_run(folder, keys, status="finished"):
    write_json(folder / "run.json", {"status": status})
    write_json(folder / "priors.json", [{"sample_id": str(n), "key": key} for n, key in enumerate(keys)])
    return folder


def test_gc_keeps_what_named_runs_use(store, keys, tmp_path):
    one, two = make_run(tmp_path / "one", keys[:1]), make_run(tmp_path / "two", keys[1:2])
    code, text = call("gc", store.folder, "--run", one, "--run", two)
    assert code == 0 and "2 unused priors" in text and "add --yes" in text and len(store.keys()) == 4
    assert str(store.path(keys[2])) in text and str(store.path(keys[0])) not in text
    code, text = call("gc", store.folder, "--run", one, "--run", two, "--yes")
    assert code == 0 and "2 unused priors" in text and sorted(store.keys()) == sorted(keys[:2])
    assert "0 unused priors" in call("gc", store.folder, "--run", one, "--run", two, "--yes")[1]


def test_gc_without_a_name_takes_left_over_files_alone(store, keys):
    old, new = (store.path(keys[0]).with_name(f".{n}.safetensors.tmp") for n in "ab")
    old.touch(), new.touch()
    os.utime(old, (1.0, 1.0))
    assert "0 unused priors and 1 left-over files" in call("gc", store.folder)[1] and old.exists()
    code, text = call("gc", store.folder, "--yes")
    assert code == 0 and not old.exists() and new.exists() and len(store.keys()) == 4


def test_gc_deletes_nothing_where_a_name_is_wrong(store, keys, tmp_path):
    foreign = make_run(tmp_path / "foreign", ["a" * 32])
    code, text = call("gc", store.folder, "--run", foreign, "--yes")
    assert code == 1 and "uses none of the 4 priors" in text and len(store.keys()) == 4
    code, text = call("gc", store.folder, "--run", tmp_path / "nowhere", "--yes")
    assert code == 1 and "not a run folder" in text
    code, text = call("gc", store.folder, "--recipe", "nosuch", "--yes")
    assert code == 2 and "no recipe 'nosuch'" in text and len(store.keys()) == 4


@pytest.fixture
def extracted(tmp_path):
    """A recipe of oracle and uniform priors, extracted; the recipe's file, its run folder and store."""
    values = {"name": "cheap", "output": str(tmp_path / "runs"), "teacher": {"sampling": {"frames": 5}},
              "world": {"train_clips": 4, "test_clips": 1, "frames": 5, "height": 32, "width": 32},
              "arms": [{"name": "o", "source": "oracle"}, {"name": "u", "source": "uniform", "base": "oracle"}]}
    path = tmp_path / "cheap.yaml"
    path.write_text(yaml.safe_dump(values))
    run = run_enhance(load_recipe(path).recipe, Console(quiet=True), until="priors")
    return path, run, PriorStore(run / "priors")


def test_gc_knows_what_a_recipe_and_an_unfinished_run_use(extracted):
    path, run, store = extracted
    assert len(store.keys()) == 8
    stray = put(store, "of another recipe")
    for named in (["--recipe", path], ["--run", run]):
        code, text = call("gc", store.folder, *named)
        assert code == 0 and "uses 8 of 9 priors" in text and "1 unused priors" in text
    (run / "priors.json").unlink()  # as in a run that has not come so far
    code, text = call("gc", store.folder, "--run", run, "--yes")
    assert code == 0 and "1 unused priors" in text and stray not in store.keys() and len(store.keys()) == 8
    record = read_json(run / "run.json", {})
    write_json(run / "run.json", {**record, "status": "running"})
    write_json(run / "priors.json", [{"key": store.keys()[0]}])
    assert "0 unused priors" in call("gc", store.folder, "--run", run, "--yes")[1]


def test_a_deleted_prior_is_made_again(tmp_path):
    make_world(tmp_path, WorldSettings(train_clips=3, test_clips=0, frames=5, height=32, width=32))
    samples, _ = load_samples(tmp_path / "train.json", tmp_path)
    context = SourceContext(samples=samples, store=PriorStore(tmp_path / "store"), sampling=Sampling(5),
                            truth=load_truth(tmp_path))
    report = fill_store(build_source("oracle", context), samples, context.store)
    context.store.path(report.rows[1][1]).write_bytes(b"damaged")
    assert call("verify", tmp_path / "store", "--delete")[0] == 0
    again = fill_store(build_source("oracle", context), samples, context.store)
    assert (again.made, again.reused, again.replaced) == (1, 2, 0)
