"""What a question is, and what makes one whole: its text, its answer, its options."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from enhancer.video.footage import PICTURES_A_SECOND, Footage, Video
from vdm_priors.errors import SampleError

VIDEO_MARKER = "<video>"
HIDDEN_ANSWER = "NA"  # MotionBench's hidden test split
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_OPTION_LINE = re.compile(r"^\s*\(?([A-Z])[.):]\s*(.*\S)\s*$")
_LETTER_ANSWER = re.compile(r"^\(?([A-Z])\)?[.:]?$")


@dataclass(frozen=True)
class Picture:
    """A picture beside a video. The student sees it; nothing moves in it, so that no prior is of it."""

    file: Path

    @property
    def footage(self) -> Footage:
        """As a video of one picture, which is how it is read."""
        return Footage((self.file,), fps=PICTURES_A_SECOND)


@dataclass(frozen=True)
class Sample:
    """One question about one video, or about several. question: without the <video> marker and without option
    lines; answer: the full text, the right option's text where there are options, or "NA"; shown: all that the student
    sees, in its order, where that is more than `video`, which then is the first video of it."""

    id: str
    video: Video
    question: str
    answer: str
    options: tuple[str, ...] = ()
    question_type: str = ""
    meta: dict[str, Any] = field(default_factory=dict, compare=False)
    shown: tuple[Video | Picture, ...] = ()

    @property
    def everything(self) -> tuple[Video | Picture, ...]:
        """All that the student sees, in its order."""
        return self.shown or (self.video,)

    @property
    def videos(self) -> tuple[Video, ...]:
        """The videos among it."""
        return tuple(one for one in self.everything if not isinstance(one, Picture))

    @property
    def kinds(self) -> list[str]:
        """"video" or "image" for each of it."""
        return ["image" if isinstance(one, Picture) else "video" for one in self.everything]

    def views(self) -> list[Sample]:
        """The question about each of its videos alone, which is what a motion prior is of: id, id@2, id@3, …"""
        if not self.shown:
            return [self]
        return [replace(self, id=self.id if n == 0 else f"{self.id}@{n + 1}", video=video, shown=())
                for n, video in enumerate(self.videos)]

    @property
    def is_hidden(self) -> bool:
        """Whether its right option is not known, so that it can be asked and neither scored nor trained on."""
        return bool(self.options) and self.answer == HIDDEN_ANSWER


@dataclass(frozen=True)
class Problem:
    """Why a sample was left out."""

    id: str
    reason: str


def make_sample(
    sample_id: str, video: Video, question: str, answer: Any, options: Any = (), question_type: Any = "",
    meta: dict | None = None, shown: tuple[Video | Picture, ...] = (),
) -> Sample:
    """The sample, its answer the right option's text; SampleError where a text is missing or no option is right."""
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
    return Sample(sample_id, video, question, answer, options, str(question_type or ""), meta or {}, shown)


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
    raise SampleError(
        f"the answer {answer!r} is none of the options ({', '.join(options)}) nor a letter A to {last}"
    )
