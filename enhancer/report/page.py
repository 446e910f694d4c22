"""`write_report`: a run folder in, one self-contained report.html out.

Read from the top: read the folder, gather each section's values, render the template, write it whole.
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import jinja2

from enhancer.report import pictures
from enhancer.report.claims import comparison, headline, number, signed
from enhancer.report.examples import draw, map_rows, read_examples
from enhancer.report.run_folder import LABELS, Missing, RunFolder, label, read_run_folder
from enhancer.report.sections import (
    counted,
    facts_of,
    head_scores,
    result_charts,
    timings,
    training_charts,
    training_table,
)
from vdm_priors.errors import UserError

SECTIONS = {
    "result": "Result",
    "training": "Training",
    "examples": "Examples",
    "heads": "Head scores",
    "skipped": "Skipped",
    "run": "This run",
}
STYLES = 8  # series classes in the template
MOST_SKIPPED = 300


def write_report(run_folder: Path) -> Path:
    """Write run_folder/report.html from the folder's files and return its path. Raises UserError."""
    folder = Path(run_folder)
    if not folder.is_dir():
        raise UserError(f"Report: {folder} is not a run folder; give the folder that 'enhancer run' wrote.")
    run = read_run_folder(folder)
    page = _template().render(**_context(run))
    path = folder / "report.html"
    part = folder / "report.html.part"
    try:
        part.write_text(page, encoding="utf-8", errors="replace")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(
            f"Report: cannot write {path} ({error.strerror}); free some space or choose "
            "a folder that can be written, then run the report again."
        ) from error
    return path


def _context(run: RunFolder) -> dict:
    types, rows = comparison(run)
    arms = [row.arm for row in rows] + list(run.arms)
    styles = _styles(list(dict.fromkeys(arms)))
    context = {
        "info": run.info,
        "title": str(run.info.get("name") or run.folder.name),
        "claim": headline(rows),
        "types": types,
        "rows": rows,
        "notes": run.table.get("notes", []),
        "styles": styles,
        "result_charts": result_charts(run, rows, styles),
        "training_charts": training_charts(run, styles),
        "training": training_table(run, styles),
        "skipped": run.skipped[:MOST_SKIPPED],
        "more_skipped": max(0, len(run.skipped) - MOST_SKIPPED),
        "skipped_by": counted(str(row.get("stage")) for row in run.skipped),
        "recipe": run.recipe,
        "prior_counts": counted(str(row.get("source")) for row in run.priors),
        "timings": timings(run),
        "facts": facts_of(run),
        "sections": SECTIONS,
        "label": label,
        "signed": signed,
    }
    context |= _examples(run, list(dict.fromkeys(arms)))
    context["missing"] = run.missing
    context["missing_in"] = {
        name: [m.sentence for m in run.missing if m.section == name] for name in SECTIONS
    }
    return context


def _examples(run: RunFolder, arms: list[str]) -> dict:
    examples = read_examples(run.examples, run.missing)
    problems: list[list[str]] = [[] for _ in examples]
    rows = [map_rows(example, arms, found) for example, found in zip(examples, problems, strict=True)]
    maps = [
        m
        for of_one in rows
        for row in of_one
        if row.name != "ground truth"
        for m in row.maps
        if m is not None
    ]
    top = pictures.top_of_scale(maps)
    drawn = [draw(e, r, top, found) for e, r, found in zip(examples, rows, problems, strict=True)]
    for example in drawn:
        for problem in example.missing:
            run.missing.append(Missing("examples", f"Example {example.title}: {problem}."))
    return {
        "examples": drawn,
        "scale": pictures.scale_uri(),
        "scale_ticks": pictures.scale_ticks(top),
        "score_shades": [pictures.score_shade(i / 7)[0] for i in range(8)],
        **head_scores(run, examples),
    }


def _styles(arms: list[str]) -> dict[str, int]:
    """A series number per arm: the known arms keep theirs in every report."""
    known = list(LABELS)
    others = [arm for arm in arms if arm not in known]
    return {
        arm: (known.index(arm) if arm in known else len(known) + others.index(arm)) % STYLES for arm in arms
    }


def _short(value: object, digits: int = 3) -> str:
    value = number(value)
    return "–" if value is None else f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}")


def _moment(text: object) -> str:
    """2025-11-21T10:55:40+00:00 → 2025-11-21 10:55, as written by the machine."""
    return str(text)[:16].replace("T", " ")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f}"
    environment.filters["short"] = _short
    environment.filters["moment"] = _moment
    source = resources.files("enhancer.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)
