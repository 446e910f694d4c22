"""The comparison as sentences and table rows: nothing is claimed that an interval does not carry.

Accuracies and differences arrive as fractions; the page shows per cent and percentage points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from enhancer.report.run_folder import Missing, RunFolder, description, label

LAMBDA0, FOCUS = "lambda0", "vdm"
NOT_TYPES = {"arm", "seeds", "n", "types", "overall", "low", "high", "average"}


@dataclass(frozen=True)
class Interval:
    """A value with its interval, all fractions."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """+1 or -1 where the interval lies on one side of zero, else 0."""
        return (self.low > 0) - (self.high < 0)


@dataclass
class Row:
    """One arm of the table."""

    arm: str
    seeds: list[str]
    n: int | None
    overall: Interval | None
    average: float | None
    types: dict[str, float | None]
    delta: Interval | None
    against_shuffled: Interval | None = None
    seed_values: list[float] = field(default_factory=list)

    @property
    def label(self) -> str:
        return label(self.arm)

    @property
    def description(self) -> str:
        return description(self.arm)


@dataclass(frozen=True)
class Claim:
    """The headline and the sentences that bound it."""

    sentence: str
    support: list[str]


def comparison(run: RunFolder) -> tuple[list[str], list[Row]]:
    """Question types and one row per arm: table.json, or scores.json where there is no table."""
    given = [row for row in run.table.get("rows", []) if isinstance(row, dict) and "arm" in row]
    if given:
        types = _types(run)
        return types, [_table_row(run, row, types) for row in given]
    if run.base_scores or any(seed.scores for seeds in run.arms.values() for seed in seeds):
        run.missing.append(
            Missing(
                "result",
                "No table: the rows below are each seed's own scores.json, so there "
                "is no paired difference and no claim.",
            )
        )
    types = list(run.base_scores.get("types", {}))
    rows = [_scores_row("base", [], run.base_scores)] if run.base_scores else []
    for arm, seeds in run.arms.items():
        for seed in seeds:
            if seed.scores:
                types += [name for name in seed.scores.get("types", {}) if name not in types]
                rows.append(_scores_row(arm, [seed.seed], seed.scores))
    return types, rows


def headline(rows: list[Row]) -> Claim:
    """What the run shows of the VDM's prior (or of the first compared arm) against λ = 0."""
    compared = [row for row in rows if row.delta is not None]
    if not compared:
        return Claim("No comparison yet: this run holds no paired difference against λ = 0.", [])
    focus = next((row for row in compared if row.arm == FOCUS), compared[0])
    delta = focus.delta
    amount = f"{abs(100 * delta.value):.1f} points"
    if delta.sign > 0:
        sentence = f"Aligning to the {focus.label} raised accuracy by {amount} over λ = 0."
    elif delta.sign < 0:
        sentence = f"Aligning to the {focus.label} lowered accuracy by {amount} against λ = 0."
    else:
        sentence = f"No difference between the {focus.label} and λ = 0 can be claimed."
    support = [f"Paired difference {points(delta)}{_of(focus)}."]
    control = next((row for row in compared if row.arm == "shuffled" and row is not focus), None)
    if control is not None:
        support.append(_against_control(focus, control))
    if len(focus.seeds) == 1:
        support.append(
            "One seed only: how much a new training seed would change this is not in the interval."
        )
    return Claim(sentence, support)


def points(interval: Interval) -> str:
    """+4.2 points (interval +1.1 to +7.3)."""
    value, low, high = (signed(x) for x in (interval.value, interval.low, interval.high))
    return f"{value} points (interval {low} to {high})"


def signed(fraction: float) -> str:
    """Percentage points with a sign and a true minus."""
    return f"{100 * fraction:+.1f}".replace("-", "\N{MINUS SIGN}")


def number(value: object) -> float | None:
    """A finite float, or None: JSON may hold null, NaN or text."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def chance(run: RunFolder) -> float | None:
    """Expected accuracy of guessing, from the options of the base model's answers."""
    sizes = [len(row["options"]) for row in run.base_answers if row.get("options")]
    return sum(1 / size for size in sizes) / len(sizes) if sizes else None


def _against_control(focus: Row, control: Row) -> str:
    """The paired difference to the shuffled control, or both intervals where it was not taken."""
    paired = focus.against_shuffled
    if paired is not None:
        verdict = {
            1: "so the right clip's prior matters",
            -1: "so another clip's prior does better",
            0: "so it is not shown that the right clip's prior matters",
        }[paired.sign]
        return f"Paired against the {control.label} control: {points(paired)}, {verdict}."
    difference = points(control.delta)
    if focus.delta.low > control.delta.high:
        return f"It lies wholly above the {control.label}'s own difference, {difference}."
    if focus.delta.sign > 0:
        return (
            f"The {control.label} control gives {difference}; the intervals overlap, so this "
            "does not show that the right clip's prior matters."
        )
    return f"The {control.label} control gives {difference}."


def _of(row: Row) -> str:
    parts = []
    if row.n:
        parts.append(f"{row.n} answers")
    if row.seeds:
        parts.append(f"{len(row.seeds)} seed{'s' if len(row.seeds) > 1 else ''}")
    return f"; {', '.join(parts)}" if parts else ""


def _types(run: RunFolder) -> list[str]:
    columns = [str(name) for name in run.table.get("columns", [])]
    return [name for name in columns if name not in NOT_TYPES and not name.startswith("delta")]


def _table_row(run: RunFolder, row: dict, types: list[str]) -> Row:
    arm = str(row["arm"])
    values = row.get("types", row)
    if isinstance(values, list):
        values = dict(zip(types, values, strict=False))
    trained = run.arms.get(arm, [])
    seeds = row.get("seeds")
    if isinstance(seeds, list):
        seeds = [str(seed) for seed in seeds]
    else:
        seeds = [seed.seed for seed in trained]
    scores = [run.base_scores] if arm == "base" else [seed.scores for seed in trained]
    overalls = [score.get("overall", {}) for score in scores]
    counted = sum(overall.get("n") or 0 for overall in overalls)
    return Row(
        arm=arm,
        seeds=seeds,
        n=row.get("n") or counted or None,
        overall=_interval(row.get("overall"), row.get("low"), row.get("high")),
        average=number(row.get("average")),
        types={name: _accuracy(values.get(name)) for name in types},
        delta=_delta(row.get("delta_vs_lambda0")),
        against_shuffled=_delta(row.get("delta_vs_shuffled")),
        seed_values=[v for v in (number(o.get("accuracy")) for o in overalls) if v is not None],
    )


def _scores_row(arm: str, seeds: list[str], scores: dict) -> Row:
    overall = scores.get("overall", {})
    return Row(
        arm=arm,
        seeds=seeds,
        n=overall.get("n"),
        overall=_interval(overall.get("accuracy"), overall.get("low"), overall.get("high")),
        average=number(scores.get("average")),
        types={name: _accuracy(value) for name, value in scores.get("types", {}).items()},
        delta=None,
    )


def _accuracy(value: object) -> float | None:
    return number(value.get("accuracy")) if isinstance(value, dict) else number(value)


def _interval(value: object, low: object, high: object) -> Interval | None:
    value, low, high = number(value), number(low), number(high)
    if value is None:
        return None
    return Interval(value, value if low is None else low, value if high is None else high)


def _delta(value: object) -> Interval | None:
    if not isinstance(value, dict):
        return None
    parts = [number(value.get(name)) for name in ("difference", "low", "high")]
    return None if None in parts else Interval(*parts)
