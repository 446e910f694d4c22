"""Trainings in processes of their own, several at once, with their progress on one screen.

A worker writes one JSON object a line to its standard output: {"bar", "done", "total", "text"},
{"note"}, {"warn"}, {"error"} or {"peak_mb"}. Everything else that it prints goes to its log file. A worker
whose parent is gone ends at its next line.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from enhancer.console import Bar, Console
from enhancer.runfolder import peak_memory_mb
from vdm_priors.errors import UserError

EVENT_EVERY = 0.5  # seconds between progress lines of one worker
LOG_TAIL = 2000  # characters of a failed worker's log that are shown
PACKAGES = str(Path(__file__).resolve().parent.parent)
STOP_SECONDS = 10.0  # a worker may use this to end after being asked


@dataclass(frozen=True)
class Work:
    """One process: what it is called, its command, and where its prints go."""

    title: str
    command: list[str]
    log: Path


@dataclass(frozen=True)
class Failure:
    """Why a worker did not finish."""

    title: str
    reason: str


# ---- in the worker -------------------------------------------------------------------------------

class WorkerConsole(Console):
    """A console whose progress, notes and warnings are sent to the parent process."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        # The channel keeps the real standard output; whatever else prints goes to the log.
        self._channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)

    def send(self, **event) -> None:
        """One line to the parent."""
        self._channel.write(json.dumps(event) + "\n")

    def note(self, text: str) -> None:
        self.send(note=text)

    def warn(self, text: str) -> None:
        self.send(warn=text)

    @contextmanager
    def bar(self, title: str, total: int | None = None, unit: str = "item") -> Iterator[Bar]:
        yield _SentBar(self, title, total, unit)


class _SentBar(Bar):
    def __init__(self, console: WorkerConsole, title: str, total: int | None, unit: str) -> None:
        super().__init__(console, title, total, unit)
        self._sent = 0.0

    def __call__(self, done: int, total: int | None = None, text: str | None = None) -> None:
        self.done, self.total = done, self.total if total is None else total
        if time.monotonic() - self._sent > EVENT_EVERY or done == self.total:
            self._sent = time.monotonic()
            self._console.send(bar=self.title, done=done, total=self.total, unit=self.unit)


def serve(work: Callable[[Console], None]) -> int:
    """Does a worker's work, and tells the parent how it ended; returns the exit status."""
    console = WorkerConsole()
    try:
        work(console)
        console.send(peak_mb=peak_memory_mb())
        return 0
    except BrokenPipeError:  # the parent is gone
        os._exit(1)
    except UserError as error:
        console.send(error=str(error))
    except Exception as error:
        traceback.print_exc()
        console.send(error=f"{type(error).__name__}: {error} (traceback in its log.txt)")
    return 1


# ---- in the parent -------------------------------------------------------------------------------

def run_workers(works: list[Work], parallel: int, console: Console, threads: int = 1) -> tuple[list[Failure], float]:
    """Runs all works, `parallel` at a time; one's failure does not stop the others.

    Returns the failures and the most memory in MB that processes running together can have held
    (this one's and the largest workers' peaks, added up). A KeyboardInterrupt ends the running ones and is raised again.
    """
    waiting, running, failures, peaks = list(works), {}, [], []
    events: queue.Queue = queue.Queue()
    with ExitStack() as stack:
        total = stack.enter_context(console.bar("students", len(works), "student"))
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    work = waiting.pop(0)
                    running[work.title] = _Running(work, events, threads)
                title, event = events.get()
                if event is not None:
                    running[title].show(event, console)
                    continue
                ended = running.pop(title)
                failure = ended.finish()
                peaks.append(ended.peak_mb)
                if failure:
                    failures.append(failure)
                total.advance()
        finally:
            for left in running.values():
                left.stop()
    return failures, peak_memory_mb() + sum(sorted(peaks)[-parallel:])


class _Running:
    """A worker process that is under way."""

    def __init__(self, work: Work, events: queue.Queue, threads: int) -> None:
        self.work, self._error, self.peak_mb = work, "", 0.0
        self._bars: dict[str, tuple[ExitStack, Bar]] = {}
        work.log.parent.mkdir(parents=True, exist_ok=True)
        paths = os.pathsep.join(filter(None, [PACKAGES, os.environ.get("PYTHONPATH")]))  # also without an installation
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": paths}
        with open(work.log, "w", encoding="utf-8") as log:
            # its own session: Ctrl-C reaches this process alone, which then ends its workers in order
            self._process = subprocess.Popen(work.command, stdout=subprocess.PIPE, stderr=log, text=True,
                                             env=environment, start_new_session=True)
        threading.Thread(target=self._read, args=(events,), daemon=True).start()

    def _read(self, events: queue.Queue) -> None:
        for line in self._process.stdout:
            try:
                events.put((self.work.title, json.loads(line)))
            except json.JSONDecodeError:
                continue
        self._process.wait()
        events.put((self.work.title, None))

    def show(self, event: dict, console: Console) -> None:
        if "bar" in event:
            self._bar(event, console)(event["done"], event["total"])
        elif "warn" in event:
            console.warn(f"{self.work.title}: {event['warn']}")
        elif "note" in event:
            console.note(f"{self.work.title}: {event['note']}")
        elif "error" in event:
            self._error = event["error"]
        elif "peak_mb" in event:
            self.peak_mb = event["peak_mb"]

    def _bar(self, event: dict, console: Console) -> Bar:
        """The bar of the worker's current stage; that of an earlier stage goes away."""
        if event["bar"] not in self._bars:
            self._close_bars()
            stack = ExitStack()
            bar = stack.enter_context(console.bar(f"{self.work.title}: {event['bar']}", event["total"], event.get("unit", "item")))
            self._bars[event["bar"]] = stack, bar
        return self._bars[event["bar"]][1]

    def _close_bars(self) -> None:
        for stack, _ in self._bars.values():
            stack.close()
        self._bars.clear()

    def finish(self) -> Failure | None:
        self._close_bars()
        code = self._process.returncode
        if code == 0:
            return None
        reason = self._error
        if not reason:
            tail = self.work.log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:].strip()
            killed = " (killed: most often the memory ran out; lower parallel_arms or the batch size)" if code == -9 else ""
            reason = f"ended with status {code}{killed}; the end of {self.work.log}:\n{tail}"
        return Failure(self.work.title, reason)

    def stop(self) -> None:
        self._close_bars()
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this installation."""
    return [sys.executable, "-m", module, *arguments]
