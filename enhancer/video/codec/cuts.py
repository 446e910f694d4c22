"""Scene cuts: where motion from before means nothing.

With the pictures at hand, a frame begins a scene where its thumbnail differs from the one before by much more than
thumbnails nearby do. From vectors alone, it is a P- or B-frame most of which is coded intra; a cut at an I-frame is
then not seen.
"""

from __future__ import annotations

import cv2
import numpy as np

THUMBNAIL = (32, 18)  # width, height
LEAST_CHANGE = 8.0  # grey levels, mean over the thumbnail
TIMES_NEARBY = 4.0  # a cut changes so many times as much as the median frame nearby
NEARBY = 6  # frames on either side
MOSTLY_INTRA = 0.7  # share of cells


def thumbnail(luma: np.ndarray) -> np.ndarray:
    """uint8 [18, 32] of uint8 [H, W]."""
    return cv2.resize(luma, THUMBNAIL, interpolation=cv2.INTER_AREA)


def cuts_in_pictures(thumbnails: list[np.ndarray | None]) -> np.ndarray:
    """[T] bool: a scene's first frames, the clip's first not counted. None: a frame without a picture, which is no
    cut."""
    changes = np.zeros(len(thumbnails))
    before = None
    for n, image in enumerate(thumbnails):
        if image is not None and before is not None:
            changes[n] = cv2.absdiff(image, before).mean()
        before = image if image is not None else before
    found = np.zeros(len(thumbnails), bool)
    for n in np.flatnonzero(changes > LEAST_CHANGE):
        nearby = np.r_[changes[max(n - NEARBY, 1) : n], changes[n + 1 : n + 1 + NEARBY]]
        found[n] = changes[n] > TIMES_NEARBY * np.median(nearby) if len(nearby) else True
    return found


def cuts_in_blocks(intra: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """[T] bool from intra [T, R, C] bool and kinds [T]: P- and B-frames coded mostly without reference."""
    return (intra.mean(axis=(1, 2)) > MOSTLY_INTRA) & np.isin(kinds, ["P", "B"])
