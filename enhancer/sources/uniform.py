"""A control: the base source's words with the same mass on every cell, so that no place is favoured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from enhancer.data.samples import Problem, Sample
from enhancer.sources import MotionSource, SourceContext, one_by_one
from vdm_priors.prior import MotionPrior
from vdm_priors.store import PriorStore, content_key


class UniformSource:
    """Flat maps over the valid cells of the base prior's grid."""

    name = "uniform"

    def __init__(self, base: MotionSource, store: PriorStore) -> None:
        self._base, self._store = base, store

    def key(self, sample: Sample) -> str:
        """Hash of the base prior's key."""
        return content_key(source=self.name, base=self._base.key(sample))

    def extract(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, MotionPrior | Problem]]:
        """Needs the base source's priors in the store; a sample without one gives a Problem."""
        yield from one_by_one(samples, self._prior, f"no {self._base.name} prior to take the words from: ")

    def _prior(self, sample: Sample) -> MotionPrior:
        return flattened(self._store.get(self._base.key(sample)), self._base.name)


def flattened(prior: MotionPrior, base_name: str) -> MotionPrior:
    """The same words; each word's mass spread evenly over the valid cells. maps [N, F, H, W]."""
    valid = prior.grid.valid.to(prior.maps.dtype)
    mass = (prior.maps * valid).sum(dim=(1, 2, 3))
    mass = torch.where(mass > 0, mass, torch.ones_like(mass))
    maps = mass[:, None, None, None] * (valid / valid.sum())
    return MotionPrior(text=prior.text, words=prior.words, maps=maps, grid=prior.grid, weight=prior.weight,
                       provenance={"source": UniformSource.name, "base": base_name})


def build(context: SourceContext) -> UniformSource:
    """Found by the file's name."""
    return UniformSource(context.base, context.store)
