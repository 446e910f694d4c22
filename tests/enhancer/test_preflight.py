"""`enhancer validate`: it says no wherever the run could not start, and reads nothing but configurations and clips."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
import yaml
from typer.testing import CliRunner

from enhancer.cli import app
from enhancer.jobs import load_recipe
from enhancer.run_data import read_data
from enhancer.preflight import preflight
from tests.enhancer.tiny_run import recipe_values, student_folder, teacher_folder, write_data
from tests.vdm_priors.real_configs import CONFIGS, write_configs
from vdm_priors.errors import ModelError

WORLD = {"train_clips": 30, "test_clips": 18, "frames": 9, "height": 32, "width": 32}
MODELS = {"vdm": [{"name": "lambda0"}, {"name": "vdm", "source": "vdm"}], "none": [{"name": "lambda0"}]}
OFFLINE = ("We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached "
           "files.")


def call(*arguments):
    """Exit status and all output as one line."""
    done = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "250", "ENHANCER_TRACEBACK": "0"})
    return done.exit_code, " ".join(done.output.split())


def write_recipe(folder, **changes):
    path = folder / "r.yaml"
    path.write_text("# Purpose: a test\n" + yaml.safe_dump(recipe_values(folder, **{"arms": MODELS["vdm"], **changes})))
    return path


@pytest.fixture
def recipe(tmp_path):
    write_data(tmp_path / "data", train=2, test=2)
    return write_recipe(tmp_path)


@pytest.fixture
def world_recipe(tmp_path):
    return write_recipe(tmp_path, world=WORLD, data={})


FAULTS = [
    ("teacher.model=/nonexistent/x", "no model folder /nonexistent/x"),
    ("student.model=/nonexistent/y", "no model folder /nonexistent/y"),
    ("teacher.sampling.frames=8", "takes clips of 4k+1 frames, not 8. Sample 5 or 9 frames"),
    ("teacher.sampling.frames=3", "Sample 1 or 5 frames"), ("teacher.model=nofolder", "no teacher folder nofolder"),
    ("teacher.size=[30,32]", "takes frames whose height and width are multiples of 8 pixels, not 30×32"),
]


@pytest.mark.parametrize("override, message", FAULTS)
def test_what_the_run_refuses_validate_refuses(recipe, tmp_path, override, message):
    code, text = call("validate", recipe, override)
    assert code == 1 and message in text and "recipe is valid" not in text
    assert not (tmp_path / "runs").exists()
    code, text = call("run", recipe, override)
    assert code == 1 and not list((tmp_path / "runs").glob("*/priors/*/*"))


@pytest.mark.parametrize("override, message", FAULTS)
def test_also_where_the_world_is_not_made_yet(world_recipe, tmp_path, override, message):
    code, text = call("validate", world_recipe, override)
    assert code == 1 and message in text and not (tmp_path / "runs").exists()


def test_frames_that_the_teacher_takes_are_valid(recipe):
    for frames in (5, 9, 13):
        assert call("validate", recipe, f"teacher.sampling.frames={frames}")[0] == 0
    code, text = call("validate", recipe, "teacher.sampling.fps=4", "teacher.sampling.frames=8")
    assert code == 0 and "depends on the clip" in text


def test_null_frames_are_the_teachers_own(recipe, tmp_path, monkeypatch):
    assert call("validate", recipe, "teacher.sampling={}")[0] == 0
    monkeypatch.setattr("vdm_priors.families.hub_commit", unreachable)
    cases = (("/nonexistent/x", 1, "no model folder"), ("owner/model", 0, "cannot be checked offline"))
    for name, code, message in cases:
        said = call("validate", recipe, "teacher.sampling={}", f"teacher.model={name}")
        assert said[0] == code and message in said[1], said[1]
    folder = tmp_path / "silent"
    shutil.copytree(teacher_folder(), folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    del config["sample_frames"]
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    for fps in ("null", "4"):
        code, text = call("validate", recipe, f"teacher.sampling={{fps: {fps}}}", f"teacher.model={folder}")
        assert code == 1 and "teacher.sampling.frames is null" in text


def test_a_teacher_that_no_arm_needs_is_only_warned_of(tmp_path):
    write_data(tmp_path / "data", train=2, test=2)
    recipe = write_recipe(tmp_path, arms=MODELS["none"])
    code, text = call("validate", recipe, "teacher.model=/nonexistent/x")
    assert code == 0 and "! There is no model folder /nonexistent/x" in text


@pytest.mark.parametrize("role, lacks, message", [
    ("teacher", "*.safetensors", "has no weights"), ("student", "*.safetensors", "has no weights"),
    ("teacher", "model_index.json", "no readable model_index.json"), ("teacher", "vae/config.json", "cannot be read"),
    ("student", "config.json", "cannot be read")])
def test_a_folder_that_is_no_whole_model(recipe, tmp_path, role, lacks, message):
    folder = tmp_path / "cut"
    shutil.copytree({"teacher": teacher_folder, "student": student_folder}[role](), folder)
    for path in list(folder.rglob(lacks) if "*" in lacks else [folder / lacks]):
        path.unlink()
    code, text = call("validate", recipe, f"{role}.model={folder}")
    assert code == 1 and message in text and str(folder) in text, text


def test_a_teacher_of_another_family(recipe, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(teacher_folder(), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "OtherPipeline"}))
    code, text = call("validate", recipe, f"teacher.model={folder}")
    assert code == 1 and "OtherPipeline" in text and "Known families: cogvideox" in text


def unreachable(name):
    raise ModelError(f"The model {name} could not be found on the hub. Set the model to the folder of a copy.")


def test_hub_names_are_said_not_to_be_checked(recipe, monkeypatch):
    monkeypatch.setattr("vdm_priors.families.hub_commit", unreachable)
    code, text = call("validate", recipe, "teacher.model=owner/model")
    assert code == 0 and "owner/model is a hub name, which cannot be checked offline" in text
    assert "the run can start, provided that owner/model can be had from the hub" in text

    def refuse(name, **how):
        raise OSError(said)

    monkeypatch.setattr("transformers.PreTrainedConfig.get_config_dict", refuse)
    said = OFFLINE
    code, text = call("validate", recipe, "student.model=owner/student")
    assert code == 0 and "provided that owner/student" in text and "We couldn't connect" in text
    loaded = load_recipe(recipe, ["student.model=owner/student"]).recipe
    report = preflight(loaded, read_data(loaded))  # as the run asks: no hours of priors for a student that is not there
    assert any("We couldn't connect" in fault for fault in report.faults)
    said = "owner/student is not a local folder and is not a valid model identifier"
    code, text = call("validate", recipe, "student.model=owner/student")
    assert code == 1 and "not a valid model identifier" in text


def test_an_unmade_world_is_counted_from_a_few_clips_like_it(world_recipe, tmp_path):
    code, text = call("validate", world_recipe)
    assert code == 0, text
    for part in ("30 training, 0 validation and 18 test clips", "student tokens a sample", "disk for clips",
                 "disk for priors"):
        assert part in text, part
    assert not (tmp_path / "runs").exists()
    code, told = call("extract", world_recipe)
    assert code == 0, told
    clips = sum(path.stat().st_size for path in tmp_path.glob("runs/worlds/*/videos/*"))
    priors = sum(path.stat().st_size for path in tmp_path.glob("runs/tiny/priors/*/*"))

    def megabytes(line):
        return float(text.partition(line)[2].split(" MB")[0].split()[-1].replace(",", "")) * 2**20

    assert megabytes("disk for clips") == pytest.approx(clips, rel=0.5)
    assert megabytes("disk for priors") >= 0.9 * priors  # at most, but for the rounding to tenths
    made = call("validate", world_recipe)[1]
    assert "30 to train on, 18 to ask" in made and "disk for clips" not in made
    assert "8 to 8 of them visual" in text and "8 to 8 of them visual" in made


def test_too_little_disk_and_no_folder_to_write_to(recipe, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    code, text = call("validate", recipe, f"output={tmp_path / 'file'}")
    assert code == 1 and "cannot be written" in text and "Set `output`" in text
    monkeypatch.setattr("enhancer.preflight.shutil.disk_usage", lambda place: namedtuple("Usage", "free")(1000))
    code, text = call("validate", recipe)
    assert code == 1 and "free some or set `output`" in text


def test_priors_alone_need_no_disk_for_students(recipe):
    loaded = load_recipe(recipe).recipe
    data = read_data(loaded)
    said = [[what for what, _, _ in preflight(loaded, data, trains=trains).lines] for trains in (True, False)]
    assert "disk for students" in said[0] and "disk for students" not in said[1]
    assert "disk for priors" in said[0] and "disk for priors" in said[1]


# ---- what a teacher costs ------------------------------------------------------------------------

@pytest.mark.parametrize("name", CONFIGS)
def test_a_full_size_teacher_of_every_family_is_estimated_from_its_configurations(name, recipe, tmp_path, monkeypatch):
    """As a hub model whose weights are not here; the hub is asked for the commit and the JSON files alone."""
    folder = write_configs(name, tmp_path / "hub")
    index = json.loads((folder / "model_index.json").read_text())
    monkeypatch.setattr("vdm_priors.families._model_index", lambda path_or_hub: index)
    monkeypatch.setattr("vdm_priors.families._skeleton.configuration_folder", lambda path_or_hub: folder)
    frames = {"mochi-1": 19}.get(name, 49)
    code, text = call("validate", recipe, "teacher.model=owner/model", "teacher.dtype=bfloat16", "teacher.batch_size=1",
                      f"teacher.sampling.frames={frames}")
    assert code == 0, text
    for part in ("teacher ", "tokens of the teacher", "arithmetic of a prior", "on an H100", "an estimate",
                 "memory of the teacher", "billion parameters"):
        assert part in text, (part, text)


def test_a_teacher_too_large_for_the_machine_is_told_with_what_would_fit(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("enhancer.preflight_models.device_memory", lambda: 2**20)
    code, text = call("validate", recipe, "teacher.batch_size=4")
    assert code == 0 and "this machine has 1 MB: set teacher." in text and "teacher.batch_size=1 (about" in text


def test_further_teachers_are_estimated_by_name(recipe, tmp_path):
    arms = "arms=[{name: vdm, source: vdm, teacher: second}]"
    second = f"{{name: second, model: {teacher_folder()}, sampling: {{frames: 9}}}}"
    code, text = call("validate", recipe, arms, f"teachers=[{second}]")
    assert code == 0 and "second: memory of the teacher" in text, text
