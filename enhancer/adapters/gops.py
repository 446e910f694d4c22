"""A compressed video as the codec adapters take it: one group of pictures (GOP) after the other.

A GOP is a key picture and the motion after it. `fuse` frames are taken together: the motion field of a step says how
far content has come since the step before, accumulated in fractions of a pixel (CoViAR's accumulation), and the error
is what that motion does not explain: the decoded picture minus the one before, warped. CoPE-VideoLM calls this P-frame
fusion (section 3.2); EMA's motion fields and HY-Himmel's maps are the same thing with other numbers.

Only one GOP is held at a time, and of a GOP longer than `longest` frames only so many, so that an hour of video needs
no more memory than a minute.

Legend: M steps of a GOP after its key picture, h × w pixels of a working picture, r × c cells of 8 of its pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import cv2
import numpy as np

from enhancer.video.clip import regular_file
from enhancer.video.codec.accumulate import accumulate
from enhancer.video.codec.assembly import assembled
from enhancer.video.codec.field import MotionField, Origin
from enhancer.video.codec.native import native_motion
from enhancer.video.codec.reading import fallback_motion
from enhancer.video.codec.streams import Segment, StreamIndex, index_stream
from enhancer.video.codec.vectors import DecodedFrame, Wanted, in_order
from vdm_priors.errors import ClipError, UserError

CELL = 8  # working pixels of a motion cell's side, like the codec's own
FALLBACKS = ("reencode", "mestimate", "refuse")
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class GopReading:
    """How a video is read.

    fuse: frames of a step; gops: most GOPs that are read, evenly spaced (None: all); size: height and width that
    pictures are scaled to, multiples of 8; longest: frames of a GOP that are held at once, the rest begins another one
    with a decoded picture as its key; fallback: a codec without vectors gets some by "reencode" or "mestimate", and the
    GOP's origin says so, or is refused; references: as in `read_motion`.
    """

    fuse: int = 30
    gops: int | None = 64
    size: tuple[int, int] = (384, 384)
    longest: int = 256
    fallback: str = "reencode"
    references: str = "match"

    def __post_init__(self) -> None:
        if self.fallback not in FALLBACKS:
            raise UserError(f"fallback is {self.fallback!r}: choose one of {', '.join(FALLBACKS)}.")
        if self.fuse < 1 or self.longest < 2 * self.fuse or self.gops is not None and self.gops < 1:
            raise UserError(
                f"fuse ({self.fuse}) and gops ({self.gops}) must be 1 or more, and longest ({self.longest}) "
                "twice fuse or more."
            )
        if any(side < CELL or side % CELL for side in self.size):
            raise UserError(f"size {self.size} must be multiples of {CELL} pixels.")


@dataclass
class Gop:
    """One GOP. number: its place in the file; end: seconds to where its last frame lasts.

    times [M + 1] seconds of the key picture and of the steps; pictures uint8 [M + 1, h, w, 3], upright RGB.
    displacement float32 [M, r, c, 2]: (x, y) that content moved since the step before, in shares of the frame's width
    and height, 0 where not `valid` [M, r, c]. error int16 [M, h, w, 3]: picture minus the one before, warped; 0 where
    not valid. origin: native, reencoded or mestimate; none where there is no motion at all.
    """

    number: int
    times: np.ndarray
    end: float
    pictures: np.ndarray
    displacement: np.ndarray
    valid: np.ndarray
    error: np.ndarray
    origin: str

    @property
    def steps(self) -> int:
        return len(self.displacement)


@dataclass(frozen=True)
class GopPlan:
    """Which GOPs of a file are read, before any is decoded. notes: what a user should know, one sentence each."""

    index: StreamIndex
    numbers: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def segments(self) -> list[Segment]:
        return [self.index.segments[number] for number in self.numbers]


def plan_gops(path: str | os.PathLike, how: GopReading = GopReading()) -> GopPlan:
    """The GOPs that `read_gops` will give, from packets' headers alone.

    Raises ClipError where the file cannot be read, or its codec has no vectors and how.fallback is "refuse".
    """
    index = index_stream(regular_file(path))
    total = len(index.segments)
    budget = total if how.gops is None else min(how.gops, total)
    numbers = tuple(np.unique(np.linspace(0, total - 1, budget).round().astype(int)).tolist())
    notes = list(index.notes)
    if len(numbers) < total:
        notes.append(
            f"{len(numbers)} of its {total} groups of pictures are read, evenly spaced: the budget is {how.gops}"
        )
    if total == 1:
        notes.append("it is one group of pictures, with a key frame at its beginning only")
    if all(segment.stop - segment.first == 1 for segment in index.segments):
        notes.append("every frame is a key frame: there are no P-frames, and so no motion")
    elif index.lacks_vectors:
        if how.fallback == "refuse":
            raise ClipError(
                f"{index.path}: the decoder of its codec ({index.codec}) exports no motion vectors, or not those of "
                "its B-frames. Re-encode it as H.264, or set the fallback to reencode, whose vectors are labelled."
            )
        notes.append(f"the decoder of {index.codec} exports no motion vectors: they are made here ({how.fallback})")
    return GopPlan(index, numbers, tuple(notes))


def read_gops(
    path: str | os.PathLike,
    how: GopReading = GopReading(),
    progress: Progress | None = None,
    plan: GopPlan | None = None,
) -> Iterator[Gop]:
    """The file's GOPs, in order, one at a time. progress(done, total, text) is called after each.

    Frames between the last step and the next key frame are left out, as in the paper (29 of 240); a GOP too short
    for one step has its last frame as its only one. GOPs of which nothing decodes are left out. Raises as `plan_gops`.
    """
    plan = plan or plan_gops(path, how)
    index, segments = plan.index, plan.segments
    parts = in_order(index, segments, _wanted(index, segments, how), threads=1)
    for done, (number, segment, frames) in enumerate(zip(plan.numbers, segments, parts, strict=True), start=1):
        count, before = segment.stop - segment.first, 0
        whole = count if count <= how.longest else how.longest - how.longest % how.fuse
        while piece := list(islice(frames, whole)):
            gop = _gop(index, number, piece, before, how)
            before += len(piece)
            if gop is not None:
                yield gop
        if progress is not None:
            progress(done, len(segments), f"group {number + 1} of {len(index.segments)}")


def _wanted(index: StreamIndex, segments: list[Segment], how: GopReading) -> Wanted:
    """Pictures of the steps alone, where it can be told beforehand which frames those are."""
    match = _matches(index, how)
    if index.ranks is None or index.lacks_vectors:
        return Wanted(index.native, luma=match or index.lacks_vectors, rgb=True, rgb_size=how.size)
    steps: set[int] = set()
    for segment in segments:
        shown = np.arange(segment.first, segment.stop)
        if segment.start is not None:
            shown = shown[index.pts[shown] >= segment.start]
        if segment.end is not None:
            shown = shown[index.pts[shown] < segment.end]
        steps.update(_every(shown[np.argsort(index.ranks[shown])].tolist(), how.fuse))
    return Wanted(luma=match, rgb=True, rgb_of=frozenset(steps), rgb_size=how.size)


def _matches(index: StreamIndex, how: GopReading) -> bool:
    """Whether H.264's references are found by the pictures; of one candidate there is nothing to find."""
    return index.codec == "h264" and how.references == "match" and index.most_references > 1


def _every(frames: list, fuse: int) -> list:
    """The key picture and each `fuse`-th frame after it; the last one where there would be no other."""
    return frames[::fuse] if len(frames) > fuse else frames[:1] + frames[1:][-1:]


def _gop(index: StreamIndex, number: int, frames: list[DecodedFrame], before: int, how: GopReading) -> Gop | None:
    """`before`: frames of the same group in pieces before this one."""
    frames_inside = [frame for frame in frames if frame.inside]
    if not frames_inside:
        return None
    stepping = {id(frame) for frame in _every(frames_inside, how.fuse)}
    if index.lacks_vectors:
        for frame in frames_inside:
            frame.rgb = frame.rgb if id(frame) in stepping else None
        pictures = [frame for frame in frames_inside if frame.rgb is not None]
        index_of, motions = fallback_motion(index, frames, how.fallback)
    else:
        pictures = [frame for frame in frames_inside if frame.rgb is not None]
        match = index.codec == "h264" and (how.references == "match" or index.most_references == 1)
        index_of, motions = index, native_motion(index, frames, match)
    if not pictures:
        return None
    field = _field(index_of, motions)
    first = min(motion.rank for motion in motions)
    row_of = {id(motion.frame): motion.rank - first for motion in motions}
    rows = [row_of[id(frame)] for frame in pictures]
    shown = np.stack([_upright(frame, how.size) for frame in pictures])
    displacement, valid = _motion(field, rows, how)
    error = np.stack(
        [np.zeros(0, np.int16)]
        if not len(valid)
        else [prediction_error(shown[n], shown[n + 1], displacement[n], valid[n]) for n in range(len(valid))]
    ).reshape(-1, *how.size, 3)
    late = before / float(index.rate) if index.seconds is None else 0.0
    origins = sorted({Origin(origin).name.lower() for origin in field.origin[rows[0] + 1 : rows[-1] + 1]})
    return Gop(
        number,
        field.times[rows] + late,
        _end_of(index, float(field.times[-1])) + late,
        shown,
        displacement,
        valid,
        error,
        " and ".join(origin for origin in origins if origin != "none") or "none",
    )


def _field(index: StreamIndex, motions: list) -> MotionField:
    """The field of these frames, and of those between them that did not decode."""
    ranks = [motion.rank for motion in motions]
    seconds = np.arange(max(ranks) + 1) / float(index.rate) if index.seconds is None else index.shown_seconds
    return assembled(index, motions, seconds[min(ranks)], float(np.nextafter(seconds[max(ranks)], np.inf)), "match")


def _end_of(index: StreamIndex, time: float) -> float:
    """Seconds at which the frame shown at `time` gives way to the next."""
    if index.seconds is None:
        return time + 1 / float(index.rate)
    later = np.searchsorted(index.shown_seconds, time, side="right")
    return float(index.shown_seconds[later]) if later < len(index.shown_seconds) else index.duration


def _upright(frame: DecodedFrame, size: tuple[int, int]) -> np.ndarray:
    picture = np.ascontiguousarray(np.rot90(frame.rgb, frame.quarter_turns))
    return picture if picture.shape[:2] == size else cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA)


def _motion(field: MotionField, rows: list[int], how: GopReading) -> tuple[np.ndarray, np.ndarray]:
    """displacement [M, r, c, 2] in fractions of the frame between neighbouring `rows`, and valid [M, r, c]."""
    height, width = field.size
    shape = how.size[0] // CELL, how.size[1] // CELL
    displacement, valid = np.zeros((len(rows) - 1, *shape, 2), np.float32), np.zeros((len(rows) - 1, *shape), bool)
    for step, (earlier, later) in enumerate(zip(rows, rows[1:])):
        moved = accumulate(field, later - earlier, rows=[later])
        if moved.span[0] < later - earlier:
            continue  # a cut between them: nothing is known of where content came from
        fractions = moved.displacement[0] / np.array([width, height], np.float32)
        displacement[step], valid[step] = resampled(
            fractions, moved.valid[0], field.row_edges / height, field.column_edges / width, shape
        )
    return displacement, valid


def resampled(
    values: np.ndarray, valid: np.ndarray, row_edges: np.ndarray, column_edges: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Cells [R, C, 2] between edges in the normalised frame as equal cells [r, c, 2]: means by the area they share.

    Cells that are not valid take no part; a target cell is valid where valid ones cover half of it or more, else 0.
    """
    by_row, by_column = (_shares(edges, cells) for edges, cells in zip((row_edges, column_edges), shape, strict=True))
    known = by_row @ valid.astype(np.float32) @ by_column.T
    total = np.einsum("rR,RCx,cC->rcx", by_row, np.where(valid[..., None], values, 0), by_column)
    enough = known >= 0.5
    return np.where(enough[..., None], total / np.maximum(known, 1e-6)[..., None], 0).astype(np.float32), enough


def _shares(edges: np.ndarray, cells: int) -> np.ndarray:
    """[cells, len(edges) − 1]: share of each of `cells` equal intervals of 0..1 that lies in each given one."""
    target = np.linspace(0, 1, cells + 1)
    upper, lower = np.minimum(target[1:, None], edges[None, 1:]), np.maximum(target[:-1, None], edges[None, :-1])
    return (np.clip(upper - lower, 0, None) * cells).astype(np.float32)


def prediction_error(before: np.ndarray, after: np.ndarray, displacement: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """What motion does not explain: int16 [h, w, 3], `after` minus `before` warped; 0 where motion is not valid.

    before, after: uint8 [h, w, 3]; displacement [r, c, 2] in fractions of the frame. It is not the residual that the
    encoder wrote, which no stock FFmpeg gives out (enhancer/video/codec/residual.py).
    """
    height, width = before.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    moved = _per_pixel(displacement) * np.array([width, height], np.float32)
    warped = cv2.remap(before, x - moved[..., 0], y - moved[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    error = after.astype(np.int16) - warped.astype(np.int16)
    return np.where(_per_pixel(valid)[..., None], error, 0).astype(np.int16)


def _per_pixel(cells: np.ndarray) -> np.ndarray:
    return np.repeat(np.repeat(cells, CELL, axis=0), CELL, axis=1)
