"""Several sources' priors of the same words on one grid, averaged: the paper's future work, a vote between teachers.

Each member's maps are carried to the finest of the members' grids (the first of equally fine ones), every word's map
is given the mass 1, and a word's map is the mean over the members that have the word. A member without the word, or
without any of its mass on that grid, has no say in it. A member whose prior could not be made for a clip is left out
there.

Agreement of a word: the mean cosine, over pairs of its members, of their maps as densities (Σ p·q/v over cells of
volume v, so that it does not depend on how a grid cuts the clip); 1 where all see the word in the same place, 0 where
each sees it elsewhere. It is unknown, null in the provenance, where fewer than two members have the word. With gate
"agreement" it multiplies the word's weight, the mean of its members'; a word that nobody confirms then weighs 0.

Legend: N words, M members, F×H×W cells of the common grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations

import torch
from torch import Tensor

from enhancer.data.samples import Problem, Sample
from enhancer.sources import MotionSource, SourceContext, one_by_one
from vdm_priors.errors import SampleError, UserError
from vdm_priors.grid import regrid
from vdm_priors.prior import MotionPrior
from vdm_priors.store import PriorStore, content_key

RULE = 1  # raise when the same members would give other maps: it is part of the store key


class EnsembleSource:
    """The mean of its members' priors, which must be in the store."""

    name = "ensemble"

    def __init__(self, members: dict[str, MotionSource], store: PriorStore, gate: str) -> None:
        if len(members) < 2:
            raise UserError(f"An ensemble needs two or more members, not {list(members)}.")
        self._members, self._store, self._gate = members, store, gate

    def key(self, sample: Sample) -> str:
        """Hash of the rule, the gate and the members' keys, null for one without a prior; SampleError if none has one."""
        keys = self._keys(sample)
        if not any(keys.values()):
            raise SampleError(f"none of the ensemble's members ({', '.join(self._members)}) has a prior of it")
        return content_key(source=self.name, rule=RULE, gate=self._gate, members=list(keys.items()))

    def _keys(self, sample: Sample) -> dict[str, str | None]:
        return {label: self._key(member, sample) for label, member in self._members.items()}

    def _key(self, member: MotionSource, sample: Sample) -> str | None:
        try:
            key = member.key(sample)
        except UserError:
            return None
        return key if key in self._store else None

    def extract(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, MotionPrior | Problem]]:
        """Needs the members' priors in the store; a sample of which none is there gives a Problem."""
        yield from one_by_one(samples, self._prior, "no ensemble prior: ")

    def _prior(self, sample: Sample) -> MotionPrior:
        priors = {label: self._store.get(key) for label, key in self._keys(sample).items() if key is not None}
        prior = averaged(priors, self._gate)
        prior.provenance["lacking"] = [label for label in self._members if label not in priors]
        return prior


def averaged(priors: dict[str, MotionPrior], gate: str = "none") -> MotionPrior:
    """The mean of priors by their members' labels, by the rule above. gate: none or agreement.

    Raises SampleError where there is no prior, priors are of different texts, no word has mass, or, with the gate, no
    word has two members.
    """
    texts = {prior.text for prior in priors.values()}
    if len(texts) != 1:
        listed = ", ".join(repr(text[:60]) for text in sorted(texts)) or "none"
        raise SampleError(f"an ensemble needs priors of one text, but its members' texts are: {listed}")
    grid_of = max(priors, key=lambda label: priors[label].grid.num_tokens)  # the first of the largest
    grid = priors[grid_of].grid
    votes = {label: _normalised(regrid(prior.maps, prior.grid, grid)) for label, prior in priors.items()}
    of_word: dict = {}  # by word, its (label, row) of every member that has a say in it
    for label, prior in priors.items():
        for row, word in enumerate(prior.words):
            if votes[label][row].any():
                of_word.setdefault(word, []).append((label, row))
    words = sorted(of_word, key=lambda word: word.start)
    if not words:
        raise SampleError("no word of its members' priors has mass on their common grid")
    volumes = grid.volumes
    agreements, weights, maps = [], [], []
    for word in words:
        maps_mfhw = torch.stack([votes[label][row] for label, row in of_word[word]])
        agreements.append(agreement(maps_mfhw, volumes))
        weights.append(sum(float(priors[label].weight[row]) for label, row in of_word[word]) / len(maps_mfhw))
        maps.append(maps_mfhw.mean(dim=0).float())
    known = [value for value in agreements if value is not None]
    weight = torch.tensor(weights)
    if gate == "agreement":
        if not known:
            raise SampleError("no word is in two members' priors, so that nothing says how far they agree")
        weight = weight * torch.tensor([value or 0.0 for value in agreements])
    members = [[label for label, _ in of_word[word]] for word in words]
    finest = priors[grid_of].provenance
    return MotionPrior(
        text=texts.pop(), words=words, maps=torch.stack(maps), grid=grid, weight=weight.clamp(0.0, 1.0),
        provenance={"source": EnsembleSource.name, "members": list(priors), "gate": gate, "grid_of": grid_of,
                    "members_of_words": members,
                    "words_lacked": {label: sum(label not in of for of in members) for label in priors},
                    "agreement_of_words": agreements, "agreement": sum(known) / len(known) if known else None,
                    **{name: finest[name] for name in ("seconds", "notes") if name in finest}})


def agreement(maps_mfhw: Tensor, volumes_fhw: Tensor) -> float | None:
    """Mean cosine in 0..1 over pairs of members of maps [M, F, H, W] of mass 1 as densities; None for one member."""
    if len(maps_mfhw) < 2:
        return None
    vectors = (maps_mfhw.double() / volumes_fhw.sqrt()).flatten(1)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    cosines = [float(vectors[a] @ vectors[b]) for a, b in combinations(range(len(vectors)), 2)]
    return min(1.0, sum(cosines) / len(cosines))


def _normalised(maps: Tensor) -> Tensor:
    """Maps [N, F, H, W] float64 of mass 1 each; one without mass stays 0."""
    maps = maps.double()
    mass = maps.sum(dim=(1, 2, 3), keepdim=True)
    return torch.where(mass > 0, maps / torch.where(mass > 0, mass, 1.0), 0.0)


def build(context: SourceContext) -> EnsembleSource:
    """Found by the file's name."""
    return EnsembleSource(context.members, context.store, context.gate)
