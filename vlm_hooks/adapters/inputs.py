"""What an adapter sees of a compressed clip: key frames, and the motion from each to the next.

Preprocessing makes it (enhancer/adapters), an adapter reads it; nothing here knows a codec.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vdm_priors.grid import WHOLE_FRAME


@dataclass
class Motion:
    """What follows one key frame, up to the next one: M ≥ 0 moments.

    vectors [M, R, C, 2] float32: how far the content of each cell has come since its reference, to the right and down,
    as a share of the frame's width and height; NaN where it is not known.
    times [M]: seconds after the file's first frame at which each moment is shown.
    end: seconds at which the interval ends: the next key frame, or the end of the clip.
    span [M]: frames between a moment and its reference: 1 for single vectors, up to s where they are accumulated.
    residuals [M, h, w, 3] float32 in −1..1, or None: the moment's picture minus its prediction from the reference, NaN
    where nothing is predicted.
    pictures [M, H, W, 3] uint8 RGB, or None: the moments' decoded pictures, for pre-training alone.
    """

    vectors: np.ndarray
    times: np.ndarray
    end: float
    span: np.ndarray
    residuals: np.ndarray | None = None
    pictures: np.ndarray | None = None


@dataclass
class MotionClip:
    """A clip as key frames and motion; a Student's clip (frames, times, duration, box) with more.

    frames uint8 [N, H, W, 3]: the key frames; times [N]: when they are shown; duration: seconds of the whole video;
    motion [N]: what follows each. origin: where the vectors come from ("native", "reencoded", "mestimate", "proxy",
    "none"); notes: for people.
    """

    frames: np.ndarray
    times: list[float]
    duration: float
    motion: list[Motion]
    origin: str = "native"
    box: tuple[float, float, float, float] = WHOLE_FRAME
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not len(self.frames) == len(self.times) == len(self.motion) > 0:
            raise ValueError(
                f"MotionClip: {len(self.frames)} frames, {len(self.times)} times and {len(self.motion)} "
                "entries of motion; there must be as many of each, and one at least."
            )

    @property
    def spans(self) -> list[tuple[float, float]]:
        """Seconds [N] (start, end) from each key frame to the next."""
        return [(time, max(motion.end, time + 1e-3)) for time, motion in zip(self.times, self.motion, strict=True)]


def picture_clip(clip: Any, picture: int = 0) -> MotionClip:
    """One frame of a clip as a key frame that nothing follows, as pictures are given (EMA, 3.4: "a blank motion
    vector"). clip: a MotionClip, or frames alone with their duration and box."""
    motion = Motion(np.zeros((0, 1, 1, 2), np.float32), np.zeros(0), clip.duration, np.zeros(0, int))
    return MotionClip(clip.frames[picture : picture + 1], [0.0], clip.duration, [motion], "none", clip.box)
