"""What is said about a scene: captions, places, and multiple-choice questions of the six MotionBench types.

Every text knows which words speak of which thing (`Mention`): that is the ground truth of per-word evidence.
Answers are single words, so that options can be compared by the likelihood of one token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from enhancer.world.scene import CAMERAS, COLOURS, DIRECTIONS, SHAPES, Scene, Thing

VERBS = {"rest": "rests", "slide": "slides", "curve": "curves", "spin": "spins", "bounce": "bounces", "jump": "jumps",
         "turn": "turns", "stop": "stops"}
NUMBERS = ("one", "two", "three", "four")
TYPES = ("MR", "LM", "CM", "MO", "AO", "RC")
START, END = 1 / 16, 15 / 16  # the middle of the first and of the last of eight parts: what eight sampled frames show
CAMERA = -1  # a mention of the camera: its evidence is the whole frame


@dataclass(frozen=True)
class Mention:
    """Characters [start, end) of a text speak of thing number `thing`; `moving`: they speak of its motion."""

    start: int
    end: int
    thing: int
    moving: bool = False


@dataclass(frozen=True)
class Question:
    """A question with its options; `answer` is one of them. type: one of TYPES, or "static"."""

    type: str
    text: str
    options: tuple[str, ...]
    answer: str
    mentions: tuple[Mention, ...]


def _mentions(text: str, thing: int, nouns: tuple[str, ...], motion: tuple[str, ...]) -> tuple[Mention, ...]:
    found = []
    for words, moving in ((nouns, False), (motion, True)):
        for word in words:
            for match in re.finditer(rf"\b{re.escape(word)}\b", text):
                found.append(Mention(match.start(), match.end(), thing, moving))
    return tuple(sorted(found, key=lambda m: m.start))


def _shuffled(rng: np.random.Generator, options) -> tuple[str, ...]:
    return tuple(str(option) for option in rng.permutation(list(options)))


def motion_question(rng: np.random.Generator, kind: str, scene: Scene, target: int) -> Question:
    """The question of MotionBench type `kind` about thing `target` of a scene drawn for it (sampling.py)."""
    thing = scene.things[target]
    if kind == "MR":
        text = f"How does the {thing.name} move?"
        answer = VERBS[thing.motion.kind]
        others = [v for v in MR_VERBS if v != answer]
        options = _shuffled(rng, [answer, *rng.choice(others, 3, replace=False)])
        return Question(kind, text, options, answer, _mentions(text, target, (thing.colour, thing.shape), ("move",)))
    if kind == "LM":
        text = f"Which way does the {thing.name} move?"
        mentions = _mentions(text, target, (thing.colour, thing.shape), ("way", "move"))
        return Question(kind, text, _shuffled(rng, DIRECTIONS), thing.motion.directions[0], mentions)
    if kind == "CM":
        text = "Which way does the camera move?"
        others = [c for c in ("left", "right", "up", "down", "in", "out") if c != scene.camera.kind]
        options = _shuffled(rng, [scene.camera.kind, *rng.choice(others, 3, replace=False)])
        return Question(kind, text, options, scene.camera.kind, _mentions(text, CAMERA, ("camera",), ("way", "move")))
    if kind == "MO":
        direction = thing.motion.directions[0]
        text = f"Which colour moves {direction}?"
        options = _shuffled(rng, [t.colour for t in scene.things])
        return Question(kind, text, options, thing.colour, _mentions(text, target, ("colour",), ("moves", direction)))
    if kind == "AO":
        which = str(rng.choice(["first", "last"]))
        text = f"Which way does the {thing.name} move {which}?"
        first, last = thing.motion.directions
        mentions = _mentions(text, target, (thing.colour, thing.shape), ("way", "move", which))
        return Question(kind, text, _shuffled(rng, DIRECTIONS), first if which == "first" else last, mentions)
    if kind == "RC":
        text = f"How many times does the {thing.name} jump?"
        mentions = _mentions(text, target, (thing.colour, thing.shape), ("times", "jump"))
        return Question(kind, text, _shuffled(rng, NUMBERS), NUMBERS[thing.motion.count - 1], mentions)
    raise ValueError(f"unknown question type {kind!r}; known: {', '.join(TYPES)}")


MR_VERBS = tuple(VERBS[k] for k in ("rest", "slide", "curve", "spin", "bounce", "jump", "stop"))


def phrase(thing: Thing) -> str:
    """What a thing does, e.g. "slides left", "turns up then left", "jumps three times"."""
    motion, verb = thing.motion, VERBS[thing.motion.kind]
    if motion.kind == "jump":
        return f"{verb} {NUMBERS[motion.count - 1]} times"
    if motion.kind == "turn":
        return f"{verb} {motion.directions[0]} then {motion.directions[1]}"
    if motion.kind == "spin":
        return f"{verb} {'clockwise' if motion.clockwise else 'backwards'}"
    return f"{verb} {motion.directions[0]}" if motion.directions else verb


def caption(rng: np.random.Generator, scene: Scene) -> tuple[str, tuple[Mention, ...]]:
    """One clause a thing in random order, then the camera, with the mentions."""
    text, mentions = "", []
    for n in rng.permutation(len(scene.things)):
        thing = scene.things[n]
        clause = f"the {thing.name} {phrase(thing)}"
        start = len(text)
        moving = tuple(phrase(thing).split())
        for m in _mentions(clause, int(n), (thing.colour, thing.shape), moving):
            mentions.append(Mention(m.start + start, m.end + start, m.thing, m.moving))
        text += clause + ", "
    start = len(text)
    clause = "the camera " + ("is still" if scene.camera.kind == "still" else f"moves {scene.camera.kind}")
    for m in _mentions(clause, CAMERA, ("camera",), ("moves", scene.camera.kind)):
        mentions.append(Mention(m.start + start, m.end + start, m.thing, m.moving))
    return text + clause + ".", tuple(mentions)


def place(scene: Scene, thing: Thing, t: float) -> str:
    """Where a thing is seen at time t, as on a chess board: column a-h from the left, row 1-8 from the top ("c4")."""
    x, y, _ = thing.pose(t)
    zoom, dx, dy = scene.camera.view(t)
    seen = (0.5 + zoom * (x - 0.5) + dx, 0.5 + zoom * (y - 0.5) + dy)
    column, row = (min(max(int(v * 8), 0), 7) for v in seen)
    return f"{'abcdefgh'[column]}{row + 1}"


def places(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    """Dense static supervision: "Where are the red disc and the …?" and each one's first and last square.

    It teaches to see things and squares; no word says how anything moves.
    """
    order = [scene.things[n] for n in rng.permutation(len(scene.things))]
    question = "Where are " + " and ".join(f"the {thing.name}" for thing in order) + " at the start and at the end?"
    answer = ", ".join(f"{thing.name} {place(scene, thing, START)} then {place(scene, thing, END)}" for thing in order)
    return question, answer


def description(scene: Scene) -> tuple[str, str]:
    """As `places`, but nothing is named in the question: the answer names the things, in the order of COLOURS and SHAPES."""
    order = sorted(scene.things, key=lambda thing: (tuple(COLOURS).index(thing.colour), SHAPES.index(thing.shape)))
    answer = ", ".join(f"{thing.name} {place(scene, thing, START)} then {place(scene, thing, END)}" for thing in order)
    return "What is there, and where is it at the start and at the end?", answer


def static_question(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    """A question that one frame answers: colour, shape, number or first/last square."""
    thing = scene.things[int(rng.integers(len(scene.things)))]
    draw = int(rng.integers(4))
    if draw == 0 and sum(t.shape == thing.shape for t in scene.things) == 1:
        return f"What colour is the {thing.shape}?", thing.colour
    if draw == 1:
        return f"What shape is the {thing.colour} thing?", thing.shape
    if draw == 2:
        return "How many things are there?", NUMBERS[len(scene.things) - 1]
    end = str(rng.choice(["start", "end"]))
    return f"Where is the {thing.name} at the {end}?", place(scene, thing, START if end == "start" else END)


def vocabulary_text() -> list[str]:
    """Every answer word alone, as it stands after the prompt: a small tokenizer trained on this has it as one token."""
    words = [*COLOURS, *SHAPES, *DIRECTIONS, *VERBS.values(), *NUMBERS, *CAMERAS]
    return [word for word in words for _ in range(50)]
