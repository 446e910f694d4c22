"""GOPs as the codec adapters take them, on clips with known motion, and clips of them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from enhancer.adapters.gop_clips import anchored_clip, keyed_clip
from enhancer.adapters.gops import Gop, GopReading, plan_gops, prediction_error, read_gops, resampled
from vdm_priors.errors import ClipError, UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "video"))
from clips import panned, write  # noqa: E402

SIZE = (64, 96)
P_ONLY = {"bf": "0", "refs": "1", "sc_threshold": "0"}


def gop_clip(folder, *, frames=49, keyint=24, motion=(0.75, 0.0), codec="libx264", **options):
    path = folder / "clip.mp4"
    write(path, panned(frames, motion, SIZE), codec, {"g": str(keyint), **P_ONLY, **options})
    return path


def test_slow_motion_is_not_lost_when_frames_are_fused(tmp_path):
    gops = list(read_gops(gop_clip(tmp_path), GopReading(fuse=12, size=SIZE)))
    assert [gop.steps for gop in gops] == [1, 1, 0]
    np.testing.assert_allclose(gops[1].times, [24 / 25, 36 / 25])
    assert gops[0].end == gops[1].times[0] and gops[2].end == pytest.approx(49 / 25)
    for gop in gops[:2]:
        moved = gop.displacement[gop.valid] * [96, 64]
        assert gop.valid.mean() > 0.8 and gop.origin == "native"
        np.testing.assert_allclose(np.median(moved, axis=0), [9.0, 0.0], atol=0.5)
        change = np.abs(np.diff(gop.pictures.astype(int), axis=0))[0]
        pixels = np.repeat(np.repeat(gop.valid[0], 8, axis=0), 8, axis=1)
        assert np.abs(gop.error[0]).mean() < 0.3 * change[pixels].mean()


def test_cells_are_resampled_by_shared_area():
    rng = np.random.default_rng(0)
    values, valid = rng.normal(size=(5, 7, 2)).astype(np.float32), rng.random((5, 7)) > 0.3
    edges = [np.concatenate([[0], np.sort(rng.random(n - 1)), [1]]) for n in (5, 7)]
    ours, known = resampled(values, valid, *edges, (3, 4))
    for r in range(3):
        for c in range(4):
            total, area = np.zeros(2), 0.0
            for i in range(5):
                for j in range(7):
                    high = min(edges[0][i + 1], (r + 1) / 3) - max(edges[0][i], r / 3)
                    wide = min(edges[1][j + 1], (c + 1) / 4) - max(edges[1][j], c / 4)
                    share = max(high, 0) * max(wide, 0) * valid[i, j]
                    total, area = total + share * values[i, j], area + share
            assert known[r, c] == (area * 12 >= 0.5)
            np.testing.assert_allclose(ours[r, c], total / area if known[r, c] else 0, atol=1e-5)


def test_warped_picture_and_error_give_the_next_one():
    rng = np.random.default_rng(1)
    before, after = rng.integers(0, 256, (2, 16, 24, 3)).astype(np.uint8)
    displacement, valid = np.zeros((2, 3, 2), np.float32), np.ones((2, 3), bool)
    displacement[0, 1] = [4 / 24, -2 / 16]  # 4 px to the right, 2 up
    valid[1, 2] = False
    error = prediction_error(before, after, displacement, valid)
    for y in range(16):
        for x in range(24):
            dx, dy = (4, -2) if (y // 8, x // 8) == (0, 1) else (0, 0)
            warped = before[np.clip(y - dy, 0, 15), np.clip(x - dx, 0, 23)].astype(int)
            expected = after[y, x].astype(int) - warped if valid[y // 8, x // 8] else np.zeros(3, int)
            np.testing.assert_array_equal(error[y, x], expected)


def test_a_cut_within_a_step_leaves_nothing_valid(tmp_path):
    pictures = np.concatenate([panned(10, (0, 0), SIZE), 255 - panned(14, (0, 0), SIZE)])
    write(tmp_path / "cut.mp4", pictures, "libx264", {"g": "48", "bf": "0", "sc_threshold": "0"})
    gop = next(read_gops(tmp_path / "cut.mp4", GopReading(fuse=8, size=SIZE)))
    assert gop.valid.mean((1, 2)).tolist() == [1.0, 0.0]
    assert not gop.error[1].any() and not gop.displacement[1].any()


def test_more_gops_than_the_budget_are_chosen_evenly_and_said(tmp_path):
    path, said = gop_clip(tmp_path, frames=60, keyint=6), []
    how = GopReading(fuse=3, size=SIZE, gops=4)
    plan = plan_gops(path, how)
    assert plan.numbers == (0, 3, 6, 9) and "4 of its 10 groups of pictures" in plan.notes[0]
    gops = list(read_gops(path, how, lambda *progress: said.append(progress)))
    assert [gop.number for gop in gops] == [0, 3, 6, 9]
    assert [gop.times[0] for gop in gops] == pytest.approx([0, 18 / 25, 36 / 25, 54 / 25])
    assert said[-1] == (4, 4, "group 10 of 10")


def test_one_gop_only_and_a_long_one_in_pieces(tmp_path):
    path = gop_clip(tmp_path, frames=40, keyint=100, motion=(1.0, 0.5))
    assert "it is one group of pictures" in plan_gops(path).notes[0]
    (whole,) = read_gops(path, GopReading(fuse=5, size=SIZE))
    pieces = list(read_gops(path, GopReading(fuse=5, size=SIZE, longest=16)))
    assert [gop.times[0] for gop in pieces] == pytest.approx([0, 15 / 25, 30 / 25])
    assert [gop.steps for gop in pieces] == [2, 2, 1] and whole.steps == 7
    np.testing.assert_array_equal(pieces[0].displacement, whole.displacement[:2])
    np.testing.assert_array_equal(pieces[1].pictures, whole.pictures[3:6])
    moved = pieces[1].displacement[pieces[1].valid] * [96, 64]
    np.testing.assert_allclose(np.median(moved, axis=0), [5.0, 2.5], atol=0.3)


def test_a_gop_shorter_than_a_step_has_one_step(tmp_path):
    gops = list(read_gops(gop_clip(tmp_path, frames=12, keyint=6), GopReading(fuse=30, size=SIZE, longest=64)))
    assert [gop.steps for gop in gops] == [1, 1]
    assert gops[0].times.tolist() == pytest.approx([0, 5 / 25])


def test_no_p_frames(tmp_path):
    path, how = gop_clip(tmp_path, frames=5, keyint=1), GopReading(fuse=2, size=SIZE)
    plan = plan_gops(path, how)
    gops = list(read_gops(path, how, plan=plan))
    assert any("there are no P-frames" in note for note in plan.notes)
    assert [gop.steps for gop in gops] == [0] * 5 and gops[0].error.shape == (0, *SIZE, 3)
    for clip in (keyed_clip(gops, plan, 2), anchored_clip(gops, plan, 2, anchors=3)):
        assert clip.origin == "none" and all(len(motion.vectors) == 0 for motion in clip.motion)


def test_a_codec_without_vectors_is_labelled_or_refused(tmp_path):
    path, how = tmp_path / "clip.webm", GopReading(fuse=4, size=SIZE)
    write(path, panned(13, (2.0, 0.0), SIZE), "libvpx", {"g": "100", "deadline": "realtime"})
    plan = plan_gops(path, how)
    assert any("vp8 exports no motion vectors: they are made here (reencode)" in note for note in plan.notes)
    (gop,) = read_gops(path, how, plan=plan)
    assert gop.origin == "reencoded" and gop.steps == 3
    np.testing.assert_allclose(np.median(gop.displacement[gop.valid] * [96, 64], axis=0), [8, 0], atol=0.5)
    assert keyed_clip([gop], plan, 4).origin == "reencoded"
    with pytest.raises(ClipError, match="vp8.*exports no motion vectors.*Re-encode it as H.264"):
        plan_gops(path, GopReading(fallback="refuse"))


def test_settings_that_cannot_be_are_refused():
    for wrong, message in (
        ({"fuse": 0}, "fuse"),
        ({"longest": 40}, "twice fuse"),
        ({"size": (60, 64)}, "multiples of 8"),
        ({"fallback": "guess"}, "reencode, mestimate, refuse"),
    ):
        with pytest.raises(UserError, match=message):
            GopReading(**wrong)


def made(number, steps, first, rate=1.0):
    """A GOP whose step n has displacement n everywhere, and picture n."""
    times = first + np.arange(steps + 1) / rate
    pictures = np.broadcast_to(np.arange(steps + 1, dtype=np.uint8)[:, None, None, None], (steps + 1, 16, 16, 3))
    displacement = (
        np.broadcast_to(np.arange(1, steps + 1, dtype=np.float32)[:, None, None, None], (steps, 2, 2, 2)) / 10
    )
    return Gop(
        number,
        times,
        times[-1] + 1 / rate,
        pictures,
        displacement,
        np.ones((steps, 2, 2), bool),
        np.zeros((steps, 16, 16, 3), np.int16),
        "native",
    )


@pytest.fixture
def plan(tmp_path):
    return plan_gops(gop_clip(tmp_path, frames=4, keyint=2))


@pytest.mark.parametrize("keys", [1, 2, 4])
def test_key_frames_and_p_frames_are_those_of_the_papers_table(plan, keys):
    """CoPE-VideoLM, Table 1: 1 + 7, 2 + 6, 4 + 4 of the 8 pictures of a GOP of 240 frames at s = 30."""
    clip = keyed_clip([made(0, 7, 0.0), made(1, 7, 8.0)], plan, 30, keys)
    assert len(clip.frames) == 2 * keys and sum(len(motion.vectors) for motion in clip.motion) == 2 * (8 - keys)
    assert clip.times[keys] == 8.0 and clip.motion[keys - 1].end == 8.0 and clip.motion[-1].end == 16.0
    place = 8 // keys - 1  # of the last step before the second key frame
    np.testing.assert_allclose(clip.motion[0].vectors[-1], place / 10, rtol=1e-6)


def test_anchors_are_spread_over_the_video_with_all_steps_between_them(plan):
    clip = anchored_clip([made(0, 4, 0.0), made(1, 4, 5.0)], plan, 30, anchors=4, pictures=True)
    assert clip.times == [0.0, 3.0, 6.0, 9.0]
    assert [motion.times.tolist() for motion in clip.motion] == [[1, 2, 3], [4, 6], [7, 8, 9], []]
    assert [motion.end for motion in clip.motion] == [3.0, 6.0, 9.0, 10.0]
    assert clip.motion[0].pictures.shape == (3, 16, 16, 3)
    few = anchored_clip([made(0, 1, 0.0)], plan, 30, anchors=8)
    assert len(few.frames) == 2 and "2 pictures for 8 anchors" in few.notes[-1]
    capped = anchored_clip([made(0, 9, 0.0)], plan, 30, anchors=2, steps=3)
    assert capped.motion[0].times.tolist() == [1, 5, 9]
