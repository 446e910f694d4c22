"""One example of the run folder as the page shows it: words, maps over frames, reconstruction strips.

Legend: N sampled frames, W words, F H W token grid (frames, rows, columns).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import safe_open

from enhancer.report import pictures
from enhancer.report.claims import number
from enhancer.report.run_folder import Missing, label
from vdm_priors.grid import TokenGrid


@dataclass
class Example:
    """One file of examples/: its header and tensors."""

    name: str
    meta: dict
    tensors: dict[str, np.ndarray]


@dataclass(frozen=True)
class MapRow:
    """One source's maps: density [F, H, W] per word (None: no attention) and their grid."""

    name: str
    maps: list[np.ndarray | None]
    grid: TokenGrid


@dataclass
class Drawn:
    """What the template needs of one example; `text` is (piece, word score or None)."""

    title: str
    question: str
    answer: str
    video: str
    times: list[float]
    tile: tuple[int, int]
    frame_count: int
    frames: str = ""
    text: list[tuple[str, dict | None]] = field(default_factory=list)
    scores: list[dict] = field(default_factory=list)
    panels: list[dict] = field(default_factory=list)
    strips: list[dict] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def read_examples(paths: list[Path], missing: list[Missing]) -> list[Example]:
    """The examples that can be read; the others are named in `missing`."""
    examples = []
    for path in paths:
        try:
            with safe_open(str(path), framework="numpy") as file:
                meta = json.loads((file.metadata() or {})["meta"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except Exception as error:  # safetensors raises its own kinds for a truncated file
            reason = (
                "no readable 'meta' in its header" if isinstance(error, KeyError | ValueError) else str(error)
            )
            missing.append(Missing("examples", f"examples/{path.name} cannot be read ({reason})."))
            continue
        if "frames" not in tensors:
            missing.append(Missing("examples", f"examples/{path.name} holds no frames."))
            continue
        examples.append(Example(path.name, meta, tensors))
    return examples


def map_rows(example: Example, arms: list[str], problems: list[str]) -> list[MapRow]:
    """Ground truth, priors, then the students: base first, the others in the order of `arms`."""
    tensors = example.tensors
    priors = [name for name in tensors if name.startswith("prior/")]
    students = [name.removeprefix("attention/") for name in tensors if name.startswith("attention/")]
    order = ["base", *arms]
    students.sort(key=lambda arm: (order.index(arm) if arm in order else len(order), arm))
    for what, found in (("prior", priors), ("attention", students)):
        if not found:
            problems.append(f"no {what} maps")
    if "truth" not in tensors:
        problems.append("no ground truth")
    if students and "base" not in students:
        problems.append("no attention of the base model (before)")
    rows = []
    names = [("truth", "ground truth")] if "truth" in tensors else []
    names += [(name, f"prior: {name.removeprefix('prior/')}") for name in priors]
    names += [
        (f"attention/{arm}", f"{'before' if arm == 'base' else 'after'}: {label(arm)}") for arm in students
    ]
    for name, shown in names:
        grid = _grid(example, name)
        if grid is None:
            problems.append(f"{shown}: no grid fits its shape {list(tensors[name].shape)}")
        else:
            rows.append(MapRow(shown, [pictures.density(m, grid) for m in tensors[name]], grid))
    return rows


def draw(example: Example, rows: list[MapRow], top: float, problems: list[str]) -> Drawn:
    """The example as strings and data: URIs; `top` is the upper end of the shared colour scale."""
    meta, frames = example.meta, example.tensors["frames"]
    tile = pictures.tile_size(*frames.shape[1:3])
    times = [number(time) or 0.0 for time in meta.get("times", [])][: len(frames)]
    if len(times) < len(frames):
        problems.append("the frames' times are incomplete, so maps are drawn only where a time is known")
    provenance = meta.get("prior_provenance") or {}
    drawn = Drawn(
        title=str(meta.get("sample_id", example.name)),
        question=str(meta.get("question", "")),
        answer=str(meta.get("answer", "")),
        video=str(meta.get("video", "")),
        times=times,
        tile=tile,
        frame_count=len(frames),
        frames=pictures.picture_uri(pictures.frame_strip(frames, tile)),
        missing=problems,
    )
    drawn.scores = [score for score in provenance.get("word_scores") or [] if isinstance(score, dict)]
    drawn.text = coloured_text(meta, drawn.scores)
    if not drawn.scores:
        problems.append("no motion scores of its words")
    drawn.panels = _panels(meta, rows, drawn, top)
    drawn.strips = _strips(example, tile, problems)
    drawn.facts = _facts(meta, provenance)
    return drawn


def coloured_text(meta: dict, scores: list[dict]) -> list[tuple[str, dict | None]]:
    """The text in pieces, each with its word's score; the words alone where no text fits their spans."""
    question, answer = str(meta.get("question", "")), str(meta.get("answer", ""))
    highest = max((number(score.get("score")) or 0.0 for score in scores), default=0.0) or 1.0
    for score in scores:
        shade = pictures.score_shade((number(score.get("score")) or 0.0) / highest)
        score["background"], score["colour"] = shade
    for text in (str(meta.get("text", "")), question, f"{question} {answer}", f"{question}\n{answer}"):
        if all(text[_at(score, "start") : _at(score, "end")] == score.get("text") for score in scores):
            break
    else:
        return [piece for score in scores for piece in ((str(score.get("text", "")), score), (" ", None))]
    text = text or question
    pieces, done = [], 0
    for score in sorted(scores, key=lambda score: _at(score, "start")):
        start, end = _at(score, "start"), _at(score, "end")
        if start >= done:
            pieces += [(text[done:start], None), (text[start:end], score)]
            done = end
    return [*((piece, score) for piece, score in pieces if piece), (text[done:], None)]


def _panels(meta: dict, rows: list[MapRow], drawn: Drawn, top: float) -> list[dict]:
    """One panel per word, every source's map over the frames; the highest score is open."""
    words = [word if isinstance(word, dict) else {"text": word} for word in meta.get("words") or []]
    count = max((len(row.maps) for row in rows), default=0)
    panels = []
    for index in range(count):
        word = words[index] if index < len(words) else {"text": f"word {index}"}
        score = _score_of(word, drawn.scores)
        lines = []
        for row in rows:
            values = row.maps[index] if index < len(row.maps) else None
            if values is None:
                lines.append({"name": row.name, "heat": None})
                continue
            heat = pictures.on_frames(values, row.grid, drawn.times, drawn.tile)
            lines.append(
                {
                    "name": row.name,
                    "heat": pictures.heat_uri(heat, top) if len(heat) else None,
                    "grid": "×".join(map(str, row.grid.shape)),
                    "peak": f"{np.nanmax(values):.1f}×",
                }
            )
        panels.append({"word": str(word.get("text", "")), "score": score, "rows": lines, "open": False})
    if panels:
        best = max(panels, key=lambda panel: number((panel["score"] or {}).get("score")) or 0.0)
        best["open"] = True
    return panels


def _strips(example: Example, tile: tuple[int, int], problems: list[str]) -> list[dict]:
    tensors, strips = example.tensors, []
    frames = tensors["frames"]
    if "inverted" in tensors:
        latents = tensors["inverted"]
        note = f"{len(latents)} latent frames, mean {latents.mean():+.2f}, deviation {latents.std():.2f}"
        strips.append(
            {
                "name": "inverted to noise",
                "note": note,
                "count": len(latents),
                "cells": True,
                "uri": pictures.picture_uri(pictures.latent_strip(latents, tile), exact=True),
            }
        )
    else:
        problems.append("no inverted latents")
    if "reconstruction" in tensors:
        copy = tensors["reconstruction"]
        strips.append(
            {
                "name": "reconstruction",
                "note": "",
                "count": len(copy),
                "cells": False,
                "uri": pictures.picture_uri(pictures.frame_strip(copy, tile)),
            }
        )
        if copy.shape == frames.shape:
            strips.append(
                {
                    "name": "difference × 4",
                    "note": "",
                    "count": len(copy),
                    "cells": False,
                    "uri": pictures.picture_uri(pictures.difference_strip(frames, copy, tile)),
                }
            )
        else:
            problems.append("no difference strip: the reconstruction has another shape than the frames")
    else:
        problems.append("no reconstruction")
    return strips


def _facts(meta: dict, provenance: dict) -> list[str]:
    facts, reconstruction = [], provenance.get("reconstruction") or {}
    psnr = meta.get("psnr_db", reconstruction.get("psnr_db"))
    error = meta.get("latent_relative_l2", reconstruction.get("latent_relative_l2"))
    if number(psnr) is not None:
        facts.append(f"PSNR {psnr:.1f} dB")
    if number(error) is not None:
        facts.append(f"relative L2 error of the latents {error:.3f}")
    if provenance.get("not_covered"):
        facts.append("beyond the teacher's text limit: " + ", ".join(map(str, provenance["not_covered"])))
    return facts


def _grid(example: Example, name: str) -> TokenGrid | None:
    """The grid named after the tensor or its group that fits its shape; the truth may lie on either."""
    grids = example.meta.get("grids") or {}
    for key in (name, name.split("/")[0], "prior", "attention"):
        if key not in grids or (key in ("prior", "attention") and name.split("/")[0] not in (key, "truth")):
            continue
        try:
            grid = TokenGrid.from_dict(grids[key])
        except (KeyError, TypeError, ValueError):
            continue
        if example.tensors[name].ndim == 4 and tuple(example.tensors[name].shape[1:]) == grid.shape:
            return grid
    return None


def _score_of(word: dict, scores: list[dict]) -> dict | None:
    same = [score for score in scores if score.get("text") == word.get("text")]
    if "start" in word:
        same = [score for score in same if score.get("start") == word["start"]]
    return next((score for score in same if score.get("selected")), same[0] if same else None)


def _at(score: dict, name: str) -> int:
    return int(number(score.get(name)) or 0)
