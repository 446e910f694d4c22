"""What people see while a job runs: steps, progress with throughput and time left, and tables.

In a terminal, a moving bar; in a log file or with --quiet, plain lines. Progress bars are
callables `bar(done, total, text)`, which is what the long functions of the other layers take.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import rich.console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

LOG_EVERY = 15.0  # seconds between progress lines where no bar can move


class Throughput(ProgressColumn):
    """Units per second, or seconds per unit where that is slow."""

    def render(self, task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(_speed_text(speed, task.fields["unit"]), style="cyan")


def _speed_text(speed: float | None, unit: str) -> str:
    if not speed:
        return ""
    return f"{speed:.1f} {unit}/s" if speed >= 1 else f"{1 / speed:.1f} s/{unit}"


class Bar:
    """One piece of work. Call it with what is done so far, or `advance` it."""

    def __init__(self, console: Console, title: str, total: int | None, unit: str) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, 0
        self._console = console
        self._started = self._said = time.monotonic()
        self._phase: tuple[str | None, int] = (None, 0)  # what is being done, and how much of it an earlier run had done
        self._task = None
        if console.live is not None:
            self._task = console.live.add_task(escape(title), total=total, unit=unit)

    def __call__(self, done: int, total: int | None = None, text: str | None = None) -> None:
        phase = (text or "").split(" ")[0]
        if phase != self._phase[0] or done < self.done:  # speed is of this phase and of this run: what is reused took no time
            self._phase, self._started = (phase, done), time.monotonic()
        self.done = done
        self.total = self.total if total is None else total
        if self._task is not None:
            description = escape(f"{self.title}: {text}" if text else self.title)
            self._console.live.update(self._task, completed=done, total=self.total, description=description)
        elif not self._console.quiet and time.monotonic() - self._said > LOG_EVERY:
            self._said = time.monotonic()
            self._console.print(f"  {self._line(text)}")

    def advance(self, count: int = 1) -> None:
        """`count` more units are done."""
        self(self.done + count)

    def _line(self, text: str | None) -> str:
        speed = (self.done - self._phase[1]) / max(time.monotonic() - self._started, 1e-9)
        left = f", {(self.total - self.done) / speed:.0f} s left" if self.total and speed else ""
        of = f"/{self.total}" if self.total else ""
        pace = _speed_text(speed, self.unit) or "starting"
        return f"{escape(self.title)}{f': {escape(text)}' if text else ''} {self.done}{of} ({pace}{left})"

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self._task is not None:
            self._console.live.remove_task(self._task)


class Console:
    """Prints for people; quiet keeps results and warnings and leaves progress out."""

    def __init__(self, quiet: bool = False, out: rich.console.Console | None = None) -> None:
        self.out = out or rich.console.Console(highlight=False, soft_wrap=False)
        self.quiet = quiet
        self.live: Progress | None = None

    def print(self, *objects, **kwargs) -> None:
        """Always printed: results and tables (rich markup)."""
        self.out.print(*objects, **kwargs)

    def step(self, title: str) -> None:
        """A new step begins."""
        if not self.quiet:
            self.out.print(f"[bold]{escape(title)}[/bold]")

    def note(self, text: str) -> None:
        """A detail of the current step; left out when quiet."""
        if not self.quiet:
            self.out.print(f"  {escape(text)}", style="dim")

    def warn(self, text: str) -> None:
        """Something the user should know even when quiet."""
        self.out.print(f"  ! {escape(text)}", style="yellow")

    @contextmanager
    def bar(self, title: str, total: int | None = None, unit: str = "item") -> Iterator[Bar]:
        """A progress bar with throughput and time left; several may be open at once."""
        outermost = self.live is None and not self.quiet and self.out.is_terminal
        if outermost:
            self.live = Progress(TextColumn("  {task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                                 Throughput(), TimeRemainingColumn(compact=True), console=self.out, transient=True)
            self.live.start()
        bar = Bar(self, title, total, unit)
        try:
            yield bar
        finally:
            bar.close()
            if outermost:
                self.live.stop()
                self.live = None
