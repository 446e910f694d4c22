"""The upper bound: the world's ground truth, for the words of the text that name something seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch

from enhancer.data.samples import Problem, Sample
from enhancer.sources import SourceContext, one_by_one, shared_text
from enhancer.video.footage import video_digest
from vdm_priors.errors import SampleError, UserError
from vdm_priors.grid import TokenGrid, frame_spans
from vdm_priors.prior import MotionPrior
from vdm_priors.store import content_key
from vdm_priors.words import is_content_word, split_words

ROWS = 16  # rows of the oracle's grid; columns follow the frame's shape


class OracleSource:
    """Ground-truth mass on a grid of one cell row per sampled frame."""

    name = "oracle"

    def __init__(self, context: SourceContext) -> None:
        if context.truth is None:
            raise UserError("The oracle source needs ground truth: use data made by `enhancer world make` (key `world`).")
        self._context = context

    def key(self, sample: Sample) -> str:
        """Hash of the video's content, its sampling and the text."""
        return content_key(source=self.name, video=video_digest(sample.video), rows=ROWS,
                           sampling=dataclasses.asdict(self._context.sampling), text=shared_text(sample, self._context.text))

    def extract(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, MotionPrior | Problem]]:
        """One prior a sample; a text no word of which has evidence gives a Problem."""
        yield from one_by_one(samples, self._prior)

    def _prior(self, sample: Sample) -> MotionPrior:
        text = shared_text(sample, self._context.text)
        clip = self._context.frames.get(sample.video, self._context.sampling)
        height, width = clip.frames.shape[1:3]
        grid = TokenGrid.regular(frame_spans(clip.times, clip.duration), ROWS, max(1, round(ROWS * width / height)), clip.box)
        words = [word for word in split_words(text) if is_content_word(word)]
        maps = self._context.truth.evidence(sample.video.name, text, words, grid).to(torch.float32)
        seen = maps.sum(dim=(1, 2, 3)) > 0
        if not seen.any():
            raise SampleError("no word of its text has evidence in the ground truth")
        kept = [word for word, there in zip(words, seen.tolist(), strict=True) if there]
        return MotionPrior(text=text, words=kept, maps=maps[seen], grid=grid, weight=torch.ones(len(kept)),
                           provenance={"source": self.name, "seconds": [float(t) for t in clip.seconds]})


def build(context: SourceContext) -> OracleSource:
    """Found by the file's name."""
    return OracleSource(context)
