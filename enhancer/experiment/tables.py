"""The table of a matrix for a terminal and for a text file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import rich.table
from rich.markup import escape

from enhancer.experiment.claims import small, verdict
from enhancer.table import points

MARKS = {1: "▲", -1: "▼", 0: ""}
NONE = "–"

Cells = tuple[str, list[str], list[list[str]]]  # title, heads, rows


def all_tables(results: dict[str, Any]) -> list[Cells]:
    """Scores, scores by question type, tests, and costs."""
    tests = _tests(results, "difference"), _tests(results, "reference")
    tables = [_scores(results), _by_type(results), *tests, _costs(results)]
    return [table for table in tables if table[2]]


def _scores(results: dict[str, Any]) -> Cells:
    """Average stands beside Overall where there are several question types; of one it is the same number."""
    columns: dict[str, Callable[[dict], str]] = {
        "student": lambda row: row["name"],
        "Overall": lambda row: _interval(row["overall"]),
        "Average": lambda row: _interval(row["average"]),
        "Δ Overall": lambda row: _difference(row["difference"]),
        "Δ Average": lambda row: _gap((row["difference"] or {}).get("average")),
        f"Δ {results['reference']}": lambda row: _difference(row["reference"]),
        "rank": lambda row: _rank(row["rank"]),
        "seeds": lambda row: str(len(row["seeds"]) or NONE),
    }
    if len(results["types"]) < 2:
        del columns["Average"], columns["Δ Average"]
    if results["reference"] is None:
        del columns[f"Δ {None}"]
    rows = [[text(row) for text in columns.values()] for row in results["rows"]]
    return "accuracy in % and paired difference from λ = 0 in points", list(columns), rows


def _by_type(results: dict[str, Any]) -> Cells:
    if len(results["types"]) < 2:
        return "", [], []
    rows = [[row["name"], *(_interval(row["types"].get(kind)) for kind in results["types"])] for row in results["rows"]]
    return "accuracy in % by question type", ["student", *(kind or "(no type)" for kind in results["types"])], rows


def _tests(results: dict[str, Any], key: str) -> Cells:
    """key: `difference` is from λ = 0, `reference` from the matrix's reference."""
    rows = []
    for row in results["rows"]:
        found = row[key]
        if found:
            rows.append(
                [
                    row["name"],
                    row["against"] if key == "difference" else results["reference"],
                    str(found["questions"]),
                    str(found["seeds"]),
                    small(found["p"]),
                    small(found["holm"]),
                    small(found["p_questions"]),
                    small(found["p_seeds"]),
                    " ".join(points(gap) for gap in found["per_seed"]),
                ]
            )
    heads = [
        "student",
        "paired with",
        "questions",
        "seeds",
        "p",
        "Holm p",
        "p, questions",
        "p, seeds",
        "difference of each seed",
    ]
    return "paired tests" if key == "difference" else f"paired tests against {results['reference']}", heads, rows


def _costs(results: dict[str, Any]) -> Cells:
    """Without tokens where no answers say them."""
    trained = [row for row in results["rows"] if row["cost"].get("training") is not None]
    columns: dict[str, Callable[[dict], str]] = {
        "student": lambda row: row["name"],
        "prior": lambda row: row["source"] or NONE,
        "prior, s/clip": lambda row: _number(row["cost"].get("seconds"), 3),
        "prior, kB/clip": lambda row: _number(row["cost"].get("bytes"), 1, 1000),
        "training, s": lambda row: _number(row["cost"]["training"], 1),
        "tokens a clip": lambda row: _number(row["cost"].get("tokens"), 0),
    }
    if all(row["cost"].get("tokens") is None for row in trained):
        del columns["tokens a clip"]
    return "cost", list(columns), [[text(row) for text in columns.values()] for row in trained]


def _interval(of: dict[str, Any] | None) -> str:
    if of is None:
        return NONE
    return f"{100 * of['value']:.1f}" + (
        "" if of["low"] is None else f" [{100 * of['low']:.1f}, {100 * of['high']:.1f}]"
    )


def _gap(of: dict[str, Any] | None) -> str:
    if of is None:
        return NONE
    return points(of["value"]) + ("" if of["low"] is None else f" [{points(of['low'])}, {points(of['high'])}]")


def _difference(of: dict[str, Any] | None) -> str:
    return f"{_gap(of)} {MARKS[verdict(of)]}".strip()


def _rank(of: list[int] | None) -> str:
    return NONE if of is None else str(of[0]) if of[0] == of[1] else f"{of[0]} to {of[1]}"


def _number(value: float | None, digits: int, unit: float = 1) -> str:
    return NONE if value is None else f"{value / unit:.{digits}f}"


def rich_tables(results: dict[str, Any]) -> list[rich.table.Table]:
    """For a terminal."""
    shown = []
    for title, heads, rows in all_tables(results):
        table = rich.table.Table(title=title, title_justify="left", header_style="bold")
        for number, head in enumerate(heads):
            table.add_column(escape(head), justify="right" if number else "left")
        for row in rows:
            table.add_row(*map(escape, row))
        shown.append(table)
    return shown


def markdown(results: dict[str, Any]) -> str:
    """For a text file or a page of docs."""
    parts = [f"# {results['name']}", results["headline"]]
    for title, heads, rows in all_tables(results):
        parts += [f"**{title}**", markdown_table(heads, rows)]
    parts.append(
        "\n".join(f"- {sentence}" for sentence in [*results["sentences"], *results["notes"], *results["missing"]])
    )
    return "\n\n".join(parts) + "\n"


def markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    """One table, its first column to the left and the others to the right."""
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows)])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
