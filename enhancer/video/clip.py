"""Read a few frames of a video file, of a span of one, or of pictures, with the seconds at which they are shown.

A frame stands for the time from its own presentation time to the next frame's. Two passes:
the packets alone (times, key frames), then the decoder, which jumps to a key frame where
that saves work. Which frames are taken is decided in enhancer/video/sampling.py.
"""

from __future__ import annotations

import os
import stat
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from enhancer.video.footage import Footage, Video, files_of, within
from enhancer.video.sampling import FrameIndex, Sampling, choose_frames
from enhancer.video.still_pictures import read_pictures
from vdm_priors.errors import ClipError

# Containers that hold their own data. Playlists and concatenations, which name other
# files or addresses, are absent on purpose.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,"
    "h264,hevc,m4v,ivf,gif,nut,mxf,yuv4mpegpipe,wav,mp3,flac,aac"
)
SEEK_AHEAD = 32  # frames; below this, decoding on is cheaper than a seek
SMALL_FRAME = 320 * 240  # pixels; below it one decoding thread is faster


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


def read_clip(video: str | os.PathLike | Footage, sampling: Sampling = Sampling()) -> Clip:
    """Read the sampled frames of a video; ClipError names the file and the remedy."""
    if not isinstance(video, Footage):
        return _read_file(regular_file(video), sampling)
    for file in video.files:
        regular_file(file)
    start, end = within(video, sampling.start, sampling.end)
    if end is not None and end <= start:
        raise ClipError(
            f"{video}: the sampling begins at {sampling.start:g} s, beyond the end of this span. Lower sampling.start."
        )
    sampling = replace(sampling, start=start, end=end)
    if video.fps is None:
        return _read_file(video.files[0], sampling)
    frames, times, duration, notes, repeated = read_pictures(video, sampling)
    return Clip(video.files[0], frames, times, duration, notes=notes, repeated=repeated)


def _read_file(path: Path, sampling: Sampling) -> Clip:
    with open_video(path) as (container, stream):
        index = _packet_index(path, container, stream)
        if index is None:
            index = _decoded_index(path, stream.average_rate)
        notes = list(index.notes)
        chosen, times = choose_frames(path, index, sampling, notes)
        frames = _decode(path, index, chosen)
    if frames is None:
        # Some packets give no frame (a cut or damaged file): sample among those that do.
        index = _decoded_index(path, None)
        notes.append(f"damaged: only {len(index.times)} frames, {index.duration:.2f} s, can be decoded")
        chosen, times = choose_frames(path, index, sampling, notes)
        frames = _decode(path, index, chosen)
        if frames is None:
            raise ClipError(
                f"{path}: the video decodes differently each time it is read. Re-encode it (ffmpeg -i IN OUT.mp4) or "
                "leave it out."
            )
    repeated = len(chosen) - len(set(chosen))
    return Clip(path, np.stack([frames[i] for i in chosen]), times, index.duration, notes=notes, repeated=repeated)


# -- the file -------------------------------------------------------------------------


def regular_file(path: str | os.PathLike) -> Path:
    if "://" in os.fspath(path):
        raise ClipError(
            f"{path}: only files on this machine are read, never an address. Download the video and give its path."
        )
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
            raise ClipError(
                f"{path}: has no video (it holds {kinds}). Give a file with moving pictures, or leave this sample out."
            )
        yield container, streams[0]


def refuse_encrypted(path: Path, packet: av.Packet) -> None:
    """ClipError for a packet of an encrypted stream: a decoder would take it for damage, or make pictures of noise."""
    if packet.has_sidedata("encryption_info"):
        raise ClipError(f"{path}: its video is encrypted. Give a file without encryption, or leave this sample out.")


# -- which frames there are -----------------------------------------------------------


def _demux(container, stream) -> Iterator[av.Packet]:
    """All packets up to the end, or up to where a cut file ends."""
    try:
        yield from container.demux(stream)
    except av.error.FFmpegError:
        return


def _packet_index(path: Path, container, stream) -> FrameIndex | None:
    """Times of all frames from the packets alone; None where packets carry no times."""
    packets = [p for p in _demux(container, stream) if p.size and not p.is_discard]
    for packet in packets:
        refuse_encrypted(path, packet)
    if not packets or any(p.pts is None for p in packets) or not stream.time_base:
        return None
    packets.sort(key=lambda p: p.pts)
    keys = [p.pts for p in packets]
    if len(set(keys)) != len(keys):
        return None
    key_frames = [p.pts for p in packets if p.is_keyframe]
    return _index_of(keys, stream.time_base, packets[-1].duration, stream.average_rate, key_frames)


def _index_of(keys, time_base, last_duration, rate, key_frames=()) -> FrameIndex:
    times = [float((key - keys[0]) * time_base) for key in keys]
    if last_duration:
        last = float(last_duration * time_base)
    elif len(times) > 1:
        last = float(np.median(np.diff(times)))
    else:
        last = float(1 / rate) if rate else 0.04
    return FrameIndex(keys, times, times[-1] + last, True, list(key_frames))


def _decoded_index(path: Path, nominal_rate) -> FrameIndex:
    """Times of the frames that really decode, by decoding all of them."""
    with open_video(path) as (container, stream):
        rate = nominal_rate or stream.average_rate
        stamps = [frame.pts for frame in _frames(container, stream)]
        time_base = stream.time_base
    if not stamps:
        raise ClipError(
            f"{path}: not one frame can be decoded: the file is cut short, damaged, or its codec is unknown. Copy it "
            "again or re-encode it."
        )
    if all(s is not None for s in stamps) and all(a < b for a, b in zip(stamps, stamps[1:])) and time_base:
        return _index_of(stamps, time_base, None, rate)
    rate = float(rate) if rate else 25.0
    times = [i / rate for i in range(len(stamps))]
    note = f"no usable time stamps: {rate:g} frames a second are assumed"
    return FrameIndex(list(range(len(stamps))), times, len(stamps) / rate, False, notes=[note])


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


def _decode(path: Path, index: FrameIndex, chosen: list[int]) -> dict[int, np.ndarray] | None:
    """Pixels by frame index, or None where a chosen frame never comes out of the decoder."""
    frames = _decode_with(path, index, chosen, seek=index.by_pts)
    if len(frames) < len(set(chosen)) and index.by_pts:
        frames = _decode_with(path, index, chosen, seek=False)
    return frames if len(frames) == len(set(chosen)) else None


def _decode_with(path: Path, index: FrameIndex, chosen: list[int], seek: bool) -> dict[int, np.ndarray]:
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

    def __init__(self, max_bytes: int = 1 << 30, read: Callable[[Video, Sampling], Clip] = read_clip) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._read = read
        self._clips: OrderedDict[tuple, Clip] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, video: str | os.PathLike | Footage, sampling: Sampling) -> Clip:
        """The clip, read if it is not kept or its files have changed; raises as read_clip does."""
        video = video if isinstance(video, Footage) else regular_file(video).absolute()
        stamps = [regular_file(file).stat() for file in files_of(video)]
        key = (video, tuple((stamp.st_size, stamp.st_mtime_ns) for stamp in stamps), sampling)
        with self._lock:
            if key in self._clips:
                self._clips.move_to_end(key)
                return self._clips[key]
        clip = self._read(video, sampling)
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
