"""Motion over several frames, back to a reference: CoViAR's accumulation (Wu et al., CVPR 2018, section 3.1), in
fractions of a pixel and with a mask.

A cell's centre is followed back from each picture to the one that it refers to, as the decoder does: fewer and longer
steps than frame by frame, whose quarters of a pixel add up to less of an error. Its place is a real number all the way;
the motion there is that of the cell it lies in, as a block's vector holds for the whole block. Whole pixels, as usual,
would lose all motion under half a pixel a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from enhancer.video.codec.field import MotionField
from vdm_priors.errors import UserError

RESETS = ("cuts", "groups")


@dataclass
class Accumulated:
    """displacement [T, R, C, 2] px since the reference frame, NaN where not valid; valid [T, R, C] bool; span [T]
    frames back to the reference, 0 where a frame is its own: its displacement is then 0, and known."""

    displacement: np.ndarray
    valid: np.ndarray
    span: np.ndarray


def accumulate(
    field: MotionField, frames: int, reset: tuple[str, ...] = RESETS, rows: Sequence[int] | None = None
) -> Accumulated:
    """How far each cell's content has come within up to `frames` frames.

    rows: frames of the field that are wanted, which are then the T of the result; None for all.

    reset: what motion is not followed across: "cuts" (scenes' first frames), "groups" (key frames); the frame there is
    the reference. Without "groups", what passes through an I-frame is not valid, as nothing is known of its motion.
    Content that was outside the picture, or passes through a cell without motion, is not valid. UserError for other
    resets.
    """
    unknown = sorted(set(reset) - set(RESETS))
    if unknown or frames < 1:
        raise UserError(
            f"accumulate: frames must be 1 or more ({frames}), and reset may have {' and '.join(RESETS)} "
            f"({', '.join(reset)})."
        )
    begins = np.zeros(len(field.times), bool)
    begins[0] = True
    if "cuts" in reset:
        begins |= field.cuts
    if "groups" in reset:
        begins |= np.diff(field.groups, prepend=field.groups[:1]) > 0
    last_begin = np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))
    wanted = np.arange(len(begins)) if rows is None else np.asarray(rows, int)
    span = np.minimum(wanted - last_begin[wanted], frames)
    paths = [_followed_back(field, int(at), int(back)) for at, back in zip(wanted, span, strict=True)]
    valid = np.stack([known for _, known in paths])
    displacement = np.stack([path for path, _ in paths]).astype(np.float32)
    displacement[~valid] = np.nan
    return Accumulated(displacement, valid, span)


def _followed_back(field: MotionField, at: int, span: int) -> tuple[np.ndarray, np.ndarray]:
    """[R, C, 2] displacement over `span` frames up to frame `at`, and where it is known."""
    row_middles, column_middles = (np.diff(edges) / 2 + edges[:-1] for edges in (field.row_edges, field.column_edges))
    centre = np.stack(np.meshgrid(column_middles, row_middles), axis=-1)  # (x, y)
    place, known = centre.copy(), np.ones(centre.shape[:2], bool)
    rows, columns = known.shape
    frame = np.full(known.shape, at)
    while (on := known & (frame > at - span)).any():
        row, column = (
            np.searchsorted(edges, place[..., axis], side="right") - 1
            for edges, axis in ((field.row_edges, 1), (field.column_edges, 0))
        )
        known &= ~on | (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        here = frame, row.clip(0, rows - 1), column.clip(0, columns - 1)
        known &= ~on | field.valid[here]
        on &= known
        past = -np.minimum(field.reference[:, 0], field.reference[:, 1])[here]
        step = np.minimum(
            np.maximum(past, 1), frame - (at - span)
        )  # a frame without a past reference: on to the one before
        place = np.where(on[..., None], place - field.displacement[here] * step[..., None], place)
        frame = np.where(on, frame - step, frame)
    return centre - place, known
