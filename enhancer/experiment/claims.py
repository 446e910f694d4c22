"""What a matrix shows, in plain sentences: nothing is claimed that an interval does not carry."""

from __future__ import annotations

from typing import Any

from enhancer.table import percent, points

CLAIM = 0.05
CONTROL = "λ = 0"


def verdict(difference: dict[str, Any] | None) -> int:
    """+1 or -1 where a difference holds after Holm's correction and over seeds, else 0."""
    if difference is None or difference["low"] is None or difference["holm"] is None or difference["seeds"] < 2:
        return 0
    if difference["holm"] >= CLAIM:
        return 0
    return (difference["low"] > 0) - (difference["high"] < 0)


def headline(results: dict[str, Any]) -> str:
    """One sentence on all cells."""
    compared = [row["difference"] for row in results["rows"] if row["difference"]]
    if not compared:
        return "Nothing can be compared yet: no cell and its λ = 0 have both answered."
    up, down = (sum(verdict(difference) == sign for difference in compared) for sign in (1, -1))
    if len(compared) == 1:
        return {(1, 0): "The cell beats λ = 0.", (0, 1): "The cell falls below λ = 0."}.get(
            (up, down), "No difference between the cell and λ = 0 is shown."
        )
    said = [
        f"{up} of {len(compared)} cells {'beats' if up == 1 else 'beat'} λ = 0"
        if up
        else f"None of {len(compared)} cells beats λ = 0"
    ]
    if down:
        said.append(f"{down} {'falls' if down == 1 else 'fall'} below it")
    if up + down < len(compared):
        said.append(f"for {len(compared) - up - down} no difference is shown")
    return "; ".join(said) + "."


def sentences(results: dict[str, Any]) -> list[str]:
    """One sentence a cell, and one on which of them is best."""
    compared = [row for row in results["rows"] if row["difference"]]
    count = sum(row["difference"]["p"] is not None for row in compared)
    said = [f"{row['name']}: {_claim(row['difference'], count, CONTROL)}" for row in compared]
    said += _referred(results)
    ranked = [row for row in results["rows"] if row["rank"]]
    if len(ranked) > 2:
        unbeaten = [row for row in ranked if row["rank"][0] == 1]
        said.append(
            f"Best is {unbeaten[0]['name']}: it beats every other student, after correction for all pairs."
            if unbeaten[0]["rank"] == [1, 1]
            else "Which student is best is not settled. No other beats these, after correction for all pairs: "
            f"{', '.join(row['name'] for row in unbeaten)}."
        )
    return said


def _referred(results: dict[str, Any]) -> list[str]:
    """One sentence a student on the matrix's reference, where that is not its λ = 0."""
    compared = [row for row in results["rows"] if row["reference"]]
    count = sum(row["reference"]["p"] is not None for row in compared)
    return [
        f"{row['name']}: {_claim(row['reference'], count, results['reference'])}"
        for row in compared
        if row["against"] != results["reference"]
    ]


def _claim(difference: dict[str, Any], count: int, against: str) -> str:
    if difference["low"] is None:
        return (
            f"{points(difference['value'])} points; no interval can be given (too few questions, or all alike), so "
            "nothing is claimed."
        )
    value, low, high = (points(difference[part]) for part in ("value", "low", "high"))
    interval = f"{value} points against {against} [{low}, {high}]"
    clear = (difference["low"] > 0) - (difference["high"] < 0)
    if difference["seeds"] < 2:
        return f"{interval} with one seed; what another seed would give is not in the interval, so nothing is claimed."
    if not clear:
        return f"no difference is shown: {interval}."
    if verdict(difference):
        return f"{'raises' if clear > 0 else 'lowers'} accuracy: {interval}" + (
            f"; it holds after correction for {count} comparisons (Holm p {_p(difference['holm'])})."
            if count > 1
            else "."
        )
    return (
        f"{interval}: the interval lies {'above' if clear > 0 else 'below'} zero, but of {count} comparisons one may "
        f"by chance (Holm p {_p(difference['holm'])}): a lead, not a result."
    )


def notes(results: dict[str, Any]) -> list[str]:
    """How the numbers were made."""
    seeds = len(results["seeds"])
    said = [
        "Intervals are 95%. "
        + (
            "They hold for new training seeds and new questions (two-way random effects, Satterthwaite's degrees of "
            "freedom)."
            if seeds > 1
            else "There is one training seed, so they are over questions alone, and no difference is claimed."
        )
    ]
    said.append(
        "A difference is paired with λ = 0 of the same seed, data and questions. p is of that interval's t, Holm p "
        "corrects it for all comparisons of its kind; beside it, sign-flip permutations of the questions' and of the "
        "seeds' means."
    )
    if 1 < seeds < 6:
        said.append(f"With {seeds} seeds the exact permutation over seeds cannot give less than {2 / 2**seeds:.3f}.")
    if seeds == 2:
        said.append(
            "Two seeds alone say little of how seeds differ: where that is much more than how questions do, a 95% "
            "interval of two missed the truth in 12% of simulated tables."
        )
    if results["unparsed"]:
        said.append(
            f"{results['unparsed']} answers in the students' own words mean none of the options, and count as wrong."
        )
    if results["chance"] is not None:
        said.append(f"Guessing would be right in {percent(results['chance'])} of cases.")
    if any(row["rank"] for row in results["rows"]):
        said.append(
            "Rank: the places that a student may have; two are ordered only where their paired difference holds after "
            "Holm's correction for all pairs."
        )
    return said


def small(p: float | None) -> str:
    """A p value."""
    return "–" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _p(p: float | None) -> str:
    """For a sentence: `= 0.04`, `<0.001`."""
    text = small(p)
    return text if text.startswith("<") else f"= {text}"
