"""Frames' motion from the stream's own vectors."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator

from enhancer.video.codec.blocks import Blocks, blocks_of, grid_shape
from enhancer.video.codec.cells import Cells, FrameMotion, cells_of, empty_cells
from enhancer.video.codec.field import Origin, Validity
from enhancer.video.codec.references import Planes, Resolved, anchored, assumed, matched
from enhancer.video.codec.streams import ANCHORED, ZERO_B_VECTORS, StreamIndex
from enhancer.video.codec.vectors import DecodedFrame

LATEST = 32  # frames that wait for one that is decoded before them; then it is taken to be lost
FARTHEST = 127  # frames to a reference: what int8 holds

Ranked = tuple[DecodedFrame, int]  # a frame and its place in the order of presentation


def native_motion(index: StreamIndex, frames: Iterable[DecodedFrame], match: bool) -> list[FrameMotion]:
    """Motion of one segment's frames, in the order of presentation. match: find H.264's references by their
    pictures."""
    resolve = _by_frame_types if index.codec in ANCHORED else _by_matching if match else _by_assumption
    found = []
    for (frame, rank), blocks, resolved in resolve(index, ranked(index, frames)):
        if frame.inside:
            found.append(FrameMotion(frame, rank, motion_cells(index, frame, rank, blocks, resolved), Origin.NATIVE))
        frame.vectors = None
    return sorted(found, key=lambda motion: motion.rank)


def ranked(index: StreamIndex, frames: Iterable[DecodedFrame]) -> Iterator[Ranked]:
    """Frames with their places in the order of presentation."""
    ranks = index.ranks
    for count, frame in enumerate(frames):
        yield frame, count if ranks is None else int(ranks[frame.ordinal])


def motion_cells(
    index: StreamIndex, frame: DecodedFrame, rank: int, blocks: Blocks, resolved: Resolved, native: bool = True
) -> Cells:
    """Cells of a frame on the stream's grid; none has a motion where the frame is damaged or of another size."""
    shape = grid_shape(index.height, index.width)
    if (frame.height, frame.width) != (index.height, index.width):
        return empty_cells(shape, Validity.UNAVAILABLE)
    if frame.damaged or native and frame.kind == "B" and index.codec in ZERO_B_VECTORS:
        return empty_cells(shape, Validity.INVALID)
    return cells_of(blocks, resolved, index.height, index.width, lambda distance: index.seconds_between(rank, distance))


def _by_frame_types(index: StreamIndex, frames: Iterator[Ranked]) -> Iterator[tuple[Ranked, Blocks, Resolved]]:
    """P refers to the anchor (I or P) before it, B to those before and after it."""
    waiting: list[Ranked] = []
    past: int | None = None
    for frame, rank in frames:
        if frame.kind == "B":
            waiting.append((frame, rank))
            continue
        for found in [*waiting, (frame, rank)]:
            yield found, *_anchored(found, past, rank)
        waiting, past = [], rank
    for found in waiting:
        yield found, *_anchored(found, past, None)


def _anchored(found: Ranked, past: int | None, future: int | None) -> tuple[Blocks, Resolved]:
    frame, rank = found
    blocks = blocks_of(frame)
    return blocks, anchored(blocks, None if past is None else past - rank, None if future is None else future - rank)


def _by_matching(index: StreamIndex, frames: Iterator[Ranked]) -> Iterator[tuple[Ranked, Blocks, Resolved]]:
    """In decoding order, with the pictures that a decoder would keep for reference (H.264's sliding window,
    8.2.5.3)."""
    kept: deque[tuple[int, Planes]] = deque(maxlen=max(index.most_references, 1))
    for frame, rank in _as_decoded(frames):
        blocks, size = blocks_of(frame), (frame.height, frame.width)
        candidates = {
            at - rank: planes
            for at, planes in kept
            if 0 < abs(at - rank) <= FARTHEST and (planes.height, planes.width) == size
        }
        yield (frame, rank), blocks, matched(blocks, frame.luma, candidates)
        if index.referable[frame.ordinal]:
            kept.append((rank, Planes(frame.luma, *size)))
        frame.luma = None


def _by_assumption(index: StreamIndex, frames: Iterator[Ranked]) -> Iterator[tuple[Ranked, Blocks, Resolved]]:
    for frame, rank in frames:
        blocks = blocks_of(frame)
        yield (frame, rank), blocks, assumed(blocks)


def _as_decoded(frames: Iterator[Ranked]) -> Iterator[Ranked]:
    """Frames by rising packet number; a packet that gives no frame holds the others up for a while only."""
    waiting: list[tuple[int, int, DecodedFrame]] = []
    following = None
    for frame, rank in frames:
        heapq.heappush(waiting, (frame.ordinal, rank, frame))
        following = frame.ordinal if following is None else following
        while waiting and (waiting[0][0] <= following or len(waiting) > LATEST):
            ordinal, at, first = heapq.heappop(waiting)
            following = ordinal + 1
            yield first, at
    while waiting:
        _, at, first = heapq.heappop(waiting)
        yield first, at
