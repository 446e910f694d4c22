"""Clips read in a process of its own, with a time limit: a file that hangs or crashes the decoder costs itself alone.

    FrameCache(read=clip_reader(60.0, run_folder))

enhancer/video/codec/guarded.py does the same for motion. The process is an ordinary one, started for good and replaced
when it dies, so that a DataLoader's workers can have theirs (multiprocessing lets them have no children), and nothing
is forked that holds a GPU or threads.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import numpy as np

from enhancer.video.clip import Clip, read_clip, regular_file
from enhancer.video.decoder import clip_of, received_arrays, request_of
from enhancer.video.footage import Footage, Video, files_of
from enhancer.video.quarantine import QUARANTINE, Quarantine
from enhancer.video.sampling import Sampling
from vdm_priors.errors import ClipError, UserError

START = 120.0  # seconds that the process may take to start on a busy machine
DECODER = (sys.executable, "-m", "enhancer.video.decoder")

Result = TypeVar("Result")


def clip_reader(timeout: float | None, folder: Path | None = None) -> Callable[[Video, Sampling], Clip]:
    """What reads the clips of a run whose folder keeps the quarantine list (None: in memory).

    timeout None: read_clip itself.
    """
    if timeout is None:
        return read_clip
    return GuardedReader(timeout, Quarantine(None if folder is None else Path(folder) / QUARANTINE))


class Guard:
    """Another process that is asked about videos. Safe in threads, which take turns, and after a fork, which gets its
    own process.

    timeout: seconds an answer, and limit: what sets it, for messages; command: what starts the process, to which its
    socket and its own limit are added; doing: what takes so long, for messages.
    """

    def __init__(self, timeout: float, quarantine: Quarantine, command: Sequence[str], doing: str,
                 limit: str = "data.timeout") -> None:
        self.timeout, self.quarantine, self.limit = timeout, quarantine, limit
        self._command, self._doing = command, doing
        self._forget()

    def ask(self, video: Video, request: bytes, made: Callable[[dict, dict[str, np.ndarray]], Result]) -> Result:
        """What `made` makes of the answer to a request about the video. UserError as the other process raises it,
        ClipError for a video that is or comes on the quarantine list."""
        for file in files_of(video):
            regular_file(file)
        if os.getpid() != self._owner:
            self._forget()  # the process is the one's that this was forked from
        with self._lock:
            reason = self.quarantine.reason(video)
            if reason is None:
                answer = self._answer(request)
                if not isinstance(answer, str):
                    return made(*answer)
                reason = answer
                self.quarantine.add(video, reason)
        listed = "" if self.quarantine.path is None else (
            f" It is on the list {self.quarantine.path} and not tried again in this run: delete its line there to have "
            "it tried."
        )
        raise ClipError(f"{video}: {reason}. Re-encode it (ffmpeg -i IN OUT.mp4) or leave it out.{listed}")

    def start(self) -> None:
        """Starts the process, as the first question does."""
        with self._lock:
            self._started()

    def _answer(self, request: bytes) -> tuple[dict, dict[str, np.ndarray]] | str:
        """The answer's facts and arrays, or how the other process failed over it."""
        connection = self._started()
        try:
            connection.send_bytes(request)
            if not connection.poll(self.timeout):
                self._end()
                return f"{self._doing} took longer than {self.limit}, {self.timeout:g} s"
            header = json.loads(connection.recv_bytes())
            if "error" not in header:
                return header, received_arrays(header, connection)
        except (EOFError, ConnectionError):
            return f"{self._doing} ended the decoder's process ({self._how_it_ended()})"
        raise (ClipError if header["of_the_clip"] else UserError)(header["error"])

    def _started(self) -> Connection:
        if self._process is not None and self._process.poll() is None:
            return self._connection
        self._end()
        ours, theirs = Pipe()
        with theirs:
            command = [*self._command, str(theirs.fileno()), str(2 * self.timeout)]
            try:
                self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            except OSError as error:
                raise UserError(f"The process that decodes videos cannot be started ({error.strerror}): free some "
                                f"memory, or lift {self.limit}.") from error
        self._connection = ours
        self._end = weakref.finalize(self, _ended, self._process, ours, self._owner)
        try:
            if ours.poll(START):
                ours.recv_bytes()
                return ours
            why = f"it was not ready after {START:g} s"
        except (EOFError, ConnectionError):
            why = self._how_it_ended()
        self._end()
        raise UserError(f"The process that decodes videos does not start ({why}): see what it printed, or lift "
                        f"{self.limit} to decode without it.")

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        if code >= 0:
            return f"exit status {code}"
        memory = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
        return signal.Signals(-code).name + memory

    def _forget(self) -> None:
        self._owner, self._lock = os.getpid(), threading.Lock()
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._end: Callable[[], object] = lambda: None


class GuardedReader(Guard):
    """read_clip in another process. timeout: seconds a clip."""

    def __init__(self, timeout: float, quarantine: Quarantine, command: Sequence[str] = DECODER) -> None:
        super().__init__(timeout, quarantine, command, "decoding it")

    def __call__(self, video: str | os.PathLike | Footage, sampling: Sampling = Sampling()) -> Clip:
        """The clip. ClipError as read_clip raises it, and for a video that is or comes on the quarantine list."""
        video = video if isinstance(video, Footage) else regular_file(video)
        return self.ask(video, request_of(video, sampling), clip_of)


def _ended(process: subprocess.Popen, connection: Connection, owner: int) -> None:
    if os.getpid() == owner:  # not in a fork, whose copy this is
        connection.close()
        process.kill()
        process.wait()
