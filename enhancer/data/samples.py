"""Samples: a video, a question about it, its answer and, for multiple choice, the options.

Three file forms, told apart row by row when the format is "auto":
  conversations  [{"id","video","conversations":[{"from":"human","value":"<video>\\n…"},{"from":"gpt","value"}]}]
  messages       [{"id","messages":[{"role":"user","content"},{"role":"assistant","content"}],"videos":[path]}]
  motionbench    {"key","question_type","video_path","qa":[{"uid","question","answer"}]} a line
Rows may also carry "options" and "question_type". A row that cannot be used becomes a
Problem; the others load.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vdm_priors.errors import SampleError

FORMATS = ("auto", "conversations", "messages", "motionbench")
VIDEO_MARKER = "<video>"
HIDDEN_ANSWER = "NA"  # MotionBench's hidden test split
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_OPTION_LINE = re.compile(r"^\s*\(?([A-Z])[.):]\s*(.*\S)\s*$")
_LETTER_ANSWER = re.compile(r"^\(?([A-Z])\)?[.:]?$")
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may hold one alone; no file or tokenizer takes it
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
# MotionBench names files alone; these are the folders of its download, and of ours
_MOTIONBENCH_FOLDERS = ("", "videos", "public-dataset", "self-collected")


@dataclass(frozen=True)
class Sample:
    """One question about one video. question: without the <video> marker and without option
    lines; answer: the full text, the right option's text where there are options, or "NA"."""

    id: str
    video: Path
    question: str
    answer: str
    options: tuple[str, ...] = ()
    question_type: str = ""
    meta: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Problem:
    """Why a sample was left out."""

    id: str
    reason: str


def load_samples(
    path: str | os.PathLike, root: str | os.PathLike | None = None, format: str = "auto"
) -> tuple[list[Sample], list[Problem]]:
    """Samples and problems of a .json or .jsonl file; video paths lie under `root` (None: the
    file's folder). SampleError where the file, or every row of it, is unusable."""
    path = Path(path)
    root = Path(root) if root is not None else path.parent
    if format not in FORMATS:
        raise SampleError(f"data format {format!r} is unknown: choose one of {', '.join(FORMATS)}.")
    samples: list[Sample] = []
    problems: list[Problem] = []
    seen: set[str] = set()
    for place, row in _rows(path, problems):
        for sample_id, build in _questions(place, row, format):
            if sample_id in seen:
                problems.append(Problem(sample_id, f"{place}: the id was used before; give every question its own id"))
                continue
            seen.add(sample_id)
            try:
                samples.append(build(root))
            except SampleError as error:
                problems.append(Problem(sample_id, str(error) if sample_id == place else f"{place}: {error}"))
    if not samples:
        listed = "; ".join(f"{p.id}: {p.reason}" for p in problems[:3]) or "it holds no rows"
        raise SampleError(f"{path}: no usable sample among {len(problems)} ({listed}). Correct the file, or data.root ({root}) if videos are missing.")
    return samples, problems


# -- rows -----------------------------------------------------------------------------


def _rows(path: Path, problems: list[Problem]) -> Iterator[tuple[str, dict]]:
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
        for number, line in enumerate(text.splitlines(), 1):
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


def _questions(place: str, row: dict, format: str) -> list[tuple[str, Any]]:
    """(id, function from root to Sample) for every question of a row; the functions raise SampleError."""
    if format == "auto":
        format = next((name for name, key in (("conversations", "conversations"), ("messages", "messages"), ("motionbench", "qa")) if key in row), "")
    row_id = next((str(row[key]) for key in ("id", "key") if row.get(key) not in (None, "")), place)
    if not format:
        return [(row_id, _fails('has none of the keys "conversations", "messages" and "qa"'))]
    if format == "motionbench":
        return _motionbench(row_id, row)
    return _dialogue(row_id, row, format)


def _fails(reason: str):
    def build(root: Path) -> Sample:
        raise SampleError(reason)

    return build


# -- conversations and messages ---------------------------------------------------------


def _dialogue(row_id: str, row: dict, format: str) -> list[tuple[str, Any]]:
    try:
        turns = _turns(row, format)
        video = _video_of(row, format)
    except SampleError as error:
        return [(row_id, _fails(str(error)))]
    known = {"id", "video", "videos", "conversations", "messages", "options", "question_type", "qa"}
    meta = {key: value for key, value in row.items() if key not in known}
    pairs = list(zip(turns[::2], turns[1::2]))
    if len(pairs) > 1 and row.get("options"):
        return [(row_id, _fails("has options and several questions; give each question its own row"))]

    def builder(number: int, sample_id: str):
        def build(root: Path) -> Sample:
            question, answer = pairs[number][0][1], pairs[number][1][1]
            markers = question.count(VIDEO_MARKER)
            if number == 0 and markers != 1:
                found = "no" if markers == 0 else f"{markers}"
                raise SampleError(f"the question has {found} {VIDEO_MARKER}; put exactly one where the video belongs")
            if number and markers:
                raise SampleError(f"a later turn has a {VIDEO_MARKER}; only the first may show the video")
            question = question.replace(VIDEO_MARKER, "").strip()
            extra = {**meta, "turn": number + 1} if len(pairs) > 1 else meta
            return _sample(sample_id, _locate(video, root), question, answer, row.get("options"), row.get("question_type", ""), extra)

        return build

    # Later turns are questions of their own about the same video.
    ids = [row_id if n == 0 else f"{row_id}#{n + 1}" for n in range(len(pairs))]
    return [(sample_id, builder(n, sample_id)) for n, sample_id in enumerate(ids)]


def _turns(row: dict, format: str) -> list[tuple[str, str]]:
    """(role, text) of every turn: user and assistant by turns."""
    role_key, text_key = ("from", "value") if format == "conversations" else ("role", "content")
    turns = []
    raw = row.get(format)
    if not isinstance(raw, list) or not raw:
        raise SampleError(f'"{format}" is not a list of turns')
    for turn in raw:
        role = _ROLES.get(turn.get(role_key)) if isinstance(turn, dict) else None
        if role is None:
            raise SampleError(f"a turn is by {turn.get(role_key)!r}; only user and assistant are read" if isinstance(turn, dict) else "a turn is not an object")
        turns.append((role, _text(turn.get(text_key))))
    if len(turns) % 2 or [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise SampleError("turns must be a question and its answer, by turns")
    return turns


def _text(content: Any) -> str:
    """Text of a turn; parts of a structured content joined, a video part becoming the marker."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise SampleError("a turn has no text")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("video", "text"):
            raise SampleError(f"a turn has a part of type {kind!r}; only text and video are read")
        parts.append(VIDEO_MARKER if kind == "video" else str(part.get("text", "")))
    return "\n".join(parts)


def _video_of(row: dict, format: str) -> str:
    if "video" in row:
        video = row["video"]
    else:
        video = row.get("videos")
    if isinstance(video, list):
        if len(video) != 1:
            raise SampleError(f"names {len(video)} videos; exactly one a sample is read")
        video = video[0]
    if not isinstance(video, str) or not video:
        raise SampleError(f'names no video (key "{"video" if format == "conversations" else "videos"}")')
    return video


# -- MotionBench ------------------------------------------------------------------------


def _motionbench(row_id: str, row: dict) -> list[tuple[str, Any]]:
    questions = row.get("qa")
    if not isinstance(questions, list) or not questions or not all(isinstance(q, dict) for q in questions):
        return [(row_id, _fails('"qa" is not a list of questions'))]
    meta = {key: value for key, value in row.items() if key not in ("qa", "question_type", "video_path")}

    def builder(sample_id: str, qa: dict):
        def build(root: Path) -> Sample:
            if not isinstance(row.get("video_path"), str) or not row["video_path"]:
                raise SampleError('names no video (key "video_path")')
            stem, options = split_options(str(qa.get("question", "")))
            if not options:
                raise SampleError('the question has no option lines ("A. …")')
            video = _locate(row["video_path"], root, _MOTIONBENCH_FOLDERS)
            return _sample(sample_id, video, stem, str(qa.get("answer", "")), options, row.get("question_type", ""), meta)

        return build

    ids = [str(qa.get("uid") or f"{row_id}#{n + 1}") for n, qa in enumerate(questions)]
    return [(sample_id, builder(sample_id, qa)) for sample_id, qa in zip(ids, questions)]


def split_options(question: str) -> tuple[str, list[str]]:
    """A question's own text, and the options of its lines "A. …", "B. …" in order."""
    stem, options = [], []
    for line in question.replace(VIDEO_MARKER, "").splitlines():
        match = _OPTION_LINE.match(line)
        if match and len(options) < len(LETTERS) and match[1] == LETTERS[len(options)]:
            options.append(match[2])
        else:
            stem.append(line)
    return "\n".join(stem).strip(), options


# -- checks shared by all forms -----------------------------------------------------------


def _sample(sample_id: str, video: Path, question: str, answer: str, options: Any, question_type: Any, meta: dict) -> Sample:
    question, answer = question.strip(), str(answer).strip()
    if not question:
        raise SampleError("the question is empty")
    if not answer:
        raise SampleError("the answer is empty")
    if options is None:
        options = ()
    if not isinstance(options, (list, tuple)) or not all(isinstance(o, str) and o.strip() for o in options):
        raise SampleError("options must be a list of texts")
    options = tuple(option.strip() for option in options)
    if options:
        answer = _right_option(answer, options)
    return Sample(sample_id, video, question, answer, options, str(question_type or ""), meta)


def _right_option(answer: str, options: tuple[str, ...]) -> str:
    if not 2 <= len(options) <= len(LETTERS):
        raise SampleError(f"has {len(options)} option(s); multiple choice needs 2 to {len(LETTERS)}")
    if len(set(options)) != len(options):
        raise SampleError("two of the options are the same text")
    if answer == HIDDEN_ANSWER or answer in options:
        return answer
    letter, lettered = _LETTER_ANSWER.match(answer), _OPTION_LINE.match(answer)
    last = LETTERS[len(options) - 1]
    if letter:
        if letter[1] > last:
            raise SampleError(f"the answer {answer!r} is none of the letters A to {last}")
        return options[LETTERS.index(letter[1])]
    if lettered and lettered[1] <= last and options[LETTERS.index(lettered[1])] == lettered[2]:
        return lettered[2]
    raise SampleError(f"the answer {answer!r} is none of the options ({', '.join(options)}) nor a letter A to {last}")


def _locate(video: str, root: Path, folders: tuple[str, ...] = ("",)) -> Path:
    """The video's path under root; SampleError where it leaves root or is not there."""
    base = root.resolve()
    for folder in folders:
        try:
            path = (base / folder / video).resolve()
            found = path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL character, a circle of links
            circle = isinstance(error, RuntimeError)
            why = "links in a circle" if circle else getattr(error, "strerror", None) or error
            shown = repr(video) if len(video) <= 100 else f"{video[:80]!r} and {len(video) - 80} characters more"
            raise SampleError(f"the video path {shown} cannot be looked up ({why}); correct it") from error
        if not path.is_relative_to(base):
            raise SampleError(f"the video path {video!r} leaves the data folder {root}; move the video there, or set data.root")
        if found:
            return path
    raise SampleError(f"the video {video!r} is not in {root}; check the path, or set data.root")
