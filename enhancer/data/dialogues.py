"""Rows that are conversations: turns by turns, about one video, several, or pictures beside them.

  conversations  {"id","video","conversations":[{"from":"human","value":"<video>\\n…"},{"from":"gpt","value"}]}
  messages       {"id","messages":[{"role":"user","content"},{"role":"assistant","content"}],"videos":[path]}

"video" and "videos" are a path, a list of paths, or a list of lists of pictures; "image" and "images" a path or a list.
The first question has a <video> or an <image> for each, in their order and before its words. A content in parts
({"type": "video", "video": path, "video_start": …}) names them where they stand.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from enhancer.data.files import FOOTAGE_KEYS, find_video, is_pictures, locate
from enhancer.data.questions import VIDEO_MARKER, Picture, Sample, make_sample
from vdm_priors.errors import SampleError

Build = Callable[[Path], Sample]  # from the data folder to the sample; raises SampleError
IMAGE_MARKER = "<image>"  # in LLaVA-Video the mark of the video
_MARKERS = {VIDEO_MARKER: "video", IMAGE_MARKER: "image"}
_MARKER = re.compile("|".join(_MARKERS))
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_KEYS = ("id", "video", "videos", "image", "images", "conversations", "messages", "options", "question_type", "qa",
         *FOOTAGE_KEYS)


def conversations(row_id: str, row: dict) -> list[tuple[str, Build]]:
    """(id, build) of every question of a row with "conversations". Raises SampleError."""
    return _dialogue(row_id, row, "conversations", "from", "value")


def messages(row_id: str, row: dict) -> list[tuple[str, Build]]:
    """(id, build) of every question of a row with "messages". Raises SampleError."""
    return _dialogue(row_id, row, "messages", "role", "content")


def _dialogue(row_id: str, row: dict, key: str, role_key: str, text_key: str) -> list[tuple[str, Build]]:
    turns = _turns(row.get(key), key, role_key, text_key)
    parts = [part for turn in row[key] if isinstance(turn[text_key], list) for part in turn[text_key]]
    videos, pictures = _videos_of(row, parts, key), _pictures_of(row, parts)
    meta = {name: value for name, value in row.items() if name not in _KEYS}
    pairs = list(zip(turns[::2], turns[1::2], strict=True))
    if len(pairs) > 1 and row.get("options"):
        raise SampleError("has options and several questions; give each question its own row")

    def builder(number: int, sample_id: str) -> Build:
        def build(root: Path) -> Sample:
            question, answer = pairs[number]
            if number and (marker := _MARKER.search(question)):
                raise SampleError(f"a later turn has a {marker[0]}; only the first may show a video or a picture")
            kinds, first = _shown_and_asked(pairs[0][0], len(videos), len(pictures))
            found = {"video": iter([find_video(named, cut, root) for named, cut in videos]),
                     "image": iter([Picture(locate(named, root)) for named in pictures])}
            shown = tuple(next(found[kind]) for kind in kinds)
            video = next(one for one in shown if not isinstance(one, Picture))
            extra = {**meta, "turn": number + 1} if len(pairs) > 1 else meta
            return make_sample(sample_id, video, question if number else first, answer, row.get("options"),
                               row.get("question_type"), extra, shown if len(shown) > 1 else ())

        return build

    # Later turns are questions of their own about the same videos.
    ids = [row_id if n == 0 else f"{row_id}#{n + 1}" for n in range(len(pairs))]
    return [(sample_id, builder(n, sample_id)) for n, sample_id in enumerate(ids)]


def _shown_and_asked(question: str, videos: int, pictures: int) -> tuple[list[str], str]:
    """What the first question shows, "video" or "image" in their order, and its words.

    SampleError where that differs from what the row names, or stands between the words: chat templates show all first.
    """
    if VIDEO_MARKER not in question and not pictures:
        question = question.replace(IMAGE_MARKER, VIDEO_MARKER)
    kinds = [_MARKERS[marker] for marker in _MARKER.findall(question)]
    if (kinds.count("video"), kinds.count("image")) != (videos, pictures):
        if videos == 1 and not pictures and "image" not in kinds:
            raise SampleError(f"the question has {kinds.count('video') or 'no'} {VIDEO_MARKER}; put exactly one where "
                              f"the video belongs")
        raise SampleError(f"the question has {kinds.count('video')} {VIDEO_MARKER} and {kinds.count('image')} "
                          f"{IMAGE_MARKER}, but the row names {videos} videos and {pictures} pictures; put one for "
                          f"each, in their order")
    words = [words for words in _MARKER.split(question) if words.strip()]
    if len(kinds) > 1 and len(words) > 1:
        raise SampleError("its videos and pictures stand between words; put them all before the question, in their "
                          "order")
    return kinds, "".join(_MARKER.split(question))


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
    """Text of a turn; parts of a structured content joined, a video's or an image's becoming its marker."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise SampleError("a turn has no text")
    markers = {kind: marker for marker, kind in _MARKERS.items()}
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", *markers):
            raise SampleError(f"a turn has a part of type {kind!r}; only text, video and image are read")
        texts.append(markers.get(kind) or str(part.get("text", "")))
    return "\n".join(texts)


def _videos_of(row: dict, parts: list[dict], key: str) -> list[tuple[str | list[str], dict]]:
    """Each video's path or pictures, and the object that says which seconds of it: the row, or a turn's part."""
    holders = [part for part in parts if "video" in part]
    if "video" in row or "videos" in row or not holders:
        value = row["video"] if "video" in row else row.get("videos")
        several = value if isinstance(value, list) and not is_pictures(value) else [value]
        if len(several) > 1 and any(row.get(name) is not None for name in ("video_start", "video_end")):
            raise SampleError("names several videos and one video_start or video_end; give each its own, in a content "
                              'of parts {"type": "video", "video": path, "video_start": …}')
        named = [(one, row) for one in several]
    else:
        named = [(part["video"], part) for part in holders]
    if not named or not all(is_pictures(one) or isinstance(one, str) and one for one, _ in named):
        raise SampleError(f'names no video (key "{"video" if key == "conversations" else "videos"}")')
    return named


def _pictures_of(row: dict, parts: list[dict]) -> list[str]:
    """The paths of the pictures beside the videos."""
    value = row.get("image") or row.get("images")
    named = value if isinstance(value, list) else [value] if value else [p["image"] for p in parts if "image" in p]
    if not all(isinstance(one, str) and one for one in named):
        raise SampleError('names a picture that is no path (key "image" or "images")')
    return named
