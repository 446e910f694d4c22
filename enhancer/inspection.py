"""Where every visual token of a student lies on a video's frames, and which tokens of teacher and student are which
word.

Of a codec adapter, whose frames' and motion tokens have different cells, each kind is drawn by itself.

`inspect_clip` asks the student exactly as training does; `write_page` draws the answer on one self-contained page.

Legend: N sampled frames, F×H×W visual tokens, W words of the text.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image

from enhancer.report import pictures
from vdm_priors.errors import UserError
from vdm_priors.grid import TokenGrid
from vdm_priors.words import Word, split_words, tokens_of_words
from vlm_hooks.adapters.student import AdaptedStudent
from vlm_hooks.capture import CaptureRequest, capture
from vlm_hooks.words import match_words

PICTURE = 480  # pixels of a frame's longer side on the page
FEW_COLUMNS = 5  # of cells; frames with more are drawn wider
FRAME_WIDTHS = (140, 440)  # pixels that a frame has at least on a page that is wide enough: with few columns, with more
NUMBER_WIDTH = 24  # pixels that a cell needs for its number
VIEW = 1000.0  # width of a drawing in its own units


@dataclass(frozen=True)
class WordTokens:
    """One word of the text with its tokens: the teacher's pieces, the student's (position in the sequence, piece)."""

    word: Word
    teacher: list[str]
    student: list[tuple[int, str]]

    @property
    def missing(self) -> str:
        """Which side has no token of the word, or ''."""
        sides = [name for name, tokens in (("teacher", self.teacher), ("student", self.student)) if not tokens]
        return " and ".join(sides)


@dataclass(frozen=True)
class Inspection:
    """One clip and text as a student sees them.

    positions [F·H·W] of the frames' tokens in a sequence of `length` tokens; motion: an adapter's runs of motion
    tokens, each its cells and its tokens' positions; attention: maps [W, F, H, W] of the words with student tokens
    (`attended`), averaged over layers, heads and the word's tokens, or None; on_motion [W]: the share of their
    attention that falls on motion tokens.
    """

    model: str
    family: str
    text: str
    video: Path
    clip: Any
    grid: TokenGrid
    positions: list[int]
    length: int
    words: list[WordTokens]
    attended: list[Word]
    attention: torch.Tensor | None
    on_motion: list[float]
    motion: list[tuple[TokenGrid, list[int]]]

    @property
    def motion_tokens(self) -> int:
        return sum(len(positions) for _, positions in self.motion)


def inspect_clip(
    student: Any,
    video: Path,
    clip: Any,
    text: str,
    teacher_tokens: Sequence[tuple[str, tuple[int, int]]],
    attention: bool = False,
) -> Inspection:
    """Ask `student` about a video's clip with `text` as the question. Raises SampleError as the student does.

    teacher_tokens: piece and characters of each of the teacher's tokens of the text (empty for special ones).
    attention: also run the model, and keep the words' attention over the visual tokens.
    """
    prompt = student.prompt(text)
    encoding = student.encode([clip], [prompt.text])
    (grid,), (columns,) = student.grids(encoding.inputs, [clip])
    runs = student.segments(encoding.inputs, [clip])[0] if isinstance(student, AdaptedStudent) else []
    motion = [(segment.grid, positions) for segment, positions in runs if segment.moving]
    ids = encoding.inputs["input_ids"][0].tolist()
    words = split_words(text)
    match = match_words(words, text, prompt.text, encoding.offsets[0], prompt.question_start)
    places = dict(match.pairs)
    of_teacher = tokens_of_words(words, [span for _, span in teacher_tokens])
    rows = [
        WordTokens(word, [teacher_tokens[token][0] for token in of_teacher[n]],
                   [(position, student.tokenizer.decode([ids[position]])) for position in places.get(n, ())])
        for n, word in enumerate(words)
    ]
    maps, on_motion = None, []
    if attention and match.pairs:
        visual = torch.cat([columns, *(positions for _, positions in motion)])
        attended = _attention(student, encoding.inputs, match, visual)
        maps = attended[:, : len(columns)].unflatten(1, grid.shape)
        on_motion = attended[:, len(columns) :].sum(1).tolist()
    return Inspection(
        model=student.folder, family=student.model.config.model_type, text=text, video=video, clip=clip, grid=grid,
        positions=columns.tolist(), length=len(ids), words=rows, attended=[words[n] for n, _ in match.pairs],
        attention=maps, on_motion=on_motion, motion=[(cells, positions.tolist()) for cells, positions in motion])


def teacher_tokens(path: str, text: str) -> list[tuple[str, tuple[int, int]]]:
    """Piece and characters of each token that a teacher reads of a text, from its tokenizer alone; its limit is
    kept."""
    from transformers import AutoTokenizer

    from vdm_priors.families import load_skeleton

    limit = load_skeleton(path).max_text_tokens
    tokenizer = AutoTokenizer.from_pretrained(path, subfolder="tokenizer")
    read = tokenizer(text, truncation=True, max_length=limit, return_offsets_mapping=True)
    pieces = tokenizer.convert_ids_to_tokens(read["input_ids"])
    return list(zip(pieces, [tuple(span) for span in read["offset_mapping"]], strict=True))


def _attention(student: Any, inputs: dict, match: Any, columns: torch.Tensor) -> torch.Tensor:
    """[W, C] of the matched words over the columns."""
    request = CaptureRequest.from_positions([match.rows], [columns], device=student.model.device)
    student.model.eval()
    with torch.no_grad(), capture(student.model):
        student.model(**inputs, motion_capture=request, logits_to_keep=1)
    rows, words = request.mean()[0].cpu(), []
    for _, positions in match.pairs:
        words.append(rows[: len(positions)].mean(dim=0))
        rows = rows[len(positions) :]
    return torch.stack(words)


# ---- the page -----------------------------------------------------------------------------------


def write_page(inspection: Inspection, path: Path) -> Path:
    """Write the page whole or not at all, and return its path. Raises UserError."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("enhancer").joinpath("inspection.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(source).render(**_context(inspection))
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(page, encoding="utf-8", errors="replace")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"The page {path} cannot be written ({error.strerror}): give another --out.") from error
    return path


def _context(shown: Inspection) -> dict:
    frames, rows, columns = shown.grid.shape
    width = FRAME_WIDTHS[columns > FEW_COLUMNS]
    return {
        "shown": shown,
        "shape": (frames, rows, columns),
        "groups": [_group(shown, number) for number in range(frames)],
        "cells": _cells(shown.grid, shown.clip),
        "motion": _motion_cards(shown),
        "unseen": _unseen(shown),
        "view": (VIEW, _view_height(shown.clip)),
        "frame_width": width,
        "border": 2 if columns <= FEW_COLUMNS else 1,
        "numbers": "all" if width / columns >= NUMBER_WIDTH else "first",
        "runs": _runs(shown.positions),
        "heat": _heat(shown),
    }


def _group(shown: Inspection, number: int) -> dict:
    """The frames of one step in time: their pictures, seconds, and the positions of its tokens."""
    start, end = shown.grid.spans[number].tolist()
    inside = [n for n, time in enumerate(shown.clip.times) if start <= time < end]
    size = shown.grid.rows * shown.grid.columns
    first = number * size
    frames = [{"number": n + 1, "seconds": f"{shown.clip.times[n]:.2f}", "uri": _picture(shown.clip.frames[n])}
              for n in inside]
    return {
        "number": number + 1,
        "span": f"{start:.2f}–{end:.2f} s",
        "first": first,
        "last": first + size - 1,
        "positions": _runs(shown.positions[first : first + size]),
        "frames": frames,
    }


def _motion_cards(shown: Inspection) -> list[dict]:
    """What moves in each span of time: its tokens' cells on the frame before it.

    Queries that are learnt have the whole frame as their cell, and share one card.
    """
    cards, first = [], 0
    for grid, positions in shown.motion:
        size = grid.rows * grid.columns
        steps = [range(grid.frames)] if size == 1 else [range(n, n + 1) for n in range(grid.frames)]
        for step in steps:
            own = positions[step.start * size : step.stop * size]
            start, end = float(grid.spans[step.start, 0]), float(grid.spans[step.stop - 1, 1])
            before = max((n for n, time in enumerate(shown.clip.times) if time <= start), default=0)
            whole = f"{first}–{first + len(own) - 1}" if len(own) > 1 else str(first)
            cells = [{**cell, "number": whole if size == 1 else first + cell["index"]}
                     for cell in _cells(grid, shown.clip)]
            cards.append({"tokens": whole, "span": f"{start:.2f}–{end:.2f} s", "positions": _runs(own), "cells": cells,
                          "frame": before + 1, "uri": _picture(shown.clip.frames[before])})
            first += len(own)
    return cards


def _cells(grid: TokenGrid, clip: Any) -> list[dict]:
    """Rectangles of one step's cells in the drawing's units; they are the same in every step."""
    height = _view_height(clip)
    top, left, bottom, right = clip.box
    y = ((grid.row_edges.numpy() - top) / (bottom - top) * height).tolist()
    x = ((grid.column_edges.numpy() - left) / (right - left) * VIEW).tolist()
    return [
        {"x": x[column], "y": y[row], "width": x[column + 1] - x[column], "height": y[row + 1] - y[row],
         "row": row, "column": column, "index": row * grid.columns + column}
        for row in range(grid.rows) for column in range(grid.columns)
    ]


def _unseen(shown: Inspection) -> list[dict]:
    """The strips at the right and at the bottom that no token covers, in the drawing's units."""
    cells, height = _cells(shown.grid, shown.clip), _view_height(shown.clip)
    right, bottom = (max(cell[at] + cell[size] for cell in cells) for at, size in (("x", "width"), ("y", "height")))
    strips = [{"x": right, "y": 0.0, "width": VIEW - right, "height": height},
              {"x": 0.0, "y": bottom, "width": right, "height": height - bottom}]
    return [strip for strip in strips if strip["width"] > 1e-6 * VIEW and strip["height"] > 1e-6 * VIEW]


def _view_height(clip: Any) -> float:
    _, height, width, _ = clip.frames.shape
    return VIEW * height / width


def _heat(shown: Inspection) -> dict | None:
    """The attention of every word as a strip over the frames, all on one scale."""
    if shown.attention is None:
        return None
    maps = [pictures.density(values.numpy(), shown.grid) for values in shown.attention]
    drawn = [m for m in maps if m is not None]
    top = pictures.top_of_scale(drawn)
    tile = pictures.tile_size(*shown.clip.frames.shape[1:3])
    rows = []
    masses = shown.attention.sum(dim=(1, 2, 3)).tolist()
    for word, values, mass, moving in zip(shown.attended, maps, masses, shown.on_motion, strict=True):
        on_frames = None if values is None else pictures.on_frames(values, shown.grid, shown.clip.times, tile)
        told = f"{100 * mass:.1f}% of its attention"
        if shown.motion:
            told += f" on the frames' tokens, {100 * moving:.1f}% on motion tokens"
        rows.append({"word": word.text, "mass": told,
                     "uri": None if on_frames is None else pictures.heat_uri(on_frames, top)})
    strip = pictures.frame_strip(shown.clip.frames, tile)
    return {"rows": rows, "frames": pictures.picture_uri(strip), "width": strip.shape[1], "height": strip.shape[0],
            "scale": pictures.scale_uri(), "ticks": pictures.scale_ticks(top),
            "seconds": [f"{time:.2f} s" for time in shown.clip.times]}


def _picture(frame: np.ndarray) -> str:
    """A frame as it is, made smaller where it is large."""
    height, width, _ = frame.shape
    scale = min(1.0, PICTURE / max(height, width))
    if scale == 1.0:
        return pictures.picture_uri(frame, exact=height * width <= 128 * 128)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return pictures.picture_uri(np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)))


def _runs(positions: Sequence[int]) -> str:
    """12–15, 20–23: unbroken runs of numbers."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and position == runs[-1][1] + 1:
            runs[-1][1] = position
        else:
            runs.append([position, position])
    return ", ".join(f"{first}–{last}" if last > first else str(first) for first, last in runs)
