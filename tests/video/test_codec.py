"""read_motion on clips whose motion is known: signs, units, references, times, every codec that PyAV can encode."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from enhancer.video.codec import (
    Origin,
    Validity,
    accumulate,
    energy_map,
    prediction_errors,
    read_motion,
    read_motions,
)
from enhancer.video.codec.pictures import key_frames, pictures_of
from enhancer.video.codec.streams import index_stream
from enhancer.video.codec.vectors import read_vectors
from tests.video.clips import middle, panned, write
from vdm_priors.errors import ClipError, UserError

MOTION = (1.5, -0.75)
PRESETS = ("ultrafast", "veryfast", "medium", "slower")


@pytest.fixture(scope="module")
def pan():
    return panned(13, MOTION)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("codec")


def assert_pans(field, motion=MOTION, within=0.15, frames=slice(1, None)):
    """Nearly all cells of every frame that has vectors, save a border, move as the content does."""
    seen = 0
    for frame in range(len(field.times))[frames]:
        if field.valid[frame].mean() > 0.5:
            assert middle(field, frame) == pytest.approx(motion, abs=within), frame
            seen += 1
    assert seen >= len(range(len(field.times))[frames]) * 0.7


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("b_frames", [0, 3])
def test_h264_presets(folder, pan, preset, b_frames):
    video = write(folder / f"{preset}{b_frames}.mp4", pan, options={"preset": preset, "bf": str(b_frames), "crf": "16"})
    field = read_motion(video)
    assert_pans(field, within=0.6 if preset == "ultrafast" else 0.15)  # ultrafast searches whole pixels only
    assert field.provenance["codec"] == "h264" and set(field.origin.tolist()) == {Origin.NATIVE}
    assert field.validity[0].tolist() == np.full((8, 12), Validity.INTRA).tolist()
    assert np.isnan(field.displacement[~field.valid]).all() and np.isfinite(field.displacement[field.valid]).all()
    assert field.velocity[field.valid] == pytest.approx(25 * field.displacement[field.valid], rel=1e-3)
    assert field.times == pytest.approx(np.arange(13) / 25) and field.duration == pytest.approx(13 / 25)
    if b_frames and preset != "ultrafast":
        assert (field.reference < -1).any() and (field.reference > 0).any() and "B" in field.kinds


def test_the_fast_mode_says_what_it_assumes(folder, pan):
    video = write(folder / "medium.mp4", pan, options={"preset": "medium"})
    fast, matched = read_motion(video, references="assume"), read_motion(video)
    assert "assumed" in fast.provenance["references"] and "matched" in matched.provenance["references"]
    assert set(np.unique(fast.reference)) <= {-1, 0, 1} and np.isnan(fast.confidence).all()
    assert (matched.confidence[matched.valid] >= 0).all() and matched.confidence[matched.valid].mean() > 0.5

    def error(field):
        return np.nanmean(np.abs(field.displacement[1:] - np.array(MOTION)))

    assert error(matched) < 0.2 < error(fast)


@pytest.mark.parametrize(
    "codec, name, kind",
    [
        ("mpeg1video", "a.mpg", "mpeg1video"),
        ("mpeg2video", "a.ts", "mpeg2video"),
        ("mpeg4", "a.mp4", "mpeg4"),
        ("flv", "a.flv", "flv"),
        ("wmv2", "a.avi", "wmv2"),
        ("msmpeg4", "a.avi", "msmpeg4"),
    ],
)
def test_other_codecs_with_vectors_of_their_own(folder, pan, codec, name, kind):
    field = read_motion(write(folder / f"{codec}{name}", pan, codec, {"g": "12", "qmax": "3"}))
    assert field.provenance["codec"].startswith(kind) and set(field.origin.tolist()) <= {Origin.NATIVE, Origin.NONE}
    assert "frame types" in field.provenance["references"]
    assert_pans(field, within=0.3)


def test_h263_sizes_are_fixed(folder):
    field = read_motion(write(folder / "a.3gp", panned(7, MOTION, (96, 128)), "h263", {"qmax": "3"}))
    assert field.provenance["codec"] in ("h263", "h263i")
    assert_pans(field, within=0.3)


@pytest.mark.parametrize("codec", ["mpeg1video", "mpeg2video"])
def test_mpeg_b_frames_have_the_distances_of_their_anchors(folder, pan, codec):
    video = write(folder / f"b{codec}.mpg", pan, codec, {"g": "12", "bf": "2", "qmax": "3"})
    field = read_motion(video)
    assert "B" in field.kinds and {-2, -1, 1, 2} <= set(np.unique(field.reference))
    assert_pans(field, within=0.3)
    anchors = np.flatnonzero(field.kinds != "B")
    for frame in np.flatnonzero(field.kinds == "B"):
        past, future = anchors[anchors < frame], anchors[anchors > frame]
        allowed = {0, *(past[-1:] - frame), *(future[:1] - frame)}
        assert set(np.unique(field.reference[frame])) <= allowed


@pytest.mark.parametrize(
    "codec, name, options",
    [
        ("libx265", "a.mp4", {"x265-params": "log-level=none:frame-threads=1:pools=none"}),
        ("libvpx", "a.webm", {"b": "600k"}),
        ("libvpx-vp9", "a.webm", {"b": "600k", "deadline": "realtime", "cpu-used": "8"}),
        ("libsvtav1", "a.mp4", {"preset": "12"}),
    ],
)
def test_codecs_without_vectors_are_matched_and_say_so(folder, pan, codec, name, options):
    video = write(folder / f"{codec}{name}", pan, codec, options)
    field = read_motion(video)
    assert set(field.origin.tolist()) == {Origin.REENCODED} and len(field.times) == 13
    assert_pans(field)
    blocks = read_motion(video, fallback="mestimate")
    assert set(blocks.origin.tolist()) == {Origin.MESTIMATE}
    assert_pans(blocks, within=0.6)
    none = read_motion(video, fallback="none")
    assert (none.validity == Validity.UNAVAILABLE).all() and np.isnan(none.displacement).all() and len(none.times) == 13


def test_mpeg4_b_frames_are_never_zeros(folder, pan):
    video = write(folder / "asp.mp4", pan, "mpeg4", {"bf": "2", "qmax": "3"})
    field = read_motion(video)
    is_b = field.kinds == "B"
    assert is_b.sum() >= 6
    assert set(field.origin[is_b]) == {Origin.REENCODED} and set(field.origin[~is_b]) == {Origin.NATIVE}
    assert_pans(field, within=0.3)
    bare = read_motion(video, fallback="none")
    assert (bare.validity[is_b] == Validity.INVALID).all() and bare.valid[bare.kinds == "P"].mean() > 0.8


def test_every_reading_gives_the_same_bytes(folder, pan):
    video = write(folder / "same.mp4", np.concatenate([pan, pan[::-1]]), options={"preset": "medium", "g": "8"})
    first = read_motion(video, qp=True, workers=1).tobytes()
    assert len(index_stream(video).segments) > 2
    assert {read_motion(video, qp=True, workers=1 + n % 4).tobytes() for n in range(20)} == {first}


def test_several_files_at_once_in_order(folder, pan):
    videos = [write(folder / f"many{n}.mp4", pan[n:], options={"preset": "veryfast"}) for n in range(5)]
    (folder / "none.mp4").write_bytes(b"no video")
    found = list(read_motions([*videos[:2], folder / "none.mp4", *videos[2:]], workers=3, references="assume"))
    assert [path.name for path, _ in found] == [
        "many0.mp4",
        "many1.mp4",
        "none.mp4",
        "many2.mp4",
        "many3.mp4",
        "many4.mp4",
    ]
    assert isinstance(found[2][1], ClipError)
    for path, field in found[:2] + found[3:]:
        assert field.tobytes() == read_motion(path, references="assume").tobytes()


def test_frame_threads_are_exact_where_frames_are_not_reordered(folder, pan):
    video = write(folder / "p.mp4", pan, options={"preset": "veryfast", "bf": "0"})
    once = read_motion(video, references="assume", workers=1).tobytes()
    assert not index_stream(video).reordered
    assert {read_motion(video, references="assume", workers=4).tobytes() for _ in range(20)} == {once}


def test_vectors_alone_are_those_of_a_full_decode(folder, pan):
    import av

    video = write(folder / "alone.mp4", pan, options={"preset": "slower", "g": "5"})
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        stream.codec_context.options, stream.codec_context.thread_type = {"flags2": "+export_mvs"}, "SLICE"
        side = {f.pts: f.side_data.get("MOTION_VECTORS") for f in container.decode(stream)}
        expected = {pts: None if found is None else found.to_ndarray().copy() for pts, found in side.items()}
    index = index_stream(video)
    frames = read_vectors(index, workers=3)
    assert [frame.ordinal for frame in frames] == list(range(13))
    for frame in frames:
        vectors = expected[index.pts[frame.ordinal]]
        assert (vectors is None) == (frame.vectors is None)
        if vectors is not None:
            assert all((vectors[name] == frame.vectors[name]).all() for name in vectors.dtype.names)


def test_open_groups_of_pictures_are_read_in_parallel_without_loss(folder, pan):
    video = write(
        folder / "open.mp4",
        np.concatenate([pan, pan[::-1]]),
        options={"preset": "medium", "g": "9", "bf": "3", "x264-params": "open-gop=1:scenecut=0"},
    )
    fields = [read_motion(video, workers=n) for n in (1, 3)]
    assert fields[0].tobytes() == fields[1].tobytes() and len(fields[0].times) == 26 and "-" not in fields[0].kinds


def test_a_part_of_a_clip_is_the_same_as_in_the_whole(folder, pan):
    video = write(folder / "part.mp4", np.concatenate([pan, pan[::-1], pan]), options={"preset": "medium", "g": "10"})
    whole, part = read_motion(video), read_motion(video, 0.5, 1.0)
    inside = (whole.times >= 0.5) & (whole.times < 1.0)
    assert part.times.tolist() == whole.times[inside].tolist() and part.duration == pytest.approx(1.0, abs=0.05)
    for name in ("displacement", "velocity", "validity", "reference", "kinds", "groups", "packet_bytes"):
        assert np.array_equal(
            getattr(part, name), getattr(whole, name)[inside], equal_nan=name in ("displacement", "velocity")
        ), name
    grid = part.grid()
    assert grid.shape == part.validity.shape and grid.spans[-1, 1] <= part.duration + 1e-9


def test_quantisers_and_packets(folder, pan):
    coarse, fine = (read_motion(write(folder / f"q{q}.mp4", pan, options={"qp": q}), qp=True) for q in ("40", "18"))
    assert coarse.qp.shape == (13, 4, 6) and coarse.qp.mean() > fine.qp.mean() + 15
    assert coarse.packet_bytes.sum() < fine.packet_bytes.sum() and (coarse.packet_bytes > 0).all()
    assert read_motion(folder / "q40.mp4").qp is None


@pytest.mark.parametrize("rotation, turned", [(90, (-0.75, -1.5)), (-90, (0.75, 1.5)), (180, (-1.5, 0.75))])
def test_rotated_clips_lie_upright(folder, rotation, turned):
    video = write(
        folder / f"r{rotation}.mp4", panned(6, MOTION, (56, 100)), options={"preset": "veryfast"}, rotation=rotation
    )
    field = read_motion(video)
    assert field.size == ((56, 100) if rotation == 180 else (100, 56))
    assert field.row_edges[0] == 0 and (np.diff(field.row_edges) > 0).all() and np.diff(field.row_edges).min() in (4, 8)
    assert_pans(field, turned)
    (_, picture), *_ = pictures_of(field)
    assert picture.shape[:2] == field.size


def test_odd_sizes_and_sound_first(folder):
    field = read_motion(write(folder / "odd.mkv", panned(6, MOTION, (51, 77)), audio_first=True))
    assert field.size == (51, 77) and field.validity.shape[1:] == (7, 10)
    assert field.row_edges[-2:].tolist() == [48, 51]
    assert_pans(field)


def test_anamorphic_pixels_are_told(folder, pan):
    field = read_motion(write(folder / "wide.mp4", pan, aspect=Fraction(4, 3)))
    assert field.provenance["pixel_aspect"] == "4/3" and any("as wide as high" in note for note in field.notes)
    assert_pans(field)


def test_a_variable_frame_rate_counts_seconds(folder, pan):
    stamps = np.cumsum([0] + [40, 120] * 6).tolist()
    field = read_motion(write(folder / "vfr.mkv", pan, options={"bf": "0", "refs": "1"}, milliseconds=stamps))
    assert field.times == pytest.approx(np.array(stamps) / 1000, abs=2e-3)
    for frame in (3, 4):
        cells = field.velocity[frame][field.valid[frame]]
        assert np.median(cells[:, 0]) == pytest.approx(1.5 / (field.times[frame] - field.times[frame - 1]), rel=0.15)


def test_interlaced_clips_are_noted(folder):
    pictures = panned(10, (2.0, 0.0), (96, 96))
    field = read_motion(write(folder / "tff.mp4", pictures, options={"preset": "medium", "x264-params": "tff=1"}))
    assert any("interlaced" in note for note in field.notes) and field.valid[1:].mean() > 0.5
    cells = field.displacement[field.valid]
    assert np.median(cells[:, 0]) == pytest.approx(2.0, abs=0.3)
    mpeg = read_motion(write(folder / "tff.ts", pictures, "mpeg2video", {"flags": "+ildct+ilme", "qmax": "3"}))
    assert np.median(mpeg.displacement[mpeg.valid][:, 0]) == pytest.approx(2.0, abs=0.3)


def test_scene_cuts_are_found(folder, pan):
    other = 255 - panned(13, (-1.0, 0.5))[:, ::-1] // 2
    video = write(folder / "cut.mp4", np.concatenate([pan, other]), options={"preset": "medium"})
    assert np.flatnonzero(read_motion(video).cuts).tolist() == [13]


def test_key_frames_alone(folder, pan):
    video = write(folder / "keys.mp4", np.concatenate([pan, pan]), options={"g": "6", "x264-params": "scenecut=0"})
    found = list(key_frames(video))
    assert [time for time, _ in found] == pytest.approx(np.arange(0, 26, 6) / 25)
    full = dict(pictures_of(read_motion(video)))
    assert all(np.array_equal(picture, full[6 * n]) for n, (_, picture) in enumerate(found))


@pytest.mark.parametrize(
    "options", [{"preset": "medium"}, {"preset": "medium", "bf": "0"}, {"preset": "superfast", "refs": "1", "bf": "0"}]
)
def test_slow_motion_adds_up(folder, options):
    """CoViAR in whole pixels gives 0 here."""
    video = write(folder / "slow.mp4", panned(16, (0.4, 0.0), (96, 160)), options={**options, "crf": "16"})
    field = read_motion(video)
    found = accumulate(field, 12)
    assert found.span.tolist() == [*range(13), 12, 12, 12]
    cells = found.displacement[13, 2:-2, 2:-2][found.valid[13, 2:-2, 2:-2]]
    assert np.median(cells[:, 0]) == pytest.approx(4.8, abs=0.1) and np.median(cells[:, 1]) == pytest.approx(
        0, abs=0.05
    )
    assert found.valid[13].mean() > 0.8 and np.isnan(found.displacement[~found.valid]).all()


def test_accumulation_restarts_where_asked(folder, pan):
    video = write(
        folder / "restart.mp4",
        np.concatenate([pan, pan]),
        options={"g": "13", "x264-params": "scenecut=0", "preset": "medium"},
    )
    field = read_motion(video)
    assert accumulate(field, 20).span.tolist() == [*range(13)] * 2
    assert accumulate(field, 20, reset=("cuts",)).span[14] == (1 if field.cuts[13] else 14)
    across = accumulate(field, 20, reset=())
    assert across.span[14] == 14 and not across.valid[14].any()  # nothing is known of an I-frame's motion
    with pytest.raises(UserError, match="cuts and groups"):
        accumulate(field, 4, reset=("gop",))


def test_content_that_came_from_outside_is_not_valid(folder):
    field = read_motion(write(folder / "enter.mp4", panned(10, (4.0, 0.0)), options={"preset": "medium", "bf": "0"}))
    found = accumulate(field, 9)
    assert not found.valid[9, :, :3].any() and found.valid[9, 1:-1, 6:].mean() > 0.8


def test_prediction_error_by_plain_loops(folder):
    video = write(
        folder / "error.mp4", panned(5, (2.0, 1.0), (32, 48)), options={"preset": "veryfast", "bf": "0", "refs": "1"}
    )
    field = read_motion(video)
    pictures = dict(pictures_of(field))
    assert not (errors := {error.frame: error for error in prediction_errors(field)})[0].known.any()
    frame, seen = 3, 0
    for row, column in np.argwhere(field.valid[frame]):
        motion = field.displacement[frame, row, column]
        if (motion != motion.round()).any():
            continue  # whole pixels need no interpolation
        for y in range(8 * row, 8 * row + 8):
            for x in range(8 * column, 8 * column + 8):
                there = np.clip([y - motion[1], x - motion[0]], 0, [31, 47]).astype(int)
                expected = pictures[frame][y, x].astype(int) - pictures[frame - 1][tuple(there)]
                assert np.array_equal(errors[frame].rgb[y, x], expected)
                seen += 1
    assert seen > 500
    energy = energy_map(field)
    assert np.isnan(energy[0]).all() and np.array_equal(np.isnan(energy), ~field.valid)
    still = np.square(np.diff(np.stack(list(pictures.values())).astype(float), axis=0)).mean()
    assert np.nanmean(energy[1:]) < 0.2 * still
