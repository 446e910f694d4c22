"""From samples to training batches: clips, prompts, and the attention rows to capture.

A batch is what `Student.encode` returns plus one entry, NOTES, that carries what the
alignment needs. Samples are taken by index alone, so arms that differ in λ or in the source
of their priors see the same batches.

Legend: B samples of a batch, N videos of them, W words of a prior.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from enhancer.data.samples import Picture, Problem, Sample
from enhancer.video.clip import Clip, FrameCache, Sampling
from enhancer.video.footage import Video
from enhancer.worker_messages import Message
from vdm_priors.errors import ClipError, SampleError
from vdm_priors.grid import TokenGrid
from vdm_priors.prior import MotionPrior
from vlm_hooks.capture import CaptureRequest
from vlm_hooks.videos import clips_of, is_clip
from vlm_hooks.words import WordMatch, match_words

NOTES = "notes"
Priors = Callable[[Sample], MotionPrior | None]


@dataclass
class Item:
    """One sample with all that it shows, decoded; problems: samples that it stands in for."""

    sample: Sample
    shown: list[Clip | np.ndarray]  # pictures are uint8 [H, W, 3]
    problems: list[Problem] = field(default_factory=list)

    @property
    def clips(self) -> list[Clip]:
        """The decoded videos, one for each of the sample's views."""
        return clips_of(self.shown)

    @property
    def for_student(self) -> Clip | list[Clip | np.ndarray]:
        """What `Student.encode` and `grids` take for it; a codec adapter's take a clip alone."""
        return self.shown[0] if len(self.shown) == 1 else self.shown


@dataclass
class BatchNotes(Message):
    """What a batch carries beside the model's inputs: ids [B], the lists below `request` [N]; None without priors."""

    ids: list[str]
    problems: list[Problem]  # samples left out
    remarks: list[Problem]  # samples used, with something to know about them
    request: CaptureRequest | None = None
    samples: list[int] = field(default_factory=list)  # which of the batch's samples each video is of
    matches: list[WordMatch | None] = field(default_factory=list)
    grids: list[TokenGrid] = field(default_factory=list)
    priors: list[MotionPrior | None] = field(default_factory=list)


def check_texts(samples: Sequence[Sample], student: Any) -> tuple[list[Sample], dict[str, Any], list[Problem]]:
    """Samples whose texts the student can take, their prompts by id, and the others as problems."""
    usable, prompts, problems = [], {}, []
    for sample in samples:
        try:
            prompts[sample.id] = student.prompt(sample.question, shown=sample.kinds)
            student.prompt(sample.answer)  # an answer must be free of control tokens just as well
            usable.append(sample)
        except SampleError as error:
            problems.append(Problem(sample.id, str(error)))
    return usable, prompts, problems


class TrainingClips(Dataset):
    """Samples with decoded frames. A sample that cannot be used is replaced by the next usable
    one, always the same, so that batches keep their size and arms stay comparable."""

    def __init__(self, samples: Sequence[Sample], prompts: dict[str, Any], student: Any, sampling: Sampling,
                 cache: FrameCache) -> None:
        self.samples = samples
        self._prompts = prompts
        self._student = _without_weights(student)
        self._sampling = sampling
        self._cache = cache
        self._fitting: set[str] = set()
        self._problems: dict[str, Problem] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        problems: list[Problem] = []
        for offset in range(len(self.samples)):
            sample = self.samples[(index + offset) % len(self.samples)]
            if sample.id not in self._problems:
                try:
                    shown = [self._read(one) for one in sample.everything]
                    self._check_length(sample, shown)
                    return Item(sample, shown, problems)
                except (ClipError, SampleError) as error:
                    reason = f"{error} (Another sample is trained on in its place.)"
                    self._problems[sample.id] = Problem(sample.id, reason)
            problems.append(self._problems[sample.id])
        listed = "; ".join(f"{p.id}: {p.reason}" for p in problems[:3])
        raise SampleError(f"None of the {len(self.samples)} training samples can be used: {listed}")

    def _read(self, shown: Video | Picture) -> Clip | np.ndarray:
        if isinstance(shown, Picture):
            return self._cache.get(shown.footage, Sampling(frames=1)).frames[0]
        return self._cache.get(shown, self._sampling)

    def _check_length(self, sample: Sample, shown: list[Clip | np.ndarray]) -> None:
        if sample.id in self._fitting:
            return
        student = self._student
        tokens = [student.clip_tokens(one) if is_clip(one) else student.num_image_tokens(*one.shape[:2])
                  for one in shown]
        text = len(student.tokenizer(self._prompts[sample.id].text + sample.answer + student.end_token)["input_ids"])
        length = text - len(shown) + sum(tokens)  # each placeholder becomes tokens
        if length > student.max_length:
            listed = " + ".join(f"{count} for {_size(one)}" for count, one in zip(tokens, shown, strict=True))
            raise SampleError(
                f"The sample has {length} tokens ({listed}), more than the model's {student.max_length}. Visual tokens "
                f"are never cut off: lower student.sampling.frames or the processor's frame size."
            )
        self._fitting.add(sample.id)


def _size(shown: Clip | np.ndarray) -> str:
    if is_clip(shown):
        frames, height, width, _ = shown.frames.shape
        return f"{frames} frames of {width}×{height} pixels"
    return f"a picture of {shown.shape[1]}×{shown.shape[0]} pixels"


class Collator:
    """Items to a batch for the model; with priors, also the rows to capture."""

    def __init__(self, student: Any, prompts: dict[str, Any], priors: Priors | None, layers: Sequence[int] | None,
                 answer_row: bool = False) -> None:
        self._student = _without_weights(student)
        self._prompts = prompts
        self._priors = priors
        self._layers = layers
        self._answer_row = answer_row

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        samples = [item.sample for item in items]
        shown = [item.for_student for item in items]
        prompts = [self._prompts[sample.id] for sample in samples]
        ids = [sample.id for sample in samples]
        encoding = self._student.encode(shown, [p.text for p in prompts], [s.answer for s in samples], names=ids)
        notes = BatchNotes(
            ids=ids,
            problems=[problem for item in items for problem in item.problems],
            remarks=[Problem(view.id, note) for item in items
                     for view, clip in zip(item.sample.views(), item.clips, strict=True) for note in clip.notes],
        )
        if self._priors is not None:
            self._plan_alignment(notes, samples, prompts, shown, encoding)
        return {**encoding.inputs, NOTES: notes}

    def _plan_alignment(self, notes: BatchNotes, samples, prompts, shown, encoding) -> None:
        """The rows and columns of each sample: its videos', one after the other."""
        notes.grids, video_columns = self._student.grids(encoding.inputs, shown)
        views = [(b, view) for b, sample in enumerate(samples) for view in sample.views()]
        notes.samples = [b for b, _ in views]
        notes.priors = [self._priors(view) for _, view in views]
        rows: list[list[int]] = [[] for _ in samples]
        columns: list[list[Tensor]] = [[] for _ in samples]
        for (b, view), prior, of_video in zip(views, notes.priors, video_columns, strict=True):
            columns[b].append(of_video)
            places = ((view.question, prompts[b].question_start), (view.answer, encoding.answer_starts[b]))
            match = None if prior is None else match_prior(prior, *places, encoding.texts[b], encoding.offsets[b])
            if match is not None and match.pairs and self._answer_row:
                match = replace(match, answer=row_of_answer(encoding.offsets[b], encoding.answer_starts[b]))
            notes.matches.append(match)
            rows[b] += [] if match is None else match.rows
            if match is None:
                alone = "trained on its answer alone" if not samples[b].shown else "this video is not aligned"
                notes.remarks.append(Problem(view.id, f"has no prior: {alone}"))
            elif match.unmatched:
                words = ", ".join(prior.words[i].text for i in match.unmatched)
                why = f" ({match.reason})" if match.reason else ""
                notes.remarks.append(Problem(view.id, f"words not aligned: {words}{why}"))
        together = [torch.cat(parts) for parts in columns]
        notes.request = CaptureRequest.from_positions(rows, together, layers=self._layers)


def match_prior(
    prior: MotionPrior, question: tuple[str, int], answer: tuple[str, int], text: str,
    offsets: Sequence[tuple[int, int]],
) -> WordMatch:
    """The student's tokens of a prior's words, where the prior's text is the question, the answer,
    or begins with the one and ends with the other.

    question, answer: the text and its first character in `text`, the student's prompt + answer;
    offsets: characters of every sequence position. Any other text has all words unmatched.
    """
    (asked, _), (told, _) = question, answer
    if prior.text == asked:
        places = [(0, *question)]
    elif prior.text == told:
        places = [(0, *answer)]
    elif prior.text.startswith(asked) and prior.text.endswith(told) and len(prior.text) > len(asked) + len(told):
        places = [(0, *question), (len(prior.text) - len(told), *answer)]
    else:
        reason = f"the prior is of the text {prior.text[:60]!r}, which is neither the sample's question nor its answer"
        return WordMatch([], list(range(len(prior.words))), reason)

    pairs, reasons = {}, []
    for shift, part, start in places:
        inside = [i for i, word in enumerate(prior.words) if word.start >= shift and word.end <= shift + len(part)]
        words = [replace(prior.words[i], start=prior.words[i].start - shift, end=prior.words[i].end - shift)
                 for i in inside]
        found = match_words(words, part, text, offsets, start)
        pairs.update({inside[i]: positions for i, positions in found.pairs})
        reasons += [found.reason] if found.reason else []
    unmatched = [i for i in range(len(prior.words)) if i not in pairs]
    return WordMatch([(i, pairs[i]) for i in sorted(pairs)], unmatched, "; ".join(reasons))


def row_of_answer(offsets: Sequence[tuple[int, int]], answer_start: int) -> int:
    """Position whose row gives the answer's first token: the one before it, since a row gives what follows."""
    return next(position for position, span in enumerate(offsets) if span[1] > answer_start) - 1


class PriorCache:
    """Priors by sample id, the least recently used dropped first, bounded in bytes of maps.

    Without their provenance, which no batch needs: it holds the scores of all heads.
    """

    def __init__(self, priors: Priors, max_bytes: int = 256 << 20) -> None:
        self._load = priors
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, MotionPrior | None] = OrderedDict()

    def __call__(self, sample: Sample) -> MotionPrior | None:
        if sample.id in self._kept:
            self._kept.move_to_end(sample.id)
            return self._kept[sample.id]
        prior = self._load(sample)
        if prior is not None:
            prior = replace(prior, provenance={})
        self._kept[sample.id] = prior
        self._bytes += _bytes_of(prior)
        while self._bytes > self._max_bytes:
            self._bytes -= _bytes_of(self._kept.popitem(last=False)[1])
        return prior


def _bytes_of(prior: MotionPrior | None) -> int:
    return 0 if prior is None else prior.maps.nbytes


def _without_weights(student: Any) -> Any:
    """The student with its config only, on the CPU: batches may be made in worker processes,
    which cannot use the training device; the Trainer moves them there."""
    light = copy.copy(student)
    light.model = SimpleNamespace(config=student.model.config, device="cpu")
    return light
