"""Single pictures and films of what the page shows, for papers and talks: PNG, SVG and MP4."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from enhancer.runfolder import readable_write_errors
from enhancer.video.codec import read_motion
from enhancer.video.codec.overlay import write_sheet, write_video
from enhancer.visualize.drawing import COLOURS, SCALE_TOP, best_word, frames_of, overlaid, save
from enhancer.visualize.figures import heads_figure, inversion_figure, sample_figure, steps_figure
from enhancer.visualize.views import METRICS, ClipView, HeadsView
from vdm_priors.errors import UserError

TITLE, SCALE = 20, 30  # pixels above a film's panels, and of the colour scale below them
FONT = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 12)


def write_pieces(view: ClipView, folder: Path, word: str | None = None) -> tuple[list[Path], list[str]]:
    """All pieces that the view has what for; their paths, and a sentence for each that could not be made."""
    made: list[Path] = []
    missing: list[str] = []
    with readable_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)

    def piece(name: str, draw: Callable[[], Figure]) -> None:
        try:
            made.extend(save(draw(), folder / name))
        except UserError as error:
            missing.append(f"{name}: {error}")

    piece("words", lambda: sample_figure(view))
    piece("scores", lambda: score_figure(view.heads))
    piece("heads", lambda: heads_figure(view.heads))
    piece("inversion", lambda: inversion_figure(view))
    if view.words and view.maps:
        n = best_word(view, word)
        name = f"map-{n}-{re.sub(r'[^A-Za-z0-9]+', '', view.words[n].text)[:24] or 'word'}"
        piece(name, lambda: steps_figure(view, {one.name: one for one in view.maps}, n))
        made.append(map_film(view, n, folder / f"{name}.mp4"))
    if view.codec is not None and Path(view.video).is_file():
        field = read_motion(view.video, float(view.codec.times[0]), view.codec.duration, workers=1)
        with readable_write_errors(folder):
            write_sheet(field, folder / "codec.png")
            write_video(field, folder / "codec.mp4")
        made += [folder / "codec.png", folder / "codec.mp4"]
    else:
        missing.append("codec: the clip's file is not at hand")
    return made, missing


def score_figure(heads: HeadsView | None) -> Figure:
    """The layer × head map of each metric, selected heads ringed."""
    if heads is None:
        raise UserError("the prior holds no head scores")
    rows, count = heads.selected.shape
    figure = Figure(figsize=(min(16, 1.5 + 0.3 * count * len(METRICS)), 1.2 + 0.26 * rows), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(1, len(METRICS), squeeze=False)[0], METRICS.items(), strict=True):
        image = axis.imshow(heads.metrics[name], cmap=COLOURS, aspect="auto")
        where = np.argwhere(heads.selected)
        axis.scatter(where[:, 1], where[:, 0], s=14, facecolors="white", edgecolors="black", linewidths=0.7)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("head", fontsize=8)
        axis.set_yticks(range(rows), heads.rows if axis is figure.axes[0] else [""] * rows, fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        figure.colorbar(image, ax=axis, shrink=0.8).ax.tick_params(labelsize=7)
    return figure


def map_film(view: ClipView, word: int, path: Path) -> Path:
    """H.264: the word's maps by all sources side by side over the clip, at the clip's pace."""
    frames = frames_of(view)
    panels = [("frames", frames), *((one.name, overlaid(frames, one, word, view.times)) for one in view.maps)]
    step = float(np.diff(view.times).mean()) if len(view.times) > 1 else 1.0
    scale = _scale(sum(values.shape[2] + 4 for _, values in panels))
    with readable_write_errors(path), av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=Fraction(1 / max(step, 1e-3)).limit_denominator(1001), options={"crf": "18"}
        )
        for n in range(len(frames)):
            picture = np.concatenate([_titled(values[n], name) for name, values in panels], axis=1)
            picture = np.concatenate([picture, scale])
            picture = np.pad(
                picture, [(0, side % 2) for side in picture.shape[:2]] + [(0, 0)]
            )  # H.264's colours need even sides
            if n == 0:
                stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def _titled(picture: np.ndarray, title: str) -> np.ndarray:
    sheet = Image.new("RGB", (picture.shape[1] + 4, picture.shape[0] + TITLE), "white")
    sheet.paste(Image.fromarray(picture), (2, TITLE))
    ImageDraw.Draw(sheet).text((4, 2), title, fill="black", font=FONT)
    return np.asarray(sheet)


def _scale(width: int) -> np.ndarray:
    """The maps' colour scale, uint8 [SCALE, width, 3]: density, its ticks at their square roots."""
    sheet = Image.new("RGB", (width, SCALE), "white")
    draw, across = ImageDraw.Draw(sheet), min(256, width // 2)
    colours = (255 * colormaps[COLOURS](np.linspace(0, 1, across))[:, :3]).round().astype(np.uint8)
    sheet.paste(Image.fromarray(np.broadcast_to(colours, (8, across, 3)).copy()), (4, 6))
    for tick in (0, 1, 2, 4, SCALE_TOP):
        name = f"{tick:g}×" if tick < SCALE_TOP else f"≥ {tick:g}× uniform"
        draw.text((4 + across * (tick / SCALE_TOP) ** 0.5, 14), name, fill="black", font=FONT, anchor="ma" if tick else "la")
    return np.asarray(sheet)
