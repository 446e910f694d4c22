"""Priors of sources that know places and no words: codec, residual, optical flow, frame difference.

All motion words share one map. Which words those are is a rule of the recipe (sources.words), the same for every such
source: the content words, those of chosen parts of speech, or the words that the teacher's prior of the sample has. A
cell that the source knows nothing of holds no mass; the prior's grid is valid where at least half of a cell is known,
and the words' weight is the known share of the clip.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from enhancer.data.samples import Problem, Sample
from enhancer.parts_of_speech import RULE, parts_of_speech
from enhancer.sources import SourceContext, one_by_one, shared_text
from enhancer.video.camera import camera_motion
from enhancer.video.clip import Clip
from enhancer.video.footage import video_digest
from vdm_priors.errors import SampleError
from vdm_priors.grid import TokenGrid, covered_share, frame_spans, regrid
from vdm_priors.prior import MotionPrior
from vdm_priors.store import content_key
from vdm_priors.words import Word, is_content_word, split_words

ROWS = 16  # rows of the prior's grid; columns follow the frame's shape
KNOWN = 0.5  # of a cell, at least
CONTENT, OF_TEACHER = ("content",), ("vdm",)  # rules of which words count


@dataclass
class Evidence:
    """strength [T, R, C] on the cells of `grid`: not negative, of any unit, NaN where not known; facts, notes: for
    provenance."""

    strength: np.ndarray
    grid: TokenGrid
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class SpatialSource:
    """A MotionSource whose maps are one measure of the clip. measure: of a sample and its sampled clip; rule: a number
    to raise when the same file would give another prior; settings: of the measure, as far as they are not the defaults.
    Both are part of the store key."""

    def __init__(
        self,
        name: str,
        rule: int,
        context: SourceContext,
        measure: Callable[[Sample, Clip], Evidence],
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self._settings = settings or {}
        self._rule, self._context, self._measure = rule, context, measure

    def key(self, sample: Sample) -> str:
        """Hash of the video's content, its sampling, the text, and the rule by which its words are chosen."""
        return content_key(
            source=self.name,
            rule=self._rule,
            rows=ROWS,
            video=video_digest(sample.video),
            sampling=dataclasses.asdict(self._context.sampling),
            text=shared_text(sample, self._context.text),
            **self._settings,
            **_words_key(sample, self._context),
        )

    def extract(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, MotionPrior | Problem]]:
        """One prior a sample; a clip in which nothing is seen to move, or a text without motion words, gives a
        Problem."""
        yield from one_by_one(samples, self._prior)

    def _prior(self, sample: Sample) -> MotionPrior:
        text = shared_text(sample, self._context.text)
        words = motion_words(sample, self._context)
        clip = self._context.frames.get(sample.video, self._context.sampling)
        found = self._measure(sample, clip)
        height, width = clip.frames.shape[1:3]
        source = dataclasses.replace(found.grid, valid=torch.from_numpy(~np.isnan(found.strength)))
        grid = TokenGrid.regular(
            frame_spans(clip.times, clip.duration), ROWS, max(1, round(ROWS * width / height)), clip.box
        )
        grid = dataclasses.replace(grid, valid=covered_share(source, grid) >= KNOWN)
        mass = regrid(torch.from_numpy(np.nan_to_num(found.strength)).double() * source.volumes, source, grid).float()
        if not mass.sum() > 0:
            raise SampleError(f"nothing moves in its clip, as far as the source {self.name} tells")
        known = float(source.valid.double().mean())
        return MotionPrior(
            text=text,
            words=words,
            maps=(mass / mass.sum()).expand(len(words), *grid.shape).contiguous(),
            grid=grid,
            weight=torch.full((len(words),), known),
            provenance={
                "source": self.name,
                "known": known,
                "words": list(self._context.words),
                **self._settings,
                "seconds": [float(t) for t in clip.seconds],
                "notes": [*clip.notes, *(note for note in found.notes if note not in clip.notes)],
                **found.facts,
            },
        )


def motion_words(sample: Sample, context: SourceContext) -> list[Word]:
    """The words that share the map, by the rule `context.words`: ("content",), ("vdm",) or some of PARTS.

    Raises SampleError where there is none.
    """
    if context.words == OF_TEACHER:
        key = context.base.key(sample)
        if key not in context.store:
            raise SampleError("the teacher has no prior of it to take the words from")
        return context.store.get(key).words
    words = split_words(shared_text(sample, context.text))
    if context.words == CONTENT:
        chosen = [word for word in words if is_content_word(word)]
    else:
        chosen = [word for word, part in zip(words, parts_of_speech(words), strict=True) if part in context.words]
    if not chosen:
        kinds = "content word" if context.words == CONTENT else " or ".join(context.words)
        raise SampleError(f"its text has no {kinds} that motion could belong to")
    return chosen


def _words_key(sample: Sample, context: SourceContext) -> dict[str, Any]:
    """What the store key says of the words: nothing for the content words, the default."""
    if context.words == CONTENT:
        return {}
    if context.words == OF_TEACHER:
        return {"words_of": context.base.key(sample)}
    return {"words": sorted(context.words), "words_rule": RULE}


def camera_settings(context: SourceContext) -> dict[str, Any]:
    """What the store key says of the camera: nothing where its motion is taken away, the default."""
    return {} if context.camera == "remove" else {"camera": context.camera}


def beside_camera(
    motion: np.ndarray, valid: np.ndarray, x: np.ndarray, y: np.ndarray, grain: float
) -> tuple[np.ndarray, np.ndarray]:
    """[T, R, C] float32 speed beside the camera's motion, 0 up to `grain`, NaN where not valid; and the camera's [T, R,
    C, 2].

    motion [T, R, C, 2], valid [T, R, C]; x [C], y [R]: cells' middles in pixels.
    """
    camera = np.stack([camera_motion(*frame, x, y) for frame in zip(motion, valid, strict=True)])
    speed = np.hypot(*np.moveaxis(motion - camera, -1, 0))
    return without_grain(np.where(valid, speed, np.nan), grain), camera


def without_grain(speed: np.ndarray, grain: float) -> np.ndarray:
    """speed float32, 0 where it is `grain` or less, NaN where it is NaN."""
    return np.where(speed <= grain, 0, speed).astype(np.float32)
