"""Words of a prior's text, with the two terms of their motion scores and their curves over frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from enhancer.visualize.views import WordView
from vdm_priors.extract import ExtractionSettings, frame_weights
from vdm_priors.grid import TokenGrid
from vdm_priors.prior import MotionPrior
from vdm_priors.selection import TeacherText
from vdm_priors.words import Word, split_words


def word_views(prior: MotionPrior, read: TeacherText | None = None) -> list[WordView]:
    """The covered words of the text in order, with what the prior's provenance says of them.

    read: the teacher's reading of the text; without it, the words that the provenance scores, or else the prior's own.
    """
    scores = {(row["start"], row["end"]): row for row in prior.provenance.get("word_scores") or []}
    own = {(word.start, word.end) for word in prior.words}
    if read is not None:
        words = [word for word, tokens in zip(read.words, read.tokens, strict=True) if tokens]
    elif scores:
        words = [Word(row["text"], row["start"], row["end"]) for row in scores.values()]
    else:
        words = prior.words or split_words(prior.text)
    views = []
    for word in words:
        at = (word.start, word.end)
        row = scores.get(at, {})
        views.append(WordView(word.text, *at, row.get("score"), row.get("mean"), row.get("fluctuation"), at in own))
    return views


def frame_curve(attention_fhw: np.ndarray, grid: TokenGrid) -> list[float]:
    """[F]: mean attention over the valid cells of each frame; NaN for a frame without any (METHOD.md, A_t2f)."""
    valid = grid.valid.numpy()
    sums = np.where(valid, attention_fhw.astype(np.float64), 0.0).sum(axis=(1, 2))
    cells = valid.sum(axis=(1, 2))
    return [float(s / c) if c else float("nan") for s, c in zip(sums, cells, strict=True)]


def stored_curves(prior: MotionPrior, settings: ExtractionSettings) -> dict[tuple[int, int], list[float]]:
    """The prior's own words' curves; its maps carry the frames' weights, which are taken off again."""
    raw: Any = prior.maps / torch.as_tensor(frame_weights(prior.grid, settings))
    return {
        (word.start, word.end): frame_curve(maps, prior.grid)
        for word, maps in zip(prior.words, raw.numpy(), strict=True)
    }
