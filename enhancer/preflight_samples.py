"""What a run's samples would need: whether their clips open, and how many tokens they take. Part of the preflight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from enhancer.console import Console
from enhancer.data.samples import Picture, Problem, Sample
from enhancer.preflight_models import hub_unreachable, light_student
from enhancer.recipe_schema import EnhanceRecipe
from enhancer.video.clip import Clip, Sampling
from enhancer.video.footage import Video
from vdm_priors.errors import ModelError, UserError

TOKENIZED = 2000  # samples whose text is tokenized; more only repeat the picture
Shown = Video | Picture


@dataclass(frozen=True)
class Look:
    """What is seen of an opened clip: (frames, height, width) as the student samples it, and the frames' seconds."""

    shape: tuple[int, int, int]
    times: tuple[float, ...]


def footage_of(shown: Shown) -> Video:
    """What is read of it."""
    return shown.footage if isinstance(shown, Picture) else shown


def probe(samples: list[Sample], sampling: Sampling, read: Callable[[Video, Sampling], Clip], report: Any,
          limit: int | None, console: Console | None) -> dict[Shown, Look]:
    """Opens the clips and pictures, or those of `limit` samples from the whole length of the data."""
    looks = {}
    first_of = {shown: sample for sample in reversed(samples) for shown in sample.everything}
    together = spread(list(dict.fromkeys(sample.everything for sample in samples)), limit)
    videos = list(dict.fromkeys(shown for one in together for shown in one))
    with (console or Console(quiet=True)).bar("opening clips", len(videos), "clip") as bar:
        for video in videos:
            try:
                clip = read(footage_of(video), Sampling(frames=1) if isinstance(video, Picture) else sampling)
                looks[video] = Look(clip.frames.shape[:3], tuple(clip.times))
            except UserError as error:
                report.problems.append(Problem(first_of[video].id, str(error)))
            bar.advance()
    part = "" if len(videos) == len(first_of) else f" of {len(videos)} looked at; there are {len(first_of)}"
    report.lines.append(("clips opened", f"{len(looks)} readable{part}", f"{len(report.problems)} not"))
    if not looks:
        report.faults.append(f"none of {len(videos)} clips can be read; the first: {report.problems[0].reason}")
    return looks


def spread(items: list, limit: int | None) -> list:
    """At most `limit` items, evenly from the first to the last; the same for the same list."""
    if limit is None or len(items) <= limit:
        return items
    return [items[n * len(items) // limit] for n in range(limit)]


def student_tokens(recipe: EnhanceRecipe, name: str | None, samples: list[Sample], looks: dict[Shown, Look],
                   report: Any, offline: bool) -> tuple[int, int]:
    """The longest sample's tokens and how many are visual; 0 where the student's configuration cannot be read."""
    if name is None:
        return 0, 0
    try:
        student, limit = light_student(name)
    except ModelError as error:
        (report.warnings if offline and hub_unreachable(error) else report.faults).append(str(error))
        return 0, 0
    seen = [sample for sample in samples if all(shown in looks for shown in sample.everything)]
    longest, longest_id, visual_counts, too_long = (0, 0), "", [], []

    @cache
    def tokens(is_picture: bool, look: Look) -> int:
        if is_picture:
            return student.num_image_tokens(*look.shape[1:])
        return student.num_video_tokens(*look.shape, look.times)  # some families write the seconds between the frames

    for sample in spread(seen, TOKENIZED):
        try:
            visual = sum(tokens(isinstance(shown, Picture), looks[shown]) for shown in sample.everything)
            listed = sample.options if recipe.evaluate.protocol != "option_text" else ()
            text = student.prompt(sample.question, listed, shown=sample.kinds).text
        except UserError:
            continue  # training and evaluation list such samples
        answers = max([sample.answer, *sample.options], key=len)
        written = len(student.tokenizer(text + answers + student.end_token)["input_ids"])
        total = written - len(sample.everything) + visual  # each placeholder becomes visual tokens
        if total > limit:
            too_long.append(Problem(sample.id, f"has {total} tokens, {visual} of them visual, more than the {limit} "
                                               f"that {name} takes: lower student.sampling.frames (visual tokens are "
                                               f"never cut off), or shorten its text"))
            continue
        visual_counts.append(visual)
        if total > longest[0]:
            longest, longest_id = (total, visual), sample.id
    counted = len(visual_counts) + len(too_long)
    part = "" if counted == len(samples) else f"; counted for {counted:,} of {len(samples):,} samples"
    if visual_counts:
        report.lines.append(("student tokens a sample", f"at most {longest[0]}",
                             f"{min(visual_counts)} to {max(visual_counts)} of them visual; longest: {longest_id}; the "
                             f"model takes {limit}{part}"))
    elif too_long:
        report.faults.append(f"every sample is too long; the first, {too_long[0].id}, {too_long[0].reason}.")
    report.problems += too_long
    return longest
