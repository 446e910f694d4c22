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

import numpy as np
import torch
from torch import Tensor

from enhancer.visualize.views import (
    METRICS, TEACHER, HeadMaps, HeadsView, InversionView, MapSet, WordView, density,
)
from enhancer.visualize.words import frame_curve, word_views
from vdm_priors.errors import ModelError
from vdm_priors.extract import ALL_ROWS_BELOW, ExtractionSettings, frame_weights, run_teacher
from vdm_priors.grid import TokenGrid
from vdm_priors.harvest import Harvest, HarvestRequest, harvest
from vdm_priors.heads import HeadAccumulator, HeadMetrics, RowStatistics
from vdm_priors.prior import MotionPrior
from vdm_priors.selection import TeacherText, motion_mask, read_text, text_maps

JUDGED_BYTES = 2_500_000  # of the judged heads' attention between places, one byte a number
OTHER_BYTES = 1_200_000  # of the other heads'
MOST_PLACES = 256  # of a frame that are shown, at most

OnStep = Callable[[str, int, int], None]


@dataclass
class Look:
    """What was found: maps of all covered words, all heads, inversion; words with their curves."""

    words: list[WordView]
    maps: MapSet
    heads: HeadsView
    inversion: InversionView


def look_again(
    teacher: Any, clip: Any, prior: MotionPrior, settings: ExtractionSettings, *, size: tuple[int, int] | None = None,
    shown_places: Tensor | None = None, share: float = 1.0, on_step: OnStep | None = None,
) -> Look:
    """The teacher's attention behind `prior`, which it made of `clip` with `settings`.

    size: as for extract_priors; shown_places [n]: places of a frame whose rows are kept (default: as many as this clip's
    share of a page can hold). Raises ModelError for a teacher that has other heads than the prior's, and as extract_priors does.
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
    steps = _Steps(grid, settings, shown_places, selected_lh, read, int(share * OTHER_BYTES))
    request = HarvestRequest(
        text_tokens=read.last_token + 1, rows=steps.rows, row_taker=lambda _: steps.row_taker(), batch_index=[0],
        direction=settings.direction, layers=layers, head_scope="layer_head", memory_columns=settings.memory_columns)
    watched = _Watched(teacher, request, steps)

    def told(phase: str, step: int, count: int) -> None:
        if phase == settings.harvest_at:
            steps.keep()
        if on_step is not None:
            on_step(phase, step, count)

    latents = teacher.encode_video(pixels)
    _, trajectory, rebuilt = run_teacher(
        watched, latents, embeds, HarvestRequest(text_tokens=1, batch_index=[0]), settings, told)
    words = word_views(prior, read)
    maps = steps.map_set(prior, words, layers)
    for word, raw in zip(words, steps.word_maps().numpy(), strict=True):
        word.curve = frame_curve(raw, grid)
    return Look(words, maps, steps.heads_view(prior, layers, settings),
                _inversion(teacher, pixels, latents, trajectory, rebuilt))


def places_shown(grid: TokenGrid, units: int, room: int) -> Tensor:
    """Places [n] of a frame, evenly in raster order: as many as `units` maps of F·n by F·n bytes leave room for."""
    places = grid.rows * grid.columns
    count = int((room / units) ** 0.5) // grid.frames
    count = min(max(count, 2), places, MOST_PLACES)
    return torch.linspace(0, places - 1, count).round().long().unique()


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
            f"The prior's heads were chosen among {len(selected)}, and this teacher has {layers} layers of {heads} heads: "
            f"it is another one, or of two stages of which the prior met one. Give the teacher that made the prior.")
    return selected.view(judged, heads).expand(layers, heads)


class _Watched:
    """The teacher, with each forward harvested on its own."""

    def __init__(self, teacher: Any, request: HarvestRequest, steps: _Steps) -> None:
        self._teacher, self._request, self._steps = teacher, request, steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def predict(self, latents: Tensor, t: float, *arguments: Any, **named: Any) -> Tensor:
        with harvest(self._teacher, self._request) as seen:
            predicted = self._teacher.predict(latents, t, *arguments, **named)
        if seen.forwards:  # none for a negative text's call or a refinement, which leave no trace
            self._steps.seen = (seen, t)
        return predicted


class _ShownRows:
    """A RowTaker: rows' statistics, and the attention between the shown cells [h, F·n, F·n]."""

    def __init__(self, accumulator: HeadAccumulator, shown: Tensor, cells: int) -> None:
        self.accumulator, self.shown = accumulator, shown
        self._slot = torch.full((cells,), -1)
        self._slot[shown] = torch.arange(len(shown))
        self.attention: Tensor | None = None

    def add(self, rows_hrs: Tensor, tokens: Tensor) -> None:
        self.accumulator.add(rows_hrs, tokens)
        if self.attention is None:
            self.attention = torch.zeros(len(rows_hrs), len(self.shown), len(self.shown))
        slot = self._slot[tokens.cpu()]
        wanted = slot >= 0
        self.attention[:, slot[wanted]] = rows_hrs[:, wanted.to(rows_hrs.device)][..., self.shown.to(rows_hrs.device)].float().cpu()

    def reads_queries(self, device: torch.device) -> bool:
        return False


class _Steps:
    """Sums over the steps, filled by `keep` after each."""

    def __init__(self, grid: TokenGrid, settings: ExtractionSettings, places: Tensor, selected_lh: Tensor, read: TeacherText,
                 room: int) -> None:
        self.room = room
        self.grid, self.settings, self.places, self.selected, self.read = grid, settings, places, selected_lh, read
        self.mask = motion_mask(settings)
        frames = torch.arange(grid.frames) * grid.rows * grid.columns
        self.shown = (frames[:, None] + places).flatten()
        everything = grid.num_tokens < ALL_ROWS_BELOW
        self.rows = grid.valid.flatten().nonzero().flatten() if everything else self.shown[grid.valid.flatten()[self.shown]]
        self.seen: tuple[Harvest, float] | None = None
        self.names: list[str] = []
        self._steps: list[Tensor] = []  # [W, S] a step
        self._layers: Tensor | None = None  # [L, W, S]
        self._attention: Tensor | None = None  # [L, h, F·n, F·n]
        self._statistics: list[tuple[Tensor, ...]] = []  # a layer: mass, inside, outside, same place
        self._judged: Tensor | None = None  # the rows that they are of
        self._own_frame = True

    def row_taker(self) -> _ShownRows:
        return _ShownRows(HeadAccumulator(self.grid, self.mask, self.rows), self.shown, self.grid.num_tokens)

    def keep(self) -> None:
        """Take the last forward's attention for this step's."""
        harvested, t = self.seen
        takers = harvested.row_takers(0)
        if len(takers) != len(self.selected):
            raise ModelError(f"The teacher ran {len(takers)} of its {len(self.selected)} attention layers in this step: models of "
                             f"two stages are not looked at again.")
        number = len(self.names)
        self.names.append(f"step {number + 1}, t = {t:.4g}")
        words = [tokens for tokens in self.read.tokens if tokens]

        def maps(heads_lh: Tensor) -> Tensor:
            of_ts = text_maps(harvested, 0, heads_lh.flatten(), self.read, self.settings.direction)
            return torch.stack([of_ts[tokens].mean(dim=0) for tokens in words])

        self._steps.append(maps(self.selected))
        only = [self.selected & (torch.arange(len(self.selected)) == layer)[:, None] for layer in range(len(self.selected))]
        layers = torch.stack([maps(one) if one.any() else torch.full_like(self._steps[-1], torch.nan) for one in only])
        attention = torch.stack([taker.attention for taker in takers])
        statistics = [taker.accumulator.statistics() for taker in takers]
        parts = [(s.mass, s.inside, s.outside, s.same_place) for s in statistics]
        if number == 0:
            self._layers, self._attention, self._statistics = layers, attention, parts
            self._judged, self._own_frame = statistics[0].rows, statistics[0].own_frame
        else:
            self._layers += layers
            self._attention += attention
            self._statistics = [tuple(a + b for a, b in zip(*pair, strict=True)) for pair in zip(self._statistics, parts, strict=True)]
        self.seen = None

    def word_maps(self) -> Tensor:
        """[W, F, H, W'] of all covered words, mean over steps, as attention (not weighted by frames)."""
        return torch.stack(self._steps).mean(dim=0).unflatten(1, self.grid.shape)

    def map_set(self, prior: MotionPrior, words: list[WordView], layers: list[int]) -> MapSet:
        """Densities of all covered words; those of the prior's own words are the prior's."""
        weights = torch.as_tensor(frame_weights(self.grid, self.settings))

        def dense(maps: Tensor) -> np.ndarray:
            return density((maps.unflatten(-1, self.grid.shape) * weights).numpy(), self.grid)

        maps = density((self.word_maps() * weights).numpy(), self.grid)
        own = {(word.start, word.end): n for n, word in enumerate(prior.words)}
        stored = density(prior.maps.numpy(), prior.grid)
        for n, word in enumerate(words):
            if (word.start, word.end) in own:
                maps[n] = stored[own[word.start, word.end]]
        return MapSet(
            "teacher", TEACHER, self.grid, maps, dense(torch.stack(self._steps)), self.names,
            dense(self._layers / len(self._steps)), [f"layer {layer}" for layer in layers],
            "selected heads; a layer without one has no map" if not self.selected.all() else "all heads")

    def heads_view(self, prior: MotionPrior, layers: list[int], settings: ExtractionSettings) -> HeadsView:
        """Scores and attention of every head, and of the mean over layers where that was judged."""
        steps = len(self._steps)
        statistics = [RowStatistics(self._judged, *(part / steps for part in parts), grid=self.grid,
                                    own_frame=self._own_frame) for parts in self._statistics]
        attention_lhrc = self._attention / steps
        count, heads = len(layers), attention_lhrc.shape[1]
        by_layer = [s.metrics() for s in statistics]
        metrics = {name: np.stack([getattr(m, name).numpy() for m in by_layer]) for name in ("dfc", "tcs", "dsr")}
        among = HeadMetrics(*(torch.from_numpy(metrics[name].ravel()) for name in ("dfc", "tcs", "dsr")))
        metrics["score"] = among.score().numpy().reshape(count, heads)
        names = [f"layer {layer}" for layer in layers]
        scores = prior.provenance.get("head_scores")
        if settings.head_scope == "layer_head":
            if scores:
                metrics = {name: np.array(scores[name], np.float64).reshape(count, heads) for name in METRICS}
            maps = [self._head_maps(list(range(count)), attention_lhrc.flatten(0, 1), statistics)]
            return HeadsView(names, metrics, self.selected.numpy(), list(range(count)) if scores else [], self.grid, maps, _standing(scores))
        mean = RowStatistics(statistics[0].rows, *(torch.stack([getattr(s, part) for s in statistics]).mean(dim=0)
                             for part in ("mass", "inside", "outside", "same_place")), grid=self.grid,
                             own_frame=statistics[0].own_frame)
        of_mean = mean.metrics()
        first = {name: np.array(scores[name], np.float64) for name in METRICS} if scores else {
            "score": of_mean.score().numpy(), **{name: getattr(of_mean, name).numpy() for name in ("dfc", "tcs", "dsr")}}
        metrics = {name: np.concatenate([first[name][None], metrics[name]]) for name in METRICS}
        selected = np.concatenate([self.selected[:1].numpy() & bool(scores), np.zeros((count, heads), bool)])
        maps = [self._head_maps([0], attention_lhrc.mean(dim=0), [mean])]
        few = places_shown(self.grid, count * heads, self.room)
        if len(few) > 1:
            keep = torch.isin(self.places, few).nonzero().flatten() if len(few) < len(self.places) else torch.arange(len(self.places))
            maps.append(self._head_maps(list(range(1, count + 1)), attention_lhrc.flatten(0, 1), statistics, keep))
        note = f"{_standing(scores)} Layers' sums are standardised among the layers' heads."
        return HeadsView(["mean over layers", *names], metrics, selected, [0] if scores else [], self.grid, maps, note)

    def _head_maps(self, rows: list[int], attention_urc: Tensor, statistics: list[RowStatistics],
                   keep: Tensor | None = None) -> HeadMaps:
        """Of all heads of these rows; `keep`: which of the places."""
        cells = int(self.grid.valid.sum())
        threshold = torch.cat([s.mass.sum(dim=1) / (len(s.rows) * cells) for s in statistics]) * cells
        places, shown = self.places, self.shown
        if keep is not None and len(keep) and len(keep) < len(places):
            index = (torch.arange(self.grid.frames)[:, None] * len(places) + keep).flatten()
            attention_urc, shown, places = attention_urc[:, index][:, :, index], shown[index], places[keep]
        valid = self.grid.valid.flatten()[shown]
        density_urc = torch.where(valid[:, None] & valid, attention_urc * cells, torch.nan)
        mask = self.mask(shown, self.grid)[:, shown]
        return HeadMaps(rows, places.numpy(), density_urc.numpy(), threshold.numpy(), mask.numpy())


def _standing(scores: dict[str, Any] | None) -> str:
    if not scores:
        return "Head selection is off: the prior is the mean over all heads."
    rows, cells = scores.get("rows") or (None, None)
    if rows is None:
        return ""
    kept, count = sum(map(bool, scores["selected"])), len(scores["selected"])
    judged = "all" if rows == cells else f"{rows} of the"
    sure = "" if rows == cells or scores.get("exchanged") is None else f"; another draw of rows would exchange about {scores['exchanged']:.1f}"
    return f"{kept} of {count} heads kept, judged by {judged} {cells} rows{sure}."


def _inversion(teacher: Any, pixels: Tensor, latents: Tensor, trajectory: Any, rebuilt: Tensor | None) -> InversionView:
    frames = _frames(pixels[0])
    if rebuilt is None:
        return InversionView(frames)
    decoded = teacher.decode(rebuilt, pixels.shape[2]).clamp(-1, 1)
    error = float(((decoded - pixels) / 2).square().mean())
    view = InversionView(frames, trajectory.noise[0].float().cpu().numpy(), _frames(decoded[0]),
                         psnr_db=float(-10 * np.log10(max(error, 1e-10))),
                         relative_l2=float((rebuilt - latents).norm() / latents.norm().clamp(min=1e-12)))
    return view


def _frames(pixels_cnyx: Tensor) -> np.ndarray:
    return ((pixels_cnyx + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).cpu().numpy()

