"""A synthetic run folder, for the report's tests and for looking at the page.

    python tests/enhancer/fake_run.py /tmp/fake_run      # writes the folder and its report.html

Shapes: N sampled frames, W words, F H W token grid (frames, rows, columns).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from vdm_priors.grid import TokenGrid

TYPES = ["MR", "LM", "CM", "MO", "AO", "RC"]
QUESTION = "Where does the red disc move after it hits the grey wall?"
HOSTILE = '<script>alert("x")</script><img src=http://evil.example/a.png onerror=alert(1)>'
ACCURACY = {"base": 0.31, "lambda0": 0.36, "vdm": 0.47, "shuffled": 0.40, "uniform": 0.29, "oracle": 0.58}
FRAMES = 8


def write_fake_run(
    folder: Path,
    *,
    seeds: int = 3,
    examples: int = 2,
    hostile: bool = False,
    effect: float = 1.0,
    size: tuple[int, int] = (64, 64),
) -> Path:
    """A whole run folder of the contract; effect scales every arm's distance to λ=0."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    accuracy = {arm: 0.36 + effect * (value - 0.36) for arm, value in ACCURACY.items()}
    seed_list = list(range(seeds))
    (folder / "recipe.yaml").write_text(_recipe(hostile), encoding="utf-8")
    _json(folder / "run.json", _run_info(folder, seeds, hostile))
    _json_lines(
        folder / "skipped.jsonl",
        [
            {"stage": "data", "id": "clip-0017", "reason": "the video has no video stream (audio only)"},
            {
                "stage": "extract",
                "id": HOSTILE if hostile else "clip-0203",
                "reason": "one frame only; motion needs two",
            },
            {"stage": "train", "id": "clip-0417", "reason": "no prior: 4 of 7 words unmatched (limit 0.5)"},
        ],
    )
    _scores(folder / "base", accuracy["base"], rng)
    for arm, value in accuracy.items():
        if arm == "base":
            continue
        for seed in seed_list:
            place = folder / "arms" / arm / f"seed{seed}"
            _scores(place, value + rng.normal(0, 0.012), rng)
            _json_lines(place / "history.jsonl", _history(arm, value, rng))
            source = None if arm == "lambda0" else arm
            _json(
                place / "train.json",
                {"seconds": 41.0 + seed, "prior_source": source, "lambda": float(arm != "lambda0"),
                 "export_max_difference": 3e-7},
            )
    _json(folder / "table.json", _table(accuracy, seed_list, rng))
    _json(
        folder / "priors.json",
        [
            {
                "sample_id": f"clip-{i:04d}",
                "key": f"{i:032x}",
                "source": "vdm",
                "question": QUESTION,
                "video": f"videos/{i:04d}.mp4",
            }
            for i in range(12)
        ],
    )
    for index in range(examples):
        write_example(folder / "examples" / f"{index}.safetensors", index, hostile=hostile, size=size)
    return folder


def write_example(
    path: Path, index: int = 0, *, hostile: bool = False, size: tuple[int, int] = (64, 64)
) -> None:
    """One examples/<n>.safetensors: a disc crosses the clip, attention follows it more or less."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(index)
    times = [round(0.25 * i, 3) for i in range(FRAMES)]
    frames, centres = _disc(size, index)
    noisy = np.clip(frames.astype(int) + rng.normal(0, 9, frames.shape), 0, 255).astype(np.uint8)
    step = times[1]
    student = TokenGrid.regular([(2 * i * step, 2 * (i + 1) * step) for i in range(4)], 8, 8)
    teacher = TokenGrid.regular([(0.0, step), (step, 5 * step), (5 * step, 8 * step)], 8, 8)
    words = _words(QUESTION)
    chosen = [word for word in words if word["selected"]]
    tensors = {
        "frames": torch.from_numpy(frames),
        "reconstruction": torch.from_numpy(noisy),
        "inverted": torch.from_numpy(rng.normal(0, 1, (3, 16, 8, 8)).astype(np.float32)),
        "truth": _maps(student, centres, times, len(chosen), sharpness=40.0, floor=0.0, rng=rng),
        "prior/vdm": 0.01 * _maps(teacher, centres, times, len(chosen), sharpness=10.0, floor=0.25, rng=rng),
    }
    sharpness = {"base": 0.5, "lambda0": 2.0, "vdm": 9.0, "shuffled": 3.0}
    for arm, value in sharpness.items():
        tensors[f"attention/{arm}"] = _maps(
            student, centres, times, len(chosen), sharpness=value, floor=0.4, rng=rng
        )
    tensors["attention/base"][-1] = 0.0  # a word that the student's prompt does not hold
    scores = rng.normal(0, 1, (3, 8))
    score = scores.sum(0)
    meta = {
        "sample_id": HOSTILE if hostile else f"clip-{index:04d}",
        "question": QUESTION,
        "answer": HOSTILE if hostile else "back to the left",
        "video": f"videos/{HOSTILE if hostile else index}.mp4",
        "times": times,
        "psnr_db": 27.4,
        "latent_relative_l2": 0.083,
        "words": [word["text"] for word in chosen],
        "grids": {"attention": student.to_dict(), "prior": teacher.to_dict()},
        "prior_provenance": {
            "source": "vdm",
            "model": "small/cogvideox",
            "seconds": times,
            "head_scores": {
                "dfc": scores[0].tolist(),
                "tcs": scores[1].tolist(),
                "dsr": scores[2].tolist(),
                "score": score.tolist(),
                "selected": (score >= np.median(score)).tolist(),
            },
            "word_scores": words,
            "reconstruction": {"psnr_db": 27.4, "latent_relative_l2": 0.083},
            "not_covered": [],
        },
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        str(path),
        metadata={"meta": json.dumps(meta)},
    )


def _words(text: str) -> list[dict]:
    words, start = [], 0
    for rank, piece in enumerate(text.rstrip("?").split(" ")):
        begin = text.index(piece, start)
        start = begin + len(piece)
        mean = {"red": 0.9, "disc": 1.0, "move": 0.8, "hits": 0.7, "wall": 0.6}.get(
            piece, 0.15 + 0.02 * rank
        ) / 192
        words.append(
            {
                "text": piece,
                "start": begin,
                "end": start,
                "mean": mean,
                "fluctuation": mean / 3,
                "score": mean * 4 / 3,
                "selected": mean * 192 >= 0.6,
            }
        )
    return words


def _disc(size: tuple[int, int], index: int) -> tuple[np.ndarray, list[tuple[float, float]]]:
    height, width = size
    rows, columns = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    frames, centres = np.zeros((FRAMES, height, width, 3), np.uint8), []
    for n in range(FRAMES):
        y, x = 0.35 + 0.04 * n, abs(0.85 - 0.2 * n) if index % 2 else 0.15 + 0.1 * n
        frames[n] = (70 + 60 * rows + 40 * columns)[..., None] * np.array([0.8, 1.0, 1.1])
        frames[n][columns > 0.92] = 150
        frames[n][((rows - y) ** 2 + (columns - x) ** 2) < 0.015] = (215, 60, 50)
        centres.append((y, x))
    return frames, centres


def _maps(
    grid: TokenGrid, centres: list, times: list, words: int, *, sharpness: float, floor: float, rng
) -> torch.Tensor:
    frames, rows, columns = grid.shape
    out = np.zeros((words, frames, rows, columns), np.float32)
    y, x = (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns
    for f, (start, end) in enumerate(np.asarray(grid.spans)):
        inside = [centres[n] for n, time in enumerate(times) if start <= time < end] or centres[-1:]
        for centre in inside:
            distance = (y[:, None] - centre[0]) ** 2 + (x[None] - centre[1]) ** 2
            out[:, f] += np.exp(-distance * sharpness * 4)
    out = out / out.max() + floor * rng.random(out.shape)
    return torch.from_numpy((out / out.sum((1, 2, 3), keepdims=True)).astype(np.float32))


def _scores(place: Path, accuracy: float, rng: np.random.Generator, n: int = 240) -> None:
    options = ["up", "down", "left", "right", "still"]
    answers = []
    for i in range(n):
        correct = bool(rng.random() < accuracy)
        answers.append(
            {
                "id": f"q{i}",
                "question_type": TYPES[i % 6],
                "options": options,
                "answer": "up",
                "chosen": "up" if correct else "left",
                "correct": correct,
                "scores": [0.0] * 5,
            }
        )
    _json_lines(place / "answers.jsonl", answers)
    types = {}
    for name in TYPES:
        rows = [row["correct"] for row in answers if row["question_type"] == name]
        types[name] = _interval(sum(rows), len(rows))
    correct = sum(row["correct"] for row in answers)
    average = sum(entry["accuracy"] for entry in types.values()) / len(types)
    _json(place / "scores.json", {"overall": _interval(correct, n), "average": average, "types": types})


def _interval(correct: int, n: int) -> dict:
    p, z = correct / n, 1.96
    centre, half = (
        (p + z * z / (2 * n)) / (1 + z * z / n),
        z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)),
    )
    return {"n": n, "correct": correct, "accuracy": p, "low": centre - half, "high": centre + half}


def _history(arm: str, accuracy: float, rng: np.random.Generator) -> list[dict]:
    rows = []
    for step in range(10, 401, 10):
        answer = 0.4 + (1.5 - accuracy) * math.exp(-step / 150) + rng.normal(0, 0.03)
        align = (
            None
            if arm == "lambda0"
            else 0.5 + 0.9 * math.exp(-step / (90 if arm != "shuffled" else 400)) + rng.normal(0, 0.02)
        )
        rows.append(
            {
                "step": step,
                "loss": answer + (align or 0.0),
                "ar_loss": answer,
                "alignment_loss": align,
                "words_matched": 0.97,
                "video_mass": 0.2 + step / 2000,
            }
        )
    return rows


def _table(accuracy: dict[str, float], seeds: list[int], rng: np.random.Generator) -> dict:
    rows = []
    for arm, value in accuracy.items():
        base = arm == "base"
        delta = value - accuracy["lambda0"]
        rows.append(
            {
                "arm": arm,
                "seeds": [] if base else seeds,
                "n": 240 if base else 240 * len(seeds),
                "types": {name: min(1.0, max(0.0, value + rng.normal(0, 0.05))) for name in TYPES},
                "overall": value,
                "low": value - 0.035,
                "high": value + 0.035,
                "average": value + 0.003,
                "delta_vs_lambda0": None
                if arm in ("base", "lambda0")
                else {"difference": delta, "low": delta - 0.038, "high": delta + 0.038},
            }
        )
    return {
        "columns": ["arm", "seeds", *TYPES, "overall", "low", "high", "average", "delta_vs_lambda0"],
        "rows": rows,
        "notes": ["Intervals: 95 %, Wilson for accuracies, bootstrap over questions for differences."],
    }


def _run_info(folder: Path, seeds: int, hostile: bool) -> dict:
    return {
        "name": HOSTILE if hostile else folder.name,
        "command": "enhancer run recipes/world/evidence.yaml",
        "started": "2025-11-21T10:02:11+00:00",
        "finished": "2025-11-21T10:55:40+00:00",
        "status": "finished",
        "versions": {"torch": "2.9.1", "diffusers": "0.35.2", "transformers": "5.0.0"},
        "hashes": {"teacher": "9f2c" * 8, "student": "01ab" * 8, "train.json": "77aa" * 8},
        "seed": 0,
        "machine": "2 cores, x86_64, 16 GB",
        "peak_memory_mb": 2911.0,
        "seconds": {"data": 12.1, "extract": 611.0, "train": 2210.4, "evaluate": 301.9, "report": 3.0},
    }


def _recipe(hostile: bool) -> str:
    note = HOSTILE if hostile else "none"
    teacher = "teacher:\n  model: small/cogvideox\n  steps: 5\n"
    return f"name: evidence\n{teacher}train:\n  steps: 400\nnote: {note}\n"


def _json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _json_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    import sys

    from enhancer.report import write_report

    print(write_report(write_fake_run(Path(sys.argv[1]))))
