"""Read a few frames of a video file, with the seconds at which they are shown.

A frame stands for the time from its own presentation time to the next frame's. The
sampled frames are those on the screen in the middle of equal bins of the sampled range,
so that asking for 8 frames of an 8-frame clip gives each of them once, whatever the
frame rate does. Two passes: the packets alone (times, key frames), then the decoder,
which jumps to a key frame where that saves work.
"""

from __future__ import annotations

import math
import os
import stat
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from vdm_priors.errors import ClipError, UserError

# Containers that hold their own data. Playlists and concatenations, which name other
# files or addresses, are absent on purpose.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,"
    "h264,hevc,m4v,ivf,gif,nut,mxf,yuv4mpegpipe,wav,mp3,flac,aac"
)
TIMESTAMP_SLACK = 1e-6  # seconds; a time base cannot hold every frame time exactly
SEEK_AHEAD = 32  # frames; below this, decoding on is cheaper than a seek
SMALL_FRAME = 320 * 240  # pixels; below it one decoding thread is faster


@dataclass(frozen=True)
class Sampling:
    """Which frames of a clip are read: times in seconds after its first frame.

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
            raise UserError(f"sampling.start is {self.start}: it counts seconds from the first frame, so give 0 or more.")
        if self.end is not None and not self.end > self.start:
            raise UserError(f"sampling.end ({self.end} s) must lie after sampling.start ({self.start} s).")
        if self.short not in ("repeat", "fail"):
            raise UserError(f"sampling.short is {self.short!r}: choose 'repeat' or 'fail'.")


@dataclass
class Clip:
    """Sampled frames of one file. frames [N,H,W,3] uint8 RGB, upright (rotation metadata applied);
    times: N seconds after the file's first frame; duration: seconds of the whole file;
    box: top, left, bottom, right of the frames in the normalised source frame; repeated: how many
    of the frames are the last one again, whose times go on at the same pace."""

    path: Path
    frames: np.ndarray
    times: list[float]
    duration: float
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    notes: list[str] = field(default_factory=list)
    repeated: int = 0

    @property
    def seconds(self) -> list[float]:
        """Times of the frames that were really sampled, without the repeated one's."""
        return self.times[: len(self.times) - self.repeated]


def read_clip(path: str | os.PathLike, sampling: Sampling = Sampling()) -> Clip:
    """Read the sampled frames of a video file; ClipError names the file and the remedy."""
    path = regular_file(path)
    with open_video(path) as (container, stream):
        index = _packet_index(container, stream)
        if index is None:
            index = _decoded_index(path, stream.average_rate)
        notes = list(index.notes)
        chosen, times = _choose(path, index, sampling, notes)
        frames = _decode(path, index, chosen)
    if frames is None:
        # Some packets give no frame (a cut or damaged file): sample among those that do.
        index = _decoded_index(path, None)
        notes.append(f"damaged: only {len(index.times)} frames, {index.duration:.2f} s, can be decoded")
        chosen, times = _choose(path, index, sampling, notes)
        frames = _decode(path, index, chosen)
        if frames is None:
            raise ClipError(f"{path}: the video decodes differently each time it is read. Re-encode it (ffmpeg -i IN OUT.mp4) or leave it out.")
    repeated = len(chosen) - len(set(chosen))
    return Clip(path, np.stack([frames[i] for i in chosen]), times, index.duration, notes=notes, repeated=repeated)


# -- the file -------------------------------------------------------------------------


def regular_file(path: str | os.PathLike) -> Path:
    if "://" in os.fspath(path):
        raise ClipError(f"{path}: only files on this machine are read, never an address. Download the video and give its path.")
    path = Path(path)
    try:
        status = path.stat()
    except OSError as error:
        raise ClipError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from error
    if stat.S_ISDIR(status.st_mode):
        raise ClipError(f"{path}: is a folder, not a video file. Give the path of one file.")
    if not stat.S_ISREG(status.st_mode):
        raise ClipError(f"{path}: is not a regular file. Copy the video into a file and give its path.")
    if status.st_size == 0:
        raise ClipError(f"{path}: the file is empty. Copy or download it again.")
    return path


@contextmanager
def open_video(path: Path) -> Iterator[tuple[av.container.InputContainer, av.video.stream.VideoStream]]:
    options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
    try:
        # "file:" keeps a path such as "concat:a|b" from being read as a protocol
        container = av.open(f"file:{path.absolute()}", container_options=options, metadata_errors="ignore")
    except OSError as error:
        raise ClipError(f"{path}: cannot be opened ({error.strerror}). Check its permissions.") from error
    except (av.error.FFmpegError, ValueError) as error:
        raise ClipError(
            f"{path}: is not a video that can be read: it is another kind of file, or cut short before its index. "
            "Copy it again, or re-encode it (ffmpeg -i IN OUT.mp4)."
        ) from error
    with container:
        pictures = av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & pictures]
        if not streams:
            kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
            raise ClipError(f"{path}: has no video (it holds {kinds}). Give a file with moving pictures, or leave this sample out.")
        yield container, streams[0]


# -- which frames there are -----------------------------------------------------------


@dataclass
class _Index:
    """Frames in the order of presentation. keys: their PTS, or their ordinals if there is none."""

    keys: list[int]
    times: list[float]
    duration: float
    by_pts: bool
    key_frames: list[int] = field(default_factory=list)  # sorted PTS of key frames
    notes: list[str] = field(default_factory=list)


def _demux(container, stream) -> Iterator[av.Packet]:
    """All packets up to the end, or up to where a cut file ends."""
    try:
        yield from container.demux(stream)
    except av.error.FFmpegError:
        return


def _packet_index(container, stream) -> _Index | None:
    """Times of all frames from the packets alone; None where packets carry no times."""
    packets = [p for p in _demux(container, stream) if p.size and not p.is_discard]
    if not packets or any(p.pts is None for p in packets) or not stream.time_base:
        return None
    packets.sort(key=lambda p: p.pts)
    keys = [p.pts for p in packets]
    if len(set(keys)) != len(keys):
        return None
    key_frames = [p.pts for p in packets if p.is_keyframe]
    return _index_of(keys, stream.time_base, packets[-1].duration, stream.average_rate, key_frames)


def _index_of(keys, time_base, last_duration, rate, key_frames=()) -> _Index:
    times = [float((key - keys[0]) * time_base) for key in keys]
    if last_duration:
        last = float(last_duration * time_base)
    elif len(times) > 1:
        last = float(np.median(np.diff(times)))
    else:
        last = float(1 / rate) if rate else 0.04
    return _Index(keys, times, times[-1] + last, True, list(key_frames))


def _decoded_index(path: Path, nominal_rate) -> _Index:
    """Times of the frames that really decode, by decoding all of them."""
    with open_video(path) as (container, stream):
        rate = nominal_rate or stream.average_rate
        stamps = [frame.pts for frame in _frames(container, stream)]
        time_base = stream.time_base
    if not stamps:
        raise ClipError(f"{path}: not one frame can be decoded: the file is cut short, damaged, or its codec is unknown. Copy it again or re-encode it.")
    if all(s is not None for s in stamps) and all(a < b for a, b in zip(stamps, stamps[1:])) and time_base:
        return _index_of(stamps, time_base, None, rate)
    rate = float(rate) if rate else 25.0
    times = [i / rate for i in range(len(stamps))]
    note = f"no usable time stamps: {rate:g} frames a second are assumed"
    return _Index(list(range(len(stamps))), times, len(stamps) / rate, False, notes=[note])


# -- which frames are taken -----------------------------------------------------------


def _choose(path: Path, index: _Index, sampling: Sampling, notes: list[str]) -> tuple[list[int], list[float]]:
    """Indices and times of the sampled frames; the times rise strictly."""
    start, end = sampling.start, index.duration
    if sampling.end is not None:
        if sampling.end > end + TIMESTAMP_SLACK:
            notes.append(f"the sampling ends at {sampling.end:g} s, the video at {end:.2f} s")
        end = min(end, sampling.end)
    if start >= end:
        raise ClipError(f"{path}: lasts {index.duration:.2f} s, but the sampling starts at {start:g} s. Lower sampling.start.")

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


# -- decoding -------------------------------------------------------------------------


def _frames(container, stream) -> Iterator[av.VideoFrame]:
    """Decoded frames in the order of presentation; damaged packets are passed over."""
    try:
        for packet in _demux(container, stream):
            try:
                yield from packet.decode()
            except av.error.InvalidDataError:
                continue
    except av.error.FFmpegError:
        return


def _decode(path: Path, index: _Index, chosen: list[int]) -> dict[int, np.ndarray] | None:
    """Pixels by frame index, or None where a chosen frame never comes out of the decoder."""
    frames = _decode_with(path, index, chosen, seek=index.by_pts)
    if len(frames) < len(set(chosen)) and index.by_pts:
        frames = _decode_with(path, index, chosen, seek=False)
    return frames if len(frames) == len(set(chosen)) else None


def _decode_with(path: Path, index: _Index, chosen: list[int], seek: bool) -> dict[int, np.ndarray]:
    wanted = sorted(set(chosen))
    found: dict[int, np.ndarray] = {}
    position = 0  # index of the frame that the decoder is at
    with open_video(path) as (container, stream):
        # Threads cost more than they save on few or small frames, and clips are read in parallel anyway.
        stream.codec_context.thread_count = 1 if stream.height * stream.width < SMALL_FRAME else 0
        converter = VideoReformatter()
        frames = enumerate(_frames(container, stream))
        for target in wanted:
            key = index.keys[target]
            if seek:
                near = bisect_right(index.key_frames, key) - 1
                if near >= 0 and bisect_right(index.keys, index.key_frames[near]) - 1 > position + SEEK_AHEAD:
                    container.seek(index.key_frames[near], stream=stream, backward=True)
                    frames = enumerate(_frames(container, stream))
            for ordinal, frame in frames:
                at = frame.pts if index.by_pts else ordinal
                if at is not None and at >= key:
                    if at == key:
                        found[target] = _upright(frame, converter)
                        position = target
                    break
    return found


def _upright(frame: av.VideoFrame, converter: VideoReformatter) -> np.ndarray:
    pixels = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    quarters = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, quarters)) if quarters else pixels


# -- keeping decoded clips ------------------------------------------------------------


class FrameCache:
    """Decoded clips, the least recently used dropped first, bounded in bytes of pixels."""

    def __init__(self, max_bytes: int = 1 << 30, read: Callable[[Path, Sampling], Clip] = read_clip) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._read = read
        self._clips: OrderedDict[tuple, Clip] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str | os.PathLike, sampling: Sampling) -> Clip:
        """The clip, read if it is not kept or its file has changed; raises as read_clip does."""
        path = regular_file(path)
        status = path.stat()
        key = (str(path.absolute()), status.st_size, status.st_mtime_ns, sampling)
        with self._lock:
            if key in self._clips:
                self._clips.move_to_end(key)
                return self._clips[key]
        clip = self._read(path, sampling)
        with self._lock:
            if key not in self._clips and clip.frames.nbytes <= self.max_bytes:
                self._clips[key] = clip
                self.bytes += clip.frames.nbytes
            while self.bytes > self.max_bytes:
                _, dropped = self._clips.popitem(last=False)
                self.bytes -= dropped.frames.nbytes
        return clip

    def __len__(self) -> int:
        return len(self._clips)
