"""MotionField: what a video stream says of motion, on a grid of 8 × 8 pixel cells.

Legend: T frames in the order of presentation, R rows and C columns of cells; 2 is (x, y) to the right and down.

Signs and units: the displacement of a cell is where its content goes, in pixels as stored (not those of anamorphic
display), a frame: content seen at p in frame t is near p + displacement in frame t + 1 and near p − displacement in
frame t − 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from enhancer.video.codec.blocks import CELL

if TYPE_CHECKING:
    from vdm_priors.grid import TokenGrid


class Validity(IntEnum):
    """What is known of a cell at a frame. Only INTER cells have a motion; the others hold NaN."""

    UNAVAILABLE = 0  # the frame did not decode, has another size, or its codec exports no vectors
    INTER = 1
    INTRA = 2  # coded without reference: an I-frame, or a block for which no good reference was found
    OUT_OF_FRAME = 3  # the vector points to beyond the edge of the picture, where nothing was seen
    INVALID = 4  # there is a vector, and it is known to be wrong: a damaged frame, zeros in MPEG-4's B-frames


class Origin(IntEnum):
    """Where a frame's vectors come from. Only NATIVE is what the file's own encoder chose."""

    NONE = 0
    NATIVE = 1
    REENCODED = 2  # vectors of an encoding of the decoded frames, made in memory
    MESTIMATE = 3  # FFmpeg's block matching of the decoded frames


@dataclass
class MotionField:
    """Motion of one clip.

    times [T] seconds after the file's first frame; duration: to the end of the last frame, in seconds
    displacement [T, R, C, 2] float32 px/frame and velocity [T, R, C, 2] float32 px/second, NaN where not `valid`
    validity [T, R, C] int8 of Validity; origin [T] int8 of Origin
    reference [T, 2, R, C] int8: frames to the reference of either list, negative in the past, 0 where there is none
    confidence [T, R, C] float32 0..1: that the reference's distance is right; NaN where not `valid` or only assumed
    kinds [T] of I P B S ? and - (did not decode); keys [T] bool; groups [T] int32, rising by one at each key frame
    packet_bytes [T] int64; qp [T, ⌈H/16⌉, ⌈W/16⌉] int16 or None; cuts [T] bool: a scene's first frame
    row_edges [R+1], column_edges [C+1]: pixels; cells at an edge may be smaller
    provenance: codec, profile, how vectors and references were obtained, in JSON types; notes: for people
    """

    path: Path
    times: np.ndarray
    duration: float
    displacement: np.ndarray
    velocity: np.ndarray
    validity: np.ndarray
    origin: np.ndarray
    reference: np.ndarray
    confidence: np.ndarray
    kinds: np.ndarray
    keys: np.ndarray
    groups: np.ndarray
    cuts: np.ndarray
    packet_bytes: np.ndarray
    row_edges: np.ndarray
    column_edges: np.ndarray
    qp: np.ndarray | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def valid(self) -> np.ndarray:
        """[T, R, C] bool: cells with a motion."""
        return self.validity == Validity.INTER

    @property
    def magnitude(self) -> np.ndarray:
        """[T, R, C] float32 px/second, NaN where not valid."""
        return np.hypot(self.velocity[..., 0], self.velocity[..., 1])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the upright frame in pixels."""
        return int(self.row_edges[-1]), int(self.column_edges[-1])

    def grid(self) -> TokenGrid:
        """The cells as a TokenGrid in the normalised frame, valid where the motion is."""
        import torch  # takes seconds, and reading motion needs it not

        from vdm_priors.grid import TokenGrid, frame_spans

        height, width = self.size
        return TokenGrid(
            frame_spans(self.times.tolist(), self.duration),
            torch.from_numpy(self.row_edges / height),
            torch.from_numpy(self.column_edges / width),
            torch.from_numpy(self.valid),
        )

    def tobytes(self) -> bytes:
        """All numbers, for comparing two readings of a file bit for bit."""
        arrays = [
            self.times,
            self.displacement,
            self.velocity,
            self.validity,
            self.origin,
            self.reference,
            self.confidence,
            self.kinds,
            self.keys,
            self.groups,
            self.cuts,
            self.packet_bytes,
            self.row_edges,
            self.column_edges,
        ]
        return b"".join(np.ascontiguousarray(a).tobytes() for a in arrays + ([] if self.qp is None else [self.qp]))


def turned_upright(values: np.ndarray, quarters: int, vectors: bool = False) -> np.ndarray:
    """[…, R, C] (or […, R, C, 2] with `vectors`) turned as np.rot90 turns the picture."""
    axes = (-3, -2) if vectors else (-2, -1)
    turned = np.rot90(values, quarters, axes)
    if vectors:
        for _ in range(quarters % 4):  # a quarter to the left takes (x, y) to (y, −x)
            turned = np.stack([turned[..., 1], -turned[..., 0]], axis=-1)
    return np.ascontiguousarray(turned)


def edges(length: int, cells: int, turned: bool) -> np.ndarray:
    """Pixels at which the cells of one axis begin and end; the short cell comes last, or first where turned round."""
    at = np.minimum(np.arange(cells + 1) * CELL, length).astype(np.float64)
    return length - at[::-1] if turned else at
