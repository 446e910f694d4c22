"""Samples of a data file: a video, a question about it, its answer and, for multiple choice, the options.

The forms of rows are in enhancer/data/formats.py. A row that cannot be used becomes a Problem; the others load.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from enhancer.data.formats import FORMS, questions_of
from enhancer.data.questions import HIDDEN_ANSWER, LETTERS, VIDEO_MARKER, Picture, Problem, Sample, split_options
from vdm_priors.errors import SampleError

__all__ = ["FORMATS", "HIDDEN_ANSWER", "LETTERS", "Picture", "Problem", "Sample", "VIDEO_MARKER", "load_samples",
           "split_options"]

FORMATS = ("auto", *FORMS)
ONE_VIDEO = ("here a sample is one question about one video (the training of `enhancer run` takes several); give each "
             "its own row, or join what belongs together in one file")
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may hold one alone; no file or tokenizer takes it


def load_samples(
    path: str | os.PathLike, root: str | os.PathLike | None = None, format: str = "auto", training: bool = False,
    several: bool = False,
) -> tuple[list[Sample], list[Problem]]:
    """Samples and problems of a .json or .jsonl file; video paths lie under `root` (None: the
    file's folder). SampleError where the file, or every row of it, is unusable.

    training: questions whose answer is hidden ("NA") are problems, since there is nothing to learn from them. several:
    whether samples may show several videos, or pictures beside them, or else are problems.
    """
    path = Path(path)
    root = Path(root) if root is not None else path.parent
    if format not in FORMATS:
        raise SampleError(f"data format {format!r} is unknown: choose one of {', '.join(FORMATS)}.")
    samples: list[Sample] = []
    problems: list[Problem] = []
    seen: set[str] = set()
    for place, row in read_rows(path, problems):
        row_id = name_of(row, place)
        for sample_id, build in questions_of(row_id, row, format):
            if sample_id in seen:
                reason = f"{place}: the id was used before; give every question its own id"
                problems.append(Problem(sample_id, reason))
                continue
            seen.add(sample_id)
            try:
                sample = build(root)
                if training and sample.is_hidden:
                    raise SampleError(f"its answer is hidden ({HIDDEN_ANSWER}), so it cannot be trained on")
                if sample.shown and not several:
                    raise SampleError(f"shows {len(sample.videos)} videos and {len(sample.shown) - len(sample.videos)} "
                                      f"pictures; {ONE_VIDEO}")
                views = {view.id for view in sample.views()[1:]}
                if views & seen:
                    raise SampleError(f"its further videos are called {', '.join(sorted(views))}, and other rows too; "
                                      "give those another id")
                seen |= views
                samples.append(sample)
            except SampleError as error:
                problems.append(Problem(sample_id, str(error) if sample_id == place else f"{place}: {error}"))
    if not samples:
        listed = "; ".join(f"{p.id}: {p.reason}" for p in problems[:3]) or "it holds no rows"
        raise SampleError(
            f"{path}: no usable sample among {len(problems)} ({listed}). Correct the file, or data.root ({root}) if "
            f"videos are missing."
        )
    return samples, problems


def name_of(row: dict, place: str) -> str:
    """What a row is called: its id or key, or else its place in the file."""
    return next((str(row[key]) for key in ("id", "key") if row.get(key) not in (None, "")), place)


def read_rows(path: Path, problems: list[Problem]) -> Iterator[tuple[str, dict]]:
    """("row n" or "line n", row) of all rows that are objects; the others become problems."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise SampleError(f"{path}: cannot be read ({why}). Give a .json or .jsonl file of samples.") from error
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise SampleError(f"{path}: is not valid JSON ({error}). Correct the file at that place.") from error
        numbered = [(f"row {number}", row) for number, row in enumerate(rows, 1)]
    else:
        numbered = []
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a text may hold U+2028
            if not line.strip():
                continue
            try:
                numbered.append((f"line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                problems.append(Problem(f"line {number}", f"is not valid JSON ({error.msg} at column {error.colno})"))
            except RecursionError:
                problems.append(Problem(f"line {number}", "is not a sample: it is nested too deeply"))
    for place, row in numbered:
        if not isinstance(row, dict):
            problems.append(Problem(place, f"is of type {type(row).__name__}, not an object with keys"))
        elif _SURROGATE.search(json.dumps(row, ensure_ascii=False)):
            problems.append(Problem(place, "holds half a surrogate pair, which is no character; correct the encoding"))
        else:
            yield place, row
