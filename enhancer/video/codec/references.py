"""How far away the picture is that a vector refers to, which the export does not say.

MPEG-1, MPEG-2, MPEG-4 part 2 and H.263: P refers to the last I or P, B to the two around it, so the frame types tell.
H.264 has up to 16 candidates. Headers say which pictures may be referred to and how many are kept; among those, the
block is matched: predicted from each candidate with the standard's own interpolation (ITU-T H.264, 8.4.2.2.1), and the
candidate with the least absolute difference is taken. Where only one candidate is left, nothing is matched. In a fade
each candidate is also tried in the light of the block's frame, as weighted prediction (8.4.2.3) may have used it.

FFmpeg exports a zero vector for a list that one partition of a bidirectional macroblock does not use. Such a block is
found by its partner in the other list, and dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from enhancer.video.codec.blocks import CELL, FIRST, Blocks

FADE = 1.0  # grey levels between the means of two pictures: from there on the light may have changed
NOISE = 1.0  # grey levels: differences of this size between candidates mean nothing
UNUSED = 1.25  # times its partner's difference: a zero vector that predicts so much worse is that of an unused list
_G, _B, _H, _J = range(4)  # samples at whole pixels, half right, half down, half both
# Quarter positions as the mean of two samples, (plane, right, down) each; 8.4.2.2.1, figure 8-4. [y quarter][x quarter]
_QUARTERS = np.array(
    [
        [[(_G, 0, 0), (_G, 0, 0)], [(_G, 0, 0), (_B, 0, 0)], [(_B, 0, 0), (_B, 0, 0)], [(_B, 0, 0), (_G, 1, 0)]],
        [[(_G, 0, 0), (_H, 0, 0)], [(_B, 0, 0), (_H, 0, 0)], [(_B, 0, 0), (_J, 0, 0)], [(_B, 0, 0), (_H, 1, 0)]],
        [[(_H, 0, 0), (_H, 0, 0)], [(_H, 0, 0), (_J, 0, 0)], [(_J, 0, 0), (_J, 0, 0)], [(_J, 0, 0), (_H, 1, 0)]],
        [[(_H, 0, 0), (_G, 0, 1)], [(_H, 0, 0), (_B, 0, 1)], [(_J, 0, 0), (_B, 0, 1)], [(_H, 1, 0), (_B, 0, 1)]],
    ]
)
_BORDER = 4  # pixels; the six taps' results are all the edge's from there on
_TAPS = np.array([1, -5, 20, 20, -5, 1], np.float32)


@dataclass
class Resolved:
    """distance [B] int: frames from the block's frame to its reference, negative in the past, 0 where the list is not
    used;
    confidence [B] float32 0..1, 1 where it is known without matching, NaN where it is only assumed;
    difference [B] float32: of the block and its prediction, mean absolute grey levels, 0 where it was not looked at."""

    distance: np.ndarray
    confidence: np.ndarray
    difference: np.ndarray


def assumed(blocks: Blocks) -> Resolved:
    """One frame away, the first list in the past, the second in the future: fast, and wrong where it is not so."""
    distance = np.where(blocks.list == FIRST, -1, 1)
    distance[_lone_zeros(blocks)] = 0
    return Resolved(distance, np.full(len(blocks), np.nan, np.float32), np.zeros(len(blocks), np.float32))


def anchored(blocks: Blocks, past: int | None, future: int | None) -> Resolved:
    """Distances to the anchors (I or P) before and after this frame, as frame types tell them; None: there is no
    such."""
    distance = np.where(blocks.list == FIRST, past or 0, future or 0)
    return Resolved(distance, (distance != 0).astype(np.float32), np.zeros(len(blocks), np.float32))


def matched(blocks: Blocks, luma: np.ndarray | None, candidates: dict[int, Planes]) -> Resolved:
    """The nearest best match among candidates (by distance in frames, not 0); luma uint8 [H, W] of the blocks' frame,
    or None where there is at most one candidate.

    The first list looks into the past and the second into the future, or where there is nothing, the other way.
    Confidence: (s₂ − s₁) / (s₂ + 1 grey level) of the least and second least mean absolute difference; 1 for a vector
    of length 0, whose displacement is 0 at any distance.
    """
    distance, confidence = np.zeros(len(blocks), int), np.zeros(len(blocks), np.float32)
    difference = np.zeros(len(blocks), np.float32)
    moving, partner = blocks.motion.any(axis=1), _partners(blocks)
    # of two vectors for one place that are not the same, both are looked at: one may be of a list that is not used
    disputed = (partner >= 0) & (moving | moving[partner])
    for side in (-1, 1):
        here = (blocks.list == FIRST) == (side < 0)
        distances = sorted((d for d in candidates if d * side > 0), key=abs) or sorted(candidates, key=abs)
        if not distances:
            continue
        distance[here], confidence[here] = distances[0], 1.0
        unclear = np.flatnonzero(here & (moving & (len(distances) > 1) | disputed)) if luma is not None else ()
        if not len(unclear):
            continue
        lights = [light_change(luma, candidates[d]) for d in distances]
        tried = zip(distances, lights, strict=True)
        costs = np.stack([differences(blocks, unclear, luma, candidates[d], light) for d, light in tried])
        # near ties go to the nearest: a farther candidate must be better by more than a hair
        best = np.argmin(costs + 1e-3 * np.arange(len(distances))[:, None], axis=0)
        distance[unclear] = np.array(distances)[best]
        least = difference[unclear] = np.take_along_axis(costs, best[None], axis=0)[0]
        if len(distances) > 1:
            second = np.partition(costs, 1, axis=0)[1]
            confidence[unclear] = np.where(moving[unclear], ((second - least) / (second + NOISE)).clip(0, 1), 1.0)
    worse = difference > UNUSED * difference[partner] + NOISE
    unused = _lone_zeros(blocks) & worse & (luma is not None)
    distance[unused], confidence[unused] = 0, 0.0
    return Resolved(distance, confidence, difference)


class Planes:
    """A reference picture with its half-pixel samples, which are made when they are first needed.

    luma uint8 [height, width], or None where there is but one candidate, so that nothing is ever predicted.
    """

    def __init__(self, luma: np.ndarray | None, height: int, width: int) -> None:
        self._luma, self.height, self.width = luma, height, width

    @cached_property
    def light(self) -> tuple[float, float]:
        """Mean and standard deviation."""
        return light_of(self._luma)

    @cached_property
    def _samples(self) -> np.ndarray:
        """Four planes with a border, flattened."""

        def filtered(image: np.ndarray, vertical: bool) -> np.ndarray:
            kernel = _TAPS[:, None] if vertical else _TAPS[None]
            return cv2.filter2D(
                image, cv2.CV_32F, kernel, anchor=(0, 2) if vertical else (2, 0), borderType=cv2.BORDER_REPLICATE
            )

        def rounded(sums: np.ndarray, shift: int) -> np.ndarray:
            return np.clip(np.floor((sums + (1 << shift - 1)) / (1 << shift)), 0, 255).astype(np.uint8)

        # beyond the picture its edge goes on: with so much of it, clamped places are exact
        luma = cv2.copyMakeBorder(self._luma, *[_BORDER] * 4, cv2.BORDER_REPLICATE)
        right = filtered(luma, vertical=False)
        return np.stack(
            [
                luma,
                rounded(right, 5),
                rounded(filtered(luma, vertical=True), 5),
                rounded(filtered(right, vertical=True), 10),
            ]
        ).reshape(-1)

    def predict(self, corner: np.ndarray, motion: np.ndarray, height: int, width: int) -> np.ndarray:
        """Blocks [N, height, width] uint8 at corner + motion; corner [N, 2] and motion [N, 2] px, in quarters of a
        pixel.

        Beyond the edge the picture goes on as its edge, as in the standard.
        """
        quarters = np.round(motion * 4).astype(np.int64)
        whole, part = corner + (quarters >> 2), quarters & 3
        samples = _QUARTERS[part[:, 1], part[:, 0]]  # [N, 2, 3]
        one, other = (self._gathered(whole, samples[:, n], height, width) for n in (0, 1))
        return (one.astype(np.uint16) + other + 1 >> 1).astype(np.uint8)

    def _gathered(self, whole: np.ndarray, sample: np.ndarray, height: int, width: int) -> np.ndarray:
        plane, right, down = sample.T
        all_rows, all_columns = self.height + 2 * _BORDER, self.width + 2 * _BORDER
        x = np.clip((whole[:, 0] + right + _BORDER)[:, None] + np.arange(width), 0, all_columns - 1)
        y = np.clip((whole[:, 1] + down + _BORDER)[:, None] + np.arange(height), 0, all_rows - 1)
        rows = (plane[:, None] * all_rows + y) * all_columns
        return self._samples.take(rows[:, :, None] + x[:, None, :])


def light_of(luma: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of a picture."""
    mean, deviation = cv2.meanStdDev(luma)
    return float(mean[0, 0]), float(deviation[0, 0])


def light_change(luma: np.ndarray, reference: Planes) -> tuple[float, float] | None:
    """(gain, offset) that give the reference the mean and contrast of `luma`; None where their means are alike."""
    (mean, deviation), (other_mean, other_deviation) = light_of(luma), reference.light
    if abs(mean - other_mean) < FADE or min(deviation, other_deviation) < NOISE:
        return None
    gain = deviation / other_deviation
    return gain, mean - gain * other_mean


def differences(
    blocks: Blocks, which: np.ndarray, luma: np.ndarray, reference: Planes, light: tuple[float, float] | None = None
) -> np.ndarray:
    """Mean absolute difference [N], in grey levels, of the blocks `which` [N] and their prediction from the reference.

    luma uint8 [H, W]; parts of a block outside the picture do not count. light: a (gain, offset) that the prediction is
    also tried with; the smaller difference counts.
    """
    found = np.zeros(len(which), np.float32)
    high_luma = cv2.copyMakeBorder(luma, 0, 2 * CELL, 0, 2 * CELL, cv2.BORDER_REPLICATE)
    for high, wide in ((h, w) for h in (1, 2) for w in (1, 2)):
        of_size = np.flatnonzero((blocks.high[which] == high) & (blocks.wide[which] == wide))
        if not len(of_size):
            continue
        picked = which[of_size]
        corner, height, width = blocks.corner[picked], high * CELL, wide * CELL
        y, x = corner[:, 1, None] + np.arange(height), corner[:, 0, None] + np.arange(width)
        inside = (y < luma.shape[0])[:, :, None] & (x < luma.shape[1])[:, None, :]
        here = high_luma[y[:, :, None], x[:, None, :]]
        there = reference.predict(corner, blocks.motion[picked], height, width)
        predictions = [there]
        if light is not None:
            lit = np.rint(light[0] * there.astype(np.float32) + light[1])
            predictions.append(lit.clip(0, 255).astype(np.uint8))
        apart = [np.where(inside, cv2.absdiff(here, p), 0).sum(axis=(1, 2), dtype=np.float32) for p in predictions]
        found[of_size] = np.minimum.reduce(apart) / inside.sum(axis=(1, 2))
    return found


def _lone_zeros(blocks: Blocks) -> np.ndarray:
    """[B] bool: vectors of length 0 of partitions whose other list has a vector that is not."""
    partner = _partners(blocks)
    zero = ~blocks.motion.any(axis=1)
    partition = blocks.wide * blocks.high < 4  # a whole macroblock's lists are exported rightly
    return zero & partition & (partner >= 0) & ~zero[partner]


def _partners(blocks: Blocks) -> np.ndarray:
    """[B] index of the same place's block in the other list, −1 where there is none."""
    place = (blocks.row.astype(np.int64) << 32) | blocks.column
    partner = np.full(len(blocks), -1)
    first, second = (np.flatnonzero(blocks.list == side) for side in (0, 1))
    _, in_first, in_second = np.intersect1d(place[first], place[second], return_indices=True)
    partner[first[in_first]], partner[second[in_second]] = second[in_second], first[in_first]
    return partner
