"""Small clips with known motion, encoded for the tests with PyAV's own encoders."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter


@lru_cache
def texture(side: int = 320) -> np.ndarray:
    """Smooth noise, float32 [side, side]."""
    noise = np.random.default_rng(0).random((side, side), dtype=np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.0)
    return 20 + 215 * (smooth - smooth.min()) / np.ptp(smooth)


def panned(frames: int, motion: tuple[float, float], size: tuple[int, int] = (64, 96)) -> np.ndarray:
    """uint8 [N, H, W, 3]: content that moves by `motion` (x, y) pixels a frame."""
    height, width = size
    middle = np.array([(texture().shape[1] - width) / 2, (texture().shape[0] - height) / 2])
    shots = []
    for n in range(frames):
        offset = n * np.array(motion) - (frames - 1) / 2 * np.array(motion) - middle
        matrix = np.float32([[1, 0, offset[0]], [0, 1, offset[1]]])
        image = cv2.warpAffine(texture(), matrix, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
        shots.append(np.repeat(np.clip(image, 0, 255).astype(np.uint8)[..., None], 3, axis=2))
    return np.stack(shots)


def write(
    path,
    pictures,
    codec="libx264",
    options=None,
    rate=25,
    milliseconds=None,
    rotation=0,
    aspect=None,
    audio_first=False,
    container_options=None,
):
    """Encodes uint8 [N, H, W, 3]; skips the test where this PyAV has no such encoder. `flags` of options are PyAV's
    names; milliseconds: each frame's time."""
    options = dict(options or {})
    try:
        av.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this build of PyAV has no encoder {codec}")
    with av.open(str(path), "w", options=container_options or {}) as container:
        sound = container.add_stream("aac", rate=16000) if audio_first else None
        stream = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        if pictures.shape[1] % 2 or pictures.shape[2] % 2:
            stream.pix_fmt = "yuv444p"
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        if sound:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 16000
            for packet in [*sound.encode(silence), *sound.encode()]:
                container.mux(packet)
        converter = VideoReformatter()
        for n, image in enumerate(pictures):
            frame = converter.reformat(
                av.VideoFrame.from_ndarray(image, format="rgb24"), format=stream.pix_fmt, threads=1
            )
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[n], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def middle(field, frame):
    """Median displacement (x, y) of the valid cells that do not touch the frame's edge."""
    cells, valid = field.displacement[frame, 1:-1, 1:-1], field.valid[frame, 1:-1, 1:-1]
    return np.median(cells[valid], axis=0)
