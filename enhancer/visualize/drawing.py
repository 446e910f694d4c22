"""What figures, pieces and films have in common: maps over frames on one scale, attention between places, saving.

Legend: N frames, y×x pixels, F×H×W' cells.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import FuncNorm, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from PIL import Image

from enhancer.report.pictures import on_frames
from enhancer.runfolder import readable_write_errors
from enhancer.visualize.views import ClipView, HeadsView, MapSet
from vdm_priors.errors import UserError

COLOURS = "viridis"  # perceptually uniform, and readable with any colour vision
STRENGTH = 0.6  # of a map over its picture
SCALE_TOP = 8.0  # times uniform
TILE = 224  # pixels of a drawn frame's shorter side, at least
SHOWN_FRAMES = 6
DPI = 200
RED = "#c00000"


def density_norm(top: float = SCALE_TOP) -> Normalize:
    """The colour follows the density's square root, as on the page."""
    return FuncNorm((lambda v: np.sqrt(np.clip(v, 0, None)), np.square), vmin=0, vmax=top)


def attention_norm() -> LogNorm:
    """Attention between places, times uniform."""
    return LogNorm(vmin=2.0**-8, vmax=2.0**8)


def chosen_frames(view: ClipView, count: int = SHOWN_FRAMES) -> np.ndarray:
    """Up to `count` frames, evenly spread."""
    return np.unique(np.linspace(0, len(view.times) - 1, min(count, len(view.times))).round().astype(int))


def frames_of(view: ClipView) -> np.ndarray:
    """uint8 [N, y, x, 3], small ones enlarged; grey where the clip is not at hand."""
    if view.frames is None:
        rows, columns = view.maps[0].maps.shape[-2:] if view.maps else (3, 4)
        return np.full((len(view.times), TILE, round(TILE * columns / rows), 3), 128, np.uint8)
    height, width = view.frames.shape[1:3]
    factor = max(1, -(-TILE // min(height, width)))
    kind = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    return np.stack(
        [np.asarray(Image.fromarray(frame).resize((width * factor, height * factor), kind)) for frame in view.frames]
    )


def overlaid(frames: np.ndarray, one: MapSet, word: int, times: list[float], top: float = SCALE_TOP) -> np.ndarray:
    """uint8 [N, y, x, 3]: a word's map over the frames; frames stay as they are where no cell is known."""
    values = on_frames(one.maps[word], one.grid, times, frames.shape[1:3])
    level = np.sqrt(np.clip(np.nan_to_num(values), 0, top) / top)
    colours = colormaps[COLOURS](level)[..., :3]
    mixed = (1 - STRENGTH) * frames + STRENGTH * 255 * colours
    return np.where(np.isfinite(values)[..., None], mixed, frames).round().astype(np.uint8)


def best_word(view: ClipView, asked: str | None = None) -> int:
    """The word asked for, or the prior's one of the highest score. Raises UserError for a word that is not there."""
    texts = [word.text for word in view.words]
    if asked is not None:
        if asked not in texts:
            raise UserError(f"The text has no word {asked!r}; it has {', '.join(map(repr, texts))}.")
        return texts.index(asked)
    if not view.words:
        raise UserError(f"{view.name} has no words to draw.")
    return max(range(len(texts)), key=lambda n: (view.words[n].selected, view.words[n].score or 0.0))


def head_picture(view: HeadsView, row: int, head: int) -> np.ndarray | None:
    """Attention between the shown places of all frames [F·n, F·n], times uniform; None where the view has none."""
    for maps in view.maps:
        if row in maps.rows:
            return maps.attention[maps.rows.index(row) * view.selected.shape[1] + head]
    return None


def ranked_heads(view: HeadsView) -> list[tuple[int, int]]:
    """(row, head) by falling score, of the heads that were judged and have a picture."""
    score = view.metrics["score"]
    rows = [row for row in (view.judged or range(len(view.rows))) if head_picture(view, row, 0) is not None]
    found = [(row, head) for row in rows for head in range(score.shape[1]) if np.isfinite(score[row, head])]
    return sorted(found, key=lambda at: -score[at])


def shortened(text: str, most: int = 30) -> str:
    """A word as a label: at most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def not_drawn(text: str) -> list[str]:
    """Characters that the figures' fonts have no picture of; they are drawn as boxes."""
    fonts = [get_font(findfont(name)) for name in ("DejaVu Sans", "DejaVu Sans Mono")]
    return sorted({c for c in text if not c.isspace() and not all(font.get_char_index(ord(c)) for font in fonts)})


def save(figure: Figure, stem: Path) -> list[Path]:
    """PNG and SVG of the same name. Raises UserError where they cannot be written."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    with readable_write_errors(stem), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")  # the command names them (not_drawn)
        stem.parent.mkdir(parents=True, exist_ok=True)
        for path in paths:
            figure.savefig(
                path, dpi=DPI, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None
            )
    return paths
