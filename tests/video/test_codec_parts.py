"""The parts of the codec reader by plain loops: interpolation, headers, cells, upright turns; and references on the
world."""

from __future__ import annotations

import sys
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enhancer.video.codec.blocks import FIRST, SECOND, Blocks, blocks_of
from enhancer.video.codec.cells import cells_of
from enhancer.video.codec.cuts import cuts_in_pictures
from enhancer.video.codec.field import Validity, turned_upright
from enhancer.video.codec.h264 import Headers
from enhancer.video.codec.references import Planes, Resolved, differences, matched
from enhancer.video.codec.streams import index_stream
from enhancer.video.codec.vectors import VECTOR, DecodedFrame
from tests.video.clips import panned, write

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))


def sample(luma, x, y):
    """One luma sample at a quarter position, as ITU-T H.264, 8.4.2.2.1 words it; x, y in quarters of a pixel."""
    height, width = luma.shape

    def whole(column, row):
        return int(luma[min(max(row, 0), height - 1), min(max(column, 0), width - 1)])

    def six(values):
        return values[0] - 5 * values[1] + 20 * values[2] + 20 * values[3] - 5 * values[4] + values[5]

    def clipped(value, shift):
        return min(max((value + (1 << shift - 1)) >> shift, 0), 255)

    def right(column, row):  # b
        return clipped(six([whole(column + k, row) for k in range(-2, 4)]), 5)

    def down(column, row):  # h
        return clipped(six([whole(column, row + k) for k in range(-2, 4)]), 5)

    def centre(column, row):  # j
        return clipped(six([six([whole(column + k, row + m) for k in range(-2, 4)]) for m in range(-2, 4)]), 10)

    c, r = x >> 2, y >> 2
    table = {
        (0, 0): [whole(c, r)],
        (2, 0): [right(c, r)],
        (0, 2): [down(c, r)],
        (2, 2): [centre(c, r)],
        (1, 0): [whole(c, r), right(c, r)],
        (3, 0): [right(c, r), whole(c + 1, r)],
        (0, 1): [whole(c, r), down(c, r)],
        (0, 3): [down(c, r), whole(c, r + 1)],
        (1, 1): [right(c, r), down(c, r)],
        (3, 1): [right(c, r), down(c + 1, r)],
        (1, 3): [down(c, r), right(c, r + 1)],
        (3, 3): [down(c + 1, r), right(c, r + 1)],
        (2, 1): [right(c, r), centre(c, r)],
        (2, 3): [centre(c, r), right(c, r + 1)],
        (1, 2): [down(c, r), centre(c, r)],
        (3, 2): [centre(c, r), down(c + 1, r)],
    }
    values = table[x & 3, y & 3]
    return values[0] if len(values) == 1 else values[0] + values[1] + 1 >> 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(-60, 60), st.integers(-60, 60))
def test_prediction_is_the_standards_by_plain_loops(seed, x, y):
    luma = np.random.default_rng(seed).integers(0, 256, (16, 24), dtype=np.uint8)
    found = Planes(luma, 16, 24).predict(np.array([[8, 0]]), np.array([[x / 4, y / 4]], np.float32), 4, 4)[0]
    assert found.tolist() == [
        [sample(luma, 4 * (8 + column) + x, 4 * row + y) for column in range(4)] for row in range(4)
    ]


def blocks(*rows):
    """Blocks of (column, row, wide, high, list, x, y)."""
    columns = np.array([row[:5] for row in rows], int).T
    return Blocks(*columns, np.array([row[5:] for row in rows], np.float32))


def test_the_right_picture_is_found_and_near_ties_go_to_the_nearest():
    rng = np.random.default_rng(0)
    far = rng.integers(0, 256, (32, 48), dtype=np.uint8)
    near = rng.integers(0, 256, (32, 48), dtype=np.uint8)
    now = np.roll(far, 3, axis=1)
    now[:, 24:] = 128
    far[:, 24:] = near[:, 24:] = 128
    candidates = {-1: Planes(near, 32, 48), -3: Planes(far, 32, 48), 2: Planes(far, 32, 48)}
    seen = blocks(
        (1, 1, 2, 2, FIRST, -3, 0), (4, 1, 2, 2, FIRST, -3, 0), (1, 1, 2, 2, SECOND, -3, 0), (0, 0, 1, 1, FIRST, 0, 0)
    )
    found = matched(seen, now, candidates)
    assert found.distance.tolist() == [-3, -1, 2, -1]
    assert found.confidence[0] > 0.9 and found.confidence[1] < 0.05 and found.confidence[2] == found.confidence[3] == 1
    assert differences(seen, np.array([0]), now, candidates[-3])[0] == 0


def test_a_list_that_a_partition_does_not_use_is_dropped():
    rng = np.random.default_rng(1)
    past, future = (rng.integers(0, 256, (32, 32), dtype=np.uint8) for _ in range(2))
    now = np.roll(past, 2, axis=0)
    candidates = {-1: Planes(past, 32, 32), 1: Planes(future, 32, 32)}
    found = matched(blocks((1, 1, 1, 1, FIRST, 0, -2), (1, 1, 1, 1, SECOND, 0, 0)), now, candidates)
    assert found.distance.tolist() == [-1, 0]
    whole = matched(blocks((0, 0, 2, 2, FIRST, 0, -2), (0, 0, 2, 2, SECOND, 0, 0)), now, candidates)
    assert whole.distance.tolist() == [-1, 1]  # a whole macroblock's lists are exported rightly


def test_cells_say_why_they_have_no_motion():
    seen = blocks(
        (0, 0, 2, 2, FIRST, 2, 0),
        (2, 0, 1, 1, FIRST, 40, 0),
        (3, 0, 1, 1, FIRST, 1, 1),
        (0, 2, 2, 2, FIRST, -2, 4),
        (0, 2, 2, 2, SECOND, 2, -4),
    )
    resolved = Resolved(
        np.array([-2, -1, 0, -1, 1]), np.array([1, 1, 0, 0.5, 0.5], np.float32), np.zeros(5, np.float32)
    )
    cells = cells_of(seen, resolved, 32, 32, lambda distance: distance * 0.1)
    expected = np.full((4, 4), Validity.INTRA)
    expected[:2, :2] = expected[2:, :2] = Validity.INTER
    expected[0, 2], expected[0, 3] = Validity.OUT_OF_FRAME, Validity.INVALID
    assert cells.validity.tolist() == expected.tolist()
    assert cells.displacement[0, 0].tolist() == [-1, 0] and cells.velocity[0, 0] == pytest.approx([-10, 0])
    assert cells.displacement[2, 0].tolist() == [2, -4] and cells.reference[:, 2, 0].tolist() == [-1, 1]
    assert np.isnan(cells.displacement[expected != Validity.INTER]).all()


def test_a_block_that_reaches_over_the_edge_counts_by_its_visible_part():
    seen, resolved = (
        blocks((0, 0, 2, 2, FIRST, 0, -1)),
        Resolved(np.array([-1]), np.ones(1, np.float32), np.zeros(1, np.float32)),
    )
    cells = cells_of(seen, resolved, 8, 32, lambda distance: distance * 0.1)
    assert (cells.validity[0, :2] == Validity.INTER).all() and cells.validity.shape == (1, 4)


def test_blocks_by_plain_loops():
    rng = np.random.default_rng(2)
    records = np.zeros(40, VECTOR)
    for n, (x, y) in enumerate((8 * c, 8 * r) for r in range(5) for c in range(8)):
        records[n]["source"], records[n]["w"], records[n]["h"] = rng.choice([-1, 1]), 8, 8
        records[n]["dst_x"], records[n]["dst_y"], records[n]["motion_scale"] = x + 4, y + 4, 4
        records[n]["motion_x"], records[n]["motion_y"] = rng.integers(-30, 30, 2)
    found = blocks_of(DecodedFrame(0, True, "P", False, False, False, 36, 60, 0, vectors=records))
    maps = [found.at_cells(side, (5, 8)) for side in (FIRST, SECOND)]
    for n, record in enumerate(records):
        side = FIRST if record["source"] < 0 else SECOND
        place = (record["dst_y"] - 4) // 8, (record["dst_x"] - 4) // 8
        assert maps[side][place] == n and maps[1 - side][place] == -1
        assert found.motion[n].tolist() == [record["motion_x"] / 4, record["motion_y"] / 4]


@pytest.mark.parametrize("quarters", range(4))
def test_turns_move_cells_and_vectors_together(quarters):
    """A point and its vector's end, turned as the picture is."""
    vectors = np.random.default_rng(3).normal(size=(3, 5, 2))
    found = turned_upright(vectors, quarters, vectors=True)
    places = turned_upright(np.arange(15).reshape(3, 5), quarters)
    turn = np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), quarters)  # of (x, y) with y down, to the left
    for row, column in np.ndindex(places.shape):
        assert found[row, column] == pytest.approx(turn @ vectors.reshape(15, 2)[places[row, column]])


@pytest.mark.parametrize("name", ["a.mp4", "a.ts"])
def test_headers_say_which_pictures_may_be_referred_to(tmp_path, name):
    options = {"preset": "medium", "bf": "3", "refs": "5", "b-pyramid": "normal"}
    video = write(tmp_path / name, panned(20, (1.5, 0)), options=options)
    with av.open(str(video)) as container:
        kinds = {frame.pts: "?IPB"[frame.pict_type] for frame in container.decode(video=0)}
    index = index_stream(video)
    assert index.most_references == 5
    for pts, referable in zip(index.pts.tolist(), index.referable.tolist(), strict=True):
        assert referable or kinds[pts] == "B"
    assert 0 < (~index.referable).sum() < 20


def test_damaged_headers_say_nothing():
    rng = np.random.default_rng(4)
    for length in (0, 1, 7, 30, 200):
        headers = Headers(bytes([1, 100, 0, 21, 255, 225]) + rng.bytes(length))
        assert headers.is_reference(rng.bytes(50)) in (True, False)
        assert headers.sequence is None or headers.sequence.max_references <= 16


def test_a_cut_stands_out_of_what_is_nearby():
    rng = np.random.default_rng(5)
    scenes = [np.full((18, 32), level, np.uint8) for level in [50] * 6 + [140] * 6]
    assert np.flatnonzero(cuts_in_pictures(scenes)).tolist() == [6]
    flicker = [rng.integers(0, 256, (18, 32), dtype=np.uint8) for _ in range(10)]
    assert not cuts_in_pictures(flicker).any() and not cuts_in_pictures([None, None]).any()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("preset", ["medium", "slower"])
def test_references_are_right_on_the_world(tmp_path, preset):
    """Textured moving cells' displacement is that of the ground truth over the vector's span, in 98 of 100."""
    from bench_codec_accuracy import Tally, Truth, backward_flows, encode, judge

    import cv2

    from enhancer.video.codec import read_motion
    from enhancer.video.codec.pictures import pictures_of
    from enhancer.world.render import render_clip
    from enhancer.world.sampling import draw_scene
    from enhancer.world.text import TYPES

    tally, near = Tally(), Tally()
    for n, kind in enumerate(TYPES):
        scene, _ = draw_scene(np.random.default_rng([7, n]), kind, "test", size=(192, 192))
        video, truth = tmp_path / f"{n}.mp4", Truth(scene)
        encode(video, render_clip(scene), scene.fps, "libx264", {"preset": preset})
        field = read_motion(video)
        greys = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for _, picture in pictures_of(field)]
        flows = backward_flows(greys)
        judge(field, truth, greys, flows, tally)
        judge(read_motion(video, references="assume"), truth, greys, flows, near)
    assert len(tally.right) > 2000 and np.mean(tally.right) >= 0.98
    assert np.mean(near.right) < 0.8  # the distance is what makes the difference
