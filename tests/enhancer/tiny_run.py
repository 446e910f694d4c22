"""Small clips, small random models and a small recipe, so that a test runs the whole job in seconds."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

from tests.vdm_priors.tiny_teacher import build_tiny_teacher
from tests.video.clips import write
from tests.vlm_hooks.tiny_student import tiny_folder

QUESTIONS = ["Which way does the red square move?", "Where does the square go at the end?"]


@cache
def teacher_folder() -> Path:
    return build_tiny_teacher(Path(mkdtemp(prefix="tiny-teacher-")))


@cache
def student_folder() -> Path:
    return Path(tiny_folder())


def write_video(path: Path, frames: int = 9, size: tuple[int, int] = (32, 32), seed: int = 0, fps: int = 8) -> Path:
    """A square that moves over noise, as an H.264 file."""
    background = np.random.default_rng(seed).integers(0, 120, (*size, 3), np.uint8)
    pictures = np.repeat(background[None], frames, axis=0)
    for n, image in enumerate(pictures):
        x = (n * 2 + 3 * seed) % (size[1] - 8)
        image[8:16, x:x + 8] = (220, 30, 30)
    return write(path, pictures, options={"threads": "1", "preset": "ultrafast"}, rate=fps)


def write_data(root: Path, train: int = 4, test: int = 3) -> Path:
    """A data folder of conversations: <root>/train.json and test.json."""
    (root / "videos").mkdir(parents=True)
    for split, count in (("train", train), ("test", test)):
        rows = []
        for n in range(count):
            name = f"videos/{split}{n}.mp4"
            write_video(root / name, seed=n + 10 * (split == "test"))
            answer = ["left", "right"][n % 2]
            rows.append({"id": f"{split}{n}", "video": name, "options": ["left", "right", "up"], "question_type": ["MR", "LM"][n % 2],
                         "conversations": [{"from": "human", "value": f"<video>\n{QUESTIONS[n % 2]}"},
                                           {"from": "gpt", "value": answer}]})
        (root / f"{split}.json").write_text(json.dumps(rows))
    return root


def recipe_values(folder: Path, **changes) -> dict:
    """Plain values of a small recipe that writes to `folder`/runs/tiny."""
    values = {
        "name": "tiny", "output": str(folder / "runs"), "data": {"root": str(folder / "data")},
        "teacher": {"model": str(teacher_folder()), "sampling": {"frames": 9}, "batch_size": 2,
                    "extraction": {"steps": 2, "reconstruction": False}},
        "student": {"model": str(student_folder()), "sampling": {"frames": 4}},
        "training": {"steps": 2, "batch_size": 2, "learning_rate_llm": 1e-3, "learning_rate_merger": 1e-3,
                     "learning_rate_vision": 2e-4},
        "arms": [{"name": "lambda0"}, {"name": "vdm", "source": "vdm"}, {"name": "shuffled", "source": "shuffled"}],
        "evaluate": {"batch_size": 8}, "examples": 1,
    }
    return {**values, **changes}
