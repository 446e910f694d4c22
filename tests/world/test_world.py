"""The embedded world: deterministic, balanced, and its ground truth agrees with what is drawn."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import combinations

import av
import cv2
import numpy as np
import pytest
import torch

from enhancer.world import WorldSettings, load_truth, make_world
from enhancer.world.baselines import baseline, option_features
from enhancer.world.make import clip_record, finished, type_schedule
from enhancer.world.render import render_clip, render_flow, render_frame, render_masks
from enhancer.world.sampling import SPLITS, draw_scene, looks, random_motion
from enhancer.video.clip import Sampling, read_clip
from enhancer.world.scene import COLOURS, MOTIONS, SHAPES, Camera, Motion, Scene, Thing
from enhancer.world.text import TYPES, place
from vdm_priors.errors import UserError
from vdm_priors.grid import TokenGrid, frame_spans
from vdm_priors.words import split_words

SMALL = WorldSettings(seed=3, train_clips=6, validation_clips=2, test_clips=6)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, SMALL)
    return folder


def test_clips_are_real_h264_of_the_asked_size(world):
    for row in json.loads((world / "train.json").read_text()):
        with av.open(str(world / row["video"])) as container:
            stream = container.streams.video[0]
            frames = list(container.decode(stream))
            assert stream.codec_context.name == "h264"
            assert (len(frames), frames[0].height, frames[0].width) == (17, 64, 64)
            assert float(stream.average_rate) == 8.0


def test_same_settings_give_the_same_bytes(world, tmp_path):
    make_world(tmp_path, SMALL, workers=2)
    for file in sorted(p.relative_to(world) for p in world.rglob("*") if p.is_file()):
        assert (tmp_path / file).read_bytes() == (world / file).read_bytes(), file


def test_another_world_in_the_folder_is_refused(world):
    assert finished(world, SMALL)
    with pytest.raises(UserError, match="other settings"):
        make_world(world, replace(SMALL, seed=4))


def test_an_interrupted_world_is_completed(world, tmp_path):
    def stop(done, total, text):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_world(tmp_path, SMALL, progress=stop)
    assert not finished(tmp_path, SMALL)
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "videos").glob("*.mp4")}
    make_world(tmp_path, SMALL)
    assert finished(tmp_path, SMALL)
    assert kept and all((tmp_path / "videos" / name).stat().st_mtime_ns == when for name, when in kept.items())


def test_splits_share_no_thing_texture_or_background():
    seen = {}
    for split in SPLITS:
        scenes = [draw_scene(np.random.default_rng([1, i]), TYPES[i % 6], split)[0] for i in range(60)]
        seen[split] = [{(t.colour, t.shape) for s in scenes for t in s.things}, {t.texture for s in scenes for t in s.things},
                       {s.background for s in scenes}]
    for one, other in combinations(SPLITS, 2):
        assert all(a.isdisjoint(b) for a, b in zip(seen[one], seen[other], strict=True)), (one, other)
    for split in ("train", "test"):  # but every colour and shape is known
        assert {c for c, _ in looks(split)} == set(COLOURS) and {s for _, s in looks(split)} == set(SHAPES)


@pytest.mark.parametrize("kind", TYPES)
def test_answers_and_their_positions_are_balanced(kind):
    questions = [clip_record(SMALL, "train", n, kind)[1] for n in range(240)]
    assert all(q.answer in q.options and len(set(q.options)) == len(q.options) for q in questions)
    for counts in (Counter(q.answer for q in questions), Counter(q.options.index(q.answer) for q in questions)):
        assert max(counts.values()) < 2.2 * min(counts.values()), counts


def test_the_schedule_has_exact_shares():
    settings = replace(SMALL, questions={"LM": 3.0, "RC": 1.0})
    assert Counter(type_schedule(settings, 100, np.random.default_rng(0))) == {"LM": 75, "RC": 25}
    with pytest.raises(UserError, match="unknown type XX"):
        type_schedule(replace(SMALL, questions={"XX": 1.0}), 4, np.random.default_rng(0))


def _scene(motion: Motion, camera: Camera = Camera(), size=(96, 128)) -> Scene:
    return Scene((Thing("red", "square", (0.4, 0.5), 0.12, 3, motion),), camera, "coffee", 5, size[0], size[1], 9, 8.0)


@pytest.mark.parametrize("scene", [
    _scene(Motion("slide", ("right",), 0.3)), _scene(Motion("spin")), _scene(Motion("curve", ("up",), 0.3)),
    _scene(Motion(), Camera("left", 0.3)), _scene(Motion(), Camera("in", 0.4)),
])
def test_flow_warps_each_frame_to_the_next(scene):
    for frame in (0, 4):
        now, then, flow = render_frame(scene, frame), render_frame(scene, frame + 1), render_flow(scene, frame)
        y, x = np.mgrid[0:scene.height, 0:scene.width].astype(np.float32)
        fetched = cv2.remap(then, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR).astype(float)
        inside = ((x + flow[..., 0]) > 1) & ((x + flow[..., 0]) < scene.width - 2) & ((y + flow[..., 1]) > 1) & (
            (y + flow[..., 1]) < scene.height - 2)
        error = np.abs(fetched - now)[inside].mean()
        assert error < 3.0 and error < 0.6 * max(np.abs(then.astype(float) - now)[inside].mean(), 5.0)


def test_masks_cover_the_drawn_thing_and_respect_order():
    below = Thing("green", "square", (0.5, 0.5), 0.2, 0)
    above = Thing("red", "disc", (0.5, 0.5), 0.1, 0)
    masks = render_masks(Scene((below, above), height=64, width=64), 0)
    assert masks[1].any() and not (masks[0] & masks[1]).any()
    frame = render_frame(Scene((below, above), height=64, width=64), 0).astype(int)
    assert (frame[masks[1]][:, 0] > frame[masks[1]][:, 1]).mean() > 0.95  # red above
    assert (frame[masks[0]][:, 1] > frame[masks[0]][:, 0]).mean() > 0.95  # green around it


def test_places_follow_the_camera():
    thing = Thing("red", "disc", (0.5, 0.5), 0.1, 0)
    assert place(Scene((thing,)), thing, 0.0) == "e5"
    assert place(Scene((thing,), Camera("left", 0.4)), thing, 1.0) == "f5"  # content goes right


def test_evidence_is_where_the_named_thing_is(world):
    truth = load_truth(world)
    grid = TokenGrid.regular(frame_spans([n / 4 for n in range(8)], 17 / 8), 8, 8)
    checked = 0
    for row in json.loads((world / "test.json").read_text()):
        text = row["conversations"][0]["value"].removeprefix("<video>\n")
        words = split_words(text)
        evidence = truth.evidence(row["video"], text, words, grid)
        assert evidence.shape == (len(words), 8, 8, 8)
        scene = truth.scene(row["video"])
        for word, mass in zip(words, evidence, strict=True):
            mentioned = [m for m in truth.mentions(row["video"], text) if m.start < word.end and word.start < m.end]
            assert float(mass.sum()) == pytest.approx(1.0 if mentioned else 0.0, abs=1e-4)
            if mentioned and mentioned[0].thing >= 0:
                mask = render_masks(scene, 4)[mentioned[0].thing].reshape(8, 8, 8, 8).any(axis=(1, 3))
                assert float(mass[2][torch.from_numpy(~mask)].sum()) < 0.05  # frame 4 is at 0.5 s, grid frame 2
                checked += 1
    assert checked >= 6
    with pytest.raises(UserError, match="no ground truth for the text"):
        truth.mentions(row["video"], "What is this?")
    with pytest.raises(UserError, match="oracle"):
        truth.scene("elsewhere.mp4")


def test_scene_survives_json():
    scene, _ = draw_scene(np.random.default_rng(0), "AO", "train")
    again = Scene.from_dict(json.loads(json.dumps(scene.to_dict())))
    assert again == scene
    np.testing.assert_array_equal(render_clip(again), render_clip(scene))


@pytest.mark.parametrize("frames", [8, 9])
@pytest.mark.parametrize(("kind", "count"), [(k, 1) for k in MOTIONS if k not in ("rest", "jump")] + [("jump", n) for n in (1, 2, 3, 4)])
def test_every_motion_shows_in_the_sampled_frames(world, kind, count, frames):
    """Also four hops, whose rhythm could meet that of the samples."""
    clip = read_clip(next((world / "videos").glob("*.mp4")), Sampling(frames=frames))
    motion = random_motion(np.random.default_rng(0), kind, **({"count": count} if kind == "jump" else {}))
    poses = np.array([motion.offset(min(t * 8 / 16, 1.0)) for t in clip.times])
    shown = np.ptp(poses, axis=0)
    assert shown[2] > 1.0 if kind == "spin" else shown[:2].max() > 0.5 * motion.reach
    if kind == "jump":  # each number of hops looks unlike the others
        others = [Motion("jump", reach=motion.reach, count=n) for n in (1, 2, 3, 4) if n != count]
        for other in others:
            heights = np.array([other.offset(min(t * 8 / 16, 1.0))[1] for t in clip.times])
            assert np.abs(heights - poses[:, 1]).max() > 0.4 * motion.reach


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(UserError, match="even number"):
        make_world(tmp_path, replace(SMALL, height=65))
    with pytest.raises(UserError, match="more than world.most_things"):
        make_world(tmp_path, replace(SMALL, least_things=3, most_things=2))


@pytest.fixture(scope="module")
def guesses():
    """Text-only and first-frame guessers at a size that finds a planted cue (below) and takes seconds."""
    return {frame: baseline(SMALL, frame, train=1800, test=1200, steps=300)["types"] for frame in (None, 0)}


@pytest.mark.parametrize("kind", TYPES)
def test_neither_text_nor_one_frame_tells_the_answer(guesses, kind):
    """200 questions a type: from the text no more than chance; from a frame's exact places little more (README has both)."""
    chance = 1 / 3 if kind == "MO" else 1 / 4
    assert guesses[None][kind]["low"] < chance < guesses[None][kind]["accuracy"] + 0.1
    assert guesses[0][kind]["accuracy"] < chance + (0.22 if kind == "MO" else 0.17)


def test_the_guesser_finds_a_planted_cue(monkeypatch):
    """If left-movers started left of the middle and right-movers right of it, the first frame would tell them apart."""

    def planted(rng, motion, margin=-0.04):
        x = {"left": 0.2, "right": 0.8}.get((motion.directions or ("",))[0], 0.5)
        return x, float(rng.uniform(0.4, 0.6))

    monkeypatch.setattr("enhancer.world.sampling.place_motion", planted)
    found = baseline(replace(SMALL, questions={"LM": 1.0}), 0, train=900, test=300, steps=200)
    assert found["types"]["LM"]["accuracy"] > 0.55


def test_baselines_see_only_what_they_may():
    record, question, _ = clip_record(SMALL, "train", 0, "LM")
    scene = Scene.from_dict(record["scene"])
    assert not option_features(question, scene, None)[:, -10:].any()
    assert option_features(question, scene, 4)[:, -10:].any()
