"""A control: this sample's words with another clip's maps, so that only the place is wrong.

The clips are put in one seeded cycle; every clip takes its maps from the next. A student aligned
to these priors still learns to look at things that move, only not at those it is asked about.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from enhancer.data.samples import Problem, Sample
from enhancer.sources import MotionSource, Progress, SourceContext
from vdm_priors.errors import SampleError, UserError
from vdm_priors.prior import MotionPrior
from vdm_priors.store import PriorStore, content_key


class ShuffledSource:
    """The base source's priors exchanged between clips, the same way for the same samples and seed."""

    name = "shuffled"

    def __init__(self, base: MotionSource, store: PriorStore, samples: list[Sample], seed: int) -> None:
        self._base, self._store = base, store
        self._by_video: dict[Path, list[Sample]] = {}
        for sample in samples:
            self._by_video.setdefault(sample.video, []).append(sample)
        self._next = next_in_cycle(list(self._by_video), seed)

    def key(self, sample: Sample) -> str:
        """Hash of both clips' base keys. SampleError where there is no other clip with a prior."""
        return content_key(source=self.name, own=self._base.key(sample), donor=self._donor(sample)[1])

    def _donor(self, sample: Sample) -> tuple[Sample, str]:
        """The sample whose maps are taken, and its base key: the same turn of the next clip with a prior."""
        turn = self._by_video[sample.video].index(sample)
        video = self._next[sample.video]
        while video != sample.video:
            for donor in _from_turn(self._by_video[video], turn):
                key = self._key_or_none(donor)
                if key is not None and key in self._store:
                    return donor, key
            video = self._next[video]
        raise SampleError(f"no other clip has a {self._base.name} prior to exchange with; give at least two clips")

    def _key_or_none(self, sample: Sample) -> str | None:
        try:
            return self._base.key(sample)
        except UserError:
            return None

    def extract(self, samples: list[Sample], progress: Progress | None = None) -> Iterator[tuple[Sample, MotionPrior | Problem]]:
        """Needs the base source's priors in the store; a sample without one gives a Problem."""
        for done, sample in enumerate(samples, 1):
            try:
                donor, donor_key = self._donor(sample)
                own = self._store.get(self._base.key(sample))
                yield sample, exchanged(own, self._store.get(donor_key), {
                    "source": self.name, "base": self._base.name, "maps_of": donor.id})
            except UserError as error:
                yield sample, Problem(sample.id, f"no shuffled prior: {error}")
            if progress:
                progress(done, len(samples))


def next_in_cycle(videos: list[Path], seed: int) -> dict[Path, Path]:
    """A derangement: all clips in one seeded cycle, so that none of two or more maps to itself."""
    ordered = sorted(videos)
    order = [ordered[i] for i in np.random.default_rng(seed).permutation(len(ordered))]
    return dict(zip(order, order[1:] + order[:1], strict=True))


def exchanged(own: MotionPrior, donor: MotionPrior, provenance: dict) -> MotionPrior:
    """own's words and grid with donor's rows in order (again from the first where donor has fewer)."""
    maps = donor.maps
    if maps.shape[1:] != own.maps.shape[1:]:  # clips of another shape: the same relative place
        mass = maps.sum(dim=(1, 2, 3), keepdim=True)
        maps = F.interpolate(maps[None], size=own.maps.shape[1:], mode="trilinear")[0]
        maps = maps * (mass / maps.sum(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny))
    rows = [i % len(donor.words) for i in range(len(own.words))]
    return MotionPrior(text=own.text, words=own.words, maps=maps[rows] * own.grid.valid, grid=own.grid,
                       weight=own.weight, provenance=provenance)


def _from_turn(samples: list[Sample], turn: int) -> list[Sample]:
    turn %= len(samples)
    return samples[turn:] + samples[:turn]


def build(context: SourceContext) -> ShuffledSource:
    """Found by the file's name."""
    return ShuffledSource(context.base, context.store, context.samples, context.seed)
