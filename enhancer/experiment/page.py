"""`write_page`: the folders of matrices in, one self-contained HTML page out; what is missing is said on it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from enhancer.experiment.claims import CONTROL, verdict
from enhancer.experiment.results import CELL, make_results
from enhancer.experiment.tables import MARKS, all_tables
from enhancer.report import charts
from enhancer.runfolder import read_json, read_lines, write_text
from vdm_priors.errors import UserError

CONTROL_STYLE, STYLES = (
    1,
    {1: 5, -1: 2, 0: 0},
)  # numbers of the series' colours: dark, and green, orange, grey by verdict
CHARACTER = 6.3  # width of one in a chart's text
MOST_NAME = 190
MOST_SKIPPED = 100


def write_page(path: Path, folders: list[Path]) -> Path:
    """Writes the page of these matrices and returns its path. Raises UserError for a folder without a plan."""
    matrices = [_matrix(Path(folder)) for folder in folders]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("enhancer.experiment").joinpath("page.html.j2").read_text(encoding="utf-8")
    write_text(path, environment.from_string(source).render(matrices=matrices))
    return path


def _matrix(folder: Path) -> dict[str, Any]:
    results = make_results(folder)
    try:
        record = read_json(folder / "run.json", {})
    except UserError as error:
        record = {"status": f"unknown: {error}"}
    recipe = folder / "recipe.yaml"
    return {
        "results": results,
        "record": record,
        "charts": [chart for chart in all_charts(results) if chart],
        "tables": [table for table in all_tables(results)],
        "marks": MARKS,
        "recipe": recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
        "skipped": read_lines(folder / "skipped.jsonl")[:MOST_SKIPPED],
    }


def all_charts(results: dict[str, Any]) -> list[tuple[str, Markup] | None]:
    """Caption and chart of the rankings, by λ = 0 and by the reference, and of the accuracies; None of what is not known."""
    reference = results["reference"]
    referred = None if reference is None else _ranking(results, "reference", reference)
    return [_ranking(results, "difference", CONTROL), referred, _accuracies(results)]


def _ranking(results: dict[str, Any], key: str, against: str) -> tuple[str, Markup] | None:
    """Students by their difference from λ = 0, or from the reference, the largest first."""
    rows = [row for row in results["rows"] if row[key] and row[key]["low"] is not None]
    bars = [
        charts.Bar(
            _short(row["name"]),
            *(100 * row[key][part] for part in ("value", "low", "high")),
            STYLES[verdict(row[key])],
            [100 * gap for gap in row[key]["per_seed"]],
        )
        for row in sorted(rows, key=lambda row: -row[key]["value"])
    ]
    if not bars:
        return None
    said = (
        f"Paired difference from {against}, best first. Bars are 95% intervals, small dots single seeds; green holds "
        "above zero after correction, orange below, grey shows no difference."
    )
    return said, charts.interval_chart(
        bars,
        title=f"Paired difference of every student from {against} with its interval",
        unit="percentage points",
        reference=(against, 0.0),
        names=_width(bars),
    )


def _accuracies(results: dict[str, Any]) -> tuple[str, Markup] | None:
    rows = [row for row in results["rows"] if row["overall"] and row["overall"]["low"] is not None]
    bars = [
        charts.Bar(
            _short(row["name"]),
            *(100 * row["overall"][part] for part in ("value", "low", "high")),
            STYLES[verdict(row["difference"])] if row["kind"] == CELL else CONTROL_STYLE,
            [100 * value for value in row["per_seed"]] if len(row["per_seed"]) > 1 else [],
        )
        for row in rows
    ]
    if not bars:
        return None
    guess = None if results["chance"] is None else ("chance", 100 * results["chance"])
    return "Overall accuracy. Bars are 95% intervals, small dots single seeds.", charts.interval_chart(
        bars,
        title="Overall accuracy of every student with its interval",
        unit="accuracy, %",
        reference=guess,
        names=_width(bars),
    )


def _width(bars: list[charts.Bar]) -> int:
    return round(min(MOST_NAME, max(60, 14 + CHARACTER * max(len(bar.name) for bar in bars))))


def _short(name: str) -> str:
    most = int((MOST_NAME - 14) / CHARACTER)
    return name if len(name) <= most else name[: most - 1] + "…"
