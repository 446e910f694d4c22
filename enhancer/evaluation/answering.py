"""All questions of a file answered, by any number of processes, continued where an earlier call ended.

Each process appends its answers to <folder>/parts/<rank>.jsonl as they are made; whoever comes later reads all parts,
and asks what is in none of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from enhancer.data.samples import Sample
from enhancer.evaluation.generation import generate
from enhancer.evaluation.multiple_choice import WINDOW, evaluate
from enhancer.processes import Process
from enhancer.runfolder import readable_write_errors
from enhancer.video.clip import FrameCache, Sampling
from vlm_hooks.student import LETTER_REQUEST

PARTS = "parts"


def answer_all(
    student: Any,
    samples: list[Sample],
    protocol: str,
    sampling: Sampling,
    cache: FrameCache,
    batch_size: int,
    new_tokens: int,
    folder: Path | None,
    process: Process = Process(),
    progress: Callable[[int, int, str], None] | None = None,
    request: str = LETTER_REQUEST,
) -> Iterator[dict]:
    """The rows that this process makes, its share of the samples that no part has an answer of; they are in its part
    when they come.

    student: called once there is something to ask, for the student. folder: of the parts, None keeps nothing. request:
    what asks for the letter, where the prompt lists the options.
    """
    done = {} if folder is None else read_parts(folder)
    left = [sample for sample in samples if sample.id not in done or "error" in done[sample.id]][
        process.rank :: process.count
    ]
    if not left:
        return
    loaded, size = student(), batch_size if protocol == "generate" else WINDOW * batch_size
    for first in range(0, len(left), size):
        window = left[first : first + size]
        if protocol == "generate":
            rows = generate(loaded, window, sampling, cache, batch_size, new_tokens, request=request)
        else:
            rows = evaluate(loaded, window, sampling, cache, batch_size, protocol, request=request)
        if folder is not None:
            _append(folder / PARTS / f"{process.rank}.jsonl", rows)
        yield from rows
        if progress:
            progress(first + len(window), len(left), "")


def ask(
    student: Any,
    samples: Sequence[Sample],
    settings: Any,
    sampling: Sampling = Sampling(),
    cache: FrameCache | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[dict]:
    """One row a sample, in order, by the protocol of the recipe's `evaluate` (recipe_schema.EvaluateSettings)."""
    if settings.protocol == "generate":
        return generate(student, samples, sampling, cache, settings.batch_size, settings.new_tokens, progress)
    return evaluate(student, samples, sampling, cache, settings.batch_size, settings.protocol, progress)


def read_parts(folder: Path) -> dict[str, dict]:
    """By id, the rows of all parts: an answer, if there is one, and not an earlier error. A line that a killed process
    left half is none."""
    rows: dict[str, dict] = {}
    for path in sorted((folder / PARTS).glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # an answer may hold U+2028
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and "id" in row and ("error" not in row or "error" in rows.get(row["id"], row)):
                rows[row["id"]] = row
    return rows


def _append(path: Path, rows: list[dict]) -> None:
    """Adds the rows and has them on the disk; what is left of a half line before them becomes a line of its own."""
    with readable_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
