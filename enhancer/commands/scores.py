"""How `enhancer evaluate` shows a score: by question type, beside published rows, and what it lacks."""

from __future__ import annotations

from typing import Any

import rich.table
from rich.markup import escape

from enhancer.benchmarks import Benchmark, published
from enhancer.console import Console
from enhancer.table import percent

SHOWN = 20  # errors that are printed; all are in scores.json


def print_summary(summary: dict, benchmark: Benchmark | None, asking: Any, console: Console) -> None:
    table = rich.table.Table(
        "type", "questions", "right", "accuracy [95%]", box=None, padding=(0, 2, 0, 0), header_style="bold"
    )
    for name, counted in [*summary["types"].items(), ("Overall", summary["overall"])]:
        accuracy = (
            "–"
            if counted["accuracy"] is None
            else f"{percent(counted['accuracy'])} [{percent(counted['low'])}, {percent(counted['high'])}]"
        )
        table.add_row(escape(name or "(no type)"), str(counted["n"]), str(counted["correct"]), escape(accuracy))
    console.print(table)
    if summary["average"] is not None:
        console.print(f"Average over types: {percent(summary['average'])}", markup=False)
    if benchmark and published(benchmark.name)["rows"]:
        _print_published(summary, benchmark, asking, console)
    if summary["not_scored"] - summary["open"] > 0:
        console.warn(f"{summary['not_scored'] - summary['open']} answers are hidden and not scored")
    if summary["open"]:
        console.warn(f"{summary['open']} questions without options were answered and are not scored")
    if summary["unparsed"]:
        console.warn(f"{summary['unparsed']} answers mean none of the options and count as wrong")
    for error in summary["errors"][:SHOWN]:
        console.warn(f"{error['id']} could not be asked: {error['reason']}")
    if len(summary["errors"]) > SHOWN:
        console.warn(
            f"and {len(summary['errors']) - SHOWN} more" + (f" in {asking.out / 'scores.json'}" if asking.out else "")
        )
    if not summary["complete"]:
        console.warn(f"The score is incomplete: {_lacking(summary, asking)}.")


def _lacking(summary: dict, asking: Any) -> str:
    said = [f"{len(summary['errors'])} questions could not be asked"] if summary["errors"] else []
    if asking.limit is not None:
        said.append("--limit left questions out")
    if summary["expected"] not in (None, summary["overall"]["n"]):
        said.append(f"{summary['overall']['n']} of the benchmark's {summary['expected']} questions were scored")
    return ", ".join(said)


def _print_published(summary: dict, benchmark: Benchmark, asking: Any, console: Console) -> None:
    """Published rows below one's own, with what is known of how they were made."""
    known, types = published(benchmark.name), list(benchmark.types)
    table = rich.table.Table(
        "model",
        "frames",
        "Overall",
        "Average",
        *types,
        box=None,
        padding=(0, 1, 0, 0),  # all columns in a terminal of 80
        header_style="bold",
        title=f"{benchmark.title}, accuracy in %",
        title_justify="left",
    )
    own = f"{asking.frames}" if asking.fps is None else f"{asking.fps:g} fps"
    cells = [
        None if summary["overall"]["n"] == 0 else summary["overall"]["accuracy"],
        summary["average"],
        *((summary["types"].get(kind) or {}).get("accuracy") for kind in types),
    ]
    mark = "" if summary["complete"] else " (incomplete)"
    table.add_row(
        escape(f"yours{mark}"), own, *("–" if cell is None else f"{100 * cell:.2f}" for cell in cells), style="bold"
    )
    base = ""
    for row in known["rows"]:
        method = row["model"].removeprefix(base + " + ")  # of the model in the row above
        base = base if method != row["model"] else row["model"]
        cells = [row["overall"], row["average"], *(row["types"].get(kind) for kind in types)]
        table.add_row(
            escape((method if method == row["model"] else f"  + {method}") + ("*" if row["reproduced"] else "")),
            row["frames"],
            *("–" if cell is None else f"{cell:.2f}" for cell in cells),
        )
    console.print(table)
    most = "" if asking.fps is None else f", at most {asking.frames} frames"
    console.print(
        f"Yours: {asking.protocol}{most}, {asking.dtype}. Theirs: {known['source']}. {known['protocol']} Scores of "
        f"different protocols differ by more than methods do.",
        markup=False,
    )
