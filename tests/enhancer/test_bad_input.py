"""Bad input: one paragraph that names the file or sample and the remedy, and nothing finished is lost.

What read_clip and load_samples say is tested in test_clip.py and test_samples.py; here, what a person at the command
line gets.
"""

from __future__ import annotations

import errno
import html
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from enhancer.cli import app
from enhancer.data.samples import load_samples
from enhancer.runfolder import read_json, read_lines
from tests.enhancer.tiny_run import recipe_values, student_folder, teacher_folder, write_data, write_video

TEXT = "Which way does the red square move?"


def call(*arguments):
    """Exit status, standard output as one line, and standard error of a command."""
    done = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "ENHANCER_TRACEBACK": "0"})
    return done.exit_code, " ".join(done.stdout.split()), done.stderr


def check_paragraph(stderr, *words):
    """The last line of stderr is the whole error, holds the words, and is one that the program expects."""
    said = stderr.strip().splitlines()[-1]
    assert said.startswith("error: ") and said.endswith(".") and stderr.count("error: ") == 1, stderr
    assert "Traceback" not in stderr and "Unexpected" not in said, stderr
    for word in words:
        assert str(word) in said, (word, said)


def write_sound(path):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())


def write_cut(path):
    write_video(path)
    path.write_bytes(path.read_bytes()[:700])


BAD_CLIPS = {  # kind: (how the file is made, what is wrong with it, the remedy)
    "missing": (lambda path: None, "No such file", "Check the path"),
    "folder": (Path.mkdir, "is a folder", "Give the path of one file"),
    "empty": (Path.touch, "is empty", "Copy or download it again"),
    "text": (lambda path: path.write_text("not a video " * 100), "is not a video", "re-encode it"),
    "cut": (write_cut, "cut short", "Copy it again"),
    "sound": (write_sound, "has no video (it holds audio)", "leave this sample out"),
    "still": (lambda path: write_video(path, frames=1), "has a single frame", "leave this sample out"),
}


def extract(video, out, *more, text=TEXT):
    return call("extract", "--video", video, "--text", text, "--teacher", teacher_folder(), "--out", out,
                "teacher.sampling.frames=9", "teacher.extraction.steps=1", *more)


# ---- one video -----------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", BAD_CLIPS)
def test_a_bad_video_is_named_with_the_remedy(tmp_path, kind):
    make, wrong, remedy = BAD_CLIPS[kind]
    video = tmp_path / f"{kind}.mp4"
    make(video)
    code, _, stderr = extract(video, tmp_path / "priors")
    assert code == 1 and not (tmp_path / "priors").exists()
    check_paragraph(stderr, video, wrong, remedy)


def test_a_clip_shorter_than_the_sampling_says_which_seconds_there_were(tmp_path):
    video = write_video(tmp_path / "short.mp4", frames=3)
    code, out, _ = extract(video, tmp_path / "priors")
    assert code == 0, out
    assert "sampled 3 frames of 0.38 s, at seconds 0.00, 0.12, 0.25 " in out
    assert "the last one is repeated 6 times" in out
    code, _, stderr = extract(video, tmp_path / "priors", "teacher.sampling.short=fail")
    assert code == 1
    check_paragraph(stderr, video, "has 3 frames", "asks for 9", "sampling.short")


def test_text_beyond_the_teachers_limit_and_text_without_a_word(tmp_path):
    video = write_video(tmp_path / "clip.mp4")
    code, out, _ = extract(video, tmp_path / "priors", text=TEXT + " And then, where does it go" * 60)
    assert code == 0 and "beyond the teacher's text limit, so without a prior: " in out and "more" in out
    code, _, stderr = extract(video, tmp_path / "priors", text="?! ...")
    assert code == 1
    check_paragraph(stderr, "'?! ...'", "has no word", "Give a text with at least one word")


# ---- rows that no reader expects -----------------------------------------------------------------

def talk(sample_id, video, question=f"<video>\n{TEXT}", answer="left"):
    return {"id": sample_id, "video": video, "options": ["left", "right", "up"], "question_type": "MR",
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


@pytest.mark.parametrize("row, listed, reason", [
    (talk("a", "x\0.mp4"), "a", "null byte"), (talk("a", "x" * 5000), "a", "File name too long"),
    (talk("a", "loop.mp4"), "a", "circle"),
    (talk("\ud800", "ok.mp4"), "row 2", "surrogate"), (talk("a", "ok.mp4", answer="\udfff"), "row 2", "surrogate"),
    ({"video": "ok.mp4"}, "row 2", "none of the keys")])
def test_a_row_that_no_file_system_or_tokenizer_takes_is_listed(tmp_path, row, listed, reason):
    (tmp_path / "ok.mp4").touch()
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "data.json").write_text(json.dumps([talk("good", "ok.mp4"), row]))
    samples, problems = load_samples(tmp_path / "data.json")
    assert [s.id for s in samples] == ["good"] and [p.id for p in problems] == [listed]
    assert reason in problems[0].reason and len(problems[0].reason) < 300
    assert problems[0].reason.count("row 2") == (listed != "row 2")  # the place is said once


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[" * 100000, b'{"a":' * 100000, b"[1, 2]", b"null"])
def test_a_data_file_that_holds_no_samples_is_named(tmp_path, content):
    (tmp_path / "data.json").write_bytes(content)
    code, _, stderr = call("evaluate", "--model", "world", "--data", tmp_path / "data.json")
    assert code == 1
    check_paragraph(stderr, tmp_path / "data.json")


# ---- a run with bad samples among good ones ------------------------------------------------------

BAD_ROWS = {  # id: (row, reason)
    "no-marker": (talk("no-marker", "videos/train0.mp4", question=TEXT), "the question has no <video>"),
    "wrong-letter": (talk("wrong-letter", "videos/train0.mp4", answer="D"), "'D' is none of the letters A to C"),
    "no-question": (talk("no-question", "videos/train0.mp4", question="<video>"), "the question is empty"),
    "no-answer": (talk("no-answer", "videos/train0.mp4", answer=" "), "the answer is empty"),
    "no-word": (talk("no-word", "videos/train0.mp4", question="<video>?!"), "has no word that the teacher could"),
    "too-long": (talk("too-long", "videos/train0.mp4", question="<video>" + TEXT * 100), "more than the model's 2048"),
    "train1": (talk("train1", "videos/train0.mp4"), "the id was used before"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run whose data hold every kind of bad clip and row; the run folder, and what the command gave."""
    folder = tmp_path_factory.mktemp("bad")
    data = write_data(folder / "data", train=3, test=2)
    rows = [row for row, _ in BAD_ROWS.values()]
    for kind, (make, _, _) in BAD_CLIPS.items():
        make(data / "videos" / f"{kind}.mp4")
        rows.append(talk(kind, f"videos/{kind}.mp4"))
    (data / "train.json").write_text(json.dumps(json.loads((data / "train.json").read_text()) + rows))
    test = [talk("test-cut", "videos/cut.mp4"), talk("test-letter", "videos/test0.mp4", answer="E")]
    (data / "test.json").write_text(json.dumps(json.loads((data / "test.json").read_text()) + test))
    arms = [{"name": "lambda0"}, {"name": "vdm", "source": "vdm"}]
    # three steps of four see every one of the ten samples that load
    recipe = write_recipe(folder, arms=arms, examples=1, training={"steps": 3, "batch_size": 4})
    return folder / "runs" / "tiny", call("run", recipe)


def write_recipe(folder, **changes):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values(folder, **changes)))
    return path


def test_the_run_ends_with_the_good_samples(finished):
    run, (code, out, stderr) = finished
    assert code == 0 and "Traceback" not in out + stderr, stderr
    assert read_json(run / "run.json", {})["status"] == "finished"
    priors = sorted(row["sample_id"] for row in read_json(run / "priors.json", []))
    assert priors == ["too-long", "train0", "train1", "train2"]
    for student in ("base", "arms/lambda0/seed0", "arms/vdm/seed0"):
        assert read_json(run / student / "scores.json", {})["overall"]["n"] == 2
        assert student == "base" or len(read_lines(run / student / "history.jsonl")) == 3
    assert "left out" in out and "skipped.jsonl" in out


def test_every_bad_sample_is_in_the_report_with_its_reason(finished):
    run, _ = finished
    page = html.unescape((run / "report.html").read_text(encoding="utf-8"))
    expected = {sample: reason for sample, (_, reason) in BAD_ROWS.items()}
    expected |= {kind: wrong for kind, (_, wrong, _) in BAD_CLIPS.items()}
    # the loader looks for the file itself
    expected |= {"missing": "is not in", "folder": "is not in"}
    expected |= {"test-cut": "cut short", "test-letter": "none of the letters A to C"}
    skipped = read_lines(run / "skipped.jsonl")
    assert {row["id"] for row in skipped} == set(expected)
    for sample, wanted in expected.items():
        reasons = [row["reason"] for row in skipped if row["id"] == sample]
        assert all(wanted in reason for reason in reasons), (sample, reasons)
        assert any(f'<th scope="row">{sample}</th>' in line and wanted in line for line in page.splitlines()), sample


def test_evaluate_lists_what_cannot_be_asked_and_fails_where_nothing_can(finished):
    data = finished[0].parents[1] / "data"
    command = ["evaluate", "--model", student_folder(), "--frames", 4, "--data"]
    code, out, _ = call(*command, data / "test.json")
    assert code == 3 and "Overall 2 " in out and "The score is incomplete" in out
    assert "test-cut could not be asked: " in out and "test-letter could not be asked: row 4: " in out
    (data / "bad.json").write_text(json.dumps([talk("one", "videos/sound.mp4"), talk("two", "videos/empty.mp4")]))
    code, _, stderr = call(*command, data / "bad.json")
    assert code == 1
    check_paragraph(stderr, "None of 2 questions could be scored", "sound.mp4", "has no video")


# ---- places that cannot be written ---------------------------------------------------------------

@pytest.mark.parametrize("arguments", [
    ["extract", "--video", "{videos}/train0.mp4", "--text", TEXT, "--teacher", "{teacher}", "--out", "{there}",
     "teacher.sampling.frames=9", "teacher.extraction.steps=1"],
    ["evaluate", "--model", "{student}", "--data", "{data}/test.json", "--out", "{there}"],
    ["world", "make", "{there}", "train_clips=1", "test_clips=0", "frames=5", "height=32", "width=32"],
    ["cp", "quickstart", "{there}"], ["export", "{run}", "{there}"]], ids=lambda arguments: arguments[0])
def test_output_that_cannot_be_written(finished, tmp_path, arguments):
    (tmp_path / "file").touch()  # root may write anywhere, but makes no folder in a file either
    run = finished[0]
    data = run.parents[1] / "data"
    places = {"there": tmp_path / "file" / "there", "run": run, "data": data, "videos": data / "videos",
              "teacher": teacher_folder(), "student": student_folder()}
    code, _, stderr = call(*(argument.format(**places) for argument in arguments))
    assert code == 1
    check_paragraph(stderr, tmp_path / "file", "cannot be written", "hoose a folder that you may write to")


# ---- a full disk and Ctrl-C ----------------------------------------------------------------------

@pytest.fixture
def extraction(tmp_path):
    """A recipe of eight priors, made one after another; and where they are stored."""
    write_data(tmp_path / "data", train=8, test=0)
    values = recipe_values(tmp_path, arms=[{"name": "vdm", "source": "vdm"}])
    values["teacher"] |= {"batch_size": 1, "extraction": {"steps": 20, "reconstruction": False}}
    return write_recipe(tmp_path, **values), tmp_path / "runs" / "tiny" / "priors"


def stored(store):
    return sorted(store.glob("*/*.safetensors"))


def test_a_full_disk_keeps_the_finished_priors_and_a_rerun_continues(extraction, monkeypatch):
    recipe, store = extraction
    synced = []

    def full(handle):
        synced.append(handle)
        if len(synced) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("vdm_priors.prior.os.fsync", full)
    code, _, stderr = call("extract", recipe, "teacher.extraction.steps=1")
    assert code == 1
    check_paragraph(stderr, store, "No space left on device", "bytes free", "what is finished is kept")
    kept = {path: path.read_bytes() for path in stored(store)}
    assert len(kept) == 3 and not list(store.rglob("*.tmp"))
    assert read_json(store.parent / "run.json", {})["status"] == "failed"
    monkeypatch.undo()
    code, out, _ = call("extract", recipe, "teacher.extraction.steps=1")
    assert code == 0 and "vdm: 5 made, 3 reused" in out
    assert all(path.read_bytes() == content for path, content in kept.items())


def python(*arguments, **environment):
    """A Python process whose standard error is read, in a session of its own so that no other gets its signal."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=environment, start_new_session=True, preexec_fn=_hears_interrupts)


def _hears_interrupts() -> None:
    """What was started in the background (nohup, some CI) inherits that SIGINT is ignored; a person's terminal does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_says_what_is_kept_and_the_same_command_continues(extraction):
    recipe, store = extraction
    process = python("-m", "enhancer", "extract", recipe)
    deadline = time.monotonic() + 120
    while len(stored(store)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    count = len(stored(store))
    assert process.returncode == 130 and "Traceback" not in stderr and 2 <= count < 8, stderr
    assert f"{count} priors" in stderr and "the same command continues" in stderr
    assert not list(store.rglob("*.tmp")) and read_json(store.parent / "run.json", {})["status"] == "interrupted"
    code, out, _ = call("extract", recipe)
    assert code == 0 and f"vdm: {8 - count} made, {count} reused" in out and len(stored(store)) == 8


@pytest.mark.parametrize("library, command, said", [
    ("typer", ["ls"], ""), ("torch", ["extract", "--video", "clip.mp4", "--text", "x"], "Interrupted")])
def test_ctrl_c_while_libraries_load(tmp_path, library, command, said):
    """A library that is interrupted while it loads, and that makes another error of it, as transformers does."""
    lines = ["import os, signal, time", "try:", "    os.kill(os.getpid(), signal.SIGINT)", "    time.sleep(60)",
             "except KeyboardInterrupt:", "    raise" + (" ImportError('Could not import')" if said else "")]
    (tmp_path / f"{library}.py").write_text("\n".join(lines))
    process = python("-m", "enhancer", *command, PYTHONPATH=str(tmp_path))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and said in stderr, stderr
    assert "Traceback" not in stderr and "Unexpected" not in stderr, stderr
