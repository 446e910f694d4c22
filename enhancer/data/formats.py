"""The forms that rows are written in, one function each: a row to its questions.

  conversations  {"id","video","conversations":[{"from":"human","value":"<video>\\n…"},{"from":"gpt","value"}]}
                 (MotionVid-QA, LLaVA-Video and most training sets)
  messages       {"id","messages":[{"role":"user","content"},{"role":"assistant","content"}],"videos":[path]}
  motionbench    {"key","question_type","video_path","qa":[{"uid","question","answer"}]}, options as lines "A. …"
  favor          {"video_name","questions":[{"question","options","correct_answer","task_type"}]} (FAVOR-Bench)
  captions       {"video_path","motion_caption"} (MotionBench-train)
  videomme       {"videoID","question_id","task_type","question","options":["A. …"],"answer"}, or its official template,
                 {"video_id","questions":[{"question_id","task_type","question","options","answer"}]} (Video-MME)
  plain          {"video","question","answer","options","question_type"}, a question a row; its type may also be "type"

Rows of the first two (enhancer/data/dialogues.py) may carry "options" and "question_type", show several videos and
pictures beside them, and a video of theirs may be a list of pictures, with "fps". Every row may say "video_start" and
"video_end" (seconds). Several questions give several samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enhancer.data.dialogues import conversations, messages
from enhancer.data.files import FOOTAGE_KEYS, find_video
from enhancer.data.questions import LETTERS, VIDEO_MARKER, Sample, make_sample, split_options
from vdm_priors.errors import SampleError

Build = Callable[[Path], Sample]  # from the data folder to the sample; raises SampleError
CAPTION_QUESTION = "Describe the motion in this video in detail."  # captions come without a question
# MotionBench and FAVOR-Bench name files alone; these are the folders of their downloads, and of ours
_FOLDERS = ("", "videos", "public-dataset", "self-collected")


@dataclass(frozen=True)
class Format:
    """key: the one that tells its rows; questions: (id, row) to the (id, build) of each question of the row."""

    key: str
    questions: Callable[[str, dict], list[tuple[str, Build]]]


def questions_of(row_id: str, row: dict, format: str) -> list[tuple[str, Build]]:
    """(id, build) of every question of a row; "auto" tells the format by the row's keys."""
    if format == "auto":
        if "chosen" in row and "rejected" in row:
            return [(row_id, _fails('is a preference pair ("chosen", "rejected"), and the training has no loss for '
                                    'those; write the chosen answer as "conversations"'))]
        format = next((name for name, form in FORMS.items() if form.key in row), "")
    if not format:
        *first, last = (f'"{form.key}"' for form in FORMS.values())
        return [(row_id, _fails(f"has none of the keys {', '.join(first)} and {last}"))]
    try:
        return FORMS[format].questions(row_id, row)
    except SampleError as error:
        return [(row_id, _fails(str(error)))]


def _fails(reason: str) -> Build:
    def build(root: Path) -> Sample:
        raise SampleError(reason)

    return build


def _without(row: dict, *keys: str) -> dict:
    return {key: value for key, value in row.items() if key not in (*keys, *FOOTAGE_KEYS)}


# -- benchmarks -------------------------------------------------------------------------


def _motionbench(row_id: str, row: dict) -> list[tuple[str, Build]]:
    questions = _listed(row, "qa")
    meta = _without(row, "qa", "question_type", "video_path")

    def builder(sample_id: str, qa: dict) -> Build:
        def build(root: Path) -> Sample:
            stem, options = split_options(str(qa.get("question", "")))
            if not options:
                raise SampleError('the question has no option lines ("A. …")')
            video = find_video(_named(row, "video_path"), row, root, _FOLDERS)
            answer = _by_letter(qa.get("answer", ""), options)
            return make_sample(sample_id, video, stem, answer, options, row.get("question_type"), meta)

        return build

    ids = [str(qa.get("uid") or f"{row_id}#{n + 1}") for n, qa in enumerate(questions)]
    return [(sample_id, builder(sample_id, qa)) for sample_id, qa in zip(ids, questions, strict=True)]


def _favor(row_id: str, row: dict) -> list[tuple[str, Build]]:
    questions = _listed(row, "questions")
    named = _named(row, "video_name")
    meta = _without(row, "questions", "video_name")

    def builder(sample_id: str, asked: dict) -> Build:
        def build(root: Path) -> Sample:
            if not asked.get("options"):
                raise SampleError('the question has no "options"')
            name = named if named.lower().endswith(".mp4") else f"{named}.mp4"  # the set writes both
            video = find_video(name, row, root, _FOLDERS)
            return make_sample(sample_id, video, str(asked.get("question", "")), asked.get("correct_answer", ""),
                               asked["options"], asked.get("task_type"), meta)

        return build

    ids = [f"{named}#{n + 1}" for n in range(len(questions))]
    return [(sample_id, builder(sample_id, asked)) for sample_id, asked in zip(ids, questions, strict=True)]


def _videomme(row_id: str, row: dict) -> list[tuple[str, Build]]:
    nested = "questions" in row
    questions = _listed(row, "questions") if nested else [row]
    names = [row[key] for key in ("videoID", "video_id") if isinstance(row.get(key), str) and row[key]]
    meta = _without(row, "questions", "question", "options", "answer", "task_type")

    def builder(sample_id: str, asked: dict) -> Build:
        def build(root: Path) -> Sample:
            if not asked.get("options"):
                raise SampleError('the question has no "options"')
            options = _unlettered(asked["options"])
            return make_sample(sample_id, _first_video(names, row, root), str(asked.get("question", "")),
                               _by_letter(asked.get("answer", ""), options), options, asked.get("task_type"), meta)

        return build

    ids = [str(asked.get("question_id") or (f"{row_id}#{n + 1}" if nested else row_id))
           for n, asked in enumerate(questions)]
    return [(sample_id, builder(sample_id, asked)) for sample_id, asked in zip(ids, questions, strict=True)]


def _first_video(names: list[str], row: dict, root: Path) -> Any:
    """The file of the first name that is there, with .mp4; SampleError where none is."""
    if not names:
        raise SampleError('names no video (key "videoID" or "video_id")')
    *others, last = names
    for name in others:
        try:
            return find_video(f"{name}.mp4", row, root, (*_FOLDERS, "data"))
        except SampleError:
            continue
    return find_video(f"{last}.mp4", row, root, (*_FOLDERS, "data"))


def _by_letter(answer: Any, options: Any) -> Any:
    """The option whose letter the answer is, in forms that always answer so; the text of another may be that letter."""
    letter = str(answer).strip()
    at = LETTERS.find(letter) if len(letter) == 1 else -1
    return options[at] if isinstance(options, list) and 0 <= at < len(options) else answer


def _unlettered(options: Any) -> Any:
    """Options without the letters "A. " before them, if all of them have theirs."""
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        return options
    _, found = split_options("\n".join(option.replace("\n", " ") for option in options))
    return found if len(found) == len(options) else options


def _plain(row_id: str, row: dict) -> list[tuple[str, Build]]:
    def build(root: Path) -> Sample:
        kind = next((row[key] for key in ("question_type", "type", "category") if row.get(key)), "")
        question = str(row.get("question", "")).replace(VIDEO_MARKER, "")
        video = find_video(_named(row, "video"), row, root, _FOLDERS)
        return make_sample(row_id, video, question, row.get("answer", ""), _unlettered(row.get("options")), kind,
                           _without(row, "video", "question", "answer", "options"))

    return [(row_id, build)]


def _captions(row_id: str, row: dict) -> list[tuple[str, Build]]:
    def build(root: Path) -> Sample:
        caption = row.get("motion_caption")
        if not isinstance(caption, str):
            raise SampleError('has no caption (key "motion_caption")')
        video = find_video(_named(row, "video_path"), row, root, _FOLDERS)
        return make_sample(row_id, video, CAPTION_QUESTION, caption,
                           meta=_without(row, "video_path", "motion_caption", "id", "key"))

    return [(row_id, build)]


def _listed(row: dict, key: str) -> list[dict]:
    questions = row.get(key)
    if not isinstance(questions, list) or not questions or not all(isinstance(q, dict) for q in questions):
        raise SampleError(f'"{key}" is not a list of questions')
    return questions


def _named(row: dict, key: str) -> str:
    if not isinstance(row.get(key), str) or not row[key]:
        raise SampleError(f'names no video (key "{key}")')
    return row[key]


FORMS = {
    "conversations": Format("conversations", conversations),
    "messages": Format("messages", messages),
    "motionbench": Format("qa", _motionbench),
    "videomme": Format("video_id", _videomme),
    "favor": Format("questions", _favor),
    "captions": Format("motion_caption", _captions),
    "plain": Format("question", _plain),
}
