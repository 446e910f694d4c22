"""Processes that extract priors together: `accelerate launch` and `torchrun` start them and say which is which.

They need no process group. What they share lies in the prior store: the priors, who makes which
(vdm_priors.store.Claims), and in <store>/.extraction/<run>/ one record a process, which says what it did and what it
could not do. A process holds a lock beside its record while it lives, so that the others can tell a slow one from a
dead one.
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from enhancer.runfolder import read_json, readable_write_errors, write_json
from vdm_priors.errors import UserError

FOLDER = ".extraction"
# as accelerate.PartialState looks for them: torchrun's and accelerate's own, Intel MPI, Open MPI, MVAPICH2
RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
LOCAL = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
TELL_EVERY = 1.0  # seconds between two records of a process that only say how far it is
IMPORTED = time.time()
END = object()
Item = TypeVar("Item")


@dataclass(frozen=True)
class Process:
    """One of `count` processes; local: its number on its own machine, and so which of the machine's GPUs it takes."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def this(cls) -> Process:
        """As the launcher's environment says (torchrun's names, or those of MPI); the only one without a launcher."""
        def told(names: tuple[str, ...], default: int) -> int:
            return next((int(os.environ[name]) for name in names if name in os.environ), default)

        try:
            rank, count = told(RANK, 0), told(COUNT, 1)
            local = told(LOCAL, rank)
        except ValueError as error:
            raise UserError(
                f"One of the environment's {RANK[0]}, {COUNT[0]} and {LOCAL[0]} is no number ({error}); start the "
                f"processes with `accelerate launch` or `torchrun`.") from error
        if not 0 <= rank < count:
            raise UserError(f"The environment says RANK={rank} of WORLD_SIZE={count}; ranks count from 0.")
        return cls(rank, count, local)

    def __str__(self) -> str:
        return f"process {self.rank} of {self.count}"

    def device(self, device: str) -> str:
        """`cuda` made this process's own GPU, the machine's GPUs in turn."""
        if device != "cuda" or self.count == 1:
            return device
        import torch

        return f"cuda:{self.local % max(1, torch.cuda.device_count())}"


class Team:
    """This process among those that fill one store for one run, and their records.

    As it begins, process 0 removes the records of processes that ended before it was started: those are of an earlier
    launch. One of this launch may have ended too, if it found nothing to do while process 0 still loaded.
    """

    def __init__(self, store: Path, run: str, process: Process) -> None:
        self.process, self.folder = process, Path(store) / FOLDER / run
        self._record: dict[str, Any] = {"rank": process.rank, "status": "working", "reason": "", "settled": {},
                                        "problems": {}}
        self._told = self._heard = 0.0
        self._others: list[dict] = []

    @contextmanager
    def working(self) -> Iterator[Team]:
        """Says that this process works, and afterwards that it has finished, or why it failed."""
        with readable_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if self.process.rank == 0:
            since = _started()
            for path in self.folder.glob("*.json"):
                if path.stat().st_mtime < since and not self._alive(int(path.stem)):
                    path.unlink(missing_ok=True)
        with open(self._lock(self.process.rank), "ab") as lock:  # closing it ends the lock
            _try_lock(lock)
            self._tell()
            try:
                yield self
            except KeyboardInterrupt:
                self._record["status"] = "interrupted"
                raise
            except BaseException as error:
                self._record.update(status="failed", reason=str(error) or type(error).__name__)
                raise
            else:
                self._record["status"] = "finished"
            finally:
                self._tell()

    def settle(self, label: str, key: str, samples: int, problem: str | None = None) -> None:
        """This process has made the prior of `key` for so many samples, or could not: `problem`."""
        self._record["settled"][label] = self._record["settled"].get(label, 0) + samples
        if problem is not None:
            self._record["problems"][key] = problem
        self._tell(TELL_EVERY if problem is None else TELL_EVERY / 10)  # a problem that is not known is met again

    def others(self, now: bool = False) -> list[dict]:
        """The other processes' records; read again at most once a second, or now."""
        if now or time.monotonic() - self._heard > TELL_EVERY:
            paths = sorted(self.folder.glob("*.json"))
            records = [read_json(path, {}) for path in paths if path != self._path(self.process.rank)]
            self._others, self._heard = [record for record in records if record], time.monotonic()
        return self._others

    def problems(self) -> dict[str, str]:
        """By key, why the other processes could not make a prior."""
        return {key: reason for record in self.others(now=True) for key, reason in record["problems"].items()}

    def settled(self, label: str) -> int:
        """How many samples the other processes have settled."""
        return sum(record["settled"].get(label, 0) for record in self.others())

    def lost(self) -> list[str]:
        """A sentence for each other process that failed, or ended without a word."""
        sentences = []
        for record in self.others(now=True):
            who = f"process {record['rank']} of {self.process.count}"
            if record["status"] == "failed":
                sentences.append(f"{who} failed: {record['reason']}")
            elif record["status"] == "working" and not self._alive(record["rank"]):
                sentences.append(f"{who} ended without a word: it was killed, most often because the memory ran out")
        return sentences

    def _tell(self, pause: float = 0.0) -> None:
        if time.monotonic() - self._told >= pause:
            write_json(self._path(self.process.rank), self._record)
            self._told = time.monotonic()

    def _alive(self, rank: int) -> bool:
        try:
            with open(self._lock(rank), "ab") as lock:
                return not _try_lock(lock)
        except OSError:
            return True  # nothing can be said

    def _path(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"

    def _lock(self, rank: int) -> Path:
        return self.folder / f"{rank}.lock"


def _started() -> float:
    """When this process was started, in seconds since 1970; where the system does not say, when this file was read."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return IMPORTED


def _try_lock(file: Any) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits until no other process is in this block for `folder`; one that dies in it leaves it."""
    with readable_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "ab")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: as good as it can be
        yield


@contextmanager
def ended_in_order() -> Iterator[None]:
    """A launcher ends the others with SIGTERM where one process fails; it is taken like Ctrl-C, so that it is told and
    what is finished is kept."""
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def ahead(items: Iterator[Item], count: int = 1) -> Iterator[Item]:
    """The items in order, of which up to `count` are made in a thread before they are asked for.

    What making an item raises is raised where that item would come. Closing waits for the item under way.
    """
    thread = ThreadPoolExecutor(1)
    try:
        waiting = deque(thread.submit(next, items, END) for _ in range(count))
        while (item := waiting.popleft().result()) is not END:
            waiting.append(thread.submit(next, items, END))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
