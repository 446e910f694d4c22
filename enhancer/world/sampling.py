"""Draws scenes: the question's answer first, uniformly, then a scene in which it is true.

So answers are balanced by construction, and the named thing is one of several that move in their own ways: neither the
question's text nor one frame tells the answer (enhancer/world/baselines.py measures both).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from enhancer.world.render import TEST_BACKGROUNDS, TRAIN_BACKGROUNDS, VALIDATION_BACKGROUNDS
from enhancer.world.scene import CAMERAS, COLOURS, DIRECTIONS, MOTIONS, SHAPES, Camera, Motion, Scene, Thing, place_motion
from enhancer.world.text import Question, motion_question

BACKGROUNDS = {"train": TRAIN_BACKGROUNDS, "validation": VALIDATION_BACKGROUNDS, "test": TEST_BACKGROUNDS}
SPLITS = ("train", "validation", "test")
REACH = (0.18, 0.26)  # of the frame: 12 to 17 pixels of 64; longer paths would let the first place tell the direction


def looks(split: str, all_pairs: bool = False) -> list[tuple[str, str]]:
    """Colour-shape pairs of a split: no pair is in two; train and test have every colour and every shape.

    all_pairs: every pair, whatever the split.
    """
    numbered = [(i, j, (c, s)) for i, c in enumerate(COLOURS) for j, s in enumerate(SHAPES)]
    if all_pairs:
        return [pair for _, _, pair in numbered]
    test = [pair for i, j, pair in numbered if (i + j) % 4 == 0]
    validation = [pair for i, j, pair in numbered if (i + j) % 4 == 1 and i % 2 == 0]
    train = [pair for _, _, pair in numbered if pair not in test and pair not in validation]
    return {"train": train, "validation": validation, "test": test}[split]


def _texture(rng: np.random.Generator, split: str) -> int:
    """Surface seeds of the splits are disjoint."""
    return int(rng.integers(0, 40)) + 1000 * SPLITS.index(split)


def random_motion(rng: np.random.Generator, kind: str, **fixed) -> Motion:
    """A motion of a kind with everything not fixed drawn uniformly."""
    reach = float(rng.uniform(*REACH))
    directions = list(DIRECTIONS)
    if kind == "turn":
        first = str(rng.choice(directions))
        across = [d for d in directions if abs(DIRECTIONS[d][0]) != abs(DIRECTIONS[first][0])]
        drawn = {"directions": (first, str(rng.choice(across))), "reach": reach}
    elif kind in ("slide", "stop", "bounce", "curve"):
        drawn = {"directions": (str(rng.choice(directions)),), "reach": reach}
    elif kind == "jump":
        drawn = {"count": int(rng.integers(1, 5)), "reach": 0.7 * reach}
    else:
        drawn = {}
    if kind in ("curve", "spin"):
        drawn["clockwise"] = bool(rng.random() < 0.5)
    return Motion(kind=kind, **{**drawn, **fixed})


def _things(rng: np.random.Generator, split: str, motions: list[Motion], all_pairs: bool) -> tuple[Thing, ...]:
    """Things with these motions: different colours and shapes, apart from each other at the start where possible."""
    pairs = looks(split, all_pairs)
    for _ in range(200):
        picks = [pairs[i] for i in rng.permutation(len(pairs))[: len(motions)]]
        if len({c for c, _ in picks}) == len(picks):
            break
    best: tuple[float, tuple[Thing, ...]] | None = None
    for _ in range(12):
        things = tuple(
            Thing(colour, shape, place_motion(rng, motion), float(rng.uniform(0.11, 0.14)), _texture(rng, split), motion)
            for (colour, shape), motion in zip(picks, motions, strict=True)
        )
        apart = min((np.hypot(*(np.subtract(a.pose(t)[:2], b.pose(t)[:2]))) for t in (0.0, 0.5, 1.0)
                     for i, a in enumerate(things) for b in things[:i]), default=1.0)
        if best is None or apart > best[0]:
            best = (apart, things)
        if apart > 0.24:
            break
    return best[1]


def draw_scene(rng: np.random.Generator, kind: str, split: str, *, size: tuple[int, int] = (64, 64), frames: int = 17,
               fps: float = 8.0, things: tuple[int, int] = (2, 3), all_pairs: bool = False) -> tuple[Scene, Question]:
    """A scene and its question of one MotionBench type. size: (height, width); things: least and most; see `looks`."""
    count = int(rng.integers(things[0], things[1] + 1))
    camera = Camera()
    direction = str(rng.choice(list(DIRECTIONS)))
    others = lambda n, kinds: [random_motion(rng, str(rng.choice(kinds))) for _ in range(n)]  # noqa: E731
    if kind == "MR":
        kinds = [k for k in MOTIONS if k != "turn"]
        motions = [random_motion(rng, str(rng.choice(kinds))), *others(count - 1, kinds)]
    elif kind == "LM":
        motions = [random_motion(rng, "slide", directions=(direction,)), *others(count - 1, ["slide", "slide", "rest"])]
    elif kind == "MO":
        count = max(count, 3)
        ways = [direction, *rng.permutation([d for d in DIRECTIONS if d != direction])[: count - 1]]
        # shorter ways: three places together tell more than one
        motions = [random_motion(rng, "slide", directions=(str(way),), reach=float(rng.uniform(0.14, 0.18))) for way in ways]
    elif kind == "AO":
        motions = [random_motion(rng, "turn"), *others(count - 1, ["turn", "slide"])]
        motions[0] = replace(motions[0], reach=min(motions[0].reach, 0.2))
    elif kind == "RC":
        motions = [random_motion(rng, "jump"), *others(count - 1, ["jump", "rest"])]
    else:
        motions = others(count, ["rest"])
        camera = Camera(str(rng.choice([c for c in CAMERAS if c != "still"])), float(rng.uniform(0.25, 0.4)))
    scene_things = _things(rng, split, motions, all_pairs)
    if kind == "MR":
        scene_things = tuple(replace(thing, tilt=float(rng.uniform(-math.pi, math.pi))) for thing in scene_things)
    if count > 1 and (kind == "MR" or motions[0].kind == "bounce"):
        scene_things = _with_neighbour(rng, scene_things)
    order = rng.permutation(count)  # the named thing is not always the one drawn first (lowest)
    scene = Scene(tuple(scene_things[i] for i in order), camera, str(rng.choice(BACKGROUNDS[split])),
                  int(rng.integers(2**31)), size[0], size[1], frames, fps)
    target = int(np.flatnonzero(order == 0)[0])
    return scene, motion_question(rng, kind, scene, target)


def _with_neighbour(rng: np.random.Generator, things: tuple[Thing, ...]) -> tuple[Thing, ...]:
    """Put the second thing, at rest, beside the place where the first one is in the middle of the clip.

    A bounce has it in its way: the contact is seen, not only implied. Other motions have one that they do not touch, so
    that the neighbour alone does not tell a bounce.
    """
    first, second = things[0], things[1]
    if first.motion.kind == "bounce":
        side = DIRECTIONS[first.motion.directions[0]]
    elif first.motion.directions:
        dx, dy = DIRECTIONS[first.motion.directions[0]]
        sign = float(rng.choice([-1.0, 1.0]))
        side = (dy * sign, dx * sign)
    else:
        side = DIRECTIONS[str(rng.choice(list(DIRECTIONS)))]
    x, y, _ = first.pose(0.5)
    gap = 0.85 * (first.size + second.size)
    at = (min(max(x + side[0] * gap, 0.0), 1.0), min(max(y + side[1] * gap, 0.0), 1.0))
    return (first, replace(second, origin=at, motion=Motion()), *things[2:])
