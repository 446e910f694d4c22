"""GOPs to the clips that adapters take: which decoded pictures are key frames, and the motion that follows each.

keyed     CoPE-VideoLM and EMA: the first picture of every GOP, and of its parts where more key frames are wanted
anchored  HY-Himmel: K pictures evenly spaced over the video, whatever GOP they are of
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from enhancer.adapters.gops import Gop, GopPlan
from enhancer.video.clip import Clip
from vdm_priors.errors import ClipError
from vlm_hooks.adapters.inputs import Motion, MotionClip, picture_clip


@dataclass
class _Moment:
    """A picture of a GOP and the step that leads to it, None for the GOP's first."""

    gop: Gop
    place: int

    @property
    def time(self) -> float:
        return float(self.gop.times[self.place])

    @property
    def picture(self) -> np.ndarray:
        return self.gop.pictures[self.place]

    @property
    def moves(self) -> bool:
        return self.place > 0


def keyed_clip(gops: Sequence[Gop], plan: GopPlan, fuse: int, keys: int = 1, pictures: bool = False) -> MotionClip:
    """`keys` key frames a GOP, evenly spaced among its steps, and the other steps as motion (CoPE-VideoLM, Table 1).

    The step that leads to a key frame is left out, as its picture says it all. pictures: keep the steps' pictures, for
    pre-training. Raises ClipError where there is no GOP.
    """
    chosen: list[list[_Moment]] = []
    for gop in gops:
        moments = [_Moment(gop, place) for place in range(gop.steps + 1)]
        starts = np.unique(np.linspace(0, len(moments), keys + 1).round().astype(int))[:-1]
        chosen += [moments[a:b] for a, b in zip(starts, [*starts[1:], len(moments)], strict=True)]
    ends = [
        part[-1].gop.end if n + 1 == len(chosen) or chosen[n + 1][0].gop is not part[-1].gop else chosen[n + 1][0].time
        for n, part in enumerate(chosen)
    ]
    return _clip([part[0] for part in chosen], [part[1:] for part in chosen], ends, plan, fuse, pictures)


def anchored_clip(
    gops: Sequence[Gop], plan: GopPlan, fuse: int, anchors: int = 8, steps: int | None = None, pictures: bool = False
) -> MotionClip:
    """`anchors` pictures, the first and the last among them, and all steps between two of them (HY-Himmel, 3.1).

    Each interval keeps the step that leads to its later anchor; of an interval with more than `steps`, so many evenly
    spaced ones are kept. Pictures are the key frames where there are as many GOPs as anchors; a video of fewer pictures
    has fewer anchors, which is noted. Raises ClipError where there is no GOP.
    """
    moments = [_Moment(gop, place) for gop in gops for place in range(gop.steps + 1)]
    notes = [] if len(moments) >= anchors else [f"has {len(moments)} pictures for {anchors} anchors: each is one"]
    at = np.unique(np.linspace(0, max(len(moments) - 1, 0), min(anchors, len(moments))).round().astype(int)).tolist()
    between = [moments[a + 1 : b + 1] for a, b in zip(at, at[1:])] + [[]] * bool(at)
    between = [_evenly([moment for moment in part if moment.moves], steps) for part in between]
    ends = [moments[b].time for b in at[1:]] + [gops[-1].end] if at else []
    return _clip([moments[n] for n in at], between, ends, plan, fuse, pictures, notes)


def shown_picture(clip: Clip, size: Sequence[int]) -> MotionClip:
    """A picture as a GOP that nothing follows (EMA, 3.4: "a blank motion vector"); size: its new height and width."""
    picture = cv2.resize(clip.frames[0], (size[1], size[0]), interpolation=cv2.INTER_AREA)
    return picture_clip(replace(clip, frames=picture[None]))


def _evenly(moments: list[_Moment], most: int | None) -> list[_Moment]:
    if most is None or len(moments) <= most:
        return moments
    return [moments[n] for n in np.linspace(0, len(moments) - 1, most).round().astype(int)]


def _clip(
    keys: list[_Moment],
    following: list[list[_Moment]],
    ends: list[float],
    plan: GopPlan,
    fuse: int,
    pictures: bool,
    notes: Sequence[str] = (),
) -> MotionClip:
    if not keys:
        raise ClipError(f"{plan.index.path}: not one picture can be decoded: the file is damaged. Copy it again.")
    motion = [
        _motion(part, end, fuse, pictures, keys[0].picture.shape) for part, end in zip(following, ends, strict=True)
    ]
    origins = sorted({moment.gop.origin for part in following for moment in part}) or ["none"]
    return MotionClip(
        np.stack([key.picture for key in keys]),
        [key.time for key in keys],
        plan.index.duration,
        motion,
        " and ".join(origins),
        notes=[*plan.notes, *notes],
    )


def _motion(part: list[_Moment], end: float, fuse: int, pictures: bool, shape: tuple[int, int, int]) -> Motion:
    height, width, _ = shape
    vectors = np.zeros((len(part), height // 8, width // 8, 2), np.float32)
    residuals = np.zeros((len(part), height, width, 3), np.float32)
    for n, moment in enumerate(part):
        step, valid = moment.place - 1, moment.gop.valid[moment.place - 1]
        vectors[n] = np.where(valid[..., None], moment.gop.displacement[step], np.nan)
        known = np.repeat(np.repeat(valid, 8, axis=0), 8, axis=1)[..., None]
        residuals[n] = np.where(known, moment.gop.error[step] / np.float32(255), np.nan)
    return Motion(
        vectors,
        np.array([moment.time for moment in part]),
        end,
        np.full(len(part), fuse),
        residuals,
        np.stack([moment.picture for moment in part]) if pictures and part else None,
    )
