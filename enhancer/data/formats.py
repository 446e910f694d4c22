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

Rows of the first two may carry "options" and "question_type". Every row may say "video_start" and "video_end"
(seconds); the first two's video may be a list of pictures, with "fps". Several questions give several samples; several
videos, or pictures beside the video, are refused, since a motion prior is of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enhancer.data.files import FOOTAGE_KEYS, find_video, is_pictures
from enhancer.data.questions import VIDEO_MARKER, Sample, make_sample, split_options
from vdm_priors.errors import SampleError

Build = Callable[[Path], Sample]  # from the data folder to the sample; raises SampleError
CAPTION_QUESTION = "Describe the motion in this video in detail."  # captions come without a question
ONE_VIDEO = ("a sample is one question about one video, which its motion prior is of; give each video its own row, or "
             "join what belongs together in one file")
_IMAGE_MARKER = "<image>"  # LLaVA-Video's mark of the video
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
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


# -- conversations and messages ---------------------------------------------------------


def _conversations(row_id: str, row: dict) -> list[tuple[str, Build]]:
    return _dialogue(row_id, row, "conversations", "from", "value")


def _messages(row_id: str, row: dict) -> list[tuple[str, Build]]:
    return _dialogue(row_id, row, "messages", "role", "content")


def _dialogue(row_id: str, row: dict, key: str, role_key: str, text_key: str) -> list[tuple[str, Build]]:
    turns = _turns(row.get(key), key, role_key, text_key)
    named, cut = _video_of(row, key, text_key)
    meta = _without(row, "id", "video", "videos", "conversations", "messages", "options", "question_type", "qa")
    pairs = list(zip(turns[::2], turns[1::2], strict=True))
    if len(pairs) > 1 and row.get("options"):
        raise SampleError("has options and several questions; give each question its own row")

    def builder(number: int, sample_id: str) -> Build:
        def build(root: Path) -> Sample:
            question, answer = pairs[number]
            if VIDEO_MARKER not in question:
                question = question.replace(_IMAGE_MARKER, VIDEO_MARKER)
            if _IMAGE_MARKER in question or row.get("image") or row.get("images"):
                raise SampleError(f"shows a picture beside its video, but {ONE_VIDEO}")
            markers = question.count(VIDEO_MARKER)
            if number == 0 and markers != 1:
                found = "no" if markers == 0 else f"{markers}"
                raise SampleError(f"the question has {found} {VIDEO_MARKER}; put exactly one where the video belongs")
            if number and markers:
                raise SampleError(f"a later turn has a {VIDEO_MARKER}; only the first may show the video")
            question = question.replace(VIDEO_MARKER, "")
            extra = {**meta, "turn": number + 1} if len(pairs) > 1 else meta
            video = find_video(named, cut, root)
            return make_sample(sample_id, video, question, answer, row.get("options"), row.get("question_type"), extra)

        return build

    # Later turns are questions of their own about the same video.
    ids = [row_id if n == 0 else f"{row_id}#{n + 1}" for n in range(len(pairs))]
    return [(sample_id, builder(n, sample_id)) for n, sample_id in enumerate(ids)]


def _turns(raw: Any, key: str, role_key: str, text_key: str) -> list[str]:
    """The texts of the turns: a question and its answer, by turns."""
    if not isinstance(raw, list) or not raw:
        raise SampleError(f'"{key}" is not a list of turns')
    roles, texts = [], []
    for turn in raw:
        if not isinstance(turn, dict):
            raise SampleError("a turn is not an object")
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in _ROLES:
            raise SampleError(f"a turn is by {role!r}; only user and assistant are read")
        roles.append(_ROLES[role])
        texts.append(_text(turn.get(text_key)))
    if len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        raise SampleError("turns must be a question and its answer, by turns")
    return texts


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


def _video_of(row: dict, key: str, text_key: str) -> tuple[str | list[str], dict]:
    """The path or pictures that a row names, and the object that says which seconds of it: the row or a turn's part."""
    structured = [turn[text_key] for turn in row[key] if isinstance(turn[text_key], list)]
    parts = [part for content in structured for part in content if "video" in part]
    holder = next((part for part in parts if "video" not in row and "videos" not in row), row)
    video = holder["video"] if "video" in holder else holder.get("videos")
    if isinstance(video, list) and not is_pictures(video):
        if len(video) != 1:
            raise SampleError(f"names {len(video)} videos, but {ONE_VIDEO}")
        video = video[0]
    if not is_pictures(video) and (not isinstance(video, str) or not video):
        raise SampleError(f'names no video (key "{"video" if key == "conversations" else "videos"}")')
    return video, holder


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
            return make_sample(sample_id, video, stem, qa.get("answer", ""), options, row.get("question_type"), meta)

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
            return make_sample(sample_id, _first_video(names, row, root), str(asked.get("question", "")),
                               asked.get("answer", ""), _unlettered(asked["options"]), asked.get("task_type"), meta)

        return build

    ids = [str(asked.get("question_id") or (f"{row_id}#{n + 1}" if nested else row_id)) for n, asked in enumerate(questions)]
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
        return make_sample(row_id, find_video(_named(row, "video"), row, root, _FOLDERS), question, row.get("answer", ""),
                           _unlettered(row.get("options")), kind, _without(row, "video", "question", "answer", "options"))

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
    "conversations": Format("conversations", _conversations),
    "messages": Format("messages", _messages),
    "motionbench": Format("qa", _motionbench),
    "videomme": Format("video_id", _videomme),
    "favor": Format("questions", _favor),
    "captions": Format("motion_caption", _captions),
    "plain": Format("question", _plain),
}
