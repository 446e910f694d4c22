"""The values of the sections that are charts and tables: result, training, heads, the run itself.

Each function takes what was read of the run folder and names what it could not find in `run.missing`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from markupsafe import Markup

from enhancer.report import charts
from enhancer.report.claims import Row, chance, number
from enhancer.report.examples import Example
from enhancer.report.run_folder import Missing, RunFolder, label

LOSSES = {"ar_loss": "Answer loss", "alignment_loss": "Alignment loss"}


def result_charts(run: RunFolder, rows: list[Row], styles: dict[str, int]) -> list[tuple[str, Markup]]:
    shown = []
    single = len({row.arm for row in rows}) < len(rows)  # no table: a row is one seed
    bars = [
        charts.Bar(
            f"{row.label} {' '.join(row.seeds)}" if single else row.label,
            100 * row.overall.value,
            100 * row.overall.low,
            100 * row.overall.high,
            styles[row.arm],
            [100 * value for value in row.seed_values] if len(row.seeds) > 1 else [],
        )
        for row in rows
        if row.overall
    ]
    if bars:
        guess = chance(run)
        reference = None if guess is None else ("chance", 100 * guess)
        shown.append(
            (
                "Overall accuracy. Bars are intervals, small dots single seeds.",
                charts.interval_chart(
                    bars,
                    title="Overall accuracy of every arm with its interval",
                    unit="accuracy, %",
                    reference=reference,
                ),
            )
        )
    bars = [
        charts.Bar(
            row.label, 100 * row.delta.value, 100 * row.delta.low, 100 * row.delta.high, styles[row.arm]
        )
        for row in rows
        if row.delta
    ]
    if bars:
        shown.append(
            (
                "Paired difference against λ = 0, same questions and seeds.",
                charts.interval_chart(
                    bars,
                    title="Paired difference of every arm against λ = 0 with its interval",
                    unit="percentage points",
                    reference=("λ = 0", 0.0),
                ),
            )
        )
    return shown


def training_charts(run: RunFolder, styles: dict[str, int]) -> list[dict]:
    """Both losses: a thin line per seed, a thick one for their mean, each a running mean over 5 %."""
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
            chart = charts.curve_chart(
                curves, title=f"{name} by step, one line per arm", x_name="step", y_name=""
            )
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


def training_table(run: RunFolder, styles: dict[str, int]) -> list[dict]:
    """One line per student: its last logged values."""
    keys = ("step", "ar_loss", "alignment_loss", "words_matched", "video_mass")
    table = []
    for arm in sorted(run.arms, key=list(styles).index):
        for seed in run.arms[arm]:
            last = {
                key: next(
                    (v for row in reversed(seed.history) if (v := number(row.get(key))) is not None), None
                )
                for key in keys
            }
            table.append(
                {
                    "label": label(arm),
                    "seed": seed.seed,
                    **last,
                    "seconds": number(seed.train.get("seconds")),
                    "source": seed.train.get("prior_source"),
                    "weight": number(seed.train.get("lambda")),
                    "export": number(seed.train.get("export_max_difference")),
                }
            )
    return table


def head_scores(run: RunFolder, examples: list[Example]) -> dict:
    """Head scores of the example clips' priors: a chart over clips and each head's means."""
    given = []
    for example in examples:
        scores = (example.meta.get("prior_provenance") or {}).get("head_scores") or {}
        parts = {name: scores.get(name) for name in ("dfc", "tcs", "dsr", "score", "selected")}
        if all(isinstance(part, list) and part for part in parts.values()):
            given.append(parts)
    size = min((len(part) for parts in given for part in parts.values()), default=0)
    if not size:
        run.missing.append(
            Missing(
                "heads",
                "No head scores in any example's prior (head selection off, or the "
                "prior's source has no heads).",
            )
        )
        return {"heads": [], "head_chart": None, "head_clips": 0}
    values = {
        name: np.array([[number(v) or 0.0 for v in parts[name][:size]] for parts in given])
        for name in ("dfc", "tcs", "dsr", "score")
    }
    chosen = np.array([[bool(v) for v in parts["selected"][:size]] for parts in given])
    chart = charts.head_chart(
        values["score"].tolist(),
        chosen.tolist(),
        title="Summed standardised score of every head; filled marks are selected",
    )
    heads = [
        {
            "head": h,
            "selected": int(chosen[:, h].sum()),
            **{k: float(v[:, h].mean()) for k, v in values.items()},
        }
        for h in range(size)
    ]
    return {"heads": heads, "head_chart": chart, "head_clips": len(given)}


def timings(run: RunFolder) -> list[tuple[str, float, float]]:
    """(stage, seconds, share of the longest)."""
    seconds = run.info.get("seconds")
    given = [(str(k), number(v)) for k, v in seconds.items()] if isinstance(seconds, dict) else []
    given = [(stage, value) for stage, value in given if value is not None]
    longest = max((value for _, value in given), default=0.0) or 1.0
    return [(stage, value, value / longest) for stage, value in given]


def facts_of(run: RunFolder) -> list[tuple[str, str]]:
    facts = []
    for key in ("command", "status", "started", "finished", "seed", "machine", "peak_memory_mb"):
        value = run.info.get(key)
        if value is None:
            if run.info and not (key == "finished" and run.info.get("status") == "running"):
                run.missing.append(Missing("run", f"run.json does not say '{key}'."))
            continue
        if isinstance(value, list):
            value = " ".join(map(str, value))
        if isinstance(value, dict):
            value = ", ".join(f"{k}: {v}" for k, v in value.items())
        facts.append((key.replace("_mb", " (MB)").replace("_", " "), str(value)))
    return facts


def counted(names: Iterable[str]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return sorted(counts.items())
