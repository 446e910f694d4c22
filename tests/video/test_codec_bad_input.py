"""Damaged and impossible files: a typed error, or a field whose mask says what is not known; never a hang or zeros."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from enhancer.video.codec import Validity, read_motion
from tests.video.clips import middle, panned, write
from vdm_priors.errors import ClipError, UserError

MOTION = (1.5, -0.75)
LONGEST = 60.0  # seconds for one tiny file on a busy machine


def sound(field):
    """NaN just where the mask says that nothing is known."""
    assert np.array_equal(np.isnan(field.displacement[..., 0]), field.validity != Validity.INTER)
    assert np.isfinite(field.displacement[field.valid]).all() and np.isfinite(field.velocity[field.valid]).all()
    return field


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A transport stream, which can be cut anywhere, of five groups of pictures."""
    return write(
        tmp_path_factory.mktemp("bad") / "whole.ts",
        panned(30, MOTION),
        options={"g": "6", "bf": "2", "x264-params": "scenecut=0"},
    )


@pytest.mark.parametrize("share", [0.02, 0.3, 0.77, 0.995])
@pytest.mark.parametrize(
    "name, codec", [("a.ts", "libx264"), ("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.webm", "libvpx")]
)
def test_cut_short(tmp_path, share, name, codec):
    data = write(tmp_path / name, panned(20, MOTION), codec).read_bytes()
    cut = tmp_path / f"cut{name}"
    cut.write_bytes(data[: int(share * len(data))])
    try:
        field = sound(read_motion(cut))
    except ClipError as error:
        assert str(cut) in str(error)
    else:
        assert len(field.times) <= 20


def test_garbage_in_the_middle_leaves_the_rest(tmp_path, whole):
    data = bytearray(whole.read_bytes())
    third = len(data) // 3
    data[third : third + 3000] = np.random.default_rng(0).bytes(3000)
    bad = tmp_path / "garbage.ts"
    bad.write_bytes(data)
    field = sound(read_motion(bad))
    assert 15 < len(field.times) <= 30 and field.valid[-6:].any()
    assert any("did not decode" in note or "damaged" in note for note in field.notes) or len(field.times) < 30
    assert middle(field, len(field.times) - 2) == pytest.approx(MOTION, abs=0.3)


def test_zeroed_packets_are_rows_without_motion(tmp_path):
    video = write(
        tmp_path / "whole.mp4", panned(30, MOTION), options={"g": "10", "bf": "0", "x264-params": "scenecut=0"}
    )
    data = bytearray(video.read_bytes())
    with av.open(str(video)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    for position, size in packets[12:16]:
        data[position : position + size] = bytes(size)
    bad = tmp_path / "zeroed.mp4"
    bad.write_bytes(data)
    field = sound(read_motion(bad))
    assert len(field.times) == 30 and not field.valid[12:16].any() and field.valid[[11, 19, 25]].any(axis=(1, 2)).all()
    assert any("of 30 frames" in note for note in field.notes)


def test_no_key_frame_at_the_start(tmp_path, whole):
    with av.open(str(whole)) as container, av.open(str(tmp_path / "late.ts"), "w") as target:
        stream = container.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for n, packet in enumerate(p for p in container.demux(stream) if p.size):
            if n > 1:
                packet.stream = copy
                target.mux(packet)
    field = sound(read_motion(tmp_path / "late.ts"))
    assert any("does not begin with a key frame" in note for note in field.notes) and field.valid[-10:].any()


def test_a_jump_of_ten_hours(tmp_path):
    stamps = [40 * n + (36_000_000 if n > 5 else 0) for n in range(12)]
    field = sound(
        read_motion(write(tmp_path / "jump.mkv", panned(12, MOTION), options={"bf": "0"}, milliseconds=stamps))
    )
    assert (
        len(field.times) == 12 and field.times[-1] > 36_000 and any("jump by 36000 s" in note for note in field.notes)
    )
    assert middle(field, 10) == pytest.approx(MOTION, abs=0.2)
    assert len(read_motion(tmp_path / "jump.mkv", 0, 10).times) == 6


def test_frames_of_another_size_have_no_motion(tmp_path):
    one, two = (
        write(tmp_path / f"{n}.h264", panned(8, MOTION, size), options={"g": "8"})
        for n, size in enumerate([(64, 96), (96, 128)])
    )
    both = tmp_path / "both.h264"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    field = sound(read_motion(both))
    of_other_size = (field.validity == Validity.UNAVAILABLE).all(axis=(1, 2))
    assert of_other_size.sum() in (7, 8, 9) and field.valid.any() and any("are not of" in note for note in field.notes)


@pytest.mark.parametrize("size", [(32, 1), (1, 32), (2, 2)])
def test_tiny_frames(tmp_path, size):
    pictures = np.full((6, *size, 3), 90, np.uint8)
    pictures[::2] += 20
    field = sound(read_motion(write(tmp_path / "tiny.mkv", pictures)))
    assert field.size == size and len(field.times) == 6


def test_a_single_frame_has_no_motion(tmp_path):
    field = sound(read_motion(write(tmp_path / "one.mp4", panned(1, MOTION))))
    assert not field.valid.any() and (field.validity == Validity.INTRA).all()


def test_what_is_not_a_video_is_refused(tmp_path, whole):
    cv2.imwrite(str(tmp_path / "image.png"), np.zeros((32, 32, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "image.jpg"), np.zeros((32, 32, 3), np.uint8))
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(1).bytes(20_000))
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{whole}\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile '{whole}'\n")
    (tmp_path / "list.sdp").write_text(
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    )
    os.mkfifo(tmp_path / "pipe.mp4")
    for name in (
        "image.png",
        "image.jpg",
        "empty.mp4",
        "noise.mp4",
        "list.m3u8",
        "list.ffconcat",
        "list.sdp",
        "pipe.mp4",
        "none.mp4",
        ".",
    ):
        with pytest.raises(ClipError, match=str(tmp_path)):
            read_motion(tmp_path / name)
    for address in ("https://example.com/a.mp4", "rtsp://example.com/a", f"concat:{whole}|{whole}", "data://a"):
        with pytest.raises(ClipError):
            read_motion(address)


def test_wrong_arguments(whole):
    for wrong, message in (
        ({"references": "guess"}, "'match' or 'assume'"),
        ({"fallback": "flow"}, "'reencode' or 'mestimate'"),
        ({"start": -1.0}, "0 <= start < end"),
        ({"start": 2.0, "end": 1.0}, "0 <= start < end"),
    ):
        with pytest.raises(UserError, match=message):
            read_motion(whole, **wrong)
    with pytest.raises(ClipError, match="lasts 1.20 s, and nothing"):
        read_motion(whole, 5.0)


# ---- mutated files ---------------------------------------------------------------------------------

MUTANTS, BATCH = 500, 50


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut, with bytes changed, zeroed, doubled or left out, wherever it comes."""
    found = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at, length = int(rng.integers(len(found))), int(rng.integers(1, 200))
        way = rng.integers(6)
        if way == 0:
            found = found[: max(at, 1)]
        elif way == 1:
            found[at : at + length] = rng.bytes(min(length, len(found) - at))
        elif way == 2:
            found[at : at + length] = bytes(min(length, len(found) - at))
        elif way == 3:
            del found[at : at + length]
        elif way == 4:
            found[at:at] = found[at : at + length]
        else:
            for _ in range(8):
                found[int(rng.integers(len(found)))] ^= 1 << int(rng.integers(8))
        if not found:
            return data[:1]
    return bytes(found)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_mutated_files_never_crash_hang_or_lie(tmp_path):
    rng = np.random.default_rng(0)
    # x265 ends the process on frames under its coding tree's size
    seeds = [
        write(
            tmp_path / f"seed{n}{suffix}",
            panned(8, MOTION, (64, 64) if codec == "libx265" else (32, 48)),
            codec,
            options,
        )
        for n, (suffix, codec, options) in enumerate(
            [
                (".mp4", "libx264", {"g": "4", "preset": "medium"}),
                (".ts", "libx264", {"g": "4"}),
                (".mkv", "libx264", {"bf": "0"}),
                (".avi", "mpeg4", {"bf": "2"}),
                (".mpg", "mpeg2video", {"bf": "2"}),
                (".flv", "flv", {}),
                (".webm", "libvpx", {}),
                (".mp4", "libx265", {"x265-params": "log-level=none:frame-threads=1:pools=none"}),
            ]
        )
    ]
    files = []
    for n in range(MUTANTS):
        seed = seeds[n % len(seeds)]
        files.append(tmp_path / f"{n}{seed.suffix}")
        files[-1].write_bytes(mutated(seed.read_bytes(), rng))
    found = Counter()
    for first in range(0, MUTANTS, BATCH):
        batch = files[first : first + BATCH]
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "fuzz_worker.py"), *map(str, batch)],
            capture_output=True,
            text=True,
            timeout=BATCH * 20,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        lines = done.stdout.splitlines()
        assert done.returncode == 0, (
            f"{batch[len(lines)]} ended the process with {done.returncode}: {done.stderr[-500:]}"
        )
        for file, line in zip(batch, lines, strict=True):
            seconds, verdict = line.split(" ", 1)
            assert float(seconds) < LONGEST, f"{file} took {seconds} s"
            assert verdict in ("ok", "refused"), f"{file}: {verdict}"
            found[verdict] += 1
    assert found["ok"] > MUTANTS / 4 and found["refused"] > MUTANTS / 50, found
