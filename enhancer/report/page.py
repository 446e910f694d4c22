"""`write_report`: a run folder in, one self-contained report.html out.

Read from the top: read the folder, gather each section's values, render the template, write it whole.
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from enhancer.report import charts, pictures
from enhancer.report.claims import Row, chance, comparison, headline, number, signed
from enhancer.report.examples import draw, map_rows, read_examples
from enhancer.report.run_folder import LABELS, Missing, RunFolder, label, read_run_folder
from vdm_priors.errors import UserError

SECTIONS = {
    "result": "Result", "training": "Training", "examples": "Examples",
    "heads": "Head scores", "skipped": "Skipped", "run": "This run",
}
LOSSES = {"ar_loss": "Answer loss", "alignment_loss": "Alignment loss"}
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
        raise UserError(f"Report: cannot write {path} ({error.strerror}); free some space or choose "
                        "a folder that can be written, then run the report again.") from error
    return path


def _context(run: RunFolder) -> dict:
    types, rows = comparison(run)
    arms = [row.arm for row in rows] + list(run.arms)
    styles = _styles(list(dict.fromkeys(arms)))
    context = {
        "info": run.info, "title": str(run.info.get("name") or run.folder.name), "claim": headline(rows),
        "types": types, "rows": rows, "notes": run.table.get("notes", []), "styles": styles,
        "result_charts": _result_charts(run, rows, styles),
        "training_charts": _training_charts(run, styles), "training": _training_table(run, styles),
        "skipped": run.skipped[:MOST_SKIPPED], "more_skipped": max(0, len(run.skipped) - MOST_SKIPPED),
        "skipped_by": _count((str(row.get("stage")) for row in run.skipped)),
        "recipe": run.recipe, "prior_counts": _count(str(row.get("source")) for row in run.priors),
        "timings": _timings(run), "facts": _facts(run), "sections": SECTIONS, "label": label, "signed": signed,
    }
    context |= _examples(run, list(dict.fromkeys(arms)))
    context["missing"] = run.missing
    context["missing_in"] = {name: [m.sentence for m in run.missing if m.section == name] for name in SECTIONS}
    return context


def _result_charts(run: RunFolder, rows: list[Row], styles: dict[str, int]) -> list[tuple[str, Markup]]:
    shown = []
    bars = [charts.Bar(row.label, 100 * row.overall.value, 100 * row.overall.low, 100 * row.overall.high,
                       styles[row.arm], [100 * value for value in row.seed_values] if len(row.seeds) > 1 else [])
            for row in rows if row.overall]
    if bars:
        guess = chance(run)
        reference = None if guess is None else ("chance", 100 * guess)
        shown.append(("Overall accuracy. Bars are intervals, small dots single seeds.", charts.interval_chart(
            bars, title="Overall accuracy of every arm with its interval", unit="accuracy, %", reference=reference)))
    bars = [charts.Bar(row.label, 100 * row.delta.value, 100 * row.delta.low, 100 * row.delta.high, styles[row.arm])
            for row in rows if row.delta]
    if bars:
        shown.append(("Paired difference against λ = 0, same questions and seeds.", charts.interval_chart(
            bars, title="Paired difference of every arm against λ = 0 with its interval",
            unit="percentage points", reference=("λ = 0", 0.0))))
    return shown


def _training_charts(run: RunFolder, styles: dict[str, int]) -> list[dict]:
    """Both losses: a thin line per seed, a thick one for their mean, each a running mean over 5 % of the steps."""
    shown = []
    for key, name in LOSSES.items():
        curves, arms, absent = [], [], []
        for arm in sorted(run.arms, key=list(styles).index):
            lines = [line for line in (_curve(seed.history, key) for seed in run.arms[arm]) if line]
            if not lines:
                absent.append(label(arm))
                continue
            arms.append(arm)
            if len(lines) > 1:
                curves += [charts.Curve(line, styles[arm], thin=True) for line in lines]
            curves.append(charts.Curve(_mean_curve(lines), styles[arm]))
        if curves:
            chart = charts.curve_chart(curves, title=f"{name} by step, one line per arm", x_name="step", y_name="")
            shown.append({"name": name, "chart": chart, "arms": arms, "absent": absent})
        elif run.arms:
            run.missing.append(Missing("training", f"{name}: no history.jsonl holds {key}."))
    return shown


def _curve(history: list[dict], key: str) -> list[tuple[float, float]]:
    points = [(number(row.get("step")), number(row.get(key))) for row in history]
    points = [(step, value) for step, value in points if step is not None and value is not None]
    return charts.running_mean(points, max(1, len(points) // 40)) if points else []


def _mean_curve(lines: list[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    by_step: dict[float, list[float]] = {}
    for line in lines:
        for step, value in line:
            by_step.setdefault(step, []).append(value)
    return [(step, sum(by_step[step]) / len(by_step[step])) for step in sorted(by_step)]


def _training_table(run: RunFolder, styles: dict[str, int]) -> list[dict]:
    """One line per student: its last logged values."""
    keys = ("step", "ar_loss", "alignment_loss", "words_matched", "video_mass")
    table = []
    for arm in sorted(run.arms, key=list(styles).index):
        for seed in run.arms[arm]:
            last = {key: next((v for row in reversed(seed.history) if (v := number(row.get(key))) is not None), None)
                    for key in keys}
            table.append({"label": label(arm), "seed": seed.seed, **last, "seconds": number(seed.train.get("seconds")),
                          "source": seed.train.get("prior_source"), "weight": number(seed.train.get("lambda"))})
    return table


def _examples(run: RunFolder, arms: list[str]) -> dict:
    examples = read_examples(run.examples, run.missing)
    problems: list[list[str]] = [[] for _ in examples]
    rows = [map_rows(example, arms, found) for example, found in zip(examples, problems, strict=True)]
    maps = [m for of_one in rows for row in of_one if row.name != "ground truth" for m in row.maps if m is not None]
    top = pictures.top_of_scale(maps)
    drawn = [draw(e, r, top, found) for e, r, found in zip(examples, rows, problems, strict=True)]
    for example in drawn:
        for problem in example.missing:
            run.missing.append(Missing("examples", f"Example {example.title}: {problem}."))
    return {
        "examples": drawn, "scale": pictures.scale_uri(), "scale_ticks": pictures.scale_ticks(top),
        "score_shades": [pictures.score_shade(i / 7)[0] for i in range(8)], **_heads(run, examples),
    }


def _heads(run: RunFolder, examples: list) -> dict:
    """Head scores of the example clips' priors: a chart over clips and each head's means."""
    given = []
    for example in examples:
        scores = (example.meta.get("prior_provenance") or {}).get("head_scores") or {}
        parts = {name: scores.get(name) for name in ("dfc", "tcs", "dsr", "score", "selected")}
        if all(isinstance(part, list) and part for part in parts.values()):
            given.append(parts)
    size = min((len(part) for parts in given for part in parts.values()), default=0)
    if not size:
        run.missing.append(Missing("heads", "No head scores in any example's prior (head selection off, or the "
                                            "prior's source has no heads)."))
        return {"heads": [], "head_chart": None, "head_clips": 0}
    values = {name: np.array([[number(v) or 0.0 for v in parts[name][:size]] for parts in given])
              for name in ("dfc", "tcs", "dsr", "score")}
    chosen = np.array([[bool(v) for v in parts["selected"][:size]] for parts in given])
    chart = charts.head_chart(values["score"].tolist(), chosen.tolist(),
                              title="Summed standardised score of every head; filled marks are selected")
    heads = [{"head": h, "selected": int(chosen[:, h].sum()), **{k: float(v[:, h].mean()) for k, v in values.items()}}
             for h in range(size)]
    return {"heads": heads, "head_chart": chart, "head_clips": len(given)}


def _timings(run: RunFolder) -> list[tuple[str, float, float]]:
    """(stage, seconds, share of the longest)."""
    seconds = run.info.get("seconds")
    given = [(str(k), number(v)) for k, v in seconds.items()] if isinstance(seconds, dict) else []
    given = [(stage, value) for stage, value in given if value is not None]
    longest = max((value for _, value in given), default=0.0) or 1.0
    return [(stage, value, value / longest) for stage, value in given]


def _facts(run: RunFolder) -> list[tuple[str, str]]:
    facts = []
    for key in ("command", "status", "started", "finished", "seed", "machine", "peak_memory_mb"):
        value = run.info.get(key)
        if value is None:
            if run.info:
                run.missing.append(Missing("run", f"run.json does not say '{key}'."))
            continue
        if isinstance(value, list):
            value = " ".join(map(str, value))
        if isinstance(value, dict):
            value = ", ".join(f"{k}: {v}" for k, v in value.items())
        facts.append((key.replace("_mb", " (MB)").replace("_", " "), str(value)))
    return facts


def _count(names) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return sorted(counts.items())


def _styles(arms: list[str]) -> dict[str, int]:
    """A series number per arm: the known arms keep theirs in every report."""
    known = list(LABELS)
    others = [arm for arm in arms if arm not in known]
    return {arm: (known.index(arm) if arm in known else len(known) + others.index(arm)) % STYLES for arm in arms}


def _short(value: object, digits: int = 3) -> str:
    value = number(value)
    return "–" if value is None else f"{value:.{digits}g}"


def _moment(text: object) -> str:
    """2025-11-21T10:55:40+00:00 → 2025-11-21 10:55, as written by the machine."""
    return str(text)[:16].replace("T", " ")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f}"
    environment.filters["short"] = _short
    environment.filters["moment"] = _moment
    source = resources.files("enhancer.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)
