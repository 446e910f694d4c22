"""The comparison of a run: table.json from the answers on disk, and what its intervals allow to say.

All intervals are 95%. One seed: over questions (Wilson for an accuracy, paired bootstrap for a
difference). Several seeds: Student's t over seeds, for differences over the per-seed pairs. The
base model has no seed: Wilson over questions.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import rich.table
from rich.markup import escape

from enhancer.evaluation.scores import paired_difference, summarise
from enhancer.runfolder import read_lines
from vdm_priors.errors import UserError

BASE = "base"
# two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
       2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
RESAMPLES = 4000


def make_table(folder: Path, recipe: Any) -> dict:
    """The rows (base, then the recipe's arms) with columns, notes and the recovered share."""
    answers = {arm.name: {seed: read_lines(folder / "arms" / arm.name / f"seed{seed}" / "answers.jsonl")
                          for seed in recipe.seeds} for arm in recipe.arms}
    base = {None: read_lines(folder / "base" / "answers.jsonl")}
    control = next((arm.name for arm in recipe.arms if recipe.weight(arm) == 0), None)
    shuffled = next((arm.name for arm in recipe.arms if arm.source == "shuffled"), None)
    rows = [_row(BASE, base, None, None, recipe.seed)]
    for name, by_seed in answers.items():
        rows.append(_row(name, by_seed, answers.get(control) if name != control else None,
                         answers.get(shuffled) if name not in (control, shuffled) else None, recipe.seed))
    types = sorted({kind for row in rows for kind in row["types"]})
    table = {"columns": ["arm", "seeds", *types, "overall", "low", "high", "average", "delta_vs_lambda0"], "rows": rows}
    table["recovered"] = _recovered(recipe, answers, control)
    table["notes"] = _notes(table, recipe, base[None], control)
    return table


def _row(name: str, by_seed: dict, control: dict | None, shuffled: dict | None, seed: int) -> dict:
    summaries = [summarise(rows) for rows in by_seed.values()]
    overall = [s["overall"]["accuracy"] for s in summaries if s["overall"]["accuracy"] is not None]
    if not overall:
        raise UserError(f"{name}: none of its questions could be scored; its answers.jsonl says why.")
    low, high = (summaries[0]["overall"]["low"], summaries[0]["overall"]["high"]) if len(overall) == 1 else t_interval(overall)
    types = sorted({kind for s in summaries for kind in s["types"]})
    return {
        "arm": name, "seeds": [s for s in by_seed if s is not None], "n": sum(s["overall"]["n"] for s in summaries),
        "types": {t: statistics.fmean(s["types"][t]["accuracy"] for s in summaries if t in s["types"]) for t in types},
        "overall": statistics.fmean(overall), "low": max(low, 0.0), "high": min(high, 1.0),
        "average": statistics.fmean(s["average"] for s in summaries if s["average"] is not None),
        "delta_vs_lambda0": difference(by_seed, control, seed) if control else None,
        "delta_vs_shuffled": difference(by_seed, shuffled, seed) if shuffled else None,
        "errors": sum(len(s["errors"]) for s in summaries),
    }


def difference(by_seed: dict[int, list[dict]], control: dict[int, list[dict]], seed: int) -> dict:
    """Accuracy minus the control's, paired by seed and question: {difference, low, high}."""
    pairs = [paired_difference(rows, control[k], seed) for k, rows in by_seed.items()]
    if len(pairs) == 1:
        return {key: pairs[0][key] for key in ("difference", "low", "high", "p")}
    gaps = [pair["difference"] for pair in pairs]
    low, high = t_interval(gaps)
    return {"difference": statistics.fmean(gaps), "low": low, "high": high, "per_seed": gaps}


def t_interval(values: list[float]) -> tuple[float, float]:
    """95% interval of the mean of a few values (Student's t)."""
    quantile = T95[min(len(values) - 1, len(T95)) - 1]
    half = quantile * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values) - half, statistics.fmean(values) + half


# ---- how much of the oracle's gain ---------------------------------------------------------------

def _recovered(recipe: Any, answers: dict, control: str | None) -> dict | None:
    arms = {arm.source: arm.name for arm in reversed(recipe.arms) if recipe.weight(arm) > 0}
    if control is None or "vdm" not in arms or "oracle" not in arms:
        return None
    return recovered_share(answers[control], answers[arms["vdm"]], answers[arms["oracle"]], recipe.seed)


def recovered_share(control: dict, vdm: dict, oracle: dict, seed: int) -> dict:
    """(vdm − λ0)/(oracle − λ0) with a bootstrap over seeds and questions.

    {share, low, high, oracle_gain, oracle_low, oracle_high}; share is None where the interval of
    the oracle's gain holds zero: there is then nothing to recover a share of.
    """
    ids = sorted(set.intersection(*({row["id"] for row in rows if row["correct"] is not None}
                                    for arm in (control, vdm, oracle) for rows in arm.values())))
    c, v, o = (np.array([[{row["id"]: bool(row["correct"]) for row in rows}[i] for i in ids] for rows in arm.values()], float)
               for arm in (control, vdm, oracle))  # [seeds, questions]
    random = np.random.default_rng(seed)
    gains = np.empty((RESAMPLES, 2))
    for n in range(RESAMPLES):
        seeds = random.integers(0, len(c), len(c))
        questions = random.integers(0, len(ids), len(ids))
        at = np.ix_(seeds, questions)
        gains[n] = (v[at] - c[at]).mean(), (o[at] - c[at]).mean()
    oracle_low, oracle_high = np.quantile(gains[:, 1], [0.025, 0.975])
    result = {"oracle_gain": float((o - c).mean()), "oracle_low": float(oracle_low), "oracle_high": float(oracle_high),
              "share": None, "low": None, "high": None}
    if oracle_low > 0:
        positive = gains[gains[:, 1] > 0]
        low, high = np.quantile(positive[:, 0] / positive[:, 1], [0.025, 0.975])
        result |= {"share": float((v - c).mean() / (o - c).mean()), "low": float(low), "high": float(high)}
    return result


# ---- sentences -----------------------------------------------------------------------------------

def _notes(table: dict, recipe: Any, base: list[dict], control: str | None) -> list[str]:
    several = len(recipe.seeds) > 1
    notes = [
        f"Intervals are 95%. Those of trained students and of differences are over the {len(recipe.seeds)} training "
        f"seeds (Student's t; the same questions are asked of all); that of {BASE}, which is not trained, is over questions (Wilson)."
        if several else
        "Intervals are 95% and over questions (Wilson; paired bootstrap for differences). There is one training seed, so how "
        "much another seed would change a number is not in them."]
    sizes = [len(row["options"]) for row in base if row.get("options")]
    if sizes:
        notes.append(f"Guessing would be right in {percent(statistics.fmean(1 / s for s in sizes))} of cases.")
    if control is None:
        notes.append("No arm was trained with λ = 0, so nothing is said about what alignment adds to fine-tuning.")
    for row in table["rows"]:
        if row["delta_vs_lambda0"]:
            notes.append(f"{row['arm']} against λ = 0: {_claim(row['delta_vs_lambda0'])}")
        if row["delta_vs_shuffled"] and row["arm"] == "vdm":
            notes.append(f"vdm against the shuffled prior: {_claim(row['delta_vs_shuffled'])}")
        if row["errors"]:
            notes.append(f"{row['arm']}: {row['errors']} questions could not be asked and count for nothing.")
    share = table["recovered"]
    if share and share["share"] is not None:
        notes.append(f"Of the oracle's gain over λ = 0 the VDM's prior recovers {percent(share['share'])} "
                     f"[{percent(share['low'])}, {percent(share['high'])}] (bootstrap over seeds and questions).")
    elif share:
        notes.append(f"The oracle's gain over λ = 0, {points(share['oracle_gain'])} [{points(share['oracle_low'])}, "
                     f"{points(share['oracle_high'])}], may be zero, so no share of it can be given.")
    return notes


def _claim(delta: dict) -> str:
    amount = f"{points(delta['difference'])} points [{points(delta['low'])}, {points(delta['high'])}]"
    if delta["low"] > 0:
        return f"{amount}; the interval lies above zero."
    if delta["high"] < 0:
        return f"{amount}; the interval lies below zero."
    return f"{amount}; the interval holds zero, so no difference is shown."


def percent(fraction: float) -> str:
    """0.4216 -> 42.2%."""
    return f"{100 * fraction:.1f}%"


def points(fraction: float) -> str:
    """Percentage points with a sign."""
    return f"{100 * fraction:+.1f}"


def rich_tables(table: dict, width: int) -> list[rich.table.Table]:
    """The table for a terminal of so many columns, in per cent; two tables where one would be too wide."""
    types = list(dict.fromkeys(kind for row in table["rows"] for kind in row["types"]))
    name_width = max(len(row["arm"]) for row in table["rows"])
    if name_width + 8 * len(types) + 75 <= width:
        return [_rich_table(table, types, totals=True)]
    return [_rich_table(table, [], totals=True), _rich_table(table, types, totals=False)]


def _rich_table(table: dict, types: list[str], totals: bool) -> rich.table.Table:
    shown = rich.table.Table(title="accuracy in %" if totals else "accuracy in % by question type", title_justify="left",
                             header_style="bold")
    shown.add_column("arm", no_wrap=True)
    for name in [*types, *(["Overall [95%]", "Average", "Δ vs λ=0 [95%]", "seeds"] if totals else [])]:
        shown.add_column(escape(name), justify="right", no_wrap=True)
    for row in table["rows"]:
        cells = [f"{100 * row['types'][kind]:.1f}" if kind in row["types"] else "–" for kind in types]
        if totals:
            delta = row["delta_vs_lambda0"]
            cells += [f"{100 * row['overall']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]", f"{100 * row['average']:.1f}",
                      f"{points(delta['difference'])} [{points(delta['low'])}, {points(delta['high'])}]" if delta else "–",
                      str(len(row["seeds"]) or "–")]
        shown.add_row(escape(row["arm"]), *(escape(cell) for cell in cells))
    return shown
