"""The compressed video's own motion as a prior: no model, and hardly any time.

A codec knows nothing of words, so all motion words share one map: how fast each cell moves beside the camera, which is fitted
and taken away frame by frame. Motion words are the text's content words, a rule that needs no other source. Where nothing moves
by itself, the camera's own motion is the map; where that is nil too, there is no prior.

Speeds under a quarter of a pixel a frame are the vectors' own grain and count as none. A cell whose motion is unknown (intra,
out of frame, damaged) holds no mass; the prior's grid is valid where at least half of a cell is known, and the words' weight is
the known share of the clip.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from enhancer.data.samples import Problem, Sample
from enhancer.sources import SourceContext, shared_text
from enhancer.video.camera import camera_motion
from enhancer.video.codec import MotionField, read_motion
from vdm_priors.errors import SampleError, UserError
from vdm_priors.grid import TokenGrid, covered_share, frame_spans, regrid
from vdm_priors.prior import MotionPrior
from vdm_priors.store import content_key, file_digest
from vdm_priors.words import is_content_word, split_words

RULE = 1  # raise when the same file would give another prior: it is part of the store key
ROWS = 16  # rows of the prior's grid; columns follow the frame's shape
GRAIN = 0.25  # px a frame
KNOWN = 0.5  # of a cell, at least


class CodecSource:
    """Motion magnitude of the file's vectors, camera motion removed, for every content word."""

    name = "codec"

    def __init__(self, context: SourceContext) -> None:
        self._context = context

    def key(self, sample: Sample) -> str:
        """Hash of the video's content, its sampling and the text."""
        return content_key(source=self.name, rule=RULE, rows=ROWS, video=file_digest(sample.video),
                           sampling=dataclasses.asdict(self._context.sampling), text=shared_text(sample, self._context.text))

    def extract(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, MotionPrior | Problem]]:
        """One prior a sample; a clip in which nothing moves, or a text without content words, gives a Problem."""
        for sample in samples:
            try:
                yield sample, self._prior(sample)
            except UserError as error:
                yield sample, Problem(sample.id, str(error))

    def _prior(self, sample: Sample) -> MotionPrior:
        text = shared_text(sample, self._context.text)
        words = [word for word in split_words(text) if is_content_word(word)]
        if not words:
            raise SampleError("its text has no content word that motion could belong to")
        clip = self._context.frames.get(sample.video, self._context.sampling)
        field = read_motion(sample.video, self._context.sampling.start, self._context.sampling.end)
        speed, moving = speeds(field)
        height, width = clip.frames.shape[1:3]
        grid = TokenGrid.regular(frame_spans(clip.times, clip.duration), ROWS, max(1, round(ROWS * width / height)), clip.box)
        source = dataclasses.replace(field.grid(), valid=torch.from_numpy(~np.isnan(speed)))
        grid = dataclasses.replace(grid, valid=covered_share(source, grid) >= KNOWN)
        mass = regrid(torch.from_numpy(np.nan_to_num(speed)).double() * source.volumes, source, grid).float()
        if not mass.sum() > 0:
            raise SampleError("nothing moves in its clip, as far as the codec tells")
        known = float(source.valid.double().mean())
        return MotionPrior(
            text=text, words=words, maps=(mass / mass.sum()).expand(len(words), *grid.shape).contiguous(), grid=grid,
            weight=torch.full((len(words),), known),
            provenance={"source": self.name, "of": moving, "known": known, "seconds": [float(t) for t in clip.seconds],
                        "notes": [*clip.notes, *(note for note in field.notes if note not in clip.notes)], **field.provenance})


def speeds(field: MotionField) -> tuple[np.ndarray, str]:
    """[T, R, C] float32 px/second, NaN where not known, and what they are of: "things" beside the camera, or the "camera"."""
    x, y = (edges[:-1] + np.diff(edges) / 2 for edges in (field.column_edges, field.row_edges))
    camera = np.stack([camera_motion(displacement, valid, x, y)
                       for displacement, valid in zip(field.displacement, field.valid, strict=True)])
    beside = np.hypot(*np.moveaxis(field.displacement - camera, -1, 0))
    beside[_revealed(field, camera)] = np.nan
    length = np.hypot(*np.moveaxis(field.displacement, -1, 0))
    a_second = np.divide(field.magnitude, length, out=np.zeros_like(length), where=length > 0)  # frames a second
    if np.nansum(beside > GRAIN) > 0:
        # a cell may be still while the camera moves, and say nothing of seconds: the clip's rate serves
        rate = np.median(a_second[a_second > 0])
        return _without_grain(beside, beside * np.where(a_second > 0, a_second, rate)), "things"
    return _without_grain(length, field.magnitude), "camera"


def _without_grain(length: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """speed, 0 where length (px a frame) is under the vectors' grain, NaN where it is unknown."""
    return np.where(length > GRAIN, speed, np.where(np.isnan(length), np.nan, 0)).astype(np.float32)


def _revealed(field: MotionField, camera: np.ndarray) -> np.ndarray:
    """[T, R, C] bool: cells that the camera has brought in over the edge, whose vectors find nothing to refer to."""
    left, right, top, bottom = (edges[part] for edges in (field.column_edges, field.row_edges) for part in (slice(-1), slice(1, None)))
    height, width = field.size
    found = np.zeros(field.validity.shape, bool)
    for distance in np.moveaxis(field.reference, 1, 0):
        shift = camera * distance[..., None]
        found |= (left + shift[..., 0] < -GRAIN) | (right + shift[..., 0] > width + GRAIN)
        found |= (top[:, None] + shift[..., 1] < -GRAIN) | (bottom[:, None] + shift[..., 1] > height + GRAIN)
    return found


def build(context: SourceContext) -> CodecSource:
    """Found by the file's name."""
    return CodecSource(context)
