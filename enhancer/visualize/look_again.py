"""Asks the teacher about a clip once more, and keeps what a prior does not: every step, every layer, every head's rows.

    look = look_again(teacher, clip, prior, settings)

The teacher runs as it did for the prior (vdm_priors.extract.run_teacher), each of its forwards inside a harvest of its
own, so that a step can be told from the next. Nothing of S×S is kept: of vision's rows, those of a few places in every
frame, which show the motion mask's diagonals exactly.

Memory: layers · heads · text tokens · cells · 4 bytes for a forward's maps, as for head_scope layer_head.
Legend: T text tokens, W words, F×H×W' the teacher's grid of S cells, K steps, L layers, h heads of a layer, n places,
R query rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from enhancer.visualize.steps import Steps, places_shown
from enhancer.visualize.views import HeadsView, InversionView, MapSet, WordView
from enhancer.visualize.words import frame_curve, word_views
from vdm_priors.errors import ModelError
from vdm_priors.extract import ExtractionSettings
from vdm_priors.forwards import reconstruction_quality, run_teacher, to_frames
from vdm_priors.harvest import HarvestRequest, harvest
from vdm_priors.prior import MotionPrior
from vdm_priors.selection import read_text

JUDGED_BYTES = 2_500_000  # of the judged heads' attention between places, one byte a number
OTHER_BYTES = 1_200_000  # of the other heads'

OnStep = Callable[[str, int, int], None]


@dataclass
class Look:
    """What was found: maps of all covered words, all heads, inversion; words with their curves."""

    words: list[WordView]
    maps: MapSet
    heads: HeadsView
    inversion: InversionView


def look_again(
    teacher: Any,
    clip: Any,
    prior: MotionPrior,
    settings: ExtractionSettings,
    *,
    size: tuple[int, int] | None = None,
    shown_places: Tensor | None = None,
    share: float = 1.0,
    on_step: OnStep | None = None,
) -> Look:
    """The teacher's attention behind `prior`, which it made of `clip` with `settings`.

    size: as for extract_priors; shown_places [n]: places of a frame whose rows are kept (default: as many as this
    clip's share of a page can hold). Raises ModelError for a teacher that has other heads than the prior's, and as
    extract_priors does.
    """
    settings = replace(settings, reconstruction=True)
    embeds, (offsets,) = teacher.encode_text([prior.text])
    read = read_text(prior.text, offsets)
    pixels = teacher.prepare_frames(clip.frames, size)
    grid = teacher.token_grid(clip.times, clip.duration, clip.box, size)
    layers = _layers(teacher, settings)
    heads = teacher.transformer.config.num_attention_heads
    selected_lh = _selected(prior, settings, len(layers), heads)
    if shown_places is None:
        units = heads * (len(layers) if settings.head_scope == "layer_head" else 1)
        shown_places = places_shown(grid, units, int(share * JUDGED_BYTES))
    steps = Steps(grid, settings, shown_places, selected_lh, read, int(share * OTHER_BYTES))
    request = HarvestRequest(
        text_tokens=read.last_token + 1,
        rows=steps.rows,
        row_taker=lambda _: steps.row_taker(),
        batch_index=[0],
        direction=settings.direction,
        layers=layers,
        head_scope="layer_head",
        memory_columns=settings.memory_columns,
    )
    watched = _Watched(teacher, request, steps)

    def told(phase: str, step: int, count: int) -> None:
        if phase == settings.harvest_at:
            steps.keep()
        if on_step is not None:
            on_step(phase, step, count)

    latents = teacher.encode_video(pixels)
    _, trajectory, rebuilt = run_teacher(
        watched, latents, embeds, HarvestRequest(text_tokens=1, batch_index=[0]), settings, told
    )
    (quality,), decoded = reconstruction_quality(teacher, pixels, latents, rebuilt, settings)
    words = word_views(prior, read)
    maps = steps.map_set(prior, words, layers)
    for word, raw in zip(words, steps.word_maps().numpy(), strict=True):
        word.curve = frame_curve(raw, grid)
    return Look(
        words,
        maps,
        steps.heads_view(prior, layers, settings),
        InversionView(
            to_frames(pixels[0]).numpy(),
            trajectory.noise[0].float().cpu().numpy(),
            decoded[0].numpy(),
            quality["psnr_db"],
            quality["latent_relative_l2"],
        ),
    )


def _layers(teacher: Any, settings: ExtractionSettings) -> list[int]:
    count = len(teacher.attention_layers)
    return list(range(count)) if settings.layers is None else sorted({layer % count for layer in settings.layers})


def _selected(prior: MotionPrior, settings: ExtractionSettings, layers: int, heads: int) -> Tensor:
    """Bool [L, h]: heads that the prior's maps are the mean of; a head chosen for all layers is so in each."""
    scores = prior.provenance.get("head_scores")
    if not scores:
        return torch.ones(layers, heads, dtype=torch.bool)
    selected = torch.tensor(scores["selected"], dtype=torch.bool)
    judged = layers if settings.head_scope == "layer_head" else 1
    if len(selected) != judged * heads:
        raise ModelError(
            f"The prior's heads were chosen among {len(selected)}, and this teacher has {layers} layers of {heads} "
            f"heads: it is another one, or of two stages of which the prior met one. Give the teacher that made it."
        )
    return selected.view(judged, heads).expand(layers, heads)


class _Watched:
    """The teacher, with each forward harvested on its own."""

    def __init__(self, teacher: Any, request: HarvestRequest, steps: Steps) -> None:
        self._teacher, self._request, self._steps = teacher, request, steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def predict(self, latents: Tensor, t: float, *arguments: Any, **named: Any) -> Tensor:
        with harvest(self._teacher, self._request) as seen:
            predicted = self._teacher.predict(latents, t, *arguments, **named)
        if seen.forwards:  # none for a negative text's call or a refinement, which leave no trace
            self._steps.seen = (seen, t)
        return predicted
