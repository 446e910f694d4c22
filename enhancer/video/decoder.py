"""A process that reads clips for another one, which can end it where a file hangs or crashes the decoder.

    python -m enhancer.video.decoder SOCKET SECONDS

Over the socket, whose file descriptor is given, go messages of multiprocessing.connection: first an empty one from
here; then, again and again, a request as JSON, and the answer: JSON and, unless that has an "error", the bytes of each
array named in its "arrays". After SECONDS for one answer this process ends itself: the one that asks may be gone by
then. enhancer.video.codec.guarded has the same for motion.
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
from vdm_priors.errors import ClipError, UserError

Answer = tuple[dict, dict[str, np.ndarray]]  # facts in JSON types, and arrays by name


def serve(connection: Connection, seconds: float, answer: Callable[[dict], Answer]) -> None:
    """Sends what `answer` makes of each request, or its UserError, until the other end is closed."""
    connection.send_bytes(b"")
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):
            return
        signal.setitimer(signal.ITIMER_REAL, seconds)  # nobody takes the signal, so it ends the process
        try:
            facts, arrays = answer(request)
        except UserError as error:
            failed = {"error": str(error), "of_the_clip": isinstance(error, ClipError)}
            connection.send_bytes(json.dumps(failed).encode())
            continue
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        shapes = {name: [array.dtype.str, array.shape] for name, array in arrays.items()}
        connection.send_bytes(json.dumps({**facts, "arrays": shapes}).encode())
        for array in arrays.values():
            connection.send_bytes(_bytes_of(np.ascontiguousarray(array)))


def received_arrays(header: dict, connection: Connection) -> dict[str, np.ndarray]:
    """The arrays that follow the header of an answer."""
    found = {name: np.empty(shape, dtype) for name, (dtype, shape) in header["arrays"].items()}
    for array in found.values():
        connection.recv_bytes_into(_bytes_of(array)) if array.size else connection.recv_bytes()
    return found


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


# ---- clips ---------------------------------------------------------------------------------------

def clips_by(read: Callable[[Video, Sampling], Clip]) -> Callable[[dict], Answer]:
    """What answers a `request_of`."""

    def answer(request: dict) -> Answer:
        clip = read(video_of(request), Sampling(**request["sampling"]))
        return {"path": str(clip.path), "times": clip.times, "duration": clip.duration, "box": clip.box,
                "notes": clip.notes, "repeated": clip.repeated}, {"frames": clip.frames}

    return answer


def request_of(video: Video, sampling: Sampling) -> bytes:
    """The message that asks for a clip."""
    footage = dataclasses.asdict(video) if isinstance(video, Footage) else {"files": [video]}
    footage["files"] = [str(file) for file in footage["files"]]
    whole = not isinstance(video, Footage)
    return json.dumps({**footage, "whole": whole, "sampling": dataclasses.asdict(sampling)}).encode()


def video_of(request: dict) -> Video:
    """The video that a request is for."""
    files = tuple(Path(file) for file in request["files"])
    return files[0] if request["whole"] else Footage(files, request["start"], request["end"], request["fps"],
                                                        request["assumed"])


def clip_of(header: dict, arrays: dict[str, np.ndarray]) -> Clip:
    """The clip of an answer."""
    return Clip(Path(header["path"]), arrays["frames"], header["times"], header["duration"], tuple(header["box"]),
                header["notes"], header["repeated"])


def main(answer: Callable[[dict], Answer]) -> None:
    """The process that a guard starts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    serve(Connection(int(sys.argv[1])), float(sys.argv[2]), answer)


if __name__ == "__main__":
    main(clips_by(read_clip))
