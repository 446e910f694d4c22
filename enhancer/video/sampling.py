"""Which frames of a clip are taken, given the times of all of them: no file is read here.

The sampled frames are those on the screen in the middle of equal bins of the sampled range, so that asking for 8 frames
of an 8-frame clip gives each of them once, whatever the frame rate does.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path

from vdm_priors.errors import ClipError, UserError

TIMESTAMP_SLACK = 1e-6  # seconds; a time base cannot hold every frame time exactly


@dataclass(frozen=True)
class Sampling:
    """Which frames of a clip are read: times in seconds after its first frame, or its span's beginning.

    `frames` equal bins over [start, end), or bins of 1/fps seconds, then at most `frames`
    (a longer range is covered by `frames` equal bins). `end` None is the clip's end.
    `short` says what happens where the range has fewer frames: "repeat" shows the last
    one again and notes it, "fail" raises ClipError.
    """

    frames: int = 8
    fps: float | None = None
    start: float = 0.0
    end: float | None = None
    short: str = "repeat"

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise UserError(f"sampling.frames is {self.frames}: ask for at least 1 frame.")
        if self.fps is not None and not self.fps > 0:
            raise UserError(f"sampling.fps is {self.fps}: give a positive number of frames a second, or none.")
        if not self.start >= 0:
            raise UserError(
                f"sampling.start is {self.start}: it counts seconds from the first frame, so give 0 or more."
            )
        if self.end is not None and not self.end > self.start:
            raise UserError(f"sampling.end ({self.end} s) must lie after sampling.start ({self.start} s).")
        if self.short not in ("repeat", "fail"):
            raise UserError(f"sampling.short is {self.short!r}: choose 'repeat' or 'fail'.")


@dataclass
class FrameIndex:
    """Frames in the order of presentation. keys: their PTS, or their ordinals if there is none."""

    keys: list[int]
    times: list[float]
    duration: float
    by_pts: bool
    key_frames: list[int] = field(default_factory=list)  # sorted PTS of key frames
    notes: list[str] = field(default_factory=list)


def choose_frames(
    path: Path, index: FrameIndex, sampling: Sampling, notes: list[str]
) -> tuple[list[int], list[float]]:
    """Indices and times of the sampled frames; the times rise strictly. Remarks are added to `notes`.

    ClipError, naming `path`, where the range is empty or has too few frames.
    """
    start, end = sampling.start, index.duration
    if sampling.end is not None:
        if sampling.end > end + TIMESTAMP_SLACK:
            notes.append(f"the sampling ends at {sampling.end:g} s, the video at {end:.2f} s")
        end = min(end, sampling.end)
    if start >= end:
        raise ClipError(
            f"{path}: lasts {index.duration:.2f} s, but the sampling starts at {start:g} s. Lower sampling.start, or the "
            "sample's video_start."
        )

    span = end - start
    count, width = sampling.frames, span / sampling.frames
    if sampling.fps is not None:
        bins = math.floor(span * sampling.fps + TIMESTAMP_SLACK)
        if bins <= sampling.frames:
            # A range shorter than two bins still gives two frames: one alone has no motion.
            count = max(bins, min(2, sampling.frames))
            width = min(1 / sampling.fps, span / count)

    first = max(0, bisect_right(index.times, start + TIMESTAMP_SLACK) - 1)
    stop = max(first + 1, bisect_right(index.times, end - TIMESTAMP_SLACK))
    available = stop - first
    if available == 1 and count > 1:
        raise ClipError(
            f"{path}: has a single frame between {start:.2f} s and {end:.2f} s, so there is no motion in it. "
            "Widen sampling.start/end, set sampling.frames to 1 for a still, or leave this sample out."
        )
    if available < count:
        if sampling.short == "fail":
            raise ClipError(
                f"{path}: has {available} frames between {start:.2f} s and {end:.2f} s, the sampling asks for {count}. "
                "Lower sampling.frames, or set sampling.short to 'repeat'."
            )
        chosen = list(range(first, stop))
        times = [index.times[i] for i in chosen]
        step = (times[-1] - times[0]) / (len(times) - 1)
        missing = count - available
        notes.append(f"{available} frames where {count} were asked for: the last one is repeated {missing} times")
        return chosen + chosen[-1:] * missing, times + [times[-1] + step * (k + 1) for k in range(missing)]

    chosen = []
    for k in range(count):
        shown = bisect_right(index.times, start + (k + 0.5) * width + TIMESTAMP_SLACK) - 1
        # No frame twice, and enough left for the bins that follow (long-held frames).
        lowest = chosen[-1] + 1 if chosen else first
        chosen.append(min(max(shown, lowest), stop - (count - k)))
    return chosen, [index.times[i] for i in chosen]
