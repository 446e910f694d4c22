"""`enhancer compare --priors-only`: a small world from end to end, what is counted, and what is refused."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import typer.testing
from PIL import Image

from enhancer.agreement_run import compared_recipe, measure_sources
from enhancer.cli import app
from enhancer.commands.compare import all_tables
from enhancer.console import Console
from enhancer.extraction import needed_sources
from enhancer.jobs import load_recipe
from enhancer.run_data import prepare_data
from vdm_priors.errors import RecipeError

WORLD = ["world.seed=4", "world.train_clips=1", "world.test_clips=6", "world.height=32", "world.width=32",
         "world.frames=9", "teacher.sampling.frames=5"]
SOURCES = "frame_difference,codec,oracle,uniform,shuffled,ensemble"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The command's folder, and what it printed."""
    root = tmp_path_factory.mktemp("compare")
    result = typer.testing.CliRunner().invoke(
        app, ["compare", "quickstart", f"output={root}", *WORLD, "--priors-only", "--sources", SOURCES])
    assert result.exit_code == 0, result.output
    return root / "quickstart" / "compare", result.output


def test_oracle_is_perfect_and_controls_are_chance(compared):
    document = json.loads((compared[0] / "agreement.json").read_text())
    sources = document["sources"]
    oracle = sources["oracle"]["groups"]["all"]
    assert oracle["auc"]["mean"] > 0.99 and oracle["kl"]["mean"] < 0.01 and oracle["centre"]["mean"] < 0.01
    uniform = sources["uniform(frame_difference)"]["groups"]["all"]
    assert uniform["auc"]["mean"] == pytest.approx(0.5, abs=0.02) and uniform["kl"]["mean"] > oracle["kl"]["mean"]
    found = sources["frame_difference"]["groups"]["all"]
    assert oracle["kl"]["mean"] < found["kl"]["mean"] and uniform["auc"]["mean"] < found["auc"]["mean"]
    assert found["known"]["mean"] < 1 == oracle["known"]["mean"]  # the first frame has none before it


def test_every_clip_is_measured_or_counted_as_without(compared):
    document = json.loads((compared[0] / "agreement.json").read_text())
    for entry in document["sources"].values():
        assert len(entry["clips"]) + len(entry["without"]) == document["clips"] == 6
        assert all(problem["reason"] for problem in entry["without"])
        assert entry["seconds"] > 0 and entry["bytes"] > 0
    assert {group for groups in document["groups"].values() for group in groups} >= {"all", "type CM", "motion camera"}
    camera = [key for key, groups in document["groups"].items() if "motion camera" in groups]
    assert all(document["sources"]["oracle"]["clips"][key]["auc"] is None for key in camera)


def test_means_of_the_table_are_those_of_the_clips(compared):
    document = json.loads((compared[0] / "agreement.json").read_text())
    with open(compared[0] / "agreement.csv", newline="") as file:
        rows = {(row["source"], row["group"], row["measure"]): row for row in csv.DictReader(file)}
    for label, entry in document["sources"].items():
        for measure in ("auc", "nss", "kl", "centre"):
            values = [clip[measure] for clip in entry["clips"].values() if clip[measure] is not None]
            row = rows[label, "all", measure]
            assert float(row["mean"]) == pytest.approx(sum(values) / len(values)) and int(row["n"]) == len(values)
            assert float(row["low"]) <= float(row["mean"]) <= float(row["high"])
    assert "frame_difference" in compared[1] and "AUC by kind of clip" in compared[1]
    assert "AUC by kind of clip" in (compared[0] / "agreement.md").read_text()


def test_the_picture_has_a_row_for_each_source_and_clip(compared):
    picture = np.asarray(Image.open(compared[0] / "agreement.png").convert("RGB"))
    assert picture.shape[1] > 300 and picture.shape[0] > 3 * 8 * 80  # three clips; frames, ground truth and six sources
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 200


def test_without_ground_truth_sources_are_compared_with_each_other(compared):
    root = compared[0].parent.parent
    loaded = load_recipe("quickstart", [f"output={root}", *WORLD]).recipe
    data = prepare_data(loaded, Console(quiet=True))
    recipe = replace(compared_recipe(loaded, ["codec", "frame_difference"]), world=None)
    measured = measure_sources(recipe, data.test[:4], None, root / "quickstart" / "priors", Console(quiet=True))
    (pair,) = measured.document["correlation"]
    assert {pair["first"], pair["second"]} == {"codec", "frame_difference"} and 0.2 < pair["mean"] <= 1
    titles = [title for title, _, _ in all_tables(measured.document)]
    assert len(titles) == 2 and titles[1].startswith("Source against source")
    assert all(entry["groups"] == {} for entry in measured.document["sources"].values())
    assert all(entry["reused"] and entry["seconds"] is None for entry in measured.document["sources"].values())


def test_what_sources_are_made_from():
    recipe = load_recipe("quickstart").recipe
    compared = compared_recipe(recipe, ["codec", "oracle", "flow", "shuffled", "ensemble"])
    assert [spec.label for spec in needed_sources(compared)] == ["codec", "oracle", "flow", "shuffled(codec)", "ensemble(codec+flow)"]


@pytest.mark.parametrize("names", ["codec,codec", "uniform", "codek", "", "codec,ensemble"])
def test_sources_that_cannot_be_compared_are_refused(names):
    with pytest.raises(RecipeError, match="sources|members"):
        compared_recipe(load_recipe("quickstart").recipe, [name for name in names.split(",") if name])


def test_the_oracle_needs_a_world_and_the_command_says_what_it_compares():
    with pytest.raises(RecipeError, match="ground truth"):
        compared_recipe(replace(load_recipe("quickstart").recipe, world=None), ["oracle", "codec"])
    result = typer.testing.CliRunner().invoke(app, ["compare", "quickstart"])
    assert result.exit_code == 2 and "--priors-only" in result.output


def test_the_camera_stays_in_the_maps_where_it_is_wanted(compared):
    root = compared[0].parent.parent
    found = {}
    for camera in ("remove", "keep"):
        loaded = load_recipe("quickstart", [f"output={root}", *WORLD, f"sources.camera={camera}"]).recipe
        data = prepare_data(loaded, Console(quiet=True))
        asked = [sample for sample in data.test if sample.question_type == "CM"]
        recipe = compared_recipe(loaded, ["codec", "flow"])
        found[camera] = measure_sources(recipe, asked, data.truth, root / "quickstart" / "priors", Console(quiet=True))
    for source in ("codec", "flow"):
        kl = {camera: of.document["sources"][source]["groups"].get("all", {}).get("kl", {}).get("mean")
              for camera, of in found.items()}
        assert kl["keep"] is not None and (kl["remove"] is None or kl["keep"] < kl["remove"])
        kept = found["keep"].priors[source].values()
        assert {(prior.provenance["camera"], prior.provenance["of"]) for prior in kept} == {("keep", "all")}
        assert all("camera" not in prior.provenance for prior in found["remove"].priors[source].values())
