"""The figures of the paper's supplement, for one's own clip (arXiv 2606.06853, supplement, Figures 1 to 5).

1 steps of inversion and denoising, and shares of heads    2 two heads from near
3 a training sample: words, scores, maps                   4 vision-to-vision maps of heads by their scores
5 original, inverted noise, reconstruction
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure, SubFigure

from enhancer.visualize.drawing import (
    COLOURS,
    RED,
    attention_norm,
    best_word,
    chosen_frames,
    density_norm,
    frames_of,
    head_picture,
    overlaid,
    ranked_heads,
    save,
    shortened,
)
from enhancer.visualize.views import ClipView, HeadsView, MapSet
from vdm_priors.errors import UserError

FIGURES = (1, 2, 3, 4, 5)
STEPS = (2, 5, 10)
RATIOS = (0.25, 0.5, 0.75)
NEAR = 100  # places of a frame, of Figure 2
MOST_HEADS = 12
MOST_SCORES = 6  # words of each kind in Figure 3's table, as in the paper
TEXT = 8.5  # points of Figure 3's text, in a fixed pitch
CHARACTER = 0.602 * TEXT  # points that a character takes


def steps_figure(view: ClipView, variants: dict[str, MapSet], word: int) -> Figure:
    """Figure 1: the clip, and the word's map for each variant of extraction (a name → its maps)."""
    frames, chosen = frames_of(view), chosen_frames(view)
    rows = {"original": frames, **{name: overlaid(frames, one, word, view.times) for name, one in variants.items()}}
    return _strips(
        {name: values[chosen] for name, values in rows.items()},
        [f"{view.times[n]:.2f} s" for n in chosen],
        f"“{shortened(view.words[word].text)}”",
        scale=True,
    )


def near_figure(heads: HeadsView) -> Figure:
    """Figure 2: the best and the worst head, attention between the first places of each frame."""
    ranked = _ranked(heads)
    figure = Figure(figsize=(9, 4.9), layout="constrained")
    for axis, at in zip(figure.subplots(1, 2), (ranked[0], ranked[-1]), strict=True):
        image = _draw_head(axis, heads, at)
    figure.colorbar(image, ax=figure.axes, label="attention, times uniform", shrink=0.8)
    _name_axes(figure)
    return figure


def heads_figure(heads: HeadsView) -> Figure:
    """Figure 4: heads from the highest score to the lowest, selected ones in red."""
    ranked = _ranked(heads)
    shown = [
        ranked[n] for n in np.unique(np.linspace(0, len(ranked) - 1, min(MOST_HEADS, len(ranked))).round().astype(int))
    ]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2.9 * columns + 1, 3.15 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, at in zip(axes, shown, strict=False):
        image = _draw_head(axis, heads, at)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    figure.colorbar(image, ax=list(axes), label="attention, times uniform", shrink=0.7)
    _name_axes(figure)
    return figure


def sample_figure(view: ClipView) -> Figure:
    """Figure 3: the text with the selected words in red, scores of words, and two words' aggregated maps."""
    scored = sorted((word for word in view.words if word.score is not None), key=lambda word: -word.score)
    if not scored or not view.maps:
        raise UserError(
            f"Figure 3 shows motion scores and maps, and {view.name} lacks them: its prior is of no "
            f"video diffusion model."
        )
    teacher = next((one for one in view.maps if one.kind == "teacher"), view.maps[0])
    order = sorted(
        (n for n, word in enumerate(view.words) if word.selected), key=lambda n: -(view.words[n].score or 0)
    )[:2]
    frames, chosen = frames_of(view), chosen_frames(view)
    height, width = frames.shape[1:3]
    tall = 1.6 * height / width
    wide = 1.6 * len(chosen) + 1.2
    lines = 0.25 + 0.19 * (1 + int(len(view.text) * CHARACTER / (66 * wide)))
    figure = Figure(figsize=(wide, lines + 1.2 + tall * (1 + len(order))), layout="constrained")
    text, table, strips = figure.subfigures(3, 1, height_ratios=[lines, 1.2, tall * (1 + len(order))])
    _write_text(text, view, 0.92 * wide)
    _score_table(table, scored)
    rows = [("frames", frames)]
    rows += [(f"“{shortened(view.words[n].text)}”", overlaid(frames, teacher, n, view.times)) for n in order]
    _draw_strips(strips, [(name, values[chosen]) for name, values in rows], [""] * len(chosen), scale=bool(order))
    return figure


def inversion_figure(view: ClipView) -> Figure:
    """Figure 5: the clip, the noise it was inverted to, and its reconstruction with each frame's PSNR."""
    found = view.inversion
    if found is None or found.latents is None or found.reconstruction is None:
        raise UserError(
            f"Figure 5 shows an inversion, and none of {view.name} is at hand: the teacher must be asked again."
        )
    chosen, psnr = chosen_frames(view), found.frame_psnr()
    shown = (np.clip(found.latents[:, :3] + 3, 0, 6) / 6 * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    latents = shown[(chosen * len(shown) // max(len(view.times), 1)).clip(0, len(shown) - 1)]
    rows = {
        "original": found.frames[chosen],
        "inverted to noise": latents,
        "reconstruction": found.reconstruction[chosen],
    }
    below = [f"{view.times[n]:.2f} s" + ("" if psnr is None else f"\n{psnr[n]:.1f} dB") for n in chosen]
    return _strips(rows, below, "")


def _ranked(heads: HeadsView | None) -> list[tuple[int, int]]:
    ranked = [] if heads is None else ranked_heads(heads)
    if not ranked:
        raise UserError(
            "This figure shows heads' attention, and none is at hand: the prior's teacher and clip are needed."
        )
    return ranked


def _draw_head(axis: object, heads: HeadsView, at: tuple[int, int]) -> object:
    picture = np.clip(head_picture(heads, *at), 2.0**-8, None)
    image = axis.imshow(picture, cmap=COLOURS, norm=attention_norm(), interpolation="nearest")
    frames = heads.grid.frames
    ticks = (np.arange(frames) + 0.5) * len(picture) / frames - 0.5
    step = max(1, frames // 7)
    axis.set_xticks(ticks[::step], np.arange(1, frames + 1)[::step], fontsize=7)
    axis.set_yticks(ticks[::step], np.arange(1, frames + 1)[::step], fontsize=7)
    axis.set_title(
        f"{heads.rows[at[0]]}, head {at[1]}: {heads.metrics['score'][at]:.2f}",
        fontsize=9,
        color=RED if heads.selected[at] else "black",
    )
    return image


def _name_axes(figure: Figure) -> None:
    figure.supxlabel("attended latent frame, its places in raster order", fontsize=8)
    figure.supylabel("latent frame that attends", fontsize=8)


def _strips(rows: dict[str, np.ndarray], below: list[str], title: str, scale: bool = False) -> Figure:
    """A row of frames each, named at the left."""
    count = len(below)
    first = next(iter(rows.values()))
    ratio = first.shape[1] / first.shape[2]
    figure = Figure(figsize=(1.7 * count + 1.2, (1.7 * ratio + 0.12) * len(rows) + 0.6), layout="constrained")
    _draw_strips(figure, list(rows.items()), below, scale)
    if title:
        figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def _draw_strips(
    part: Figure | SubFigure, rows: list[tuple[str, np.ndarray]], below: list[str], scale: bool
) -> None:
    """Rows of frames with their names, times `below` the last; scale: with the maps' colour bar."""
    axes = part.subplots(len(rows), len(below), squeeze=False)
    for line, (name, values) in zip(axes, rows, strict=True):
        for axis, picture in zip(line, values, strict=True):
            _picture(axis, picture)
        line[0].set_ylabel(name, fontsize=9, parse_math=False)
    for axis, text in zip(axes[-1], below, strict=True):
        axis.set_xlabel(text, fontsize=8)
    if scale:
        bar = part.colorbar(
            ScalarMappable(density_norm(), COLOURS), ax=list(axes.ravel()), shrink=0.6, ticks=[0, 1, 2, 4, 8]
        )
        bar.set_label("times uniform", fontsize=8)


def _picture(axis: object, picture: np.ndarray) -> None:
    axis.imshow(picture, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])


def _write_text(part: object, view: ClipView, width: float) -> None:
    """The text word by word, so that each has its own colour; `width`: inches that lines may fill."""
    axis = part.subplots()
    axis.set_axis_off()
    most = int(72 * width / CHARACTER)
    pieces, done = [], 0
    for word in view.words:
        pieces += [(view.text[done : word.start], False), (view.text[word.start : word.end], word.selected)]
        done = word.end
    pieces += [(view.text[done:], False)]
    parts = [(piece[at : at + most], selected) for piece, selected in pieces for at in range(0, len(piece), most)]
    column, line = 0, 0
    for piece, selected in parts:
        if column + len(piece) > most:
            column, line = 0, line + 1
        axis.annotate(
            piece.replace("\n", " "),
            (0, 1),
            (column * CHARACTER, -13 * line),
            xycoords="axes fraction",
            textcoords="offset points",
            family="monospace",
            fontsize=TEXT,
            va="top",
            color=RED if selected else "black",
            parse_math=False,
        )
        column += len(piece)


def _score_table(part: object, scored: list) -> None:
    """Standardised scores of up to six selected and six other words, as in the paper."""
    axis = part.subplots()
    axis.set_axis_off()
    scores = np.array([word.score for word in scored])
    level = dict(zip(map(id, scored), (scores - scores.mean()) / (scores.std() or 1), strict=True))
    groups = {
        "selected": [word for word in scored if word.selected][:MOST_SCORES],
        "not selected": [word for word in scored if not word.selected][:MOST_SCORES],
    }
    columns, rows = max(map(len, groups.values())), []
    for name, chosen in groups.items():
        empty = [""] * (columns - len(chosen))
        rows.append([name, *(shortened(word.text, 14) for word in chosen), *empty])
        rows.append(["score", *(f"{level[id(word)]:.2f}" for word in chosen), *empty])
    table = axis.table(rows, loc="center", cellLoc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(8.5)
    for cell in table.get_celld().values():
        cell.get_text().set_parse_math(False)


def first_places(rows: int, columns: int) -> torch.Tensor:
    """The places of Figure 2: the first hundred of a frame."""
    return torch.arange(min(NEAR, rows * columns))


def draw_figure(
    number: int,
    view: ClipView,
    stem: Path,
    word: str | None,
    variants: Callable[[], dict[str, MapSet]],
    near: Callable[[], HeadsView],
) -> list[Path]:
    """Draws one figure as PNG and SVG. variants, near: what Figures 1 and 2 ask the teacher for. Raises UserError for
    what the clip lacks."""
    made = {
        1: lambda: steps_figure(view, variants(), best_word(view, word)),
        2: lambda: near_figure(near()),
        3: lambda: sample_figure(view),
        4: lambda: heads_figure(view.heads),
        5: lambda: inversion_figure(view),
    }[number]()
    return save(made, stem)
