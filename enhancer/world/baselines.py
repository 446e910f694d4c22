"""How far the world's questions can be answered without watching: from the text alone, or from one frame.

Both baselines are given more than any model could see: the exact question, the exact position and rotation of every
thing in one frame. A small network learns to score the options from that. `enhancer world baselines` prints the table.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from enhancer.evaluation.scores import summarise
from enhancer.world.make import WorldSettings, clip_record
from enhancer.world.scene import CAMERAS, COLOURS, DIRECTIONS, Scene
from enhancer.world.text import MR_VERBS, NUMBERS, TYPES, Question

ANSWERS = tuple(dict.fromkeys([*MR_VERBS, *DIRECTIONS, *CAMERAS, *COLOURS, *NUMBERS]))
MOST = 4  # options of a question at the most
TEXT_WIDTH = len(ANSWERS) + len(TYPES) + len(DIRECTIONS) + 2
FRAME_WIDTH = 10


def option_features(question: Question, scene: Scene, frame: int | None) -> np.ndarray:
    """One row per option, padded to MOST rows: what text (and one frame, if given) say, float32 [MOST, width]."""
    rows = np.zeros((MOST, TEXT_WIDTH + FRAME_WIDTH), dtype=np.float32)
    words = question.text.rstrip("?").split()
    named = next((thing for thing in scene.things if thing.name in question.text), None)
    for n, option in enumerate(question.options):
        row = rows[n]
        row[ANSWERS.index(option)] = 1.0
        row[len(ANSWERS) + TYPES.index(question.type)] = 1.0
        for d, direction in enumerate(DIRECTIONS):
            row[len(ANSWERS) + len(TYPES) + d] = direction in words
        row[TEXT_WIDTH - 2], row[TEXT_WIDTH - 1] = "first" in words, "last" in words
        if frame is None:
            continue
        thing = named or next((t for t in scene.things if t.colour == option), None)
        if thing is not None:
            x, y, angle = thing.pose(scene.time(frame))
            zoom, dx, dy = scene.camera.view(scene.time(frame))
            others = [t.pose(scene.time(frame)) for t in scene.things if t is not thing]
            near = min(others, key=lambda p: math.hypot(p[0] - x, p[1] - y), default=(x, y, 0.0))
            row[TEXT_WIDTH:] = [x * zoom + dx - 0.5, y * zoom + dy - 0.5, math.sin(angle), math.cos(angle), near[0] - x,
                                near[1] - y, thing.size, len(others), (x - 0.5) ** 2, (y - 0.5) ** 2]
        else:  # the camera: all a frame shows is where things are
            spread = [t.pose(scene.time(frame))[:2] for t in scene.things]
            row[TEXT_WIDTH : TEXT_WIDTH + 2] = np.mean(spread, axis=0) - 0.5
    return rows


def _draw(settings: WorldSettings, split: str, count: int, frame: int | None):
    features, present, answers, questions = [], [], [], []
    for index in range(count):
        record, question, _ = clip_record(settings, split, index, TYPES[index % len(TYPES)])
        features.append(option_features(question, Scene.from_dict(record["scene"]), frame))
        present.append([n < len(question.options) for n in range(MOST)])
        answers.append(question.options.index(question.answer))
        questions.append(question)
    return torch.tensor(np.stack(features)), torch.tensor(present), torch.tensor(answers), questions


def baseline(settings: WorldSettings, frame: int | None, train: int = 6000, test: int = 1800, steps: int = 1200) -> dict:
    """Scores (as `summarise` gives them) of the best guess from the text alone (frame None) or with one frame's truth."""
    torch.manual_seed(settings.seed)
    settings = replace(settings, seed=settings.seed + 1000)
    x, present, answer, _ = _draw(settings, "train", train, frame)
    network = nn.Sequential(nn.Linear(x.shape[-1], 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        pick = torch.randint(0, len(x), (256,))
        scores = network(x[pick]).squeeze(-1).masked_fill(~present[pick], float("-inf"))
        loss = nn.functional.cross_entropy(scores, answer[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x, present, answer, questions = _draw(settings, "test", test, frame)
    with torch.no_grad():
        chosen = network(x).squeeze(-1).masked_fill(~present, float("-inf")).argmax(-1)
    return summarise([
        {"id": str(n), "question_type": q.type, "options": list(q.options), "answer": q.answer, "chosen": q.options[int(c)],
         "correct": bool(c == a)} for n, (q, c, a) in enumerate(zip(questions, chosen, answer, strict=True))])


def chance(settings: WorldSettings, count: int = 600) -> dict[str, float]:
    """Mean of 1 / number of options, per type."""
    found: dict[str, list[float]] = {}
    for index in range(count):
        _, question, _ = clip_record(settings, "test", index, TYPES[index % len(TYPES)])
        found.setdefault(question.type, []).append(1 / len(question.options))
    return {kind: float(np.mean(values)) for kind, values in found.items()}


def baseline_table(settings: WorldSettings | None = None, progress=None, **sizes) -> dict[str, dict]:
    """Rows chance, text alone, first / middle / last frame; the values are accuracies per type."""
    settings = settings or WorldSettings()
    rows = {"chance": chance(settings)}
    frames = {"text alone": None, "first frame": 0, "middle frame": settings.frames // 2, "last frame": settings.frames - 1}
    for done, (name, frame) in enumerate(frames.items()):
        if progress:
            progress(done, len(frames), name)
        scores = baseline(settings, frame, **sizes)
        rows[name] = {kind: entry["accuracy"] for kind, entry in scores["types"].items()}
    return rows
