"""Pictures in their order as a clip."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from enhancer.video.footage import Footage
from enhancer.video.sampling import FrameIndex, Sampling, choose_frames
from vdm_priors.errors import ClipError


def read_pictures(video: Footage, sampling: Sampling) -> tuple[np.ndarray, list[float], float, list[str], int]:
    """Frames [N, H, W, 3] uint8 RGB, their times, the pictures' duration, notes, and how many frames are repeated.

    EXIF orientation is applied; all pictures must be of one size. ClipError names the picture that cannot be used.
    """
    count = len(video.files)
    notes = [f"no fps is given: {video.fps:g} pictures a second are assumed"] if video.assumed else []
    index = FrameIndex(list(range(count)), [n / video.fps for n in range(count)], count / video.fps, False)
    chosen, times = choose_frames(video.files[0], index, sampling, notes)
    pixels = {n: _picture(video.files[n]) for n in set(chosen)}
    first = pixels[chosen[0]].shape[:2]
    for n in chosen:
        if pixels[n].shape[:2] != first:
            (height, width), (rows, columns) = first, pixels[n].shape[:2]
            raise ClipError(
                f"{video.files[n]}: is a picture of {columns}×{rows} pixels among others of {width}×{height}. Give the "
                "pictures of one video the same size."
            )
    frames = np.stack([pixels[n] for n in chosen])
    return frames, times, index.duration, notes, len(chosen) - len(pixels)


def _picture(path: Path) -> np.ndarray:
    import cv2  # takes a while, and videos need it not

    try:
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error) as error:
        raise ClipError(f"{path}: cannot be read as a picture ({error}). Copy it again.") from error
    if pixels is None:
        raise ClipError(f"{path}: is not a picture that can be read, or it is cut short. Copy it again.")
    return np.ascontiguousarray(pixels[..., ::-1])  # it gives BGR
