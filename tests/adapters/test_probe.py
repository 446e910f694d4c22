"""Codec pictures and panels for models that no one adapted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from enhancer.adapters import probe
from enhancer.adapters.codec_pictures import codec_clip, error_picture, panel, vector_picture
from enhancer.adapters.gops import Gop, plan_gops
from enhancer.console import Console
from enhancer.jobs import load_recipe
from enhancer.recipe import build
from tests.adapters.test_preprocess import gop_clip
from vdm_priors.errors import ClipError, RecipeError


def test_a_vector_picture_tells_directions_apart_and_rest_from_the_unknown():
    displacement = np.zeros((2, 3, 2), np.float32)
    displacement[0, :3] = [[0.1, 0], [-0.1, 0], [0, 0.1]]
    displacement[1, 1] = [0.05, 0]
    valid = np.ones((2, 3), bool)
    valid[1, 2] = False
    picture = vector_picture(displacement, valid)
    assert picture.shape == (16, 24, 3)
    cells = picture[::8, ::8].astype(int)
    assert cells[0, 0].tolist() == [255, 0, 0] and cells[0, 1].tolist() == [0, 255, 255]  # opposite hues
    assert cells[1, 0].tolist() == [255, 255, 255] and cells[1, 2].tolist() == [0, 0, 0]
    assert cells[1, 1, 0] == 255 and 120 < cells[1, 1, 1] < 135  # half as far, half as deep
    assert (picture[:8, :8] == cells[0, 0]).all()


def test_an_error_picture_is_grey_where_nothing_came():
    error = np.zeros((8, 8, 3), np.int16)
    error[0, 0], error[1, 1], error[2, 2] = 10, -10, 300
    picture = error_picture(error)
    assert picture[0, 0, 0] == 168 and picture[1, 1, 0] == 88 and picture[2, 2, 0] == 255 and picture[7, 7, 0] == 128


def test_a_panel_has_its_pictures_row_by_row():
    pictures = [np.full((12, 18, 3), 10 * n, np.uint8) for n in range(6)]
    tiled = panel(pictures, 2, 3)
    assert tiled.shape == (12, 18, 3)
    for n in range(6):
        row, column = divmod(n, 3)
        assert (tiled[6 * row : 6 * row + 6, 6 * column : 6 * column + 6] == 10 * n).all()


def made(steps: int) -> Gop:
    """Picture n is n everywhere; step n moves by a hundredth of n to the right, with error n."""
    pictures = np.zeros((steps + 1, 16, 16, 3), np.uint8) + np.arange(steps + 1, dtype=np.uint8)[:, None, None, None]
    displacement = np.zeros((steps, 2, 2, 2), np.float32)
    displacement[..., 0] = np.arange(1, steps + 1)[:, None, None] / 100
    error = np.zeros((steps, 16, 16, 3), np.int16) + np.arange(1, steps + 1, dtype=np.int16)[:, None, None, None]
    return Gop(
        0, np.arange(steps + 1.0), steps + 1.0, pictures, displacement, np.ones((steps, 2, 2), bool), error, "native"
    )


def test_pictures_of_a_kind_span_the_video_by_themselves(tmp_path):
    plan = plan_gops(gop_clip(tmp_path, frames=4, keyint=2))
    clip = codec_clip([made(9)], plan, "IMIMRR")
    assert clip.times == [0, 1, 9, 9, 1, 9]
    assert clip.frames[[0, 2], 0, 0, 0].tolist() == [0, 9]
    assert clip.frames[[4, 5], 0, 0, 0].tolist() == [128 + 4, 128 + 36]
    assert (
        clip.frames[3, 0, 0].tolist() == vector_picture(made(9).displacement[8], np.ones((2, 2), bool))[0, 0].tolist()
    )
    panels = codec_clip([made(9)], plan, "PP", (2, 2))
    assert panels.frames.shape == (2, 16, 16, 3) and panels.times == [0, 5]
    with pytest.raises(ClipError, match="no motion to draw"):
        codec_clip([made(0)], plan, "IM")


def test_the_recipes_are_the_papers_conditions():
    recipe = load_recipe("adapters/himmel/probe").recipe
    counts = {c.name: tuple(c.pictures.count(letter) for letter in "IMR") for c in recipe.conditions}
    assert counts == {
        "frames": (8, 0, 0),
        "half_vectors": (4, 4, 0),
        "mixed": (2, 3, 3),
        "vectors": (0, 8, 0),
        "errors": (0, 0, 8),
        "panel": (0, 0, 0),
    }
    assert {c.name: c.pictures for c in recipe.conditions}["mixed"] == "IMMMIRRR"


def test_a_probe_asks_every_condition_once_and_goes_on(tmp_path):
    raw = {
        "name": "p",
        "output": str(tmp_path),
        "world": {"train_clips": 1, "test_clips": 6},
        "device": "cpu",
        "reading": {"fuse": 4, "size": [64, 64]},
        "evaluate": {"batch_size": 6},
        "conditions": [{"name": "frames", "pictures": "II"}, {"name": "panel", "pictures": "P", "panel": [1, 2]}],
    }
    folder = probe.run(build(probe.ProbeRecipe, raw), Console(quiet=True))
    table = json.loads((folder / "table.json").read_text())
    assert [row["condition"] for row in table] == ["frames", "panel"]
    assert all(row["overall"]["n"] == 6 and row["complete"] for row in table)
    assert table[0]["against_first"] is None and table[1]["against_first"]["n"] == 6
    answers = folder / "frames.jsonl"
    before = answers.stat().st_mtime_ns
    (folder / "panel.jsonl").unlink()
    probe.run(build(probe.ProbeRecipe, raw), Console(quiet=True))
    assert answers.stat().st_mtime_ns == before and (folder / "panel.jsonl").is_file()


def test_faults_are_named():
    with pytest.raises(RecipeError, match="conditions.a.*used 2 times"):
        build(probe.ProbeRecipe, {"name": "p", "world": {}, "conditions": [{"name": "a", "pictures": "I"}] * 2})
    with pytest.raises(RecipeError, match="pictures"):
        build(probe.ProbeRecipe, {"name": "p", "world": {}, "conditions": [{"name": "a", "pictures": "IXI"}]})
    with pytest.raises(RecipeError, match="data.root"):
        build(probe.ProbeRecipe, {"name": "p", "conditions": [{"name": "a", "pictures": "I"}]})
