"""Vectors for codecs whose decoders export none (HEVC, VP8, VP9, AV1) and for MPEG-4's B-frames.

They are made from the decoded pictures, not read from the file, and every frame that has them says so (Origin). Two
ways: a fast H.264 encoding in memory, whose vectors are read back, and FFmpeg's block matching filter. docs/codec.md
has the figures by which the first is the default.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import av.filter
import cv2
import numpy as np

from enhancer.video.codec.vectors import VECTOR
from vdm_priors.errors import UserError

MACROBLOCK = 16
# One reference and no B-frames: every vector is of the frame before. One thread and no macroblock tree: the same
# vectors each time.
ENCODER = {
    "preset": "superfast",
    "partitions": "p8x8",
    "subme": "4",
    "crf": "18",
    "bf": "0",
    "refs": "1",
    "threads": "1",
    "x264-params": "mbtree=0:rc-lookahead=0:sync-lookahead=0:weightp=0:keyint=infinite",
}
RATE = Fraction(25)  # nominal: the vectors do not depend on it


def reencoded(lumas: Iterable[np.ndarray]) -> Iterator[np.ndarray | None]:
    """For each picture, uint8 [H, W] of one size, the VECTOR records of an H.264 encoding; None where it has none (a
    first picture, a scene cut)."""
    encoder = decoder = None
    for number, luma in enumerate(lumas):
        padded = _padded(luma)
        if encoder is None:
            encoder, decoder = _encoder(*padded.shape), _decoder()
        yield from _decode(decoder, encoder.encode(_frame(padded, number)))
    if encoder is not None:
        yield from _decode(decoder, encoder.encode())
        yield from _decode(decoder, [None])


def mestimated(lumas: Iterable[np.ndarray]) -> Iterator[np.ndarray | None]:
    """For each picture, uint8 [H, W] of one size, the VECTOR records of block matching with the pictures before and
    after.

    The filter's vectors are of whole pixels, and lie in src − dst: its motion fields are never initialised.
    """
    graph, count, given = None, 0, 0
    for luma in lumas:
        padded = _padded(luma)
        if graph is None:
            graph = _matching_graph(*padded.shape)
        graph.push(_frame(padded, count))
        count += 1
        for records in _pulled(graph):
            yield records if given else _of_list(records, +1)  # there is nothing before the first picture
            given += 1
    if graph is not None:
        graph.push(_frame(padded, count))  # the filter holds one picture back until there is another
        for records in _pulled(graph):
            yield _of_list(records, -1)


WAYS = {"reencode": reencoded, "mestimate": mestimated}


def way(name: str):
    """The fallback of that name. UserError naming the known ones."""
    if name not in WAYS:
        raise UserError(
            f"fallback is {name!r}: choose {' or '.join(map(repr, WAYS))}, or 'none' to leave such frames unavailable."
        )
    return WAYS[name]


def _padded(luma: np.ndarray) -> np.ndarray:
    """Edges repeated up to whole macroblocks."""
    height, width = luma.shape
    return cv2.copyMakeBorder(luma, 0, -height % MACROBLOCK, 0, -width % MACROBLOCK, cv2.BORDER_REPLICATE)


def _frame(luma: np.ndarray, number: int) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(luma, format="gray")
    frame.pts, frame.time_base = number, 1 / RATE
    return frame


def _encoder(height: int, width: int) -> av.VideoCodecContext:
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "gray"
    encoder.time_base, encoder.framerate, encoder.options = 1 / RATE, RATE, dict(ENCODER)
    return encoder


def _decoder() -> av.VideoCodecContext:
    decoder = av.CodecContext.create("h264", "r")
    decoder.options = {"flags2": "+export_mvs", "skip_loop_filter": "all", "skip_idct": "all"}
    decoder.thread_type, decoder.thread_count = "SLICE", 1
    return decoder


def _matching_graph(height: int, width: int) -> av.filter.Graph:
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(width=width, height=height, format="gray", time_base=1 / RATE)
    graph.link_nodes(source, graph.add("mestimate", "method=epzs:mb_size=16"), graph.add("buffersink")).configure()
    return graph


def _decode(decoder: av.VideoCodecContext, packets: Iterable[av.Packet | None]) -> Iterator[np.ndarray | None]:
    for packet in packets:
        for frame in decoder.decode(packet):
            yield _records(frame)


def _pulled(graph: av.filter.Graph) -> Iterator[np.ndarray]:
    while True:
        try:
            frame = graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return
        records = _records(frame).copy()
        records["motion_x"] = records["src_x"].astype(np.int32) - records["dst_x"]
        records["motion_y"] = records["src_y"].astype(np.int32) - records["dst_y"]
        records["motion_scale"] = 1
        yield records


def _of_list(records: np.ndarray, source: int) -> np.ndarray:
    return records[records["source"] == source]


def _records(frame: av.VideoFrame) -> np.ndarray | None:
    side = frame.side_data.get("MOTION_VECTORS")
    return None if side is None else np.frombuffer(bytes(side), VECTOR)
