"""The command line: help that teaches, exit statuses, and one-paragraph errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from enhancer.cli import app
from enhancer.runfolder import read_json

sys.path.insert(0, str(Path(__file__).parent))
from tiny_run import recipe_values, student_folder, teacher_folder, write_data, write_video  # noqa: E402


def call(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "ENHANCER_TRACEBACK": "0"})
    return result.exit_code, result.output


@pytest.fixture
def recipe(tmp_path):
    write_data(tmp_path / "data", train=2, test=2)
    values = recipe_values(tmp_path, arms=[{"name": "lambda0"}, {"name": "vdm", "source": "vdm"}], examples=0, report=False)
    path = tmp_path / "r.yaml"
    path.write_text("# Purpose: a test\n" + yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("command", ["run", "validate", "ls", "cp", "keys", "extract", "train", "evaluate", "export", "report", "doctor",
                                     "world make"])
def test_every_command_has_help(command):
    code, text = call(*command.split(), "--help")
    assert code == 0 and len(text) > 200


def test_help_teaches():
    code, text = call("--help")
    assert code == 0 and "enhancer run quickstart" in text and "--video clip.mp4" in text


def test_ls_cp_keys(tmp_path):
    code, text = call("ls")
    assert code == 0 and "quickstart" in text and "the whole way in minutes" in text
    code, text = call("cp", "quickstart", tmp_path / "mine.yaml")
    assert code == 0 and (tmp_path / "mine.yaml").read_text().startswith("# Purpose")
    code, text = call("cp", "quickstart", tmp_path / "mine.yaml")
    assert code == 1 and "exists already" in text
    code, text = call("keys", "training.alignment")
    assert code == 0 and "training.alignment.max_unmatched" in text
    code, text = call("keys", "trainning")
    assert code == 2 and "Did you mean 'training" in text


def test_recipe_errors_exit_2_and_list_everything(recipe):
    code, text = call("run", recipe, "trainng.steps=3", "training.steps=0", "arms.vdm.source=vdn")
    assert code == 2
    assert "did you mean 'training'" in text and "at least 1" in text and "did you mean 'vdm'" in text and "Traceback" not in text
    assert call("run", "no-such-recipe")[0] == 2


def test_validate_says_tokens_memory_and_disk(recipe, tmp_path):
    code, text = call("validate", recipe)
    assert code == 0, text
    for expected in ("student tokens a sample", "memory of training", "disk for students", "recipe is valid"):
        assert expected in text
    assert not (tmp_path / "runs").exists()


def test_validate_lists_bad_clips_and_refuses_too_long_samples(recipe, tmp_path):
    (tmp_path / "data" / "videos" / "train1.mp4").write_bytes(b"")
    code, text = call("validate", recipe)
    assert code == 0 and "train1" in text and "1 sample would be left out" in text
    write_video(tmp_path / "data" / "videos" / "train0.mp4", frames=300, size=(128, 128))
    code, text = call("validate", recipe, "student.sampling.frames=300")
    assert code == 0 and "train0: has" in text and "more than the 2048" in text and "2 samples would be left out" in text
    code, text = call("validate", recipe, "student.sampling.frames=2000")
    assert code == 1 and "every sample is too long" in text and "student.sampling.frames" in text


def test_missing_data_and_models_are_one_paragraph(recipe):
    code, text = call("run", recipe, "data.train=gone.json")
    assert code == 1 and "gone.json" in text and "Traceback" not in text
    code, text = call("run", recipe, "student.model=/nowhere/model")
    assert code == 1 and "/nowhere/model" in text and "Traceback" not in text


def test_interrupted_run_exits_130_and_says_what_is_done(recipe, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("enhancer.pipeline.train_and_evaluate", interrupt)
    code, text = call("run", recipe, "--quiet")
    assert code == 130
    assert "data, preflight, priors" in text and "2 priors" in text and "same command continues" in text


def test_unexpected_errors_are_one_line(recipe, monkeypatch):
    def fault(*args, **kwargs):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("enhancer.pipeline.prepare_data", fault)
    code, text = call("run", recipe)
    assert code == 1 and "ZeroDivisionError" in text and "ENHANCER_TRACEBACK=1" in text and "Traceback (most" not in text


def test_unwritable_output(recipe, tmp_path):
    (tmp_path / "file").touch()
    code, text = call("run", recipe, f"output={tmp_path / 'file'}")
    assert code == 1 and "cannot be written" in text and "output" in text


def test_extract_stops_after_the_priors_and_train_before_the_evaluation(recipe, tmp_path):
    run = tmp_path / "runs" / "tiny"
    code, text = call("extract", recipe)
    assert code == 0 and "vdm: 2 made, 0 reused" in text.replace("\n", " ") and not (run / "arms").exists()
    code, text = call("train", recipe)
    assert code == 0 and "0 made, 2 reused" in text
    assert (run / "arms" / "vdm" / "seed0" / "train.json").is_file() and not (run / "base" / "scores.json").exists()
    code, text = call("export", run, tmp_path / "model")
    assert code == 0 and "loads with stock transformers" in text and (tmp_path / "model" / "config.json").is_file()
    assert "largest difference of its logits from the arm's: 0" in " ".join(text.split())
    code, text = call("export", run, tmp_path / "other", "--arm", "oracle")
    assert code == 1 and "it has: lambda0 seed0, vdm seed0" in text and not (tmp_path / "other").exists()


def _change_weights(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lm_head" in name or "embed_tokens" in name)
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, path, metadata={"format": "pt"})


def _change_processor(folder):
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["video_processor"]["image_mean"] = [0.0, 0.0, 0.0]
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize("spoil, message", [
    (_change_weights, "gives logits that differ by"), (_change_processor, "prepares a clip otherwise"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "cannot be loaded with stock transformers"),
    (lambda folder: (folder / "config.json").unlink(), "cannot be loaded with stock transformers")])
def test_export_proves_the_copy_and_leaves_nothing_of_a_bad_one(tmp_path, monkeypatch, spoil, message):
    import shutil

    arm = tmp_path / "run" / "arms" / "vdm" / "seed0"
    shutil.copytree(student_folder(), arm / "model")
    (arm / "train.json").write_text("{}")
    (tmp_path / "run" / "run.json").write_text("{}")
    copytree = shutil.copytree

    def damaging(source, target, **how):  # as a failing disk would
        copytree(source, target, **how)
        spoil(Path(target))

    monkeypatch.setattr("enhancer.commands.models.shutil.copytree", damaging)
    code, text = call("export", tmp_path / "run", tmp_path / "model")
    assert code == 1 and message in " ".join(text.split()), text
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_extract_one_video(tmp_path):
    video = write_video(tmp_path / "clip.mp4", frames=20, size=(48, 80))
    arguments = ["extract", "--video", video, "--text", "Which way does the red square move?", "--teacher", teacher_folder(),
                 "--out", tmp_path / "priors", "teacher.sampling.frames=9", "teacher.extraction.steps=2"]
    code, text = call(*arguments)
    assert code == 0, text
    for expected in ("sampled 9 frames of 2.50 s, at seconds 0.", "square", "motion-sensitive heads", "dB PSNR", "stored:"):
        assert expected in text, expected
    code, text = call(*arguments)
    assert code == 0 and "reused:" in text
    (stored,) = (tmp_path / "priors").glob("*/*.safetensors")
    assert stored.name in text.replace("\n", "")


def test_extract_takes_as_many_frames_as_the_teacher_was_trained_on(tmp_path):
    video = write_video(tmp_path / "clip.mp4", frames=20)
    arguments = ["extract", "--video", video, "--text", "red square", "--teacher", teacher_folder(),
                 "--out", tmp_path / "priors", "teacher.extraction.steps=1"]
    code, text = call(*arguments)
    assert code == 0 and "sampled 9 frames of 2.50 s" in text
    assert "as many as the teacher was trained on" in " ".join(text.split())
    code, text = call(*arguments, "teacher.sampling.frames=9")
    assert code == 0 and "reused:" in text and "was trained on" not in text
    code, text = call(*arguments, "teacher.sampling.frames=5")
    assert code == 0 and "sampled 5 frames of 2.50 s" in text


@pytest.mark.parametrize("arguments, code, message", [
    (["--text", "x"], 2, "RECIPE"), (["--video", "gone.mp4"], 2, "--text"), (["--video", "gone.mp4", "--text", "red"], 1, "gone.mp4"),
    (["--video", "gone.mp4", "--text", " "], 1, "empty"), (["--video", "gone.mp4", "--text", "x", "teacher.extraction.stepz=1"], 2, "steps")])
def test_extract_usage(arguments, code, message):
    teacher = ["--teacher", teacher_folder()] if "--video" in arguments else []
    result = call("extract", *arguments, *teacher)
    assert result[0] == code and message in result[1]


def test_frames_that_the_teacher_cannot_take(tmp_path):
    video = write_video(tmp_path / "clip.mp4", frames=20)
    code, text = call("extract", "--video", video, "--text", "red square", "--teacher", teacher_folder(), "--out", tmp_path / "p",
                      "teacher.sampling.frames=8")
    assert code == 1 and "Sample 5 or 9 frames" in text.replace("\n", " ")


def test_evaluate_a_model(tmp_path):
    data = write_data(tmp_path / "data", train=1, test=2)
    code, text = call("evaluate", "--model", student_folder(), "--data", data / "test.json", "--frames", 4, "--out", tmp_path / "out")
    assert code == 0 and "Overall" in text and "Average over types" in text
    assert read_json(tmp_path / "out" / "scores.json", {})["overall"]["n"] == 2
    (data / "plain.json").write_text(json.dumps([{**json.loads((data / "train.json").read_text())[0], "options": None}]))
    code, text = call("evaluate", "--model", student_folder(), "--data", data / "plain.json")
    assert code == 1 and "no multiple-choice question" in text


def test_world_make(tmp_path):
    settings = ["train_clips=2", "test_clips=0", "frames=5", "height=32", "width=32"]
    code, text = call("world", "make", tmp_path / "w", *settings)
    assert code == 0 and len(list((tmp_path / "w" / "videos").glob("*.mp4"))) == 2
    assert call("world", "make", tmp_path / "w", *settings)[0] == 0
    code, text = call("world", "make", tmp_path / "w", "train_clip=2")
    assert code == 2 and "did you mean 'train_clips'" in text


def test_doctor_passes_a_machine_that_runs_these_tests(tmp_path):
    code, text = call("doctor", "--output", tmp_path / "runs")
    for part in ("python", "packages", "machine", "H.264", "shipped models", "recipes", "can be written"):
        assert part in text, part
    assert code == 0 and "✗" not in text, text


def _unwritable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    return tmp_path / "file" / "runs"


def _no_package(tmp_path, monkeypatch):
    monkeypatch.setattr("enhancer.doctor.NEEDED", ("torch", "no_such_package"))
    return tmp_path


def _no_recipes(tmp_path, monkeypatch):
    monkeypatch.setattr("enhancer.doctor.list_recipes", lambda: [])
    return tmp_path


def _broken_check(tmp_path, monkeypatch):
    monkeypatch.setattr("enhancer.doctor.machine_memory", lambda: 1 / 0)
    return tmp_path


@pytest.mark.parametrize("provoke, sentence", [
    (_unwritable, "cannot be written"), (_no_package, "no_such_package (ModuleNotFoundError"), (_no_recipes, "none in"),
    (_broken_check, "ZeroDivisionError")])
def test_doctor_fails_for_each_fault(tmp_path, monkeypatch, provoke, sentence):
    output = provoke(tmp_path, monkeypatch)
    code, text = call("doctor", "--output", output)
    assert code == 1 and text.count("✗") == 1 and sentence in " ".join(text.split()), text


def test_report_needs_a_run_folder(tmp_path):
    code, text = call("report", tmp_path / "nothing")
    assert code == 1 and "nothing" in text
