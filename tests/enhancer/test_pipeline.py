"""The main job end to end on small random models: steps, resuming, controls, failures."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from enhancer.console import Console
from enhancer.evaluation.scores import summarise
from enhancer.extraction import needed_sources, with_own_frames
from enhancer.pipeline import run_enhance
from enhancer.run_data import data_root
from enhancer.recipe import build
from enhancer.recipe_schema import EnhanceRecipe
from enhancer.runfolder import RunFolder, finished_so_far, read_json, read_lines, write_json, write_text
from enhancer.sources import SourceSpec
from enhancer.table import make_table, recovered_share, rich_tables, t_interval
from vdm_priors.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
from tiny_run import recipe_values, write_data  # noqa: E402

pytest.importorskip("enhancer.training")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run: three arms in this process."""
    folder = tmp_path_factory.mktemp("run")
    write_data(folder / "data")
    (folder / "data" / "videos" / "train3.mp4").write_bytes(b"not a video")  # a bad sample among good ones
    recipe = build(EnhanceRecipe, recipe_values(folder))
    return run_enhance(recipe, Console(quiet=True)), recipe


def test_run_folder_holds_everything(finished):
    run, recipe = finished
    record = read_json(run / "run.json", None)
    assert record["status"] == "finished" and record["seed"] == 0
    assert {"student", "teacher", "train", "test"} <= set(record["hashes"]) and "torch" in record["versions"]
    assert {"data", "preflight", "priors", "students", "examples", "table"} <= set(record["seconds"])
    assert record["peak_memory_mb"] > 10
    for arm in ("lambda0", "vdm", "shuffled"):
        place = run / "arms" / arm / "seed0"
        assert len(read_lines(place / "history.jsonl")) == 2
        assert len(read_lines(place / "answers.jsonl")) == 3
        assert {"overall", "average", "types"} <= set(read_json(place / "scores.json", {}))
        train = read_json(place / "train.json", {})
        assert (train["prior_source"], train["lambda"]) == ((None, 0.0) if arm == "lambda0" else (arm, 1.0))
        assert train["export_max_difference"] == 0.0
        assert (place / "model" / "model.safetensors").is_file() and not (place / "checkpoints").exists()
    assert (run / "base" / "answers.jsonl").is_file() and (run / "report.html").is_file()
    assert build(EnhanceRecipe, yaml.safe_load((run / "recipe.yaml").read_text())) == recipe


def test_priors_are_listed_and_the_bad_sample_is_named(finished):
    run, _ = finished
    rows = read_json(run / "priors.json", [])
    assert sorted((row["source"], row["sample_id"]) for row in rows) == [
        (source, f"train{n}") for source in ("shuffled", "vdm") for n in range(3)]
    skipped = read_lines(run / "skipped.jsonl")
    assert {row["id"] for row in skipped} == {"train3"} and {"extract", "train"} <= {row["stage"] for row in skipped}


def test_table_and_notes(finished):
    run, _ = finished
    table = read_json(run / "table.json", {})
    assert [row["arm"] for row in table["rows"]] == ["base", "lambda0", "vdm", "shuffled"]
    base, control, vdm, shuffled = table["rows"]
    assert base["delta_vs_lambda0"] is None and control["delta_vs_lambda0"] is None
    assert vdm["delta_vs_lambda0"]["low"] <= vdm["delta_vs_lambda0"]["difference"] <= vdm["delta_vs_lambda0"]["high"]
    assert vdm["delta_vs_shuffled"] is not None and shuffled["delta_vs_shuffled"] is None
    assert set(vdm["types"]) == {"MR", "LM"}
    assert any("one training seed" in note for note in table["notes"])
    assert any("33.3%" in note for note in table["notes"])  # guessing among three options
    assert [shown.row_count for shown in rich_tables(table, 200)] == [4]
    assert [len(shown.columns) for shown in rich_tables(table, 80)] == [5, 3]


def test_example_has_maps_before_and_after(finished):
    from safetensors import safe_open

    run, _ = finished
    (path,) = (run / "examples").glob("*.safetensors")
    with safe_open(str(path), "pt") as file:
        meta, tensors = json.loads(file.metadata()["meta"]), {name: file.get_tensor(name) for name in file.keys()}
    names = {"frames", "reconstruction", "inverted", "prior/vdm", "attention/base", "attention/lambda0", "attention/vdm",
             "attention/shuffled"}
    assert names == set(tensors)
    attention = tensors["attention/vdm"]
    assert len(attention) == len(meta["words"]) == len(tensors["prior/vdm"])
    assert torch.allclose(attention.sum(dim=(1, 2, 3)), torch.ones(len(attention)), atol=1e-4)
    assert not torch.equal(attention, tensors["attention/base"])
    assert tensors["frames"].dtype == torch.uint8 and "psnr_db" in meta and meta["video"].startswith("videos/")


def test_exported_student_loads_with_stock_transformers(finished):
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    run, _ = finished
    folder = run / "arms" / "vdm" / "seed0" / "model"
    Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    AutoProcessor.from_pretrained(folder)


def test_an_export_with_other_logits_stops_the_run(tmp_path, monkeypatch):
    from enhancer import arms

    def lossy(student, folder):
        with torch.no_grad():
            kept = {name: value.clone() for name, value in student.model.state_dict().items()}
            student.model.bfloat16().float()
            export(student, folder)
            student.model.load_state_dict(kept)

    export = arms.export
    monkeypatch.setattr(arms, "export", lossy)
    write_data(tmp_path / "data", train=2, test=2)
    recipe = build(EnhanceRecipe, recipe_values(tmp_path, arms=[{"name": "lambda0"}], examples=0, report=False))
    with pytest.raises(UserError, match="logits that differ by .* the export is not usable"):
        run_enhance(recipe, Console(quiet=True))
    assert not (tmp_path / "runs" / "tiny" / "arms" / "lambda0" / "seed0" / "train.json").exists()


def test_exports_of_a_mixed_precision_training_are_proved_too(tmp_path):
    write_data(tmp_path / "data", train=2, test=2)
    training = {**recipe_values(tmp_path)["training"], "bf16": True}
    recipe = build(EnhanceRecipe, recipe_values(tmp_path, arms=[{"name": "lambda0"}], training=training, examples=0, report=False))
    run = run_enhance(recipe, Console(quiet=True), until="train")
    assert read_json(run / "arms" / "lambda0" / "seed0" / "train.json", {})["export_max_difference"] == 0.0


def test_a_rerun_redoes_nothing_but_adds_new_arms(finished, monkeypatch):
    run, recipe = finished
    before = (run / "arms" / "vdm" / "seed0" / "model" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr("enhancer.arms.train", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr("enhancer.sources.vdm.extract_priors", lambda *a, **k: pytest.fail("extracted again"))
    run_enhance(recipe, Console(quiet=True))
    assert (run / "arms" / "vdm" / "seed0" / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_another_recipe_in_the_same_folder_is_refused(finished):
    run, recipe = finished
    values = recipe_values(run.parent.parent, training={"steps": 3, "batch_size": 2})
    with pytest.raises(UserError, match=r"training.steps: 2 -> 3[\s\S]*--fresh"):
        run_enhance(build(EnhanceRecipe, values), Console(quiet=True))
    with pytest.raises(UserError, match="`resume` is false"):
        run_enhance(build(EnhanceRecipe, recipe_values(run.parent.parent, resume=False)), Console(quiet=True))
    assert read_json(run / "run.json", {})["status"] == "finished"


@pytest.mark.parametrize("what", ["student.model", "teacher.model", "data.train", "data.test"])
def test_a_run_is_not_continued_with_other_models_or_data(finished, tmp_path, what):
    run, recipe = tmp_path / "runs" / "tiny", finished[1]
    shutil.copytree(finished[0].parent.parent, tmp_path, dirs_exist_ok=True)
    recipe = replace(recipe, output=str(tmp_path / "runs"))
    record = read_json(run / "run.json", {})
    name = what.removeprefix("data.").removesuffix(".model")
    write_json(run / "run.json", {**record, "hashes": {**record["hashes"], name: "0" * 32}})  # made from something else
    before = {path.name: path.read_text() for path in (run / "run.json", run / "recipe.yaml")}
    with pytest.raises(UserError, match=rf"{what} [\s\S]*000 -> [\s\S]*another `name` or `output`[\s\S]*--fresh"):
        run_enhance(recipe, Console(quiet=True))
    assert {path.name: path.read_text() for path in (run / "run.json", run / "recipe.yaml")} == before
    if what == "data.train":  # no student has learnt from it yet: the data may be mended
        shutil.rmtree(run / "arms")
        run_enhance(recipe, Console(quiet=True), until="priors")
        assert read_json(run / "run.json", {})["hashes"]["train"] == record["hashes"]["train"]


def test_interruption_keeps_what_is_done_and_says_so(tmp_path, monkeypatch):
    write_data(tmp_path / "data", train=2, test=2)
    recipe = build(EnhanceRecipe, recipe_values(tmp_path, arms=[{"name": "lambda0"}], examples=0, report=False))

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("enhancer.arms.ask", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_enhance(recipe, Console(quiet=True))
    run = tmp_path / "runs" / "tiny"
    assert read_json(run / "run.json", {})["status"] == "interrupted"
    assert "data, preflight, priors" in finished_so_far(run)
    monkeypatch.undo()
    run_enhance(recipe, Console(quiet=True))
    assert read_json(run / "run.json", {})["status"] == "finished"


@pytest.mark.slow
def test_students_in_processes_of_their_own(tmp_path):
    write_data(tmp_path / "data", train=2, test=2)
    recipe = build(EnhanceRecipe, recipe_values(tmp_path, arms=[{"name": "lambda0"}], parallel_arms=2, examples=0, report=False))
    run = run_enhance(recipe, Console(quiet=True))
    scores = read_json(run / "arms" / "lambda0" / "seed0" / "scores.json", {})
    assert scores["overall"]["n"] == 2 and read_json(run / "base" / "scores.json", {})["overall"]["n"] == 2
    assert read_json(run / "run.json", {})["peak_memory_mb"] > 500  # the workers' memory counts


def test_a_worker_that_fails_is_reported_and_the_others_finish(tmp_path):
    from enhancer.workers import Work, run_workers

    good = "import json; print(json.dumps({'bar': 'train', 'done': 1, 'total': 2}), flush=True); print(json.dumps({'peak_mb': 7.0}))"
    told = "import json, sys; print(json.dumps({'error': 'the disk is full'})); sys.exit(1)"
    crash = "import sys; sys.stderr.write('Segfault somewhere'); sys.exit(3)"
    works = [Work(name, [sys.executable, "-c", code], tmp_path / name / "log.txt")
             for name, code in (("told", told), ("good", good), ("crash", crash))]
    failures, peak = run_workers(works, 2, Console(quiet=True))
    reasons = {failure.title: failure.reason for failure in failures}
    assert set(reasons) == {"told", "crash"} and reasons["told"] == "the disk is full"
    assert "status 3" in reasons["crash"] and "Segfault somewhere" in reasons["crash"]
    assert peak > 7


def test_a_new_version_of_the_world_gets_a_folder_of_its_own(monkeypatch):
    recipe = build(EnhanceRecipe, {"name": "t", "world": {"seed": 3}, "arms": [{"name": "a"}]})
    folder = data_root(recipe)
    assert folder.parent == Path("runs/worlds") and folder == data_root(recipe)
    monkeypatch.setattr("enhancer.world.make.VERSION", 999)
    assert data_root(recipe) != folder


def test_the_teachers_own_number_of_frames_is_the_default():
    values = recipe_values(Path("somewhere"))
    del values["teacher"]["sampling"]
    recipe = build(EnhanceRecipe, values)
    assert recipe.teacher.sampling.frames is None and with_own_frames(recipe).teacher.sampling.sampling().frames == 9
    assert recipe.teacher.sampling.frames is None  # the given recipe is as it was
    given = build(EnhanceRecipe, recipe_values(Path("somewhere"), teacher={"sampling": {"frames": 5}}))
    assert with_own_frames(given) is given
    gone = {"model": "gone/for/ever"}
    with pytest.raises(UserError, match="gone/for/ever"):
        with_own_frames(build(EnhanceRecipe, {**values, "teacher": gone}))
    control = build(EnhanceRecipe, {**values, "teacher": gone, "arms": [{"name": "lambda0"}]})
    assert with_own_frames(control) is control  # no arm needs it
    with pytest.raises(UserError, match="teacher.sampling.*end"):
        build(EnhanceRecipe, {**values, "teacher": {"sampling": {"start": 3.0, "end": 2.0}}})


def test_sources_come_after_their_bases():
    arms = [{"name": "u", "source": "uniform", "base": "oracle"}, {"name": "s", "source": "shuffled"}, {"name": "o", "source": "oracle"},
            {"name": "z", "source": "vdm", "weight": 0}]
    recipe = build(EnhanceRecipe, {"name": "t", "world": {}, "arms": arms})
    order = needed_sources(recipe)
    vdm, oracle = SourceSpec("vdm"), SourceSpec("oracle")
    assert set(order) == {oracle, vdm, SourceSpec("uniform", (oracle,)), SourceSpec("shuffled", (vdm,))}
    assert [spec.of for spec in order[:2]] == [(), ()]


def test_disk_full_and_unwritable_folders_are_told(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device", str(tmp_path / "x.json"))

    monkeypatch.setattr("enhancer.runfolder.os.replace", full)
    with pytest.raises(UserError, match="x.json cannot be written .No space left on device.*Free disk space"):
        write_json(tmp_path / "x.json", {})
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_text(tmp_path / "file" / "x.txt", "")


def test_fresh_never_deletes_a_strangers_folder(tmp_path):
    recipe = build(EnhanceRecipe, {"name": "t", "world": {}, "arms": [{"name": "a"}]})
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "thesis.doc").touch()
    for fresh in (True, False):
        with pytest.raises(UserError, match="not a run folder"):
            RunFolder.open(tmp_path / "t", recipe, fresh=fresh)
    assert (tmp_path / "t" / "thesis.doc").exists()


def test_fresh_keeps_priors(tmp_path):
    recipe = build(EnhanceRecipe, {"name": "t", "world": {}, "arms": [{"name": "a"}]})
    run = RunFolder.open(tmp_path / "t", recipe)
    for name in ("priors", "arms"):
        (run.folder / name).mkdir()
    RunFolder.open(tmp_path / "t", recipe, fresh=True)
    assert (run.folder / "priors").is_dir() and not (run.folder / "arms").exists()


# ---- the table from made-up answers --------------------------------------------------------------

def _answers(folder, rates, seeds, n=120):
    generator = torch.Generator().manual_seed(1)
    for arm, rate in rates.items():
        for seed in seeds if arm != "base" else [None]:
            hits = (torch.rand(n, generator=generator) < rate).tolist()
            rows = [{"id": f"q{i}", "question_type": "MR", "options": ["a", "b"], "answer": "a", "chosen": "a" if hit else "b",
                     "correct": hit, "scores": [0.0, 0.0]} for i, hit in enumerate(hits)]
            place = folder / "base" if arm == "base" else folder / "arms" / arm / f"seed{seed}"
            write_text(place / "answers.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            write_json(place / "scores.json", summarise(rows))


def _recipe(seeds):
    arms = [{"name": "lambda0"}, {"name": "vdm", "source": "vdm"}, {"name": "oracle", "source": "oracle"}]
    return build(EnhanceRecipe, {"name": "t", "world": {}, "arms": arms, "seeds": seeds})


def test_several_seeds_use_t_intervals_of_paired_differences(tmp_path):
    _answers(tmp_path, {"base": 0.2, "lambda0": 0.3, "vdm": 0.6, "oracle": 0.9}, [0, 1, 2])
    table = make_table(tmp_path, _recipe([0, 1, 2]))
    vdm = table["rows"][2]
    gaps = vdm["delta_vs_lambda0"]["per_seed"]
    assert len(gaps) == 3 and vdm["delta_vs_lambda0"]["difference"] == pytest.approx(sum(gaps) / 3)
    share = table["recovered"]
    assert 0.3 < share["low"] < share["share"] < share["high"] < 0.75
    assert any("recovers" in note for note in table["notes"])
    assert any("vdm against λ = 0" in note and "above zero" in note for note in table["notes"])


def test_the_note_on_intervals_says_how_each_rows_was_made(tmp_path):
    rates = {"base": 0.2, "lambda0": 0.3, "vdm": 0.6, "oracle": 0.9}
    for seeds in ([0], [0, 1, 2]):
        _answers(tmp_path / str(len(seeds)), rates, seeds)
        table = make_table(tmp_path / str(len(seeds)), _recipe(seeds))
        base, control = table["rows"][:2]
        wilson = summarise(read_lines(tmp_path / str(len(seeds)) / "base" / "answers.jsonl"))["overall"]
        assert (base["low"], base["high"]) == (wilson["low"], wilson["high"])
        (note,) = (note for note in table["notes"] if note.startswith("Intervals"))
        if len(seeds) == 1:
            assert "over questions (Wilson; paired bootstrap" in note and "seeds" not in note
            continue
        overall = [summarise(read_lines(tmp_path / f"3/arms/lambda0/seed{seed}/answers.jsonl"))["overall"]["accuracy"] for seed in seeds]
        assert (control["low"], control["high"]) == pytest.approx(t_interval(overall))
        trained, _, untrained = note.partition(";")[0], *note.rpartition(";")[1:]
        assert "trained students" in trained and "over the 3 training seeds (Student's t" in trained
        assert "base" in untrained and "over questions (Wilson)" in untrained


def test_nothing_is_claimed_where_intervals_hold_zero(tmp_path):
    _answers(tmp_path, {"base": 0.3, "lambda0": 0.3, "vdm": 0.3, "oracle": 0.3}, [0])
    table = make_table(tmp_path, _recipe([0]))
    assert table["recovered"]["share"] is None
    text = " ".join(table["notes"])
    assert "no difference is shown" in text and "no share of it can be given" in text and "above zero" not in text


def test_t_interval_against_a_known_value():
    low, high = t_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))


def test_recovered_share_of_exact_answers():
    def arm(hits):
        return {0: [{"id": str(i), "correct": hit} for i, hit in enumerate(hits)]}

    n = 400
    share = recovered_share(arm([False] * n), arm([i % 2 == 0 for i in range(n)]), arm([True] * n), seed=0)
    assert share["share"] == 0.5 and 0.44 < share["low"] < 0.5 < share["high"] < 0.56
