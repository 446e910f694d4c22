"""One picture of several sources' maps of the same clips: a column a sampled frame, a row a source, one colour scale.

Each map is drawn on its own cells as density, times uniform, so that sources of different grids share the scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from enhancer.agreement import words_map
from enhancer.agreement_run import Case, Measured, short_label
from enhancer.report.pictures import COLOURS, density, on_frames, scale_ticks, tile_size, top_of_scale
from enhancer.video.clip import FrameCache, Sampling
from enhancer.video.footage import files_of
from vdm_priors.errors import SampleError
from vdm_priors.grid import TokenGrid

CLIPS, FRAMES = 3, 9  # shown, at most
UNKNOWN = "#8a8f98"  # cells that a source knows nothing of
TILE, LEFT, GAP = 0.72, 1.5, 0.34  # inches: a tile's side, the names, a clip's heading


def draw_sources(measured: Measured, sampling: Sampling, path: Path) -> list[str]:
    """Writes the PNG and returns the ids of the clips in it: of each kind of target motion (without a ground truth: of
    each file) the first that most sources have, up to CLIPS. Raises SampleError where there is no clip to show."""
    shown = _chosen(measured)
    if not shown:
        raise SampleError("no source has a prior of any clip, so there is nothing to draw")
    blocks = [_rows(measured, case, sampling) for case in shown]
    top = top_of_scale([tiles for rows in blocks for _, tiles in rows if tiles.ndim == 3])
    columns = max(len(tiles) for rows in blocks for _, tiles in rows)
    lines = [TILE * min(1.0, rows[0][1].shape[1] / rows[0][1].shape[2]) + 0.04 for rows in blocks]  # a row's height
    width = LEFT + TILE * columns + 0.2
    height = sum(line * len(rows) for line, rows in zip(lines, blocks, strict=True)) + GAP * len(blocks) + 0.7
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    norm, colours = PowerNorm(0.5, 0, top, clip=True), colormaps[COLOURS].with_extremes(bad=UNKNOWN)
    y = height
    for case, rows, line in zip(shown, blocks, lines, strict=True):
        y -= GAP
        title = f"{case.sample.id}: {case.sample.question}  ({', '.join(case.groups[1:3])})".removesuffix("  ()")
        figure.text(0.1 / width, (y + 0.08) / height, title, fontsize=8.5, weight="bold")
        for name, tiles in rows:
            y -= line
            figure.text((LEFT - 0.1) / width, (y + line / 2) / height, name, fontsize=8, ha="right", va="center")
            for n, tile in enumerate(tiles):
                axes = figure.add_axes([(LEFT + n * TILE) / width, (y + 0.02) / height, (TILE - 0.04) / width,
                                        (line - 0.04) / height])
                axes.set_axis_off()
                image = axes.imshow(tile, interpolation="nearest") if tile.ndim == 3 else axes.imshow(
                    np.ma.masked_invalid(tile), cmap=colours, norm=norm, interpolation="nearest")
    bar = figure.add_axes([LEFT / width, 0.42 / height, TILE * min(columns, 5) / width, 0.12 / height])
    ticks = scale_ticks(top)
    scale = figure.colorbar(image, cax=bar, orientation="horizontal", ticks=[top * at**2 for at, _ in ticks])
    scale.ax.set_xticklabels([label for _, label in ticks], fontsize=7)
    figure.text((LEFT + TILE * min(columns, 5) + 0.15) / width, 0.44 / height,
                "times uniform; grey: not known", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(str(path))
    return [case.sample.id for case in shown]


def _chosen(measured: Measured) -> list[Case]:
    having = {key: sum(key in of for of in measured.priors.values()) for key in measured.cases}
    chosen: dict[Any, Case] = {}
    for most in sorted(set(having.values()) - {0}, reverse=True):
        for key, case in measured.cases.items():
            kind = case.groups[2] if case.truth is not None else files_of(case.sample.video)
            if having[key] == most and kind not in chosen and len(chosen) < CLIPS:
                chosen[kind] = case
    return list(chosen.values())


def _rows(measured: Measured, case: Case, sampling: Sampling) -> list[tuple[str, np.ndarray]]:
    """(name, tiles): frames [N, h, w, 3] uint8, then maps [N, h, w] times uniform, NaN where not known."""
    clip = FrameCache().get(case.sample.video, sampling)
    at = np.unique(np.linspace(0, len(clip.frames) - 1, min(FRAMES, len(clip.frames))).round().astype(int))
    frames, seconds = clip.frames[at], case.seconds[at]
    tile = tile_size(*frames.shape[1:3])
    rows = [("frames", frames)]
    if case.truth is not None:
        rows.append(("ground truth", _tiles(case.truth.mass, case.grid, seconds, tile)))
    for label, priors in measured.priors.items():
        try:
            prior = priors[case.sample.id]
            rows.append((short_label(label), _tiles(words_map(prior, case.words).numpy(), prior.grid, seconds, tile)))
        except (KeyError, SampleError):
            rows.append((f"{short_label(label)}: none", np.full((len(at), *tile), np.nan)))
    return rows


def _tiles(mass: np.ndarray, grid: TokenGrid, seconds: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    return on_frames(density(mass, grid), grid, seconds, tile)
