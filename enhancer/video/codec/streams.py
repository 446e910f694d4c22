"""What a video stream says of itself without being decoded: times, sizes, key frames, groups of pictures.

Packets are numbered in the order of the file (their *ordinal*), which is the order of decoding; a decoder hands the
number on with the frame, so that a frame is never confused with another one's packet, whatever its time stamps are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np

from enhancer.video.clip import open_video, refuse_encrypted
from enhancer.video.codec.h264 import LARGEST_DPB, Headers
from vdm_priors.errors import ClipError

if TYPE_CHECKING:
    from enhancer.video.codec.vectors import DecodedFrame

# Decoders of FFmpeg that export the stream's own vectors; the others return none, without an error.
NATIVE = frozenset(
    "h264 mpeg1video mpeg2video mpeg4 h263 h263p flv msmpeg4 msmpeg4v1 msmpeg4v2 msmpeg4v3 wmv1 wmv2 rv10 rv20".split()
)
# P refers to the last I or P, B to the two around it: distances follow from the frame types
ANCHORED = NATIVE - {"h264"}
# The vectors exported of their B-frames are all zero, which is not what the stream says
ZERO_B_VECTORS = frozenset({"mpeg4"})
LONG_GAP = 60.0  # seconds between two frames: a time stamp's jump, not a frame rate
RATE_IF_UNKNOWN = Fraction(25)
LARGEST_FRAME = 16384 * 16384  # pixels; more is a damaged header


@dataclass(frozen=True)
class Segment:
    """Packets [first, stop) that give the frames with pts in [start, end): a group of pictures, with those leading
    pictures of the next that refer back into it. start, end None: no limit."""

    first: int
    stop: int
    start: int | None = None
    end: int | None = None


@dataclass(frozen=True)
class StreamIndex:
    """One video stream, P packets in decoding order. seconds [P] after the first frame (None where packets have no
    usable times), pts [P] (the same), sizes [P] bytes, keys [P] bool; referable [P] bool and most_references: what
    H.264's headers say of reference pictures (all and 16 where they say nothing); height, width in pixels as stored,
    before rotation; reordered: frames are shown in another order than they are decoded."""

    path: Path
    codec: str
    profile: str
    container: str
    height: int
    width: int
    rate: Fraction
    pixel_aspect: Fraction
    time_base: Fraction
    seconds: np.ndarray | None
    pts: np.ndarray | None
    sizes: np.ndarray
    keys: np.ndarray
    last_duration: float
    referable: np.ndarray
    most_references: int
    reordered: bool
    segments: tuple[Segment, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def ranks(self) -> np.ndarray | None:
        """[P] place of each packet's frame in the order of presentation; None without times."""
        return None if self.pts is None else np.argsort(np.argsort(self.pts, kind="stable"), kind="stable")

    @cached_property
    def ordinal_of_pts(self) -> dict[int, int]:
        """Packets' numbers by their time stamps; empty without."""
        return {} if self.pts is None else {int(pts): n for n, pts in enumerate(self.pts)}

    def seconds_between(self, rank: int, distance: np.ndarray) -> np.ndarray:
        """Seconds from the frame of that rank to those `distance` frames on, of distance's sign."""
        if self.seconds is None:
            return distance / float(self.rate)
        shown = self.shown_seconds
        return shown[np.clip(rank + distance, 0, len(shown) - 1)] - shown[rank]

    @cached_property
    def shown_seconds(self) -> np.ndarray | None:
        """[P] seconds in the order of presentation; None without times."""
        return None if self.seconds is None else np.sort(self.seconds)

    @property
    def duration(self) -> float:
        """Seconds to the end of the last frame, as the packets tell."""
        last = (len(self.sizes) - 1) / float(self.rate) if self.seconds is None else self.shown_seconds[-1]
        return float(last) + self.last_duration

    def of_frames(self, frames: list[DecodedFrame]) -> StreamIndex:
        """The index of those packets alone that gave these frames, which are renumbered: VP8 and others have packets
        that show nothing, and distances are counted in frames shown."""
        kept = np.array(sorted(frame.ordinal for frame in frames), int)
        for frame in frames:
            frame.ordinal = int(np.searchsorted(kept, frame.ordinal))
        parts = {name: getattr(self, name)[kept] for name in ("sizes", "keys", "referable")}
        times = {
            name: None if getattr(self, name) is None else getattr(self, name)[kept] for name in ("seconds", "pts")
        }
        return replace(self, **parts, **times)

    @property
    def native(self) -> bool:
        """Whether the stream's own vectors can be read."""
        return self.codec in NATIVE

    @property
    def lacks_vectors(self) -> bool:
        """Whether some or all frames' vectors are not to be had from the stream."""
        return not self.native or self.codec in ZERO_B_VECTORS and self.reordered

    def between(self, start: float, end: float | None) -> list[Segment]:
        """The segments that hold a frame shown in [start, end) seconds."""
        if self.seconds is None:
            return list(self.segments)
        wanted = (self.seconds >= start) & (self.seconds < (np.inf if end is None else end))
        return [s for s in self.segments if wanted[s.first : s.stop].any()]


def index_stream(path: Path) -> StreamIndex:
    """Reads all packets' headers, decodes nothing. ClipError where the file holds no video that can be read."""
    with open_video(path) as (container, stream):
        context = stream.codec_context
        if context is None:
            raise ClipError(
                f"{path}: its video has a codec that this FFmpeg cannot decode. Re-encode it (ffmpeg -i IN OUT.mp4)."
            )
        headers = Headers(context.extradata) if context.name == "h264" else None
        packets = []
        for _, packet in picture_packets(container, stream):
            refuse_encrypted(path, packet)
            facts = packet.pts, packet.size, packet.is_keyframe, packet.duration or 0
            packets.append((*facts, *_told_by(headers, packet)))
        if not packets:
            raise ClipError(f"{path}: holds no coded picture: it is cut short or damaged. Copy it again.")
        height, width = stream.height, stream.width
        if height * width > LARGEST_FRAME:
            raise ClipError(
                f"{path}: says that its frames have {width}×{height} pixels: its header is damaged. Copy it again."
            )
        facts = dict(
            path=path,
            codec=_base_codec(context),
            profile=context.profile or "",
            container=container.format.name,
            height=height,
            width=width,
            rate=stream.average_rate or stream.guessed_rate or RATE_IF_UNKNOWN,
            pixel_aspect=stream.sample_aspect_ratio or Fraction(1),
            time_base=stream.time_base or Fraction(1, 1),
        )
        has_b_frames = bool(context.has_b_frames)
    stamps, sizes, keys, durations, referable, intra = zip(*packets, strict=True)
    keys = np.array(keys, bool)
    notes = []
    if not keys[0]:
        notes.append("the stream does not begin with a key frame")
    usable = None not in stamps and len(set(stamps)) == len(stamps)
    pts = np.array(stamps, np.int64) if usable else None
    if usable:
        seconds = np.array([float((stamp - pts.min()) * facts["time_base"]) for stamp in stamps])
        gaps = np.diff(np.sort(seconds))
        if len(gaps) and gaps.max() > LONG_GAP:
            notes.append(f"its time stamps jump by {gaps.max():.0f} s")
        segments = _segments(keys & np.array(intra, bool), pts)
    else:
        seconds, segments = None, (Segment(0, len(packets)),)
        notes.append(f"no usable time stamps: {float(facts['rate']):g} frames a second are assumed")
    reordered = has_b_frames or pts is None or bool((np.diff(pts) < 0).any())
    last = durations[int(np.argmax(pts))] * facts["time_base"] if usable else 0
    return StreamIndex(
        **facts,
        seconds=seconds,
        pts=pts,
        sizes=np.array(sizes, np.int64),
        keys=keys,
        last_duration=float(last or 1 / facts["rate"]),
        referable=np.array(referable, bool),
        most_references=headers.sequence.max_references if headers and headers.sequence else LARGEST_DPB,
        reordered=reordered,
        segments=segments,
        notes=tuple(notes),
    )


def _told_by(headers: Headers | None, packet: av.Packet) -> tuple[bool, bool]:
    """Whether H.264's headers let the packet's picture be referred to, and a decoder begin with it if it is a key
    frame."""
    if headers is None:
        return True, True
    data = bytes(packet)
    return headers.is_reference(data), not packet.is_keyframe or headers.is_intra(data)


def picture_packets(container, stream) -> Iterator[tuple[int, av.Packet]]:
    """Ordinals and packets of all coded pictures; ends where a cut file ends."""
    try:
        yield from enumerate(p for p in container.demux(stream) if p.size and not p.is_discard)
    except av.error.FFmpegError:
        return


def _base_codec(context) -> str:
    """The codec's own name, not its decoder's (libdav1d is av1)."""
    return {"libdav1d": "av1", "libaom-av1": "av1", "libvpx": "vp8", "libvpx-vp9": "vp9"}.get(
        context.name, context.name
    )


def _segments(keys: np.ndarray, pts: np.ndarray) -> tuple[Segment, ...]:
    """One from each key frame to the next, and beyond it over its leading pictures. keys [P]: those that a decoder can
    begin with; pts [P]; both in decoding order."""
    starts = [0, *[int(k) for k in np.flatnonzero(keys) if k > 0]]
    found = []
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        first_pts = None if start == 0 else int(pts[start])
        if following is None:
            found.append(Segment(start, len(pts), first_pts))
            continue
        later = np.flatnonzero(pts[following:] > pts[following])
        leading = (int(later[0]) if len(later) else len(pts) - following) - 1
        found.append(Segment(start, following + 1 + leading if leading else following, first_pts, int(pts[following])))
    return tuple(found)
