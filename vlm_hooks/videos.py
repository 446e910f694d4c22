"""Videos in a sequence of tokens: where they stand, and which seconds their tokens are of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from vdm_priors.errors import ModelError
from vdm_priors.grid import frame_spans, merge_spans


class Video(NamedTuple):
    """A video in a sequence: positions [F·H·W] of its visual tokens, frame by frame, then row by row, and F, H, W."""

    positions: Tensor
    shape: tuple[int, int, int]


def clips_of(shown: Any) -> list[Any]:
    """The clips among what a sample shows: one clip, or a list of clips and pictures (uint8 [H, W, 3])."""
    return [one for one in as_list(shown) if is_clip(one)]


def is_clip(shown: Any) -> bool:
    """Whether it is a clip, which has frames, and not a picture."""
    return hasattr(shown, "frames")


def as_list(shown: Any) -> list[Any]:
    """What a sample shows, where one clip may stand alone."""
    return list(shown) if isinstance(shown, list | tuple) else [shown]


def own_videos(sample: int, clips: Sequence[Any], videos: Sequence[Video]) -> list[Video]:
    """The video of each of the sample's clips, in their order. Raises ModelError."""
    if len(clips) == 1:
        return [chosen_video(sample, videos, None)]
    if len(clips) != len(videos):
        raise ModelError(
            f"Sample {sample} of the batch has {len(videos)} videos, but {len(clips)} clips: encode and grids need the "
            "same clips."
        )
    return list(videos)


def chosen_video(sample: int, videos: Sequence[Video], which: int | None) -> Video:
    """The sample's only video, or the one that is asked for. Raises ModelError."""
    if which is None and len(videos) == 1:
        return videos[0]
    if which is None or not 0 <= which < len(videos):
        asked = "none was chosen" if which is None else f"number {which} (counted from 0) was chosen"
        raise ModelError(
            f"Sample {sample} of the batch has {len(videos)} videos and {asked}: say with `which` which one the clip "
            "is."
        )
    return videos[which]


def token_spans(clip: Any, depth: int) -> Tensor:
    """Seconds [F, 2] of tokens that join `depth` frames each; repeating the last frame of a rest adds no time."""
    count = len(clip.times)
    groups = [list(range(first, min(first + depth, count))) for first in range(0, count, depth)]
    return merge_spans(frame_spans(clip.times, clip.duration), groups)


def seconds_per_frame(clip: Any) -> float:
    """Mean spacing of the sampled frames; a lone frame lasts the clip's duration, or a second."""
    if len(clip.times) > 1 and clip.times[-1] > clip.times[0]:
        return (clip.times[-1] - clip.times[0]) / (len(clip.times) - 1)
    return clip.duration or 1.0
