"""A control: this sample's words with the maps of another clip, so that only the place is wrong.

Who gives: the clips of each question type are put in one seeded cycle, and a sample takes its maps
from the next clip in its type's cycle that has a prior: from a question of the same form about other
things. Where no other clip of the type has one, the next in the cycle of all clips gives.

What is exchanged: the maps alone. Text, words, grid and weights stay the sample's own. A word that
the donor's prior has too (in lower case; the n-th occurrence the n-th, more of them from the first
again) takes that word's map, so that "move" gets "move" and only the place changes. The other words
take the donor's other maps in order, from the first again where there are too few of them.

A student aligned to these priors still learns to look at things that move, only not at those it is
asked about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from enhancer.data.samples import Problem, Sample
from enhancer.sources import MotionSource, SourceContext, one_by_one
from enhancer.video.footage import Video, files_of
from vdm_priors.errors import SampleError, UserError
from vdm_priors.prior import MotionPrior
from vdm_priors.store import PriorStore, content_key
from vdm_priors.words import Word

RULE = 2  # raise when the same samples and seed would exchange other maps: it is part of the store key
ANY_TYPE = None  # the cycle of all clips, beside those of the question types


class ShuffledSource:
    """The base source's priors exchanged between clips, the same way for the same samples and seed."""

    name = "shuffled"

    def __init__(self, base: MotionSource, store: PriorStore, samples: list[Sample], seed: int) -> None:
        self._base, self._store = base, store
        self._of: dict[str | None, dict[Video, list[Sample]]] = {ANY_TYPE: {}}  # question type -> clip -> its samples
        for sample in samples:
            for kind in (ANY_TYPE, sample.question_type):
                self._of.setdefault(kind, {}).setdefault(sample.video, []).append(sample)
        self._next = {kind: next_in_cycle(list(videos), seed) for kind, videos in self._of.items()}

    def key(self, sample: Sample) -> str:
        """Hash of the rule and both clips' base keys. SampleError where there is no other clip with a prior."""
        return content_key(source=self.name, rule=RULE, own=self._base.key(sample), donor=self._donor(sample)[1])

    def _donor(self, sample: Sample) -> tuple[Sample, str]:
        """The sample whose maps are taken, and its base key: of another clip, of the same question type if one is.

        Of a clip's several samples the one of the same turn gives, or else the next of them that has a prior.
        """
        for kind in (sample.question_type, ANY_TYPE):
            of, following = self._of[kind], self._next[kind]
            turn = of[sample.video].index(sample)
            video = following[sample.video]
            while video != sample.video:
                for donor in _from_turn(of[video], turn):
                    key = self._key_or_none(donor)
                    if key is not None and key in self._store:
                        return donor, key
                video = following[video]
        raise SampleError(f"no other clip has a {self._base.name} prior to exchange with; give at least two clips")

    def _key_or_none(self, sample: Sample) -> str | None:
        try:
            return self._base.key(sample)
        except UserError:
            return None

    def extract(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, MotionPrior | Problem]]:
        """Needs the base source's priors in the store; a sample without one gives a Problem."""
        yield from one_by_one(samples, self._prior, "no shuffled prior: ")

    def _prior(self, sample: Sample) -> MotionPrior:
        donor, donor_key = self._donor(sample)
        own = self._store.get(self._base.key(sample))
        return exchanged(own, self._store.get(donor_key), {
            "source": self.name, "base": self._base.name, "maps_of": donor.id,
            "same_question_type": donor.question_type == sample.question_type})


def next_in_cycle(videos: list[Video], seed: int) -> dict[Video, Video]:
    """A derangement: all clips in one seeded cycle, so that none of two or more maps to itself."""
    ordered = sorted(videos, key=lambda video: (files_of(video), str(video)))
    order = [ordered[i] for i in np.random.default_rng(seed).permutation(len(ordered))]
    return dict(zip(order, order[1:] + order[:1], strict=True))


def exchanged(own: MotionPrior, donor: MotionPrior, provenance: dict) -> MotionPrior:
    """own's text, words, grid and weights with donor's maps, by the rule above.

    Maps [N, F, H, W] of another shape are interpolated to the same relative place and keep their mass,
    save what falls on own's invalid cells. provenance gets `rows_of`: the donor's word for each of own's.
    """
    maps = donor.maps
    if maps.shape[1:] != own.maps.shape[1:]:  # clips of another shape: the same relative place
        mass = maps.sum(dim=(1, 2, 3), keepdim=True)
        maps = F.interpolate(maps[None], size=own.maps.shape[1:], mode="trilinear")[0]
        maps = maps * (mass / maps.sum(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny))
    rows = rows_by_role(own.words, donor.words)
    return MotionPrior(text=own.text, words=own.words, maps=maps[rows] * own.grid.valid, grid=own.grid,
                       weight=own.weight, provenance={**provenance, "rows_of": [donor.words[row].text for row in rows]})


def rows_by_role(own: list[Word], donor: list[Word]) -> list[int]:
    """For each of own's words the index of the donor's word whose map it takes.

    Raises SampleError if the donor has no words.
    """
    if not donor:
        raise SampleError("the clip to exchange with has a prior without words; leave it out of the samples")
    indices: dict[str, list[int]] = {}
    for index, word in enumerate(donor):
        indices.setdefault(word.text.lower(), []).append(index)
    shared = {word.text.lower() for word in own} & set(indices)
    rest = [index for index, word in enumerate(donor) if word.text.lower() not in shared] or list(range(len(donor)))
    rows, seen, others = [], dict.fromkeys(shared, 0), 0
    for word in own:
        text = word.text.lower()
        if text in shared:
            rows.append(indices[text][seen[text] % len(indices[text])])
            seen[text] += 1
        else:
            rows.append(rest[others % len(rest)])
            others += 1
    return rows


def _from_turn(samples: list[Sample], turn: int) -> list[Sample]:
    turn %= len(samples)
    return samples[turn:] + samples[:turn]


def build(context: SourceContext) -> ShuffledSource:
    """Found by the file's name."""
    return ShuffledSource(context.base, context.store, context.samples, context.seed)
