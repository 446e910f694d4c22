"""The video diffusion model's prior: clips with equally many frames are decoded and extracted in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from enhancer.data.samples import Problem, Sample
from enhancer.memory import is_out_of_memory, out_of_memory
from enhancer.processes import ahead
from enhancer.sources import SourceContext, shared_text
from enhancer.video.clip import Clip
from enhancer.video.footage import video_digest
from vdm_priors.errors import ClipError, ModelError, SampleError, UserError
from vdm_priors.extract import extract_priors
from vdm_priors.prior import MotionPrior
from vdm_priors.store import content_key

WAITING_BATCHES = 4  # batches' worth of decoded clips that may wait for others with as many frames


class VdmSource:
    """Priors from the teacher, which is loaded at the first prior that must be made."""

    name = "vdm"

    def __init__(self, context: SourceContext) -> None:
        self._context = context
        self._teacher = None

    def key(self, sample: Sample) -> str:
        """Hash of the video, its sampling, the text, the teacher (model and revision) and the settings that count."""
        context = self._context
        return content_key(source=self.name, video=video_digest(sample.video), sampling=dataclasses.asdict(context.sampling),
                           text=shared_text(sample, context.text), size=context.size, dtype=context.dtype,
                           teacher=context.teacher_fingerprint, settings=context.settings.effective())

    def extract(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, MotionPrior | Problem]]:
        """Yields a batch's priors as soon as it is through the teacher, while a thread decodes the next batch."""
        for decoded in ahead(self._decoded(samples)):
            if isinstance(decoded, list):
                yield from self._batch(decoded)
            else:
                yield decoded

    def _decoded(self, samples: Iterable[Sample]) -> Iterator[list[tuple[Sample, Clip]] | tuple[Sample, Problem]]:
        """Batches of clips with equally many frames, and in between the samples whose clip cannot be read."""
        waiting: dict[int, list[tuple[Sample, Clip]]] = {}  # by number of frames
        size = self._context.batch_size
        for sample in samples:
            try:
                clip = self._context.frames.get(sample.video, self._context.sampling)
            except UserError as error:
                yield sample, Problem(sample.id, str(error))
                continue
            batch = waiting.setdefault(len(clip.frames), [])
            batch.append((sample, clip))
            if len(batch) == size or sum(map(len, waiting.values())) >= WAITING_BATCHES * size:
                yield waiting.pop(max(waiting, key=lambda count: len(waiting[count])))
        yield from waiting.values()

    def _batch(self, batch: list[tuple[Sample, Clip]]) -> list[tuple[Sample, MotionPrior | Problem]]:
        teacher = self._loaded_teacher()  # outside the try: without a teacher nothing can be made
        try:
            priors = self._priors(teacher, batch)
        except (ClipError, SampleError, ModelError) as error:
            if len(batch) == 1:
                return [(batch[0][0], Problem(batch[0][0].id, str(error)))]
            return [result for one in batch for result in self._batch([one])]  # only the bad one is lost
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            context = self._context
            raise out_of_memory(error, teacher, context.settings, len(batch[0][1].frames), context.size, len(batch),
                                context.dtype) from error
        return [(sample, prior) for (sample, _), prior in zip(batch, priors, strict=True)]

    def _loaded_teacher(self) -> Any:
        if self._teacher is None:
            if self._context.load_teacher is None:
                raise ModelError("A prior must be made with a video diffusion model, but no teacher is given: set teacher.model.")
            self._teacher = self._context.load_teacher()
        return self._teacher

    def _priors(self, teacher: Any, batch: list[tuple[Sample, Clip]]) -> list[MotionPrior]:
        context = self._context
        clips = [clip for _, clip in batch]
        if context.fit == "refuse":
            _require_size(clips, teacher.frame_size(context.size))
        texts = [shared_text(sample, context.text) for sample, _ in batch]
        priors = extract_priors(teacher, clips, texts, context.settings, size=context.size)
        for prior, clip in zip(priors, clips, strict=True):
            seconds = [float(t) for t in clip.seconds]  # without a repeated last frame's
            notes = [*clip.notes, *_not_covered(prior)]
            prior.provenance.update(video=Path(clip.path).name, seconds=seconds, notes=notes)
        return priors


def _require_size(clips: list[Clip], size: tuple[int, int]) -> None:
    for clip in clips:
        height, width = clip.frames.shape[1:3]
        if (height, width) != size:
            raise ClipError(f"{clip.path} has frames of {height}×{width} pixels, and the teacher takes {size[0]}×{size[1]}: set "
                            f"teacher.size, or teacher.fit to resize.")


def _not_covered(prior: MotionPrior) -> list[str]:
    """A remark on the words that the teacher's text limit cut off."""
    cut = prior.provenance.get("not_covered", ())
    return [f"beyond the teacher's text limit, so without a prior: {', '.join(cut)}"] if cut else []


def build(context: SourceContext) -> VdmSource:
    """Found by the file's name."""
    return VdmSource(context)
