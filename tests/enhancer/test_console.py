"""Progress: bars in a terminal, lines in a log, nothing but results when quiet."""

from __future__ import annotations

import io

import rich.console

from enhancer import console as console_module
from enhancer.console import Console


def _console(quiet=False, terminal=False):
    stream = io.StringIO()
    out = rich.console.Console(file=stream, force_terminal=terminal, width=120, highlight=False)
    return Console(quiet, out), stream


def test_terminal_bar_shows_count_and_throughput():
    console, stream = _console(terminal=True)
    with console.bar("extracting priors", 4, "clip") as bar:
        bar(2, 4, "a.mp4 [1]")
        console.live.refresh()
        bar.advance(2)
        assert bar.done == 4
    assert console.live is None
    assert "extracting priors: a.mp4 [1]" in stream.getvalue() and "/4" in stream.getvalue()


def test_log_lines_without_terminal(monkeypatch):
    monkeypatch.setattr(console_module, "LOG_EVERY", -1.0)
    console, stream = _console()
    with console.bar("training", 10, "step") as bar:
        bar(5)
        bar(6)
    assert "training 6/10" in stream.getvalue() and "left" in stream.getvalue()


def test_speed_leaves_out_what_an_earlier_run_did(monkeypatch):
    """Resumed at 500 of 600: one step in ten seconds is 0.1 step/s, not 50."""
    now = [0.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    console, stream = _console()
    with console.bar("training", 600, "step") as bar:
        now[0] = 10.0
        bar(500)
        now[0] = 20.0
        bar(501)
    assert "501/600 (10.0 s/step, 990 s left)" in stream.getvalue()


def test_quiet_keeps_results_and_warnings_only(monkeypatch):
    monkeypatch.setattr(console_module, "LOG_EVERY", -1.0)
    console, stream = _console(quiet=True, terminal=True)
    console.step("Data")
    console.note("600 samples")
    with console.bar("training", 10) as bar:
        bar(5)
    console.warn("2 samples were left out")
    console.print("result")
    assert stream.getvalue().count("\n") == 2
    assert "left out" in stream.getvalue() and "result" in stream.getvalue()


def test_nested_bars_share_the_screen():
    console, _ = _console(terminal=True)
    with console.bar("a", 2) as first:
        with console.bar("b", 3):
            assert len(console.live.tasks) == 2
        assert console.live is not None and len(console.live.tasks) == 1
        first(1)
