"""What the compressed stream says of a clip's span: vectors, validity, residual, groups of pictures.

Legend: T coded frames, M shown ones, R×C cells.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from enhancer.video.codec import MotionField, Origin, Validity, read_motion
from enhancer.video.codec.residual import energy_map
from enhancer.visualize.views import CodecView

MOST_CELLS = 48  # along the longer side; finer fields are joined
MOST_FRAMES = 3000  # of a span; longer ones are cut
ORIGINS = {
    Origin.NONE: "none",
    Origin.NATIVE: "the stream's own",
    Origin.REENCODED: "of an H.264 encoding made here, not the stream's own",
    Origin.MESTIMATE: "of block matching made here, not the stream's own",
}


def codec_view(video: Path, times: list[float], step: float) -> CodecView:
    """Of the span of the sampled `times` (seconds), each shown by the coded frame then on screen; `step`: seconds from
    the last of them to the end of the span. Raises ClipError as read_motion does."""
    field = read_motion(video, max(0.0, times[0] - 1e-6), times[-1] + max(step, 1e-3), workers=1)
    return view_of(field, times)


def view_of(field: MotionField, times: list[float]) -> CodecView:
    """A field as a page shows it, joined to at most MOST_CELLS cells a side: median velocity, commonest validity."""
    count = min(len(field.times), MOST_FRAMES)
    shown = np.clip(np.searchsorted(field.times[:count], np.asarray(times) + 1e-6, side="right") - 1, 0, count - 1)
    group = max(1, -(-max(field.validity.shape[1:]) // MOST_CELLS))
    rows, columns = _joined(field.row_edges, group), _joined(field.column_edges, group)
    energy = energy_map(field, workers=1)[shown]
    with np.errstate(all="ignore"):
        speed = np.array(
            [m[np.isfinite(m)].mean() if np.isfinite(m).any() else np.nan for m in field.magnitude[:count]]
        )
    notes = list(field.notes)
    if count < len(field.times):
        notes.append(f"only the first {count} of {len(field.times)} coded frames are on the time line")
    return CodecView(
        times=field.times[:count],
        duration=float(field.times[count] if count < len(field.times) else field.duration),
        kinds=[str(kind) for kind in field.kinds[:count]],
        keys=field.keys[:count],
        cuts=field.cuts[:count],
        packet_bytes=field.packet_bytes[:count],
        speed=speed,
        valid_share=field.valid[:count].mean(axis=(1, 2)),
        shown=shown,
        velocity=_blocks(field.velocity[shown], group, _median),
        validity=_blocks(field.validity[shown], group, _commonest),
        residual=np.sqrt(_blocks(energy, group, _mean)),
        row_edges=rows,
        column_edges=columns,
        size=field.size,
        facts=_facts(field),
        notes=notes,
    )


def _joined(edges: np.ndarray, group: int) -> np.ndarray:
    return np.append(edges[:-1:group], edges[-1]) / edges[-1]


def _blocks(values: np.ndarray, group: int, reduce: object) -> np.ndarray:
    """[M, R, C, …] → [M, ⌈R/group⌉, ⌈C/group⌉, …], `reduce` over the cells of each block [M, cells, …]."""
    if group == 1:
        return values
    rows, columns = (range(0, size, group) for size in values.shape[1:3])
    return np.stack(
        [
            np.stack(
                [
                    reduce(values[:, r : r + group, c : c + group].reshape(len(values), -1, *values.shape[3:]))
                    for c in columns
                ],
                axis=1,
            )
            for r in rows
        ],
        axis=1,
    )


def _median(cells: np.ndarray) -> np.ndarray:
    known = np.isfinite(cells).all(axis=-1).any(axis=1)
    out = np.full((len(cells), cells.shape[-1]), np.nan, cells.dtype)
    out[known] = np.nanmedian(cells[known], axis=1)
    return out


def _mean(cells: np.ndarray) -> np.ndarray:
    known = np.isfinite(cells).any(axis=1)
    out = np.full(len(cells), np.nan, cells.dtype)
    out[known] = np.nanmean(cells[known], axis=1)
    return out


def _commonest(cells: np.ndarray) -> np.ndarray:
    """A block with any motion is INTER, since it shows a vector; else what most of it is."""
    counts = np.stack([(cells == kind).sum(axis=1) for kind in Validity], axis=1)
    counts[:, int(Validity.INTER)] *= cells.shape[1] + 1
    return counts.argmax(axis=1).astype(cells.dtype)


def _facts(field: MotionField) -> list[tuple[str, str]]:
    said = field.provenance
    origins = ", ".join(f"{ORIGINS[Origin[name.upper()]]} ({count} frames)" for name, count in said["origins"].items())
    keys = np.flatnonzero(field.keys)
    lengths = np.diff(np.append(keys, len(field.times)))
    groups = f"{len(keys)}, of {_span(lengths)} frames" if len(keys) else "no key frame in this span"
    shares = ", ".join(
        f"{100 * (field.validity == kind).mean():.1f}% {kind.name.lower().replace('_', ' ')}"
        for kind in Validity
        if (field.validity == kind).any()
    )
    return [
        ("stream", f"{said['codec']} {said['profile']}, {said['width']}×{said['height']}"),
        ("vectors", origins),
        ("groups of pictures", groups),
        ("cells", shares),
        ("references", str(said["references"])),
    ]


def _span(lengths: np.ndarray) -> str:
    low, high = int(lengths.min()), int(lengths.max())
    return str(low) if low == high else f"{low} to {high}"
