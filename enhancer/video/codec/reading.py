"""read_motion: a video file to a MotionField, by the stream's own vectors where they exist and by a labelled fallback
else."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from enhancer.video.clip import regular_file
from enhancer.video.codec.assembly import assembled
from enhancer.video.codec.blocks import blocks_of, grid_shape
from enhancer.video.codec.cells import FrameMotion, empty_cells
from enhancer.video.codec.fallback import way
from enhancer.video.codec.field import MotionField, Origin, Validity
from enhancer.video.codec.native import motion_cells, native_motion, ranked
from enhancer.video.codec.references import anchored
from enhancer.video.codec.streams import Segment, StreamIndex, index_stream
from enhancer.video.codec.vectors import DecodedFrame, Wanted, in_order, over_segments
from vdm_priors.errors import ClipError, UserError

REFERENCES = ("match", "assume")
ORIGINS = {"reencode": Origin.REENCODED, "mestimate": Origin.MESTIMATE}


def read_motion(
    path: str | os.PathLike,
    start: float = 0.0,
    end: float | None = None,
    *,
    references: str = "match",
    fallback: str = "reencode",
    qp: bool = False,
    workers: int | None = None,
) -> MotionField:
    """The motion of the frames shown in [start, end) seconds after the file's first frame.

    references: how H.264's distances to reference pictures are found: "match" predicts blocks from the decoded
    candidates; "assume" takes 1, which costs least and is wrong for half of the moving cells of x264's defaults
    (docs/codec.md). fallback: for frames whose decoder exports no vectors: "reencode", "mestimate", or "none". qp: take
    the macroblocks' quantisers along. workers: threads; None for all cores.

    Frames lie upright (rotation metadata applied), pixels are those stored. Frames that did not decode are rows without
    motion. The same file gives the same bytes in every run. Raises ClipError naming the file where nothing can be read
    or nothing is shown in that time, UserError for a wrong argument.
    """
    if references not in REFERENCES:
        raise UserError(f"references is {references!r}: choose {' or '.join(map(repr, REFERENCES))}.")
    if not start >= 0 or end is not None and not end > start:
        raise UserError(f"start {start} and end {end} must be seconds with 0 <= start < end.")
    if fallback != "none":
        way(fallback)  # an unknown name is refused before anything is read
    index = index_stream(regular_file(path))
    workers = workers or len(os.sched_getaffinity(0))
    segments = index.between(start, end)
    if not segments:
        raise ClipError(
            f"{path}: lasts {index.duration:.2f} s, and nothing of it is shown from {start:g} s to {end} s. Lower start."
        )
    match = index.codec == "h264" and (references == "match" or index.most_references == 1)  # one: nothing to look for
    if index.lacks_vectors and fallback != "none":
        decoded = chain.from_iterable(in_order(index, segments, Wanted(index.native, luma=True, qp=qp), workers))
        index, motions = fallback_motion(index, decoded, fallback)
    elif index.native:
        wanted = Wanted(luma=match and index.most_references > 1, qp=qp)
        parts = over_segments(index, segments, wanted, lambda frames: native_motion(index, frames, match), workers)
        motions = [motion for part in parts for motion in part]
    else:
        index, motions = _without_vectors(index, segments, qp, workers)
    return assembled(index, motions, start, end, "match" if match else references)


def read_motions(
    paths: Iterable[str | os.PathLike],
    start: float = 0.0,
    end: float | None = None,
    *,
    workers: int | None = None,
    **how: Any,
) -> Iterator[tuple[Path, MotionField | ClipError]]:
    """`read_motion` of several files at once, a thread each, in the order given; `how` are its other arguments.

    A file that cannot be read gives its ClipError. Only as many fields are held as there are workers (None: all cores).
    """
    workers = workers or len(os.sched_getaffinity(0))

    def read(path: str | os.PathLike) -> tuple[Path, MotionField | ClipError]:
        try:
            return Path(path), read_motion(path, start, end, workers=1, **how)
        except ClipError as error:
            return Path(path), error

    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future] = deque()
        for path in paths:
            waiting.append(pool.submit(read, path))
            if len(waiting) >= workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def fallback_motion(
    index: StreamIndex, decoded: Iterable[DecodedFrame], fallback: str
) -> tuple[StreamIndex, list[FrameMotion]]:
    """Motion of frames in the order of presentation, their luma taken along, through the fallback; a native stream keeps
    its own vectors in all but its B-frames. The index that comes back is that of the motions' ranks. UserError for an
    unknown fallback."""
    make, origin = way(fallback), ORIGINS[fallback]
    frames: list[DecodedFrame] = []
    seen: list[int] = []  # places in `frames` of those that the fallback takes

    def pictures() -> Iterator[np.ndarray]:
        for frame in decoded:
            if frame.inside:
                frames.append(frame)
                luma, frame.luma = frame.luma, None
                if luma.shape == (index.height, index.width):
                    seen.append(len(frames) - 1)
                    yield luma

    made = list(make(pictures()))
    if not index.native:
        index = index.of_frames(frames)
    ranks = [rank for _, rank in ranked(index, frames)]
    motions = {
        m.rank: m for m in (native_motion(index, frames, match=False) if index.native else _unavailable(index, frames))
    }
    for n, records in enumerate(made):
        frame, rank = frames[seen[n]], ranks[seen[n]]
        if index.native and frame.kind != "B":
            continue
        past, future = (ranks[seen[k]] - rank if 0 <= k < len(seen) else None for k in (n - 1, n + 1))
        frame.vectors = records
        blocks = blocks_of(frame)
        frame.vectors = None
        motions[rank] = FrameMotion(
            frame, rank, motion_cells(index, frame, rank, blocks, anchored(blocks, past, future), native=False), origin
        )
    return index, [motions[rank] for rank in sorted(motions)]


def _without_vectors(
    index: StreamIndex, segments: list[Segment], qp: bool, workers: int
) -> tuple[StreamIndex, list[FrameMotion]]:
    decoded = over_segments(index, segments, Wanted(vectors=False, qp=qp), list, workers)
    frames = [frame for part in decoded for frame in part if frame.inside]
    index = index.of_frames(frames)
    return index, _unavailable(index, frames)


def _unavailable(index: StreamIndex, frames: list[DecodedFrame]) -> list[FrameMotion]:
    shape = grid_shape(index.height, index.width)
    return [
        FrameMotion(frame, rank, empty_cells(shape, Validity.UNAVAILABLE), Origin.NONE)
        for frame, rank in ranked(index, frames)
    ]
