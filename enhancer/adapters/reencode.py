"""A clip encoded again with key frames at a fixed interval, as EMA does before anything else (section 4.1)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import av
from av.video.reformatter import VideoReformatter

from enhancer.video.clip import open_video, regular_file
from vdm_priors.errors import ClipError

LARGEST_DENOMINATOR = 1001  # of frame rates


@contextmanager
def reencoded(path: str | os.PathLike, key_interval: int, fps: float | None = None) -> Iterator[Path]:
    """The path of a temporary H.264 file of the same pictures: a key frame every `key_interval` frames, P-frames that
    refer to the one before, and no others. fps: keep so many frames a second, the first at or after each step; None
    keeps all.

    The motion in it is this encoder's, whatever the file's own was. Raises ClipError where nothing decodes.
    """
    path = regular_file(path)
    with TemporaryDirectory(prefix="enhancer-gops-") as folder:
        target = Path(folder) / "clip.mp4"
        with open_video(path) as (source, stream), av.open(str(target), "w") as container:
            rate = Fraction(fps if fps is not None else stream.average_rate or 25).limit_denominator(
                LARGEST_DENOMINATOR
            )
            options = {
                "preset": "veryfast",
                "threads": "1",
                "crf": "18",
                "bf": "0",
                "refs": "1",
                "g": str(key_interval),
                "keyint_min": str(key_interval),
                "x264-params": "scenecut=0:mbtree=0",
            }
            out, converter, written = None, VideoReformatter(), 0
            for frame in source.decode(stream):
                due = written + 1 if fps is None else int((frame.time or 0.0) * float(rate) + 1e-6) + 1
                if out is None:
                    out = container.add_stream("libx264", rate=rate, options=options)
                    # H.264's colours need even sides
                    out.width, out.height, out.pix_fmt = frame.width // 2 * 2, frame.height // 2 * 2, "yuv420p"
                if due <= written:
                    continue
                picture = converter.reformat(frame, out.width, out.height, "yuv420p", threads=1)
                picture.pts, picture.time_base = written, 1 / rate
                picture.pict_type = av.video.frame.PictureType.NONE  # the encoder's to choose
                container.mux(out.encode(picture))
                written += 1
            if out is None:
                raise ClipError(
                    f"{path}: not one picture can be decoded, so it cannot be encoded again. Copy it again."
                )
            container.mux(out.encode())
        yield target
