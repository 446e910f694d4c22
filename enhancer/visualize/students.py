"""Students' maps of a clip's words, over all layers and layer by layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from enhancer.data.samples import Sample
from enhancer.examples import attention_layers
from enhancer.video.clip import Clip
from enhancer.visualize.views import STUDENT, MapSet, WordView, density
from vdm_priors.errors import SampleError
from vdm_priors.prior import MotionPrior
from vdm_priors.words import Word


def student_maps(
    student: Any, name: str, sample: Sample, clip: Clip, prior: MotionPrior, words: list[WordView]
) -> MapSet:
    """Where the student looks for each of `words` while it reads the question and the answer.

    Raises SampleError as the student does, and where no word has a token in its prompt.
    """
    wanted = [Word(word.text, word.start, word.end) for word in words]
    asked = replace(
        prior, words=wanted, maps=torch.zeros(len(wanted), *prior.grid.shape), weight=torch.ones(len(wanted))
    )
    layers, grid = attention_layers(student, sample, clip, asked)
    if not layers:
        raise SampleError(f"{name}: no word of {prior.text!r} has a token in its prompt.")
    rows_lwfhw = torch.stack(list(layers.values())).numpy()
    return MapSet(
        name,
        STUDENT,
        grid,
        density(rows_lwfhw.mean(axis=0), grid),
        layers=density(rows_lwfhw, grid),
        layer_names=[f"layer {layer}" for layer in layers],
        note="mean over heads",
    )


def stored_maps(
    name: str, kind: str, grid: Any, maps: np.ndarray, places: list[int], words: int, note: str = ""
) -> MapSet:
    """Maps [w, F, H, W'] of some of the words as those of all: `places` says which word each is; NaN for the others."""
    spread = np.full((words, *grid.shape), np.nan, np.float32)
    spread[places] = density(maps, grid)
    return MapSet(name, kind, grid, spread, note=note)
