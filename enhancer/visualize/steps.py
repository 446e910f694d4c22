"""What the forwards of a second look add up to: maps of every step and layer, attention and scores of every head.

Legend: T text tokens, W words, F×H×W' the teacher's grid of S cells, L layers, h heads of a layer, U heads of some rows
of the head map, n places of a frame, R query rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from enhancer.visualize.views import METRICS, TEACHER, HeadMaps, HeadsView, MapSet, WordView, density
from vdm_priors.errors import ModelError
from vdm_priors.extract import ALL_ROWS_BELOW, ExtractionSettings, frame_weights
from vdm_priors.grid import TokenGrid
from vdm_priors.harvest import Harvest
from vdm_priors.heads import HeadAccumulator, HeadMetrics, RowStatistics
from vdm_priors.prior import MotionPrior
from vdm_priors.selection import TeacherText, motion_mask, text_maps

MOST_PLACES = 256  # of a frame that are shown, at most


def places_shown(grid: TokenGrid, units: int, room: int) -> Tensor:
    """Places [n] of a frame, evenly in raster order: as many as `units` maps of F·n by F·n bytes leave room for."""
    places = grid.rows * grid.columns
    count = int((room / units) ** 0.5) // grid.frames
    count = min(max(count, 2), places, MOST_PLACES)
    return torch.linspace(0, places - 1, count).round().long().unique()


class ShownRows:
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
        self.attention[:, slot[wanted]] = (
            rows_hrs[:, wanted.to(rows_hrs.device)][..., self.shown.to(rows_hrs.device)].float().cpu()
        )

    def reads_queries(self, device: torch.device) -> bool:
        return False


class Steps:
    """Sums over the steps, filled by `keep` after each."""

    def __init__(
        self,
        grid: TokenGrid,
        settings: ExtractionSettings,
        places: Tensor,
        selected_lh: Tensor,
        read: TeacherText,
        room: int,
    ) -> None:
        self.room = room
        self.grid, self.settings, self.places, self.selected, self.read = grid, settings, places, selected_lh, read
        self.mask = motion_mask(settings)
        frames = torch.arange(grid.frames) * grid.rows * grid.columns
        self.shown = (frames[:, None] + places).flatten()
        everything = grid.num_tokens < ALL_ROWS_BELOW
        self.rows = (
            grid.valid.flatten().nonzero().flatten() if everything else self.shown[grid.valid.flatten()[self.shown]]
        )
        self.seen: tuple[Harvest, float] | None = None
        self.names: list[str] = []
        self._steps: list[Tensor] = []  # [W, S] a step
        self._layers: Tensor | None = None  # [L, W, S]
        self._attention: Tensor | None = None  # [L, h, F·n, F·n]
        self._statistics: list[tuple[Tensor, ...]] = []  # a layer: mass, inside, outside, same place
        self._judged: Tensor | None = None  # the rows that they are of
        self._own_frame = True

    def row_taker(self) -> ShownRows:
        return ShownRows(HeadAccumulator(self.grid, self.mask, self.rows), self.shown, self.grid.num_tokens)

    def keep(self) -> None:
        """Take the last forward's attention for this step's."""
        harvested, t = self.seen
        takers = harvested.row_takers(0)
        if len(takers) != len(self.selected):
            raise ModelError(
                f"The teacher ran {len(takers)} of its {len(self.selected)} attention layers in this step: models of "
                f"two stages are not looked at again."
            )
        number = len(self.names)
        self.names.append(f"step {number + 1}, t = {t:.4g}")
        words = [tokens for tokens in self.read.tokens if tokens]

        def maps(heads_lh: Tensor) -> Tensor:
            of_ts = text_maps(harvested, 0, heads_lh.flatten(), self.read, self.settings.direction)
            return torch.stack([of_ts[tokens].mean(dim=0) for tokens in words])

        self._steps.append(maps(self.selected))
        only = [
            self.selected & (torch.arange(len(self.selected)) == layer)[:, None] for layer in range(len(self.selected))
        ]
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
            self._statistics = [
                tuple(a + b for a, b in zip(*pair, strict=True)) for pair in zip(self._statistics, parts, strict=True)
            ]
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
            "teacher",
            TEACHER,
            self.grid,
            maps,
            dense(torch.stack(self._steps)),
            self.names,
            dense(self._layers / len(self._steps)),
            [f"layer {layer}" for layer in layers],
            "selected heads; a layer without one has no map" if not self.selected.all() else "all heads",
        )

    def heads_view(self, prior: MotionPrior, layers: list[int], settings: ExtractionSettings) -> HeadsView:
        """Scores and attention of every head, and of the mean over layers where that was judged."""
        steps = len(self._steps)
        statistics = [
            RowStatistics(self._judged, *(part / steps for part in parts), grid=self.grid, own_frame=self._own_frame)
            for parts in self._statistics
        ]
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
            return HeadsView(
                names,
                metrics,
                self.selected.numpy(),
                list(range(count)) if scores else [],
                self.grid,
                maps,
                _standing(scores),
            )
        mean = RowStatistics(
            statistics[0].rows,
            *(
                torch.stack([getattr(s, part) for s in statistics]).mean(dim=0)
                for part in ("mass", "inside", "outside", "same_place")
            ),
            grid=self.grid,
            own_frame=statistics[0].own_frame,
        )
        of_mean = mean.metrics()
        first = (
            {name: np.array(scores[name], np.float64) for name in METRICS}
            if scores
            else {
                "score": of_mean.score().numpy(),
                **{name: getattr(of_mean, name).numpy() for name in ("dfc", "tcs", "dsr")},
            }
        )
        metrics = {name: np.concatenate([first[name][None], metrics[name]]) for name in METRICS}
        selected = np.concatenate([self.selected[:1].numpy() & bool(scores), np.zeros((count, heads), bool)])
        maps = [self._head_maps([0], attention_lhrc.mean(dim=0), [mean])]
        few = places_shown(self.grid, count * heads, self.room)
        if len(few) > 1:
            keep = (
                torch.isin(self.places, few).nonzero().flatten()
                if len(few) < len(self.places)
                else torch.arange(len(self.places))
            )
            maps.append(self._head_maps(list(range(1, count + 1)), attention_lhrc.flatten(0, 1), statistics, keep))
        note = f"{_standing(scores)} Layers' sums are standardised among the layers' heads."
        return HeadsView(["mean over layers", *names], metrics, selected, [0] if scores else [], self.grid, maps, note)

    def _head_maps(
        self, rows: list[int], attention_urc: Tensor, statistics: list[RowStatistics], keep: Tensor | None = None
    ) -> HeadMaps:
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
    sure = (
        ""
        if rows == cells or scores.get("exchanged") is None
        else f"; another draw of rows would exchange about {scores['exchanged']:.1f}"
    )
    return f"{kept} of {count} heads kept, judged by {judged} {cells} rows{sure}."
