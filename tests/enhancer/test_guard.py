"""Decoding in another process: the same clips, and files that hang or crash it are put aside."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from enhancer.data.samples import Sample
from enhancer.video.clip import FrameCache, Sampling, read_clip
from enhancer.video.footage import Footage
from enhancer.video.guard import GuardedReader, clip_reader
from enhancer.video.quarantine import QUARANTINE, Quarantine
from tests.enhancer.test_clip import write_video
from vdm_priors.errors import ClipError, UserError

BAD = (sys.executable, str(Path(__file__).with_name("bad_decoder.py")))
ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "clip.mp4")


@pytest.fixture
def reader(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    return GuardedReader(1.0, Quarantine(tmp_path / QUARANTINE), BAD)


def same(one, other) -> bool:
    facts_alike = dataclasses.replace(one, frames=None) == dataclasses.replace(other, frames=None)
    return facts_alike and np.array_equal(one.frames, other.frames)


def copy_of(video, name):
    return shutil.copy(video, video.with_name(name))


def test_clips_are_those_of_read_clip(video, tmp_path):
    pictures = []
    for n in range(3):
        pictures.append(tmp_path / f"{n}.png")
        cv2.imwrite(str(pictures[-1]), np.full((32, 48, 3), 20 * n, np.uint8))
    reader = clip_reader(30.0)
    for shown in (video, str(video), Footage((video,), 0.25, 0.75), Footage(tuple(pictures), fps=2),
                  Footage(tuple(pictures), fps=2, assumed=True)):
        for sampling in (Sampling(2), Sampling(4, fps=3.0), Sampling(40)):
            clip = reader(shown, sampling)
            assert same(clip, read_clip(shown, sampling))
            assert torch.from_numpy(clip.frames).shape[0] == len(clip.times)
    assert clip_reader(None) is read_clip


def test_errors_are_those_of_read_clip_and_not_put_aside(video, reader, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    for file, sampling in [("text.mp4", Sampling()), ("none.mp4", Sampling()), ("clip.mp4", Sampling(start=3))]:
        with pytest.raises(ClipError) as expected:
            read_clip(tmp_path / file, sampling)
        with pytest.raises(ClipError) as got:
            reader(tmp_path / file, sampling)
        assert str(got.value) == str(expected.value)
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ClipError, match="not a regular file"):
        reader(tmp_path / "pipe.mp4")
    assert not (tmp_path / QUARANTINE).exists() and same(reader(video), read_clip(video))


@pytest.mark.parametrize("name, reason", [
    ("hang.mp4", r"longer than data.timeout, 1 s"), ("segfault.mp4", "SIGSEGV"), ("exit.mp4", "exit status 7")])
def test_a_bad_file_is_put_aside_and_the_others_go_on(video, reader, tmp_path, name, reason):
    bad = copy_of(video, name)
    assert same(reader(video), read_clip(video))
    began = time.monotonic()
    with pytest.raises(ClipError, match=f"{name}.*{reason}.*{QUARANTINE}.*delete its line"):
        reader(bad)
    assert time.monotonic() - began < 30
    (row,) = [json.loads(line) for line in (tmp_path / QUARANTINE).read_text().splitlines()]
    assert row["file"] == str(bad) and row["when"].startswith("20") and row["reason"]

    first = reader._process
    began = time.monotonic()
    for again in (reader, GuardedReader(1.0, Quarantine(tmp_path / QUARANTINE), ("no-such-program",))):
        with pytest.raises(ClipError, match=reason):  # not decoded: the second could not
            again(Footage((bad,), 0.1))
    assert time.monotonic() - began < 0.5 and reader._process is first
    assert same(reader(video), read_clip(video))
    assert len((tmp_path / QUARANTINE).read_text().splitlines()) == 1


def test_a_mended_file_and_a_deleted_line_are_tried_again(video, tmp_path):
    bad, listed = copy_of(video, "bad.mp4"), Quarantine(tmp_path / QUARANTINE)
    listed.add(bad, "it was bad")
    reader = GuardedReader(30.0, listed)
    with pytest.raises(ClipError, match="it was bad"):
        reader(bad)
    (tmp_path / QUARANTINE).write_text("")
    assert same(reader(bad), read_clip(bad))
    listed.add(bad, "it was bad")
    os.utime(bad, ns=(1, 1))
    assert same(reader(bad), read_clip(bad))
    (tmp_path / QUARANTINE).write_text("{}\n")
    with pytest.raises(UserError, match="line 1 is no entry"):
        reader(bad)


def test_a_name_may_hold_a_line_separator(video, tmp_path):
    bad, listed = copy_of(video, "bad\u2028.mp4"), Quarantine(tmp_path / QUARANTINE)
    listed.add(bad, "it was bad\x85")
    assert Quarantine(tmp_path / QUARANTINE).reason(bad) == "it was bad\x85"


def test_threads_take_turns_and_a_fork_has_its_own_process(video, tmp_path):
    others = [copy_of(video, f"{n}.mp4") for n in range(4)]
    reader = clip_reader(30.0)
    with ThreadPoolExecutor(4) as pool:
        clips = list(pool.map(reader, others * 3))
    assert all(same(dataclasses.replace(clip, path=video), read_clip(video)) for clip in clips)
    mine = reader._process.pid

    def in_fork(said):
        same_clip = same(reader(video), read_clip(video))
        said.put((same_clip, reader._process.pid != mine))

    context = multiprocessing.get_context("fork")
    said = context.SimpleQueue()
    child = context.Process(target=in_fork, args=(said,), daemon=True)  # as a DataLoader's worker is
    child.start()
    child.join(60)
    assert said.get() == (True, True)
    assert same(reader(video), read_clip(video)) and reader._process.pid == mine


def test_the_process_ends_with_its_reader_and_is_never_needed_for_what_is_kept(video):
    reader = clip_reader(30.0)
    cache = FrameCache(read=reader)
    first = cache.get(video, Sampling(3))
    process = reader._process
    assert cache.get(video, Sampling(3)) is first
    del reader, cache
    assert process.poll() is not None


def test_a_process_that_does_not_start_is_no_fault_of_the_file(video, tmp_path):
    failing = (sys.executable, "-c", "raise SystemExit(1)")
    for command, message in [(("no-such-program",), "cannot be started"), (failing, "exit status 1")]:
        with pytest.raises(UserError, match=message) as caught:
            GuardedReader(1.0, Quarantine(tmp_path / QUARANTINE), command)(video)
        assert not isinstance(caught.value, ClipError) and not (tmp_path / QUARANTINE).exists()


def test_a_decoder_left_alone_with_a_hanging_file_ends(video, tmp_path):
    """The one that asks is killed while its decoder hangs: nothing may be left running."""
    bad = copy_of(video, "hang.mp4")
    script = ("import sys\nfrom enhancer.video.guard import *\n"
              f"reader = GuardedReader(1.0, Quarantine(), {BAD!r})\nreader._started()\n"
              "print(reader._process.pid, flush=True)\nreader.timeout = 600\n"
              f"reader({str(bad)!r})\n")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, **ENVIRONMENT}) as asking:
        decoder = int(asking.stdout.readline())
        time.sleep(0.5)
        assert Path(f"/proc/{decoder}").exists() and asking.poll() is None
        asking.kill()
    ends = time.monotonic() + 30
    while not _has_ended(decoder) and time.monotonic() < ends:
        time.sleep(0.1)
    assert _has_ended(decoder)


def _has_ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except OSError:
        return True


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_without_a_file_that_hangs(video, reader, tmp_path, workers):
    from enhancer.collate import TrainingClips
    from tests.vlm_hooks.tiny_families import family_student

    student = family_student("qwen2_5_vl")
    files = [video, copy_of(video, "hang.mp4"), copy_of(video, "c.mp4")]
    samples = [Sample(file.stem, Path(file), "What moves?", "it") for file in files]
    prompts = {sample.id: student.prompt(sample.question) for sample in samples}
    clips = TrainingClips(samples, prompts, student, Sampling(4), FrameCache(read=reader))
    loader = torch.utils.data.DataLoader(clips, batch_size=1, num_workers=workers, collate_fn=lambda items: items[0])
    items = [*loader, *loader]
    assert [item.sample.id for item in items] == ["clip", "c", "c"] * 2
    assert [[p.id for p in item.problems] for item in items] == [[], ["hang"], []] * 2
    assert "longer than data.timeout" in items[1].problems[0].reason
    assert len((tmp_path / QUARANTINE).read_text().splitlines()) == 1
