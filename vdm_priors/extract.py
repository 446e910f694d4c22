"""From clips and their texts to motion priors: the teacher's whole way for one batch.

frames -> latents -> inversion -> denoising with harvest -> head set -> words -> MotionPrior
(METHOD.md, Algorithm 1, steps 1-3). Importing this file loads no model library.

Legend: B clips, H heads, T text tokens, F×h×w token grid, S = F·h·w, N words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Protocol

import torch
from torch import Tensor

from vdm_priors.conditioning import said_by
from vdm_priors.confidence import confidence_report, word_weights
from vdm_priors.errors import ClipError
from vdm_priors.finite import require_finite
from vdm_priors.forwards import VAE_REMEDY, reconstruction_quality, run_teacher, to_frames
from vdm_priors.grid import TokenGrid
from vdm_priors.harvest import DIRECTIONS, Harvest, HarvestRequest
from vdm_priors.heads import HeadAccumulator, sample_rows
from vdm_priors.inversion import InversionTrajectory
from vdm_priors.prior import MotionPrior
from vdm_priors.selection import TeacherText, choose_heads, choose_words, motion_mask, read_text, text_maps
from vdm_priors.settings import ExtractionSettings

__all__ = [
    "ClipLike", "ExtractionArtifacts", "ExtractionSettings", "extract_directions", "extract_priors", "frame_weights",
    "run_teacher",
]

ALL_ROWS_BELOW = 4096  # vision tokens below which rows: auto takes every row (METHOD.md); as many rows are streamed
AUTO_ROWS = 512
KEPT_BYTES = 2**30  # of a clip's kept rows, float32 over all vision tokens; rows beyond it are streamed
TEXT_REMEDY = "Load the teacher in float32 or bfloat16 (T5 overflows in float16), and check its text encoder's weights."
VERSIONS_OF = ("torch", "diffusers", "transformers")


class ClipLike(Protocol):
    """frames uint8 [N, H, W, 3]; times [N] and duration in seconds; box (top, left, bottom, right)."""

    frames: Any
    times: list[float]
    duration: float
    box: tuple[float, float, float, float]


@dataclass
class ExtractionArtifacts:
    """A prior and what made it, at the teacher's frame size.

    frames uint8 [N, h·r, w·r, 3]: the clip as the teacher saw it; inverted float32 [F, C, h, w]:
    the noise the inversion ended at; reconstruction uint8 like frames, None if
    settings.reconstruction is off.
    """

    prior: MotionPrior
    frames: Tensor
    inverted: Tensor | None
    reconstruction: Tensor | None


def extract_priors(
    teacher: Any,
    clips: Sequence[ClipLike],
    texts: Sequence[str],
    settings: ExtractionSettings | None = None,
    *,
    keep: bool = False,
    size: tuple[int, int] | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
) -> list[MotionPrior] | list[ExtractionArtifacts]:
    """One MotionPrior per clip and text, all clips in one batch; with `keep`, ExtractionArtifacts.

    Clips may differ in picture size, which is resized whole to `size` (height, width; default the
    teacher's own), but not in their number of frames. `on_step(phase, step, steps)` is told of
    every step. A prior's maps are the mean of its word's token rows over the selected heads,
    float32 on the CPU; it holds the selected words only. Draws nothing at random but the query
    rows, from settings.seed; a clip's prior does not depend on the others of the batch (beyond
    rounding).
    Raises RecipeError for settings, ClipError for a number of frames the teacher cannot take,
    SampleError for a text without a word it can read, ModelError for NaN or infinite numbers.
    """
    settings = settings or ExtractionSettings()
    made, pixels, trajectory, decoded = _extract(
        teacher, clips, texts, settings, [settings.direction], size, on_step
    )
    priors = made[settings.direction]
    if not keep:
        return priors
    return [
        ExtractionArtifacts(
            prior,
            frames=to_frames(pixels[index]),
            inverted=None if trajectory is None else trajectory.noise[index].cpu(),
            reconstruction=None if decoded is None else decoded[index],
        )
        for index, prior in enumerate(priors)
    ]


def extract_directions(
    teacher: Any,
    clips: Sequence[ClipLike],
    texts: Sequence[str],
    settings: ExtractionSettings | None = None,
    *,
    size: tuple[int, int] | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
) -> dict[str, list[MotionPrior]]:
    """The priors of every direction of the map from one harvest, {"t2v" | "v2t" | "both": [a clip's, ...]}.

    Each is the one that `extract_priors` makes with that direction; settings.direction is not used.
    """
    return _extract(teacher, clips, texts, settings or ExtractionSettings(), DIRECTIONS, size, on_step)[0]


def _extract(
    teacher: Any,
    clips: Sequence[ClipLike],
    texts: Sequence[str],
    settings: ExtractionSettings,
    directions: Sequence[str],
    size: tuple[int, int] | None,
    on_step: Callable[[str, int, int], None] | None,
) -> tuple[dict[str, list[MotionPrior]], Tensor, InversionTrajectory | None, Tensor | None]:
    """The clips' priors by direction, and what they are made from: pixels, the way to noise, decoded frames."""
    settings.validate()
    _check_batch(teacher, clips, texts)
    embeds, offsets = teacher.encode_text(texts)
    require_finite(said_by(embeds), "The embeddings of the text", TEXT_REMEDY)
    read = [read_text(text, spans) for text, spans in zip(texts, offsets, strict=True)]
    pixels = torch.cat([teacher.prepare_frames(clip.frames, size) for clip in clips])
    grids = [teacher.token_grid(clip.times, clip.duration, clip.box, size) for clip in clips]
    latents = teacher.encode_video(pixels)
    require_finite(latents, "The latents that the teacher's VAE made of the clip", VAE_REMEDY)
    request = _request(
        grids, read, replace(settings, direction=directions[0] if len(directions) == 1 else "both"),
        len(teacher.attention_layers), teacher.transformer.config.num_attention_heads,
    )

    harvested, trajectory, rebuilt = run_teacher(
        teacher, latents, embeds, request, settings, on_step
    )
    quality, decoded = reconstruction_quality(teacher, pixels, latents, rebuilt, settings)
    common = {
        "source": "vdm",
        **_describe(teacher),
        "frame_size": list(pixels.shape[-2:]),
        "attention_heads": teacher.transformer.config.num_attention_heads,  # of a layer; head_scores may be of all
        "versions": {name: version(name) for name in VERSIONS_OF},
    }
    priors: dict[str, list[MotionPrior]] = {direction: [] for direction in directions}
    for index, clip in enumerate(clips):
        head_set, heads_report = choose_heads(harvested, request.rows, index, grids[index], settings)
        of_clip = {
            **common,
            "seconds": [float(t) for t in clip.times],
            "sampling": {
                "frames": len(clip.times),
                "duration": float(clip.duration),
                "box": [float(side) for side in clip.box],
            },
            "head_scores": heads_report,
            "reconstruction": quality[index],
            "not_covered": read[index].not_covered(),
        }
        for direction in directions:
            chosen = replace(settings, direction=direction)
            priors[direction].append(_prior(harvested, index, head_set, read[index], grids[index], chosen, of_clip))
    return priors, pixels, trajectory, decoded


def _prior(
    harvested: Harvest, index: int, head_set: Tensor | None, read: TeacherText, grid: TokenGrid,
    settings: ExtractionSettings, of_clip: dict[str, Any],
) -> MotionPrior:
    """The prior of one clip in one direction; of_clip: what its provenance says of the clip."""
    maps_tfhw = text_maps(harvested, index, head_set, read, settings.direction).unflatten(1, grid.shape)
    words, maps, words_report = choose_words(maps_tfhw, read, grid, settings)
    maps = maps * frame_weights(grid, settings)
    effective = settings.effective()
    prior = MotionPrior(
        text=read.text,
        words=words,
        maps=maps,
        grid=grid,
        weight=word_weights(maps, grid, settings.confidence),
        provenance={
            **of_clip,
            "settings": effective,
            "seed": effective.get("seed"),  # None where nothing is drawn at random
            "confidence": confidence_report(maps, grid),
            "word_scores": words_report,
        },
    )
    prior.validate()
    return prior


def _describe(teacher: Any) -> dict[str, Any]:
    """Model, revision and scheduler for the provenance.

    revision: the hub's commit; None for a folder of one's own, which only its fingerprint tells from others.
    """
    fingerprint = teacher.fingerprint()
    name, _, revision = fingerprint.partition("@")
    settings = {key: value for key, value in teacher.scheduler.config.items() if not key.startswith("_")}
    return {
        "model": name if revision else teacher.folder.name,
        "revision": revision or None,
        "fingerprint": fingerprint,
        # a scheduler made in code may hold arrays; str is enough to tell them apart
        "scheduler": {
            "class": type(teacher.scheduler).__name__, "settings": json.loads(json.dumps(settings, default=str))
        },
    }


def frame_weights(grid: TokenGrid, settings: ExtractionSettings) -> Tensor | float:
    """Factors [F, 1, 1] of mean 1 that make a token's attention the mass of its cell (our decision; METHOD is silent).

    `regrid` carries mass. Without the factors a third of a 9-frame clip's mass would lie in its first frame.
    """
    if settings.frame_weight == "token":
        return 1.0
    seconds = grid.spans.diff(dim=1)[:, 0].float()
    return (seconds / seconds.mean())[:, None, None]


def query_rows(settings: ExtractionSettings, tokens: int, heads: int) -> tuple[int | str, bool]:
    """How many of `tokens` vision rows judge `heads` heads, and whether they are streamed: no map, only its statistics.

    rows: auto keeps the map where it can: heads' energies are then those of their mean map, as the paper has it.
    With head_scope layer_head (`heads` counts each layer's) there is no mean over layers to lose.
    """
    rows, fitting = settings.rows, KEPT_BYTES // (4 * heads * tokens)
    if rows == "auto":
        rows = "all" if tokens < ALL_ROWS_BELOW else AUTO_ROWS
        if rows == AUTO_ROWS and settings.head_scope == "head":
            rows = max(1, min(rows, fitting))
    taken = tokens if rows == "all" else min(rows, tokens)
    return rows, taken >= ALL_ROWS_BELOW or taken > fitting


def _request(
    grids: list[TokenGrid], read: list[TeacherText], settings: ExtractionSettings, layers: int, heads: int
) -> HarvestRequest:
    """What to harvest from a teacher of `layers` × `heads`. Raises RecipeError for layers it does not have."""
    harvested = settings.layers_of(layers)
    judged = heads * (len(harvested) if settings.head_scope == "layer_head" else 1)
    rows, streamed = query_rows(settings, grids[0].num_tokens, judged)
    chosen = sample_rows(grids[0], rows, settings.seed) if settings.head_selection else None
    streamed, mask = streamed and chosen is not None, motion_mask(settings)
    return HarvestRequest(
        text_tokens=max(text.last_token for text in read) + 1,
        rows=chosen,
        row_taker=(lambda clip: HeadAccumulator(grids[clip], mask, chosen)) if streamed else None,
        direction=settings.direction,
        batch_index=range(len(read)),  # the text entries of reconstruct's batch
        layers=harvested,
        head_scope=settings.head_scope,
        memory_columns=settings.memory_columns,
    )


def _check_batch(teacher: Any, clips: Sequence[ClipLike], texts: Sequence[str]) -> None:
    if not clips or len(clips) != len(texts):
        raise ValueError(
            f"extract_priors: one text per clip is needed, got {len(clips)} clips and "
            f"{len(texts)} texts."
        )
    counts = sorted({len(clip.frames) for clip in clips})
    for count in counts:
        teacher.check_frames(count)
    if len(counts) > 1:
        raise ClipError(
            f"Clips of one batch must have the same number of frames, got {counts}. Sample the "
            f"same number from each, or extract them in separate batches."
        )
