"""Views as JSON and compact bytes: what page.py puts into the page and static/*.js reads.

Maps are one byte a cell, the square root of the density up to CEILING (0: not known); attention between places one
byte, its logarithm; pictures are one JPEG (or PNG, where small) of all frames.

Legend: N frames, W words, F×H×W' cells, U heads, n places.
"""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
from PIL import Image

from enhancer.visualize.views import METRICS, ClipView, CodecView, HeadMaps, HeadsView, InversionView, MapSet

CEILING = 64.0  # times uniform; denser cells are drawn as this
OCTAVES = 8  # of attention between places, above and below uniform
PICTURE = 448  # pixels of a frame's longer side
EXACT = 128 * 128  # pixels of a frame that is kept as it is
LATENT_RANGE = 3.0  # of inverted latents, which are about normal
MAPS_BYTES = 3_300_000  # of a page's maps; layers, then steps are joined in blocks of 2×2 until they fit
VELOCITY_STEPS = 127


class Blobs:
    """The page's binary parts, base64, each in an element of its own, decoded when it is first drawn."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def add(self, data: bytes | np.ndarray) -> int:
        """The part's number."""
        data = np.ascontiguousarray(data).tobytes() if isinstance(data, np.ndarray) else data
        self.parts.append(base64.b64encode(data).decode("ascii"))
        return len(self.parts) - 1


def encode(views: list[ClipView], blobs: Blobs) -> dict[str, Any]:
    """All views as JSON types without NaN."""
    room = MAPS_BYTES // max(len(views), 1)
    return {
        "metrics": METRICS,
        "ceiling": CEILING,
        "octaves": OCTAVES,
        "clips": [_clip(view, blobs, room) for view in views],
    }


def _clip(view: ClipView, blobs: Blobs, room: int) -> dict[str, Any]:
    pictures = None if view.frames is None else _pictures(view.frames, blobs)
    times = view.times or _middles(view.maps[0] if view.maps else None)
    missing: dict[str, list[str]] = {}
    for section, sentence in view.missing:
        missing.setdefault(section, []).append(sentence)
    return {
        "name": view.name,
        "text": view.text,
        "question": view.question,
        "answer": view.answer,
        "video": view.video,
        "times": [round(float(t), 4) for t in times],
        "frames": pictures,
        "facts": [list(map(str, fact)) for fact in view.facts],
        "words": [_word(word) for word in view.words],
        "maps": [_map_set(one, blobs, room) for one in view.maps],
        "heads": view.heads and _heads(view.heads, blobs),
        "inversion": view.inversion and _inversion(view.inversion, view.frames, blobs),
        "codec": view.codec and _codec(view.codec, blobs),
        "missing": missing,
    }


def _middles(one: MapSet | None) -> list[float]:
    """Times of a clip without frames: the middles of its latent frames."""
    return [0.0] if one is None else one.grid.spans.mean(dim=1).tolist()


def _word(word: Any) -> dict[str, Any]:
    return {
        "text": word.text,
        "start": word.start,
        "end": word.end,
        "score": _number(word.score),
        "mean": _number(word.mean),
        "fluctuation": _number(word.fluctuation),
        "selected": bool(word.selected),
        "curve": None if word.curve is None else [_number(value) for value in word.curve],
    }


def _map_set(one: MapSet, blobs: Blobs, room: int) -> dict[str, Any]:
    peaks = [_number(np.nanmax(maps)) if np.isfinite(maps).any() else None for maps in one.maps]
    made = {
        "name": one.name,
        "kind": one.kind,
        "note": one.note,
        "peaks": peaks,
        **_grid(one),
        "all": _levels(one.maps, 1, blobs),
    }
    sizes = {
        "layers": 0 if one.layers is None else one.layers.size,
        "steps": 0 if one.steps is None else one.steps.size,
    }
    blocks = dict.fromkeys(sizes, 1)
    for name in ("layers", "steps") * 4:
        if sum(size / blocks[part] ** 2 for part, size in sizes.items()) + one.maps.size > room:
            blocks[name] *= 2
    for name, names in (("layers", one.layer_names), ("steps", one.step_names)):
        values = getattr(one, name)
        made[name] = None if values is None else {"names": names, **_levels(values, blocks[name], blobs)}
    return made


def _grid(one: MapSet) -> dict[str, Any]:
    grid = one.grid
    return {
        "spans": _rounded(grid.spans.numpy()),
        "rows": _rounded(grid.row_edges.numpy()),
        "columns": _rounded(grid.column_edges.numpy()),
    }


def _levels(values: np.ndarray, block: int, blobs: Blobs) -> dict[str, Any]:
    """Density [..., H, W'] → a part of bytes, in blocks of cells where asked; 0: not known, 1..255: 0..CEILING."""
    if block > 1:
        values = _joined(values, block)
    level = 1 + np.round(254 * np.sqrt(np.clip(np.nan_to_num(values), 0, CEILING) / CEILING))
    return {
        "blob": blobs.add(np.where(np.isfinite(values), level, 0).astype(np.uint8)),
        "block": block,
        "shape": list(values.shape),
    }


def _joined(values: np.ndarray, block: int) -> np.ndarray:
    """Means of block×block cells, of the known ones; the last ones may be smaller."""
    *rest, rows, columns = values.shape
    spread = np.full((*rest, math.ceil(rows / block) * block, math.ceil(columns / block) * block), np.nan, np.float32)
    spread[..., :rows, :columns] = values
    cells = spread.reshape(*rest, spread.shape[-2] // block, block, spread.shape[-1] // block, block)
    known = np.isfinite(cells)
    count = known.sum(axis=(-3, -1))
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, np.where(known, cells, 0).sum(axis=(-3, -1)) / count, np.nan)


# ---- heads ---------------------------------------------------------------------------------------


def _heads(view: HeadsView, blobs: Blobs) -> dict[str, Any]:
    return {
        "rows": view.rows,
        "judged": view.judged,
        "note": view.note,
        "shape": list(view.grid.shape),
        "spans": _rounded(view.grid.spans.numpy()),
        "selected": view.selected.astype(int).tolist(),
        "metrics": {
            name: [[_number(value) for value in row] for row in values] for name, values in view.metrics.items()
        },
        "maps": [_head_maps(maps, view.grid.frames, blobs) for maps in view.maps],
    }


def _head_maps(maps: HeadMaps, frames: int, blobs: Blobs) -> dict[str, Any]:
    """Attention as bytes of its logarithm; which entries of the same place lie above τ, as bits [U, n, F, F]."""
    with np.errstate(divide="ignore"):
        level = 1 + np.round(127 * (np.clip(np.log2(maps.attention), -OCTAVES, OCTAVES) + OCTAVES) / OCTAVES)
    attention = np.where(np.isfinite(maps.attention), level, 0).astype(np.uint8)
    count = len(maps.places)
    blocks = maps.attention.reshape(len(attention), frames, count, frames, count)
    same_ufnf = np.stack([blocks[:, :, place, :, place] for place in range(count)], axis=1)
    with np.errstate(invalid="ignore"):
        above = same_ufnf > maps.threshold[:, None, None, None]
    return {
        "rows": maps.rows,
        "places": maps.places.tolist(),
        "attention": blobs.add(attention),
        "above": blobs.add(np.packbits(above.reshape(len(above), -1), axis=1)),
        "mask": blobs.add(np.packbits(maps.inside)),
        "threshold": [_number(value) for value in maps.threshold],
    }


# ---- inversion and codec -------------------------------------------------------------------------


def _inversion(view: InversionView, shown: np.ndarray | None, blobs: Blobs) -> dict[str, Any]:
    latents = None
    if view.latents is not None:
        values = np.clip((view.latents + LATENT_RANGE) / (2 * LATENT_RANGE), 0, 1)
        latents = {
            "blob": blobs.add((255 * values).round().astype(np.uint8)),
            "shape": list(values.shape),
            "mean": _number(view.latents.mean()),
            "deviation": _number(view.latents.std()),
        }
    psnr = view.frame_psnr()
    own = shown is None or len(shown) != len(view.frames)  # else the clip's own frames serve
    return {
        "frames": _pictures(view.frames, blobs) if own else None,
        "latents": latents,
        "psnr": _number(view.psnr_db),
        "reconstruction": None if view.reconstruction is None else _pictures(view.reconstruction, blobs),
        "frame_psnr": None if psnr is None else [_number(value) for value in psnr],
        "relative_l2": _number(view.relative_l2),
    }


def _codec(view: CodecView, blobs: Blobs) -> dict[str, Any]:
    known = np.isfinite(view.velocity).all(axis=-1)
    fastest = float(np.abs(view.velocity[known]).max()) if known.any() else 1.0
    fastest = max(fastest, 1e-6)
    velocity = np.where(known[..., None], np.round(np.nan_to_num(view.velocity) / fastest * VELOCITY_STEPS) + 128, 0)
    reach = float(np.nanpercentile(view.residual, 99.5)) if np.isfinite(view.residual).any() else 1.0
    reach = max(reach, 1.0)
    residual = np.where(
        np.isfinite(view.residual), 1 + np.round(254 * np.clip(np.nan_to_num(view.residual) / reach, 0, 1)), 0
    )
    return {
        "times": _rounded(view.times),
        "duration": _number(view.duration),
        "kinds": "".join(view.kinds),
        "keys": np.flatnonzero(view.keys).tolist(),
        "cuts": np.flatnonzero(view.cuts).tolist(),
        "bytes": view.packet_bytes.astype(int).tolist(),
        "speed": [_number(v) for v in view.speed],
        "valid": [_number(v) for v in view.valid_share],
        "shown": view.shown.tolist(),
        "rows": _rounded(view.row_edges),
        "columns": _rounded(view.column_edges),
        "fastest": _number(fastest),
        "reach": _number(reach),
        "velocity": blobs.add(velocity.astype(np.uint8)),
        "validity": blobs.add(view.validity.astype(np.uint8)),
        "residual": blobs.add(residual.astype(np.uint8)),
        "width": view.size[1],
        "facts": [list(map(str, fact)) for fact in view.facts],
        "notes": view.notes,
    }


# ---- pictures and numbers ------------------------------------------------------------------------


def _pictures(frames: np.ndarray, blobs: Blobs) -> dict[str, Any]:
    """All frames in one picture, row by row; tiles of whole JPEG blocks, so that neighbours do not bleed."""
    count, height, width, _ = frames.shape
    factor = min(1.0, PICTURE / max(height, width))
    exact = height * width <= EXACT
    size = (height, width) if exact else tuple(max(8, round(side * factor / 8) * 8) for side in (height, width))
    columns = math.ceil(math.sqrt(count))
    sheet = Image.new("RGB", (columns * size[1], math.ceil(count / columns) * size[0]))
    for n, frame in enumerate(frames):
        tile = Image.fromarray(frame)
        if tile.size != size[::-1]:
            tile = tile.resize(size[::-1], Image.Resampling.LANCZOS)
        sheet.paste(tile, (n % columns * size[1], n // columns * size[0]))
    buffer = io.BytesIO()
    if exact:
        sheet.save(buffer, "PNG", optimize=True)
    else:
        sheet.save(buffer, "JPEG", quality=80, subsampling=0)
    return {
        "blob": blobs.add(buffer.getvalue()),
        "type": "image/png" if exact else "image/jpeg",
        "count": count,
        "columns": columns,
        "height": size[0],
        "width": size[1],
    }


def _number(value: Any) -> float | None:
    """A number of five digits, None for what is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{float(value):.5g}")


def _rounded(values: np.ndarray) -> list:
    return np.round(values.astype(np.float64), 5).tolist()
