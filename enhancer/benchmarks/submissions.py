"""Answers in the form in which a benchmark takes them.

motionbench  {uid: letter} of all questions, the hidden test split's too
videomme     the official template: the file's own rows, nested by video, with "response" (a letter) at every question
favor        the file's own rows, with "prediction" (the option's text) at every question
others       {id: letter}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from enhancer.benchmarks import Benchmark
from enhancer.data.formats import questions_of
from enhancer.data.questions import LETTERS
from enhancer.data.samples import name_of, read_rows
from enhancer.runfolder import write_text

Submission = dict | list
Letters = dict[str, str]  # by question's id


def write_submission(path: Path, benchmark: Benchmark | None, data: Path, rows: list[dict]) -> int:
    """Writes the file and returns how many of the asked questions have no answer in it.

    data: the file of questions; rows: the answers. A question without an answer is left out, or has an empty one where
    the form keeps every question.
    """
    chosen = {row["id"]: row["chosen"] for row in rows if row.get("chosen") is not None}
    letters = {row["id"]: LETTERS[row["options"].index(row["chosen"])] for row in rows if row["id"] in chosen}
    form = benchmark.form if benchmark else ""
    made = WRITERS.get(form, _letters)(data, letters, chosen)
    write_text(path, json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    return sum(row["id"] not in chosen for row in rows)


def _letters(data: Path, letters: Letters, chosen: dict[str, str]) -> Submission:
    return letters


def _favor(data: Path, letters: Letters, chosen: dict[str, str]) -> Submission:
    return [
        {**row, "questions": [{**asked, "prediction": chosen.get(i, "")} for i, asked in questions]}
        for row, questions in _nested(data, "favor")
    ]


def _videomme(data: Path, letters: Letters, chosen: dict[str, str]) -> Submission:
    videos: dict[Any, dict] = {}
    of_video = ("video_id", "videoID", "url", "duration", "domain", "sub_category")
    for row, questions in _nested(data, "videomme"):
        shared = {key: row[key] for key in of_video if key in row}
        video = videos.setdefault(row.get("video_id") or row.get("videoID"), {**shared, "questions": []})
        for i, asked in questions:
            own = {key: value for key, value in asked.items() if key not in of_video}
            video["questions"].append({**own, "response": letters.get(i, "")})
    return list(videos.values())


def _nested(data: Path, form: str) -> Iterator[tuple[dict, list[tuple[str, dict]]]]:
    """Every row of the file with its questions under the ids that the reader gives them."""
    for place, row in read_rows(data, []):
        ids = [i for i, _ in questions_of(name_of(row, place), row, form)]
        asked = row["questions"] if "questions" in row else [row]
        if isinstance(asked, list) and len(asked) == len(ids):
            yield row, list(zip(ids, asked, strict=True))


WRITERS: dict[str, Callable[[Path, Letters, dict[str, str]], Submission]] = {"favor": _favor, "videomme": _videomme}
