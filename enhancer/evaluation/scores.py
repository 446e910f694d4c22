"""Statistics of multiple-choice answers.

A row is one question: {"id","question_type","answer","chosen","correct",…}. `correct` is
None where nothing may be scored: a hidden answer ("NA"), or an error ("error": reason).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from vdm_priors.errors import UserError

Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution
RESAMPLES = 10_000


def wilson(correct: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); (0, 1) where n is 0."""
    if not 0 <= correct <= n:
        raise ValueError(f"wilson: {correct} correct of {n}; expected 0 <= correct <= n")
    if n == 0:
        return 0.0, 1.0
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # The ends are exact at 0 and n, where rounding would leave a trace.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == n else centre + half)


def summarise(rows: Sequence[dict]) -> dict:
    """Overall (all questions alike) and Average (unweighted mean over question types).

    {"overall": {n, correct, accuracy, low, high}, "average": float or None, "types": {type: as overall},
    "not_scored": hidden answers, "unparsed": answers in the model's own words that mean none of the options, which are
    wrong, "errors": [{id, reason}], "complete": no errors}."""
    by_type: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        if row["correct"] is not None:
            by_type[row["question_type"]].append(bool(row["correct"]))
    types = {name: _count(by_type[name]) for name in sorted(by_type)}
    errors = [{"id": row["id"], "reason": row["error"]} for row in rows if row.get("error")]
    return {
        "overall": _count([hit for hits in by_type.values() for hit in hits]),
        "average": sum(t["accuracy"] for t in types.values()) / len(types) if types else None,
        "types": types,
        "not_scored": sum(row["correct"] is None and not row.get("error") for row in rows),
        "unparsed": sum("response" in row and bool(row["options"]) and row["chosen"] is None for row in rows),
        "errors": errors,
        "complete": not errors,
    }


def _count(hits: Sequence[bool]) -> dict:
    n, correct = len(hits), sum(hits)
    low, high = wilson(correct, n)
    return {"n": n, "correct": correct, "accuracy": correct / n if n else None, "low": low, "high": high}


def paired_difference(rows_a: Sequence[dict], rows_b: Sequence[dict], seed: int = 0) -> dict:
    """Accuracy of a minus that of b on the questions that both scored, paired by id.

    {difference, low, high, p, n}: 95% percentile bootstrap over questions; p by the exact
    McNemar test. An id that comes several times (training seeds) is paired in order and counts
    as one question with its mean difference; p is then the exact sign test over questions,
    which for single ids is McNemar's. UserError where no question is shared."""
    hits_a, hits_b = _hits(rows_a), _hits(rows_b)
    shared = [key for key in hits_a if key in hits_b]
    if not shared:
        raise UserError("the two sets of answers share no scored question: compare answers to the same data.")
    gaps = []
    for key in shared:
        if len(hits_a[key]) != len(hits_b[key]):
            raise UserError(
                f"question {key!r} was answered {len(hits_a[key])} times by one side and {len(hits_b[key])} by the other: "
                f"compare equal numbers of seeds."
            )
        gaps.append((sum(hits_a[key]) - sum(hits_b[key])) / len(hits_a[key]))
    low, high = _bootstrap(np.array(gaps), seed)
    p = mcnemar(sum(g > 0 for g in gaps), sum(g < 0 for g in gaps))
    return {"difference": float(np.mean(gaps)), "low": low, "high": high, "p": p, "n": len(gaps)}


def _hits(rows: Iterable[dict]) -> dict[str, list[bool]]:
    hits: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        if row["correct"] is not None:
            hits[row["id"]].append(bool(row["correct"]))
    return hits


def _bootstrap(gaps: np.ndarray, seed: int) -> tuple[float, float]:
    # A resample is how often each distinct gap is drawn, so its mean needs no index table.
    values, counts = np.unique(gaps, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(gaps), counts / len(gaps), size=RESAMPLES)
    means = draws @ values / len(gaps)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar p: the binomial tails of the discordant pairs at 1/2 (McNemar 1947)."""
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, 2 * tail / 2**n)
