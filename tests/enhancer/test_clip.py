from __future__ import annotations

import os

import av
import cv2
import numpy as np
import pytest

from enhancer.video.clip import Clip, FrameCache, Sampling, read_clip
from enhancer.video.footage import Footage, coded_span, video_digest
from tests.video.clips import write
from vdm_priors.errors import ClipError, UserError
from vdm_priors.store import file_digest


def write_video(path, frames=8, size=(48, 32), fps=8, pts_ms=None, codec="libx264", options=None, **more):
    """Frame i is a grey of level 20+10i (wrapping at 200) with a red square in the top left corner."""
    pictures = np.empty((frames, size[1], size[0], 3), np.uint8)
    pictures[:] = (20 + 10 * np.arange(frames) % 200)[:, None, None, None]
    pictures[:, :8, :8] = (255, 0, 0)
    options = options or ({"bf": "2", "crf": "10"} if codec == "libx264" else {})
    return write(path, pictures, codec, options, rate=fps, milliseconds=pts_ms, **more)


def levels(clip: Clip) -> list[int]:
    """The ordinals that write_video painted, modulo 20."""
    return [round((float(f[-8:, -8:].mean()) - 20) / 10) for f in clip.frames]


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "clip.mp4")


def test_every_frame_once_in_order_with_b_frames(video):
    clip = read_clip(video)
    assert clip.frames.shape == (8, 32, 48, 3) and clip.frames.dtype == np.uint8
    assert levels(clip) == list(range(8))
    assert clip.times == pytest.approx([i / 8 for i in range(8)]) and clip.duration == pytest.approx(1.0)
    assert clip.notes == [] and clip.box == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(frames=4), [1, 3, 5, 7]),
        (Sampling(frames=8, fps=4), [1, 3, 5, 7]),
        (Sampling(frames=2, fps=4), [2, 6]),
        (Sampling(frames=8, fps=0.1), [2, 6]),
        (Sampling(frames=2, start=0.5), [5, 7]),
        (Sampling(frames=2, start=0.25, end=0.5), [2, 3]),
        (Sampling(frames=1), [4]),
    ],
)
def test_frames_on_the_screen_in_the_middle_of_each_bin(video, sampling, expected):
    assert levels(read_clip(video, sampling)) == expected


def test_variable_frame_rate_uses_real_times(tmp_path):
    stamps = [0, 100, 200, 300, 1900, 2000, 2100, 2200]
    video = write_video(tmp_path / "vfr.mp4", pts_ms=stamps)
    clip = read_clip(video, Sampling(frames=3, end=2.1))
    # 0.35 s and 1.05 s show frame 3; the second bin then takes the next frame, never one twice
    assert levels(clip) == [3, 4, 5] and clip.times == pytest.approx([0.3, 1.9, 2.0])
    assert read_clip(video).times == pytest.approx([s / 1000 for s in stamps])


@pytest.mark.parametrize("rotation, corner", [(90, (-4, 4)), (-90, (4, -4)), (180, (-4, -4))])
def test_rotation_metadata_is_applied(tmp_path, rotation, corner):
    clip = read_clip(write_video(tmp_path / "phone.mp4", rotation=rotation), Sampling(frames=2))
    assert clip.frames.shape[1:3] == ((32, 48) if rotation == 180 else (48, 32))
    red = clip.frames[0][corner]
    assert red[0] > 200 and red[2] < 60


def test_odd_size_and_audio_before_video(tmp_path):
    clip = read_clip(write_video(tmp_path / "odd.mkv", size=(51, 37), audio_first=True))
    assert clip.frames.shape == (8, 37, 51, 3) and levels(clip) == list(range(8))


@pytest.mark.parametrize("name, codec", [("a.avi", "mpeg4"), ("a.ts", "libx264"), ("a.webm", "libvpx")])
def test_other_containers_start_at_zero_seconds(tmp_path, name, codec):
    clip = read_clip(write_video(tmp_path / name, codec=codec), Sampling(frames=4))
    assert levels(clip) == [1, 3, 5, 7] and clip.times[0] == pytest.approx(0.125, abs=0.05)


def test_a_stream_without_times_is_noted(tmp_path):
    clip = read_clip(write_video(tmp_path / "a.h264"), Sampling(frames=4))
    assert levels(clip) == [1, 3, 5, 7] and "frames a second are assumed" in clip.notes[0]


def test_a_long_clip_is_read_by_seeking_with_the_same_result(tmp_path, monkeypatch):
    video = write_video(tmp_path / "long.mp4", frames=400, fps=20, options={"bf": "2", "g": "40", "crf": "10"})
    sampling = Sampling(frames=4, start=5.02)
    jumping = read_clip(video, sampling)
    monkeypatch.setattr("enhancer.video.clip.SEEK_AHEAD", 10**9)
    assert np.array_equal(read_clip(video, sampling).frames, jumping.frames)
    assert levels(jumping) == [round(t * 20) % 20 for t in jumping.times]


def test_short_clip_repeats_or_fails(video):
    clip = read_clip(video, Sampling(frames=10))
    assert levels(clip) == [*range(8), 7, 7] and "repeated 2 times" in clip.notes[0]
    assert all(a < b for a, b in zip(clip.times, clip.times[1:]))
    with pytest.raises(ClipError, match="clip.mp4: has 8 frames .* asks for 10"):
        read_clip(video, Sampling(frames=10, short="fail"))


def test_one_frame_has_no_motion_but_is_a_still(tmp_path):
    video = write_video(tmp_path / "still.mp4", frames=1)
    with pytest.raises(ClipError, match="single frame .* sampling.frames to 1"):
        read_clip(video)
    assert len(read_clip(video, Sampling(frames=1)).frames) == 1


def test_a_cut_file_is_read_as_far_as_it_decodes(tmp_path):
    whole = write_video(tmp_path / "whole.ts", frames=100, options={"g": "10"})
    cut = tmp_path / "cut.ts"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    clip = read_clip(cut)
    assert len(clip.frames) == 8 and clip.duration < 9


def test_packets_without_frames_are_noted(tmp_path):
    moov_first = write_video(tmp_path / "whole.mp4", frames=100, options={"g": "10", "crf": "10"})
    data = bytearray(moov_first.read_bytes())
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 4
    data[middle : data.rindex(b"moov") - 4] = bytes(data.rindex(b"moov") - 4 - middle)
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(data)
    clip = read_clip(bad)
    assert any("damaged" in note for note in clip.notes)


def test_each_unreadable_file_says_what_and_what_to_do(tmp_path, video):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video " * 100)
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:600])
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{video}\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile '{video}'\n")
    with av.open(str(tmp_path / "sound.m4a"), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
    for name, message in [
        ("none.mp4", "No such file"),
        ("", "is a folder"),
        ("empty.mp4", "is empty"),
        ("text.mp4", "not a video"),
        ("cut.mp4", "cut short"),
        ("list.m3u8", "not a video"),
        ("list.ffconcat", "not a video"),
        ("sound.m4a", r"has no video \(it holds audio\)"),
    ]:
        with pytest.raises(ClipError, match=message) as caught:
            read_clip(tmp_path / name)
        assert str(tmp_path) in str(caught.value)
    with pytest.raises(ClipError, match="never an address"):
        read_clip("https://example.com/a.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ClipError, match="not a regular file"):
        read_clip(tmp_path / "pipe.mp4")


def test_sampling_after_the_end_and_impossible_samplings(video):
    with pytest.raises(ClipError, match="lasts 1.00 s, but the sampling starts at 3 s"):
        read_clip(video, Sampling(start=3))
    assert "the video at 1.00 s" in read_clip(video, Sampling(end=9)).notes[0]
    for wrong in ({"frames": 0}, {"fps": 0.0}, {"start": -1.0}, {"start": 2.0, "end": 1.0}, {"short": "pad"}):
        with pytest.raises(UserError, match="sampling"):
            Sampling(**wrong)


def test_cache_is_bounded_drops_the_oldest_and_sees_changes(tmp_path):
    reads = []

    def read(path, sampling):
        reads.append(path.name)
        return read_clip(path, sampling)

    one, two, three = (write_video(tmp_path / f"{n}.mp4") for n in "abc")
    size = read_clip(one).frames.nbytes
    cache = FrameCache(max_bytes=2 * size, read=read)
    for path in (one, two, one, three, one, two):
        cache.get(path, Sampling())
    assert reads == ["a.mp4", "b.mp4", "c.mp4", "b.mp4"] and cache.bytes == 2 * size
    write_video(two, frames=9)
    os.utime(two, ns=(1, 1))
    assert len(cache.get(two, Sampling(frames=9)).frames) == 9
    assert cache.bytes <= 2 * size
    assert len(FrameCache(max_bytes=10).get(one, Sampling()).frames) == 8


# -- spans and pictures -----------------------------------------------------------------


def test_a_span_gives_the_files_own_frames_and_times(video):
    whole, span = read_clip(video), read_clip(Footage((video,), 0.25, 0.75), Sampling(frames=4))
    assert levels(span) == [2, 3, 4, 5] and span.duration == whole.duration
    assert span.times == whole.times[2:6] and np.array_equal(span.frames, whole.frames[2:6])


def test_a_sampling_counts_within_the_span(video):
    span = Footage((video,), 0.25, 0.75)
    assert levels(read_clip(span, Sampling(frames=2, start=0.25))) == [4, 5]
    assert levels(read_clip(span, Sampling(frames=2, end=0.25))) == [2, 3]
    assert levels(read_clip(Footage((video,), 0.5), Sampling(frames=4))) == [4, 5, 6, 7]
    with pytest.raises(ClipError, match="beyond the end of this span"):
        read_clip(span, Sampling(start=0.5))
    with pytest.raises(ClipError, match="lasts 1.00 s.*video_start"):
        read_clip(Footage((video,), 2.0))


@pytest.fixture
def pictures(tmp_path):
    """Six pictures, wider than high, of grey 20 + 10 n with a red left edge."""
    files = []
    for n in range(6):
        pixels = np.full((32, 48, 3), 20 + 10 * n, np.uint8)
        pixels[:, :8] = (0, 0, 255)  # BGR
        files.append(tmp_path / f"{n}.png")
        cv2.imwrite(str(files[-1]), pixels)
    return tuple(files)


def test_pictures_are_a_clip_at_their_rate(pictures):
    clip = read_clip(Footage(pictures[::-1], fps=4), Sampling(frames=3))
    assert levels(clip) == [4, 2, 0] and clip.duration == 1.5 and clip.times == [0.25, 0.75, 1.25] and not clip.notes
    assumed = read_clip(Footage(pictures, fps=2, assumed=True), Sampling(frames=3))
    assert assumed.notes == ["no fps is given: 2 pictures a second are assumed"]
    assert clip.frames.shape == (3, 32, 48, 3) and clip.frames[0, 0, 0].tolist() == [255, 0, 0]
    assert levels(read_clip(Footage(pictures, 0.5, 1.0, fps=4), Sampling(frames=2))) == [2, 3]
    repeated = read_clip(Footage(pictures[:2], fps=2), Sampling(frames=3))
    assert levels(repeated) == [0, 1, 1] and repeated.repeated == 1 and repeated.times == [0.0, 0.5, 1.0]


def test_pictures_that_cannot_be_used_are_named(pictures, tmp_path):
    cv2.imwrite(str(tmp_path / "tall.png"), np.zeros((48, 32, 3), np.uint8))
    (tmp_path / "text.png").write_text("no picture")
    for file, message in [("tall.png", "32×48 pixels among others of 48×32"), ("text.png", "not a picture"),
                          ("none.png", "No such file")]:
        with pytest.raises(ClipError, match=f"{file}.*{message}"):
            read_clip(Footage((*pictures, tmp_path / file), fps=2), Sampling(frames=7))


def test_the_digest_tells_files_spans_rates_and_order_apart(video, pictures):
    shown = [video, Footage((video,), 0.25), Footage((video,), 0.25, 0.5), Footage(pictures, fps=2),
             Footage(pictures, fps=4), Footage(pictures[::-1], fps=2)]
    digests = [video_digest(v) for v in shown]
    assert len(set(digests)) == len(shown) and digests[0] == file_digest(video)
    cv2.imwrite(str(pictures[3]), np.zeros((32, 48, 3), np.uint8))
    assert video_digest(shown[3]) != digests[3]


def test_the_cache_keeps_spans_apart_and_sees_a_changed_picture(video, pictures):
    cache, shown = FrameCache(), Footage(pictures, fps=4)
    assert levels(cache.get(Footage((video,), 0.5), Sampling(2))) != levels(cache.get(video, Sampling(2)))
    before = cache.get(shown, Sampling(6))
    assert cache.get(shown, Sampling(6)) is before and len(cache) == 3
    cv2.imwrite(str(pictures[3]), np.zeros((32, 48, 3), np.uint8))
    os.utime(pictures[3], ns=(1, 1))
    assert cache.get(shown, Sampling(6)).frames[3].max() == 0


def test_a_codec_has_no_motion_of_pictures(pictures, video):
    assert coded_span(Footage((video,), 1.0, 3.0), 0.5, 1.0) == (video, 1.5, 2.0)
    assert coded_span(video, 0.5, None) == (video, 0.5, None)
    with pytest.raises(ClipError, match="no codec's motion"):
        coded_span(Footage(pictures, fps=2), 0.0, None)
