"""The decoder's motion vectors, frame by frame, the same bytes in every run.

FFmpeg exports vectors when a frame is handed out. With frame threads, another thread may then still be at work on it,
so that B-frames' vectors differ between runs; threads over slices are exact. Here the work is shared over groups of
pictures instead: each worker has a decoder of its own, and frames are put in order by their packets. A stream that is
never reordered hands a frame out only when it is done, and frame threads are exact there too.

A decoder's errors lose a frame, never the run: what did not decode is absent here and marked unavailable later.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from enhancer.video.clip import open_video
from enhancer.video.codec.cuts import thumbnail
from enhancer.video.codec.streams import Segment, StreamIndex, picture_packets

# AVMotionVector of libavutil/motion_vector.h; the offsets leave out its padding, which is never initialised
VECTOR = np.dtype(
    {
        "names": [
            "source",
            "w",
            "h",
            "src_x",
            "src_y",
            "dst_x",
            "dst_y",
            "flags",
            "motion_x",
            "motion_y",
            "motion_scale",
        ],
        "formats": ["i4", "u1", "u1", "i2", "i2", "i2", "i2", "u8", "i4", "i4", "u2"],
        "offsets": [0, 4, 5, 6, 8, 10, 12, 16, 24, 28, 32],
        "itemsize": 40,
    }
)
ENCODING_BLOCK = np.dtype([("x", "i4"), ("y", "i4"), ("w", "i4"), ("h", "i4"), ("delta", "i4")])  # AVVideoBlockParams
EIGHT_BIT_LUMA = {
    "yuv420p",
    "yuvj420p",
    "yuv422p",
    "yuvj422p",
    "yuv444p",
    "yuvj444p",
    "yuv411p",
    "yuv410p",
    "gray",
    "nv12",
}
KINDS = {1: "I", 2: "P", 3: "B", 4: "S", 5: "I", 6: "P", 7: "B"}  # AVPictureType; SI, SP, BI beside I, P, B

Result = TypeVar("Result")


@dataclass
class DecodedFrame:
    """One frame. ordinal: its packet's number; inside: it belongs to the segment, not to a neighbour whose pictures are
    decoded along; kind: I, P, B, S or ?; vectors: VECTOR records or None (an I-frame has none); luma uint8 [H, W], rgb
    uint8 [H, W, 3] and qp int16 [rows, columns of 16 px] where asked for, with luma a thumbnail for cuts;
    quarter_turns: upright = rot90(picture, quarter_turns)."""

    ordinal: int
    inside: bool
    kind: str
    key: bool
    damaged: bool
    interlaced: bool
    height: int
    width: int
    quarter_turns: int
    vectors: np.ndarray | None = None
    luma: np.ndarray | None = None
    qp: np.ndarray | None = None
    thumbnail: np.ndarray | None = None
    rgb: np.ndarray | None = None


@dataclass(frozen=True)
class Wanted:
    """What a pass over the frames takes along; vectors alone cost least, as nothing is copied from the pictures.

    rgb_of: packets' numbers of the frames whose RGB is wanted, None: all; rgb_size: height and width that it is scaled
    to, as stored, None: the frame's own."""

    vectors: bool = True
    luma: bool = False
    rgb: bool = False
    qp: bool = False
    rgb_of: frozenset[int] | None = None
    rgb_size: tuple[int, int] | None = None


def read_vectors(index: StreamIndex, workers: int | None = None) -> list[DecodedFrame]:
    """All frames with the stream's own vectors and nothing else, in decoding order of their packets."""
    parts = over_segments(index, list(index.segments), Wanted(), list, workers)
    return sorted((frame for part in parts for frame in part if frame.inside), key=lambda frame: frame.ordinal)


def over_segments(
    index: StreamIndex,
    segments: list[Segment],
    wanted: Wanted,
    use: Callable[[Iterator[DecodedFrame]], Result],
    workers: int | None = None,
) -> list[Result]:
    """`use` of each segment's frames, in order; the segments are shared among threads, one decoder each.

    workers: threads; None takes the cores that this process may run on.
    """
    workers = workers or len(os.sched_getaffinity(0))
    shares = _shares(index, segments, workers)
    if len(shares) <= 1:
        return [use(frames) for frames in in_order(index, segments, wanted, workers)]
    with ThreadPoolExecutor(len(shares)) as pool:
        done = pool.map(lambda share: [use(frames) for frames in in_order(index, share, wanted, threads=1)], shares)
        return [result for results in done for result in results]


def _shares(index: StreamIndex, segments: list[Segment], workers: int) -> list[list[Segment]]:
    """Runs of segments with about equally many packets."""
    total = sum(s.stop - s.first for s in segments)
    shares: list[list[Segment]] = [[] for _ in range(workers)]
    before = 0
    for segment in segments:
        middle = before + (segment.stop - segment.first) / 2
        shares[min(int(workers * middle / max(total, 1)), workers - 1)].append(segment)
        before += segment.stop - segment.first
    return [share for share in shares if share]


def in_order(
    index: StreamIndex, segments: list[Segment], wanted: Wanted, threads: int
) -> Iterator[Iterator[DecodedFrame]]:
    """One iterator of frames a segment, by one decoder; each must be used up before the next is asked for."""
    with open_video(index.path) as (container, stream):
        context = stream.codec_context
        _prepare(context, index, wanted, threads)
        for segment, packets in _of_segments(picture_packets(container, stream), segments):
            yield _frames(context, packets, segment, index, wanted)
            context.flush_buffers()


def _of_segments(packets: Iterator[tuple[int, av.Packet]], segments: list[Segment]) -> Iterator[tuple[Segment, list]]:
    """Each segment's numbered packets; neighbours may share some. Only one segment's packets, compressed, are held."""
    held: list[tuple[int, av.Packet]] = []
    for segment in segments:
        held = [(ordinal, packet) for ordinal, packet in held if ordinal >= segment.first]
        while not held or held[-1][0] < segment.stop - 1:
            ordinal, packet = next(packets, (None, None))
            if packet is None:
                break
            if ordinal >= segment.first:
                held.append((ordinal, packet))
        yield segment, [(ordinal, packet) for ordinal, packet in held if ordinal < segment.stop]


def _prepare(context: av.VideoCodecContext, index: StreamIndex, wanted: Wanted, threads: int) -> None:
    """Options must be set on the context itself, before its first frame: those given to av.open never reach it."""
    options = {}
    if wanted.vectors:
        options["flags2"] = "+export_mvs"
    if wanted.qp:
        options["export_side_data"] = "venc_params"
    if not (wanted.luma or wanted.rgb):  # the pictures are garbage then, the vectors the same
        options.update(skip_loop_filter="all", skip_idct="all")
    context.options = options
    context.copy_opaque = True
    context.thread_count = threads
    exact_with_frame_threads = index.codec == "h264" and not index.reordered or not wanted.vectors
    context.thread_type = "FRAME" if exact_with_frame_threads else "SLICE"


def _frames(
    context: av.VideoCodecContext,
    packets: list[tuple[int, av.Packet]],
    segment: Segment,
    index: StreamIndex,
    wanted: Wanted,
) -> Iterator[DecodedFrame]:
    """Decoded frames of one segment in the order of presentation."""
    converter = VideoReformatter()
    for count, frame in enumerate(_decoded(context, packets)):
        ordinal = frame.opaque if isinstance(frame.opaque, int) else index.ordinal_of_pts.get(frame.pts, count)
        pts = None if index.pts is None else index.pts[ordinal]
        inside = (
            pts is None
            or (segment.start is None or pts >= segment.start)
            and (segment.end is None or pts < segment.end)
        )
        yield _taken(frame, ordinal, bool(inside), wanted, converter)


def _decoded(context: av.VideoCodecContext, packets: list[tuple[int, av.Packet]]) -> Iterator[av.VideoFrame]:
    for ordinal, packet in [*packets, (None, None)]:
        try:
            if packet is not None:
                packet.opaque = ordinal  # comes back with the frame
            yield from context.decode(packet)
        except (av.error.FFmpegError, EOFError):
            continue


def _taken(
    frame: av.VideoFrame, ordinal: int, inside: bool, wanted: Wanted, converter: VideoReformatter
) -> DecodedFrame:
    side = frame.side_data.get("MOTION_VECTORS") if wanted.vectors else None
    luma = luma_of(frame, converter) if wanted.luma else None
    rgb = wanted.rgb and (wanted.rgb_of is None or ordinal in wanted.rgb_of)
    return DecodedFrame(
        ordinal,
        inside,
        KINDS.get(int(frame.pict_type), "?"),
        bool(frame.key_frame),
        bool(frame.is_corrupt),
        bool(frame.interlaced_frame),
        frame.height,
        frame.width,
        round(frame.rotation / 90) % 4,
        vectors=None
        if side is None
        else np.frombuffer(bytes(side), VECTOR),  # copied: a view would hold the whole frame
        luma=luma,
        qp=_quantisers(frame) if wanted.qp else None,
        thumbnail=None if luma is None else thumbnail(luma),
        rgb=_rgb_of(frame, converter, wanted.rgb_size) if rgb else None,
    )


def _rgb_of(frame: av.VideoFrame, converter: VideoReformatter, size: tuple[int, int] | None) -> np.ndarray:
    height, width = size or (frame.height, frame.width)
    return converter.reformat(frame, width, height, format="rgb24", interpolation="AREA", threads=1).to_ndarray()


def luma_of(frame: av.VideoFrame, converter: VideoReformatter) -> np.ndarray:
    """Copy of the luma plane, uint8 [H, W]; deeper formats are brought to 8 bits."""
    if frame.format.name not in EIGHT_BIT_LUMA:
        frame = converter.reformat(frame, format="gray", threads=1)
    plane = frame.planes[0]
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width].copy()


def _quantisers(frame: av.VideoFrame) -> np.ndarray | None:
    """QP of each macroblock, int16 [rows, columns] of 16 px, or None where the decoder exports none."""
    side = frame.side_data.get("VIDEO_ENC_PARAMS")
    if side is None or not side.nb_blocks:
        return None
    data = bytes(side)[side.blocks_offset :]
    blocks = np.ndarray(side.nb_blocks, ENCODING_BLOCK, data, strides=(side.block_size,))
    qp = np.full((-(-frame.height // 16), -(-frame.width // 16)), side.qp, np.int16)
    rows, columns = blocks["y"] // 16, blocks["x"] // 16
    inside = (rows >= 0) & (columns >= 0) & (rows < qp.shape[0]) & (columns < qp.shape[1])
    qp[rows[inside], columns[inside]] += blocks["delta"][inside].astype(np.int16)
    return qp
