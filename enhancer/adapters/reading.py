"""Samples' videos as the clips that adapters take, kept in memory once they are read."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from enhancer.adapters.gop_clips import anchored_clip, keyed_clip, shown_picture
from enhancer.adapters.gops import plan_gops, read_gops
from enhancer.adapters.reencode import reencoded
from enhancer.adapters.schema import ReadingSettings
from enhancer.data.samples import Sample
from enhancer.recipe import build, to_plain
from enhancer.runfolder import read_json, write_json
from enhancer.video.clip import Sampling, read_clip
from enhancer.video.footage import Footage, Video, files_of
from vdm_priors.errors import ClipError, ModelError
from vlm_hooks.adapters.inputs import MotionClip

LARGEST = 2 << 30  # bytes of clips in memory
FILE = "reading.json"  # in an adapter's folder: how its clips are read


class ClipReader:
    """`get(video, sampling)` as a FrameCache has it; the sampling is the recipe's reading, the argument is not used."""

    def __init__(self, reading: ReadingSettings, largest: int = LARGEST) -> None:
        self.reading, self.largest = reading, largest
        self._clips: OrderedDict[Video, Any] = OrderedDict()
        self._bytes = 0

    def save(self, folder: Path) -> None:
        """Writes beside an adapter's weights how its clips are read."""
        write_json(folder / FILE, to_plain(self.reading))

    @classmethod
    def of(cls, folder: Path) -> ClipReader:
        """The reader of an adapter's folder. Raises ModelError where `save` wrote none."""
        plain = read_json(folder / FILE, None)
        if plain is None:
            raise ModelError(
                f"{folder} does not say how its clips are read: it has no {FILE}. `enhancer run` writes it into "
                "every stage's folder; give one of those, or write into it the keys of the recipe's `reading`."
            )
        return cls(build(ReadingSettings, plain, str(folder / FILE)))

    def get(self, video: Video, sampling: Sampling | None = None) -> Any:
        """The clip: a MotionClip, or a Clip of frames alone. Raises ClipError."""
        if video in self._clips:
            self._clips.move_to_end(video)
            return self._clips[video]
        clip = self._read(video)
        self._clips[video] = clip
        self._bytes += _size(clip)
        while self._bytes > self.largest and len(self._clips) > 1:
            self._bytes -= _size(self._clips.popitem(last=False)[1])
        return clip

    def _read(self, video: Video) -> Any:
        r = self.reading
        if r.clips == "frames":
            return read_clip(video, Sampling(frames=r.frames))
        if isinstance(video, Footage) and video.fps is not None and len(video.files) == 1:
            return shown_picture(read_clip(video, Sampling(frames=1)), r.size)
        if isinstance(video, Footage) and (video.fps is not None or video.start or video.end is not None):
            raise ClipError(
                f"{video}: codec adapters read whole video files or single pictures, not spans or lists of pictures, in "
                "which no codec says what moves. Cut a span into a file of its own (ffmpeg -ss START -to END -i IN OUT.mp4)."
            )
        path = files_of(video)[0]
        with reencoded(path, r.key_interval, r.fps) if r.key_interval else nullcontext(path) as file:
            how = r.gop_reading()
            plan = plan_gops(file, how)
            gops = list(read_gops(file, how, plan=plan))
            if r.clips == "keyed":
                clip = keyed_clip(gops, plan, r.fuse, r.keys, r.pictures)
            else:
                clip = anchored_clip(gops, plan, r.fuse, r.anchors, r.steps, r.pictures)
        if r.key_interval:
            clip.origin = "reencoded"
        return clip


class Exchanged:
    """A reader whose clips have another clip's motion (or, for adapters without motion inputs, its further frames).

    partners: each sample's video and the one whose motion it gets. A control: frames and text stay, motion is wrong.
    """

    def __init__(self, reader: ClipReader, adapter: Any, partners: dict[Video, Video]) -> None:
        self.reader, self.adapter, self.partners = reader, adapter, partners

    def get(self, video: Video, sampling: Sampling | None = None) -> Any:
        return self.adapter.exchanged(self.reader.get(video), self.reader.get(self.partners[video]))


def partners(samples: Sequence[Sample], reader: ClipReader, seed: int) -> dict[Video, Video]:
    """For each video another one of the same question type, whose clip has as many key frames and steps: none keeps its
    own. A clip without such a partner is left out."""
    groups: dict[tuple, list[Video]] = {}
    for sample in samples:
        try:
            clip = reader.get(sample.video)
        except ClipError:
            continue  # evaluation says so
        shape = (
            tuple(len(motion.times) for motion in clip.motion) if isinstance(clip, MotionClip) else (len(clip.times),)
        )
        members = groups.setdefault((sample.question_type, shape), [])
        if sample.video not in members:
            members.append(sample.video)
    found = {}
    rng = np.random.default_rng(seed)
    for members in groups.values():
        order = [members[n] for n in rng.permutation(len(members))]
        if len(order) > 1:
            found |= dict(zip(order, order[1:] + order[:1], strict=True))
    return found


def _size(clip: Any) -> int:
    """Bytes of a clip's arrays."""
    total = clip.frames.nbytes
    for motion in getattr(clip, "motion", ()):
        arrays = (getattr(motion, f.name) for f in dataclasses.fields(motion))
        total += sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
    return total
