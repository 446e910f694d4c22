"""One MotionField of all frames' cells: a row for each frame shown in the time that was asked for, decoded or not."""

from __future__ import annotations

from collections import Counter

import av
import numpy as np

from enhancer.video.codec.blocks import CELL, grid_shape
from enhancer.video.codec.cells import FrameMotion, empty_cells
from enhancer.video.codec.cuts import cuts_in_blocks, cuts_in_pictures
from enhancer.video.codec.field import MotionField, Origin, Validity, edges, turned_upright
from enhancer.video.codec.streams import ANCHORED, StreamIndex
from enhancer.video.codec.vectors import DecodedFrame
from vdm_priors.errors import ClipError

LOST = "-"  # kind of a frame that did not decode


def assembled(
    index: StreamIndex, motions: list[FrameMotion], start: float, end: float | None, references: str
) -> MotionField:
    """The field of the frames shown in [start, end) seconds. ClipError where none of them decoded."""
    if not motions:
        raise ClipError(
            f"{index.path}: not one frame can be decoded: the file is cut short or damaged. Copy it again or re-encode it."
        )
    of = {motion.rank: motion for motion in motions}
    seconds = np.arange(max(of) + 1) / float(index.rate) if index.seconds is None else index.shown_seconds
    shown = (seconds >= start) & (seconds < (np.inf if end is None else end))
    ranks = np.flatnonzero(shown).tolist()
    if not any(n in of for n in ranks):
        raise ClipError(
            f"{index.path}: no frame from {start:g} s to {index.duration if end is None else end:g} s can be decoded: the file "
            f"is damaged there. Choose another part of it, or copy it again."
        )
    frames = [of[n].frame if n in of else None for n in ranks]
    lost = empty_cells(grid_shape(index.height, index.width), Validity.UNAVAILABLE)
    cells = [of[n].cells if n in of else lost for n in ranks]
    turns = next(frame.quarter_turns for frame in frames if frame)
    ordinals = _ordinals(index, frames, ranks)
    kinds = np.array([frame.kind if frame else LOST for frame in frames])
    validity = np.stack([c.validity for c in cells])
    row_edges, column_edges = _edges(index, validity.shape[1:], turns)
    pictures = [frame.thumbnail if frame else None for frame in frames]
    from_pictures = any(image is not None for image in pictures)
    after = ranks[-1] + 1
    field = MotionField(
        path=index.path,
        times=seconds[ranks],
        duration=float(seconds[after]) if after < len(seconds) else index.duration,
        displacement=turned_upright(np.stack([c.displacement for c in cells]), turns, vectors=True),
        velocity=turned_upright(np.stack([c.velocity for c in cells]), turns, vectors=True),
        validity=turned_upright(validity, turns),
        origin=np.array([of[n].origin if n in of else Origin.NONE for n in ranks], np.int8),
        reference=turned_upright(np.stack([c.reference for c in cells]), turns),
        confidence=turned_upright(np.stack([c.confidence for c in cells]), turns),
        kinds=kinds,
        keys=index.keys[ordinals] & (kinds != LOST),
        groups=_groups(index, ordinals),
        cuts=cuts_in_pictures(pictures) if from_pictures else cuts_in_blocks(validity == Validity.INTRA, kinds),
        packet_bytes=index.sizes[ordinals],
        row_edges=row_edges,
        column_edges=column_edges,
        qp=_quantisers(frames, turns),
        notes=[*index.notes, *_remarks(index, frames)],
    )
    field.provenance = _provenance(index, field, references, "pictures" if from_pictures else "intra blocks", turns)
    return field


def _ordinals(index: StreamIndex, frames: list[DecodedFrame | None], ranks: list[int]) -> np.ndarray:
    """[T] packets' numbers."""
    if index.ranks is None:
        return np.array([frame.ordinal for frame in frames])
    return np.argsort(index.ranks)[ranks]


def _groups(index: StreamIndex, ordinals: np.ndarray) -> np.ndarray:
    """[T] number of key frames shown up to each frame, counted from the file's first."""
    if index.ranks is None:
        return np.cumsum(index.keys)[ordinals].astype(np.int32)
    return np.cumsum(index.keys[np.argsort(index.ranks)])[index.ranks[ordinals]].astype(np.int32)


def _edges(index: StreamIndex, shape: tuple[int, int], turns: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of the rows' and columns' edges in the upright frame."""
    rows = edges(index.height, shape[0], turned=turns in (2, 3))
    columns = edges(index.width, shape[1], turned=turns in (1, 2))
    return (columns, rows) if turns % 2 else (rows, columns)


def _quantisers(frames: list[DecodedFrame | None], turns: int) -> np.ndarray | None:
    """[T, …] QP maps; −1 where a frame has none; None where no frame has one."""
    maps = [frame.qp if frame else None for frame in frames]
    shape = next((qp.shape for qp in maps if qp is not None), None)
    if shape is None:
        return None
    none = np.full(shape, -1, np.int16)
    return turned_upright(np.stack([qp if qp is not None and qp.shape == shape else none for qp in maps]), turns)


def _remarks(index: StreamIndex, frames: list[DecodedFrame | None]) -> list[str]:
    decoded = [frame for frame in frames if frame]
    counts = {
        "frames did not decode": len(frames) - len(decoded),
        "frames are damaged, and their vectors are not used": sum(frame.damaged for frame in decoded),
        f"frames are not of {index.width}×{index.height} pixels, and have no motion here": sum(
            (frame.height, frame.width) != (index.height, index.width) for frame in decoded
        ),
        "frames are interlaced: their vectors may be of fields": sum(frame.interlaced for frame in decoded),
    }
    found = [f"{count} of {len(frames)} {what}" for what, count in counts.items() if count]
    if index.pixel_aspect not in (0, 1):
        found.append(f"pixels are {index.pixel_aspect} as wide as high; displacements count pixels")
    return found


def _provenance(index: StreamIndex, field: MotionField, references: str, cuts: str, turns: int) -> dict:
    origins = Counter(Origin(origin).name.lower() for origin in field.origin.tolist())
    made = {Origin.REENCODED, Origin.MESTIMATE} & set(field.origin.tolist())
    hows = ["the frames beside, where vectors were made"] if made else []
    if index.codec in ANCHORED:
        hows.append("told by the frame types")
    elif index.native and index.most_references == 1:
        hows.append("the only candidate")
    elif index.native:
        hows.append("matched with the decoded candidates" if references == "match" else "assumed to be 1 frame away")
    return {
        "codec": index.codec,
        "profile": index.profile,
        "container": index.container,
        "width": index.width,
        "height": index.height,
        "rate": str(index.rate),
        "pixel_aspect": str(index.pixel_aspect),
        "rotation": 90 * turns,
        "cell": CELL,
        "origins": dict(origins),
        "references": "; ".join(hows) or "none",
        "cuts": cuts,
        "most_references": index.most_references,
        "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
    }
