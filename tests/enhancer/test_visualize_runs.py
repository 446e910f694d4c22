"""Views of run folders and priors in whatever state they are: what is left is shown, what is missing is said."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from enhancer.cli import app
from enhancer.console import Console
from enhancer.video.clip import Sampling, read_clip
from enhancer.visualize.gather import Gatherer, VisualizeKeys
from enhancer.visualize.runs import of_run
from enhancer.visualize.stored import stored_heads, stored_view
from tests.enhancer.fake_run import QUESTION, write_fake_run
from tests.enhancer.tiny_run import QUESTIONS, student_folder, teacher_folder, write_video
from vdm_priors.errors import UserError
from vdm_priors.extract import ExtractionSettings, extract_priors
from vdm_priors.families import load_teacher
from vdm_priors.prior import MotionPrior

SETTINGS = ExtractionSettings(
    steps=2, harvest_at="noise", direction="v2t", head_scope="layer_head", reconstruction=False
)


def gatherer(**known) -> Gatherer:
    return Gatherer(VisualizeKeys(), Console(quiet=True), **known)


def sentences(view, section: str) -> str:
    return " ".join(sentence for name, sentence in view.missing if name == section)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run's folder with a prior of the tiny teacher, its clip in a world beside it, and no example."""
    folder = tmp_path_factory.mktemp("runs")
    world = folder / "worlds" / "abc" / "videos"
    world.mkdir(parents=True)
    video = write_video(world / "train0.mp4")
    prior = extract_priors(
        load_teacher(teacher_folder()), [read_clip(video, Sampling(frames=9))], [QUESTIONS[0]], SETTINGS
    )[0]
    prior.provenance["video"] = video.name
    key = "f" * 32
    run = folder / "tiny"
    prior.save(run / "priors" / key[:2] / f"{key}.safetensors")
    (run / "priors.json").write_text(
        json.dumps(
            [
                {
                    "sample_id": "train0",
                    "key": key,
                    "source": "vdm",
                    "question": QUESTIONS[0],
                    "video": "/gone/worlds/abc/videos/train0.mp4",
                }
            ]
        )
    )
    (run / "recipe.yaml").write_text(
        f"job: enhance\nname: tiny\nteacher:\n  model: {teacher_folder()}\n  batch_size: 2\n"
        f"student:\n  model: {student_folder()}\n  sampling:\n    frames: 4\narms:\n- name: lambda0\n"
    )
    (run / "run.json").write_text(json.dumps({"name": "tiny", "status": "running"}))
    return run, key, prior


def test_a_half_finished_run_that_has_moved_shows_its_priors(made):
    run, _, prior = made
    (view,) = of_run(run, gatherer(), [], 4)
    assert view.video.endswith("worlds/abc/videos/train0.mp4") and view.frames.shape[0] == 9
    assert [one.kind for one in view.maps] == ["teacher", "student"]
    assert view.maps[0].steps.shape[0] == SETTINGS.steps and view.maps[1].layers is not None
    assert view.heads.maps and view.inversion.reconstruction is not None and view.codec is not None
    assert np.allclose(view.heads.metrics["score"].ravel(), prior.provenance["head_scores"]["score"])
    assert "not finished" in sentences(view, "run") and "no trained model" in sentences(view, "maps")


def test_without_its_clips_a_run_shows_what_its_priors_hold(made, tmp_path):
    run, _, _ = made
    shutil.copytree(run, tmp_path / "run")
    (view,) = of_run(tmp_path / "run", gatherer(), [], 4)
    assert view.frames is None and view.codec is None and view.inversion is None
    assert view.heads.selected.shape == (2, 2) and not view.heads.maps
    assert "not there: not where the run read it, nor beside the run" in sentences(view, "clip")
    assert "the clip is not at hand" in sentences(view, "heads")
    assert any(word.curve for word in view.words)


def test_a_recipe_of_another_version_is_read_section_by_section(made, tmp_path):
    run, _, _ = made
    shutil.copytree(run, tmp_path / "run")
    text = (run / "recipe.yaml").read_text()
    (tmp_path / "run" / "recipe.yaml").write_text(text.replace("batch_size: 2", "batch_sice: 2"))
    (view,) = of_run(tmp_path / "run", gatherer(ask=False), [], 4)
    assert "The recipe's teacher is not of this version and is left out" in sentences(view, "run")
    (tmp_path / "run" / "recipe.yaml").write_text("a: [unclosed")
    (view,) = of_run(tmp_path / "run", gatherer(ask=False), [], 4)
    assert "recipe.yaml is damaged" in sentences(view, "run")


def test_a_run_of_which_nothing_is_left_says_so(made, tmp_path):
    run, key, _ = made
    with pytest.raises(UserError, match="Nothing of .* can be shown"):
        of_run(tmp_path, gatherer(), [], 4)
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "priors" / key[:2] / f"{key}.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="damaged or not a motion prior"):
        of_run(tmp_path / "run", gatherer(), [], 4)
    with pytest.raises(UserError, match="has no sample nobody; it has train0"):
        of_run(run, gatherer(), ["nobody"], 4)


def test_a_finished_run_without_models_shows_its_examples(tmp_path):
    views = of_run(write_fake_run(tmp_path / "run", examples=2), gatherer(ask=False), [], 4)
    assert [view.name for view in views] == ["clip-0000", "clip-0001"] and views[0].text == QUESTION
    names = [one.name for one in views[0].maps]
    assert names[:3] == ["ground truth", "teacher", "before: base model"] and "after: VDM prior" in names
    assert views[0].frames is not None and views[0].inversion.frame_psnr() is not None
    own = [n for n, word in enumerate(views[0].words) if word.selected]
    for one in views[0].maps:
        stored = np.isfinite(one.maps).any(axis=(1, 2, 3)).nonzero()[0].tolist()
        assert set(stored) <= set(own), one.name  # a map stands with the word it is of
    assert "nor beside the run" in sentences(views[0], "clip")


def test_a_prior_alone(made, tmp_path):
    run, key, prior = made
    path = run / "priors" / key[:2] / f"{key}.safetensors"
    view = gatherer().of_prior(path, None)
    assert "holds no pictures (train0.mp4). Give it with --video FILE" in sentences(view, "clip")
    other = write_video(tmp_path / "longer.mp4", frames=20)
    view = gatherer().of_prior(path, other)
    assert "no frames at the prior's seconds" in sentences(view, "clip") and view.frames is None
    video = run.parent / "worlds" / "abc" / "videos" / "train0.mp4"
    view = gatherer().of_prior(path, video)
    assert "the prior's teacher is not at hand" in sentences(view, "heads")
    view = gatherer(teacher=str(teacher_folder())).of_prior(path, video)
    assert view.maps[-1].steps is not None and not sentences(view, "heads")


def test_a_source_without_heads_or_scores_says_so(made):
    _, _, prior = made
    plain = MotionPrior(prior.text, prior.words, prior.maps, prior.grid, prior.weight, {"source": "flow"})
    view = stored_view(plain, "flow")
    assert "the source flow has no heads" in sentences(view, "heads") and "flow makes none" in sentences(view, "tokens")
    assert view.maps[0].kind == "source" and np.isfinite(view.maps[0].maps).all()


def test_head_scores_without_the_number_of_heads_stay_one_row(made):
    _, _, prior = made
    facts = dict(prior.provenance)
    assert stored_heads(prior).rows == ["layer 0", "layer 1"]
    facts.pop("attention_heads")  # a prior of an older version
    old = MotionPrior(prior.text, prior.words, prior.maps, prior.grid, torch.ones(len(prior.words)), facts)
    assert stored_heads(old).rows == ["all layers, one after another"] and stored_heads(old).selected.shape == (1, 4)


# ---- the command ---------------------------------------------------------------------------------


def enhancer(*arguments: object):
    return CliRunner().invoke(app, ["visualize", *map(str, arguments)])


def test_the_command_writes_page_and_pieces(made, tmp_path):
    run, key, _ = made
    done = enhancer(
        run / "priors" / key[:2] / f"{key}.safetensors",
        "--out",
        tmp_path / "page.html",
        "--pieces",
        tmp_path / "pieces",
    )
    assert done.exit_code == 0, done.output
    assert "page:" in done.output and (tmp_path / "page.html").stat().st_size > 50_000
    names = {path.suffix for path in (tmp_path / "pieces").iterdir()}
    assert names == {".png", ".svg", ".mp4"}  # the clip and the teacher were found by the run beside the store
    assert (tmp_path / "pieces" / "inversion.svg").is_file() and (tmp_path / "pieces" / "codec.mp4").is_file()


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_each_figure_of_the_supplement_is_one_command(made, tmp_path, number, monkeypatch):
    monkeypatch.setattr("enhancer.commands.visualize.STEPS", (2, 3))  # fewer steps of a figure, for the test's time
    done = enhancer(made[0], "--figure", number, "--out", tmp_path / "figure.png")
    assert done.exit_code == 0, done.output
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert (tmp_path / f"figure.{kind}").read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], "no prior's file or run folder nowhere"),
        ([], "Give a prior's file, a run folder, or --video FILE with --text TEXT"),
        (["--video", "a.mp4", "--text", "  "], "Give a prior's file"),
        (["--video", "a.mp4", "--text", "ball", "--out", "no/such/page.html"], "there is no folder no/such"),
        (["--video", "missing.mp4", "--text", "ball"], "missing.mp4: cannot be read"),
        (["nowhere", "teacher.extraction.stebs=3"], "stebs"),
        (["--video", "a.mp4", "--text", "ball", "--sample", "x"], "--sample names a sample of a run"),
    ],
)
def test_what_the_command_cannot_do_is_said(arguments, reason):
    done = enhancer(*arguments)
    assert done.exit_code in (1, 2) and reason in " ".join(done.output.split()), done.output


def test_what_a_run_or_a_prior_has_already_is_not_asked_for_again(made):
    run, key, _ = made
    prior = run / "priors" / key[:2] / f"{key}.safetensors"
    for arguments, reason in (
        ((run, "--text", "ball"), "is a run, which has its own clips: leave out --video and --text"),
        ((prior, "--text", "ball"), "is a prior, of a text of its own: leave out --text"),
        ((prior, "--stored", "--word", "ball"), "The text has no word 'ball'; it has 'Which'"),
    ):
        done = enhancer(*arguments)
        assert done.exit_code == 1 and reason in " ".join(done.output.split()), done.output


@pytest.mark.parametrize(("job", "reason"), [("compare", "is a comparison"), ("adapter", "--student")])
def test_a_run_that_keeps_no_clips_says_what_to_look_at(tmp_path, job, reason):
    (tmp_path / "recipe.yaml").write_text(f"job: {job}\n")
    with pytest.raises(UserError, match=reason):
        of_run(tmp_path, gatherer(), [], 4)
