"""Random priors of a sample's question, the same for the same sample."""

from __future__ import annotations

import torch

from enhancer.data.samples import Sample
from vdm_priors.grid import TokenGrid, frame_spans
from vdm_priors.prior import MotionPrior
from vdm_priors.words import Word, split_words


def prior_of(sample: Sample, words: list[Word] | None = None, text: str | None = None) -> MotionPrior:
    text = sample.question if text is None else text
    words = split_words(text) if words is None else words
    grid = TokenGrid.regular(frame_spans([0.0, 0.25, 0.5, 0.75], 1.0), 2, 2)
    maps = torch.rand(len(words), *grid.shape, generator=torch.Generator().manual_seed(len(sample.id)))
    return MotionPrior(text, words, maps, grid, torch.ones(len(words)))
