"""A process that reads clips for another one, which can end it where a file hangs or crashes the decoder.

    python -m enhancer.video.decoder SOCKET SECONDS

Over the socket, whose file descriptor is given, go messages of multiprocessing.connection: first an empty one from
here; then, again and again, a request as JSON, and the answer: JSON and, unless that has an "error", the frames' bytes.
After SECONDS for one clip this process ends itself: the one that asks may be gone by then.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from enhancer.video.clip import Clip, read_clip
from enhancer.video.footage import Footage, Video
from enhancer.video.sampling import Sampling
from vdm_priors.errors import ClipError


def serve(connection: Connection, seconds: float, read: Callable[[Video, Sampling], Clip] = read_clip) -> None:
    """Answers until the other end is closed."""
    connection.send_bytes(b"")
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):
            return
        signal.setitimer(signal.ITIMER_REAL, seconds)  # nobody takes the signal, so it ends the process
        try:
            clip = read(video_of(request), Sampling(**request["sampling"]))
        except ClipError as error:
            connection.send_bytes(json.dumps({"error": str(error)}).encode())
            continue
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(json.dumps(_header(clip)).encode())
        connection.send_bytes(np.ascontiguousarray(clip.frames).data.cast("B"))


def request_of(video: Video, sampling: Sampling) -> bytes:
    """The message that asks for a clip."""
    footage = dataclasses.asdict(video) if isinstance(video, Footage) else {"files": [video]}
    footage["files"] = [str(file) for file in footage["files"]]
    whole = not isinstance(video, Footage)
    return json.dumps({**footage, "whole": whole, "sampling": dataclasses.asdict(sampling)}).encode()


def video_of(request: dict) -> Video:
    """The video that a request is for."""
    files = tuple(Path(file) for file in request["files"])
    return files[0] if request["whole"] else Footage(files, request["start"], request["end"], request["fps"])


def _header(clip: Clip) -> dict:
    return {"path": str(clip.path), "shape": clip.frames.shape, "times": clip.times, "duration": clip.duration,
            "box": clip.box, "notes": clip.notes, "repeated": clip.repeated}


def received_clip(header: dict, connection: Connection) -> Clip:
    """The clip whose header has come and whose frames follow."""
    frames = np.empty(header["shape"], np.uint8)
    connection.recv_bytes_into(frames.data.cast("B"))
    return Clip(Path(header["path"]), frames, header["times"], header["duration"], tuple(header["box"]),
                header["notes"], header["repeated"])


def main() -> None:
    """The process that enhancer.video.guard starts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    serve(Connection(int(sys.argv[1])), float(sys.argv[2]))


if __name__ == "__main__":
    main()
