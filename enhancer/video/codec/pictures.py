"""The decoded pictures of a field's rows, and key frames alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from enhancer.video.clip import open_video, refuse_encrypted, regular_file
from enhancer.video.codec.field import MotionField
from enhancer.video.codec.streams import index_stream, picture_packets
from enhancer.video.codec.vectors import Wanted, in_order


def pictures_of(field: MotionField, threads: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of the field with their upright RGB pictures [H, W, 3]."""
    index = index_stream(field.path)
    last = field.times[-1]
    segments = index.between(float(field.times[0]), float(np.nextafter(last, np.inf)))
    rows = {time: n for n, time in enumerate(field.times.tolist())}
    count = 0
    for frames in in_order(index, segments, Wanted(vectors=False, rgb=True), threads):
        for frame in frames:
            if frame.inside:
                time = count / float(index.rate) if index.seconds is None else float(index.seconds[frame.ordinal])
                count += 1
                upright = np.rot90(frame.rgb, frame.quarter_turns)
                if time in rows and upright.shape[:2] == field.size:
                    yield rows[time], np.ascontiguousarray(upright)


def key_frames(path: str | os.PathLike) -> Iterator[tuple[float, np.ndarray]]:
    """Seconds after the first packet's time, and upright RGB pictures uint8 [H, W, 3], of the key frames; nothing else
    is decoded: other packets never reach the decoder, as some decoders (VP9) ignore being told to skip.

    Raises ClipError where the file cannot be read; a key frame that does not decode is left out.
    """
    with open_video(regular_file(path)) as (container, stream):
        context, converter, first = stream.codec_context, VideoReformatter(), None
        context.thread_type = (
            "SLICE"  # frame threads would hold frames back, and flushing them costs more than it saves
        )
        for _, packet in picture_packets(container, stream):
            refuse_encrypted(Path(path), packet)
            first = packet.pts if first is None or packet.pts is not None and packet.pts < first else first
            if not packet.is_keyframe:
                continue
            try:
                frames = [*context.decode(packet), *context.decode(None)]
            except av.error.FFmpegError:
                frames = []
            context.flush_buffers()
            for frame in frames:
                pixels = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
                time = 0.0 if frame.pts is None or first is None else float((frame.pts - first) * stream.time_base)
                yield time, np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))
