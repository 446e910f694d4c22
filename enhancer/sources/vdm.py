"""The video diffusion model's prior: clips of equal shape are decoded and extracted in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from enhancer.data.samples import Problem, Sample
from enhancer.sources import Progress, SourceContext, shared_text
from enhancer.video.clip import Clip
from vdm_priors.errors import ModelError, UserError
from vdm_priors.prior import MotionPrior
from vdm_priors.store import content_key, file_digest

WAITING_BATCHES = 4  # batches of other shapes that may wait, decoded, for company


class VdmSource:
    """Priors from the teacher, which is loaded at the first prior that must be made."""

    name = "vdm"

    def __init__(self, context: SourceContext) -> None:
        self._context = context
        self._teacher = None

    def key(self, sample: Sample) -> str:
        """Hash of the video's content, its sampling, the text, the teacher and the settings."""
        context = self._context
        return content_key(source=self.name, video=file_digest(sample.video), sampling=dataclasses.asdict(context.sampling),
                           text=shared_text(sample, context.text), size=context.size,
                           teacher=context.teacher_fingerprint, settings=dataclasses.asdict(context.settings))

    def extract(self, samples: list[Sample], progress: Progress | None = None) -> Iterator[tuple[Sample, MotionPrior | Problem]]:
        """Yields a batch's priors as soon as the batch is through the teacher."""
        waiting: dict[tuple[int, ...], list[tuple[Sample, Clip]]] = {}
        size, done = self._context.batch_size, 0
        for sample in samples:
            try:
                clip = resized(self._context.frames.get(sample.video, self._context.sampling), self._context.size)
            except UserError as error:
                yield sample, Problem(sample.id, str(error))
                continue
            batch = waiting.setdefault(clip.frames.shape, [])
            batch.append((sample, clip))
            full = len(batch) == size
            if full or sum(map(len, waiting.values())) >= WAITING_BATCHES * size:
                shape = max(waiting, key=lambda s: len(waiting[s]))
                ready = waiting.pop(shape)
                yield from self._batch(ready)
                done += len(ready)
                if progress:
                    progress(done, len(samples))
        for batch in waiting.values():
            yield from self._batch(batch)

    def _batch(self, batch: list[tuple[Sample, Clip]]) -> list[tuple[Sample, MotionPrior | Problem]]:
        try:
            priors = self._priors(batch)
        except UserError as error:
            if len(batch) == 1:
                return [(batch[0][0], Problem(batch[0][0].id, str(error)))]
            return [result for one in batch for result in self._batch([one])]  # only the bad one is lost
        return [(sample, prior) for (sample, _), prior in zip(batch, priors, strict=True)]

    def _priors(self, batch: list[tuple[Sample, Clip]]) -> list[MotionPrior]:
        from vdm_priors.extract import extract_priors

        context = self._context
        if self._teacher is None:
            if context.load_teacher is None:
                raise ModelError("No teacher is given, but a prior must be made with one.")
            self._teacher = context.load_teacher()
        clips = [clip for _, clip in batch]
        priors = extract_priors(self._teacher, clips, [shared_text(sample, context.text) for sample, _ in batch], context.settings)
        for prior, clip in zip(priors, clips, strict=True):
            prior.provenance.setdefault("source", self.name)
            prior.provenance.setdefault("seconds", [float(t) for t in clip.times])
            prior.provenance["video"] = Path(clip.path).name
        return priors


def resized(clip: Clip, size: int | None) -> Clip:
    """The clip with `size` pixels on its shorter side; the frame, and so its box, stays the same."""
    height, width = clip.frames.shape[1:3]
    if size is None or min(height, width) == size:
        return clip
    scale = size / min(height, width)
    new = (round(width * scale), round(height * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    frames = [cv2.resize(frame, new, interpolation=method) for frame in clip.frames]
    return dataclasses.replace(clip, frames=np.stack(frames))


def build(context: SourceContext) -> VdmSource:
    """Found by the file's name."""
    return VdmSource(context)
