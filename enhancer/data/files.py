"""Where a row's video is: a file, a span of one (video_start, video_end), or a list of pictures (fps).

The names are those of Qwen's tools. No path leaves the data folder, whatever links say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from enhancer.video.footage import PICTURES, PICTURES_A_SECOND, Footage, Video
from vdm_priors.errors import SampleError

FOOTAGE_KEYS = ("video_start", "video_end", "fps", "sample_fps")


def find_video(named: str | list[str], row: dict, root: Path, folders: tuple[str, ...] = ("",)) -> Video:
    """The file that `named` is, or its pictures, cut as `row` says. SampleError where that cannot be.

    folders: those below `root` that are looked through in turn.
    """
    start, end = (_seconds(row, key) for key in ("video_start", "video_end"))
    start = start or 0.0
    if end is not None and end <= start:
        raise SampleError(f"video_end ({end:g} s) must lie after video_start ({start:g} s)")
    if isinstance(named, list):
        rate = next((rate for rate in (_seconds(row, key) for key in ("fps", "sample_fps")) if rate is not None), None)
        if rate == 0:
            raise SampleError("fps is 0; give the pictures a second")
        files = tuple(locate(file, root, folders) for file in named)
        return Footage(files, start, end, rate or PICTURES_A_SECOND, assumed=rate is None)
    file = locate(named, root, folders)
    return file if start == 0 and end is None else Footage((file,), start, end)


def assumed_rates(videos: Iterable[Video]) -> list[str]:
    """A warning of lists of pictures without a rate, where there are some: times, and so motion, hang on it."""
    count = len({video for video in videos if isinstance(video, Footage) and video.assumed})
    if not count:
        return []
    lists = "1 list of pictures has" if count == 1 else f"{count} lists of pictures have"
    return [f'{lists} no "fps": {PICTURES_A_SECOND:g} pictures a second are assumed; write the true rate into the rows']


def is_pictures(value: Any) -> bool:
    """Whether a row's video is a list of picture files."""
    return isinstance(value, list) and bool(value) and all(
        isinstance(file, str) and file.lower().endswith(PICTURES) for file in value
    )


def _seconds(row: dict, key: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise SampleError(f"{key} is {value!r}; give a number of 0 or more")
    return float(value)


def locate(video: str, root: Path, folders: tuple[str, ...] = ("",)) -> Path:
    """The file's path under root; SampleError where it leaves root or is not there."""
    base = root.resolve()
    for folder in folders:
        try:
            path = (base / folder / video).resolve()
            found = path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL character, a circle of links
            circle = isinstance(error, RuntimeError)
            why = "links in a circle" if circle else getattr(error, "strerror", None) or error
            shown = repr(video) if len(video) <= 100 else f"{video[:80]!r} and {len(video) - 80} characters more"
            raise SampleError(f"the video path {shown} cannot be looked up ({why}); correct it") from error
        if not path.is_relative_to(base):
            raise SampleError(
                f"the video path {video!r} leaves the data folder {root}; move the video there, or set data.root"
            )
        if found:
            return path
    raise SampleError(f"the video {video!r} is not in {root}; check the path, or set data.root")
