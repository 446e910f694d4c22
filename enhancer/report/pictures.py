"""Frames, attention maps and latents as small pictures in data: URIs.

Legend: N sampled frames, F H W token grid (frames, rows, columns), h w pixels of one tile.
A strip is N tiles side by side. Maps are drawn as density: times the mean over the grid's valid
volume (1 = uniform), so that grids of different cell sizes share one colour scale.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from PIL import Image

from vdm_priors.grid import TokenGrid

TILE_HEIGHT, TILE_WIDTH = 112, 150
COLOURS = "magma"
SHADES = 254  # palette entry 0 is transparent
OPACITY = (0.40, 0.82)  # of the lowest and of the highest value: low attention darkens, high glows
BACKDROP = 128  # the grey that the scale bar lies on


def tile_size(height: int, width: int) -> tuple[int, int]:
    """Pixels (h, w) of one tile: the clip's aspect within TILE_HEIGHT × TILE_WIDTH."""
    scale = min(TILE_HEIGHT / height, TILE_WIDTH / width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def frame_strip(frames: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """uint8 [N, H, W, 3] → [h, N·w, 3], bicubic."""
    h, w = tile
    tiles = [np.asarray(Image.fromarray(frame).resize((w, h), Image.Resampling.BICUBIC)) for frame in frames]
    return np.concatenate(tiles, axis=1)


def latent_strip(latents: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """Latents [F, C, h, w] → uint8 strip: three channels as red, green, blue; ±3 is the range."""
    shown = latents[:, :3].astype(np.float64)
    shown = np.concatenate([shown, np.repeat(shown[:, -1:], 3 - shown.shape[1], axis=1)], axis=1)
    pixels = np.clip((shown + 3) / 6, 0, 1).transpose(0, 2, 3, 1)
    h, w = tile
    images = [Image.fromarray((255 * image).round().astype(np.uint8)) for image in pixels]
    return np.concatenate([np.asarray(i.resize((w, h), Image.Resampling.NEAREST)) for i in images], axis=1)


def difference_strip(a: np.ndarray, b: np.ndarray, tile: tuple[int, int], gain: float = 4.0) -> np.ndarray:
    """|a − b| × gain of two clips uint8 [N, H, W, 3], as a strip."""
    difference = np.abs(a.astype(np.int16) - b.astype(np.int16)) * gain
    return frame_strip(np.clip(difference, 0, 255).astype(np.uint8), tile)


def density(values: np.ndarray, grid: TokenGrid) -> np.ndarray | None:
    """Mass [F, H, W] → times uniform [F, H, W], NaN on invalid cells; None where there is no mass."""
    spans, rows, columns, valid = _edges(grid)
    volume = (spans[:, 1] - spans[:, 0])[:, None, None] * np.diff(rows)[:, None] * np.diff(columns)
    mass = np.where(valid, values.astype(np.float64), 0.0)
    if not np.isfinite(mass).all() or mass.sum() <= 0 or not valid.any():
        return None
    uniform = np.where(valid, volume, 0.0) / volume[valid].sum()
    return np.where(valid, mass / mass.sum() / np.where(valid, uniform, 1.0), np.nan)


def on_frames(
    values: np.ndarray, grid: TokenGrid, times: Sequence[float], tile: tuple[int, int]
) -> np.ndarray:
    """A map [F, H, W] → [N, h, w] at the sampled times (seconds); NaN where no cell lies."""
    spans, rows, columns, _ = _edges(grid)
    h, w = tile
    row = np.searchsorted(rows, (np.arange(h) + 0.5) / h, side="right") - 1
    column = np.searchsorted(columns, (np.arange(w) + 0.5) / w, side="right") - 1
    seen = ((row >= 0) & (row < values.shape[1]))[:, None] & ((column >= 0) & (column < values.shape[2]))
    row, column = np.clip(row, 0, values.shape[1] - 1), np.clip(column, 0, values.shape[2] - 1)
    out = np.full((len(times), h, w), np.nan)
    for n, time in enumerate(times):
        inside = np.flatnonzero((spans[:, 0] <= time) & (time < spans[:, 1]))
        if len(inside):
            out[n] = np.where(seen, values[inside[0]][row][:, column], np.nan)
    return out


def top_of_scale(maps: Sequence[np.ndarray]) -> float:
    """Upper end of the colour scale, times uniform: a round number near the 99th percentile."""
    values = [m[np.isfinite(m)] for m in maps]
    reach = float(np.percentile(np.concatenate(values), 99)) if values else 2.0
    return next((float(top) for top in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48) if top >= reach), 64.0)


def heat_uri(values: np.ndarray, top: float) -> str:
    """See-through picture of values [N, h, w], times uniform; the colour follows the square root."""
    strip = np.concatenate(list(values), axis=1)
    level = np.sqrt(np.clip(np.nan_to_num(strip), 0, top) / top)
    index = np.where(np.isfinite(strip), 1 + np.round(level * (SHADES - 1)), 0).astype(np.uint8)
    picture = Image.fromarray(index, mode="P")
    colours, opacity = _palette()
    picture.putpalette(np.concatenate([np.zeros((1, 3), np.uint8), colours]).tobytes())
    return _uri(picture, "PNG", transparency=bytes([0, *opacity]), optimize=True)


def scale_uri() -> str:
    """The colour scale as it looks over middle grey, 254 × 1 pixels."""
    colours, opacity = _palette()
    part = opacity[:, None] / 255
    return _uri(
        Image.fromarray((part * colours + (1 - part) * BACKDROP).round().astype(np.uint8)[None]), "PNG"
    )


def scale_ticks(top: float) -> list[tuple[float, str]]:
    """(place from 0 to 1, label) along the scale bar."""
    values = [0, 1, *(v for v in (2, 4, 8, 16, 32) if v < 0.75 * top and top >= 2 * v), top]
    return [(math.sqrt(v / top), f"≥ {v:g}×" if v == top else f"{v:g}×") for v in values]


def picture_uri(strip: np.ndarray, *, exact: bool = False) -> str:
    """A strip [h, w, 3] uint8: JPEG, or PNG where every pixel matters."""
    picture = Image.fromarray(strip)
    return _uri(picture, "PNG", optimize=True) if exact else _uri(picture, "JPEG", quality=84, optimize=True)


def score_shade(level: float) -> tuple[str, str]:
    """Background and text colour of a word whose score is `level` of the highest (0 to 1); the text is black or white,
    whichever reads better (a contrast of 4.58 at least; WCAG 2.2, relative luminance)."""
    shade = np.array(colormaps[f"{COLOURS}_r"](0.02 + 0.60 * min(max(level, 0.0), 1.0))[:3])
    linear = np.where(shade <= 0.04045, shade / 12.92, ((shade + 0.055) / 1.055) ** 2.4)
    colour = "#" + "".join(f"{round(255 * part):02x}" for part in shade)
    return colour, "#000000" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "#ffffff"


def _edges(grid: TokenGrid) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return grid.spans.numpy(), grid.row_edges.numpy(), grid.column_edges.numpy(), grid.valid.numpy()


def _palette() -> tuple[np.ndarray, np.ndarray]:
    """Colours uint8 [SHADES, 3] and opacities uint8 [SHADES]."""
    level = np.linspace(0, 1, SHADES)
    colours = (255 * colormaps[COLOURS](level)[:, :3]).round().astype(np.uint8)
    low, high = OPACITY
    return colours, (255 * (low + (high - low) * level)).round().astype(np.uint8)


def _uri(picture: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
