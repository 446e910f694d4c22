"""What a table of answers shows: means with intervals over seeds and questions, and paired tests.

A training seed and a question both change a score, so an interval that is to hold for new seeds *and* new questions has
both in it: the two-way random-effects analysis of variance without replication (Searle, Casella & McCulloch, Variance
Components, 1992, ch. 4) gives the variance of the mean, Satterthwaite (1946) its degrees of freedom.

Legend: S seeds, Q questions, T strata (question types); x_sq is 0 or 1, or a difference of two of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 9999
BATCH = 250  # resamples at once: memory is BATCH × Q numbers


@dataclass(frozen=True)
class Estimate:
    """A mean, the ends of its 95% interval and the two-sided p of its being zero; None where nothing can be said."""

    value: float
    low: float | None
    high: float | None
    p: float | None = None

    @property
    def sign(self) -> int:
        """+1 or -1 where the interval lies on one side of zero, else 0."""
        return 0 if self.low is None or self.high is None else (self.low > 0) - (self.high < 0)


def estimate(x_sq: np.ndarray, types: list[str] | None = None) -> Estimate:
    """The mean over seeds and questions, for new seeds and new questions; one seed alone: for new questions.

    x_sq: [S, Q]; types: a name each question; the mean is then that of the types' means, all of equal weight (Average).
    The interval is None where a type has one question only, and where nothing varies.
    """
    strata = _strata(x_sq.shape[1], types)
    weight = 1 / len(strata)
    value = float(sum(weight * x_sq[:, at].mean() for at in strata))
    sizes = [len(at) for at in strata]
    if min(sizes) < 2:
        return Estimate(value, None, None)
    parts = [_variances(x_sq[:, at]) for at in strata]
    questions = [weight**2 * part[0] for part in parts]
    residual = [weight**2 * part[1] for part in parts]
    seeds = len(x_sq)
    terms = [(v, n - 1) for v, n in zip(questions, sizes, strict=True)]
    variance = sum(questions)
    if seeds > 1:
        of_seeds = float(np.var(sum(weight * x_sq[:, at].mean(axis=1) for at in strata), ddof=1)) / seeds
        terms += [(of_seeds, seeds - 1)] + [(v, (n - 1) * (seeds - 1)) for v, n in zip(residual, sizes, strict=True)]
        # an estimate of a variance may come out below what one of the two sources has alone: never less than that
        variance = max(variance + of_seeds - sum(residual), variance, of_seeds)
    return _with_interval(value, variance, terms)


def _strata(count: int, types: list[str] | None) -> list[np.ndarray]:
    if types is None:
        return [np.arange(count)]
    names = np.array(types)
    return [np.flatnonzero(names == name) for name in sorted(set(types))]


def _variances(x_sq: np.ndarray) -> tuple[float, float]:
    """Variance of the mean over all, as the questions' means show it, and the part of it that is the residual's."""
    seeds, count = x_sq.shape
    of_questions = float(np.var(x_sq.mean(axis=0), ddof=1)) / count
    if seeds == 1:
        return of_questions, 0.0
    left_sq = x_sq - x_sq.mean(axis=0) - x_sq.mean(axis=1, keepdims=True) + x_sq.mean()
    return of_questions, float((left_sq**2).sum()) / ((seeds - 1) * (count - 1)) / (seeds * count)


def _with_interval(value: float, variance: float, terms: list[tuple[float, int]]) -> Estimate:
    """terms: (estimated variance, its degrees of freedom) of what `variance` is made from (Satterthwaite)."""
    if variance <= 0:  # all alike: nothing says how far others would vary
        return Estimate(value, None, None, 1.0 if value == 0 else None)
    freedom = max(variance**2 / sum(v**2 / df for v, df in terms if v > 0), 1.0)
    error = math.sqrt(variance)
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    return Estimate(value, value - half, value + half, float(2 * stats.t.sf(abs(value) / error, freedom)))


def flips_over_seeds(d_sq: np.ndarray) -> float | None:
    """Exact two-sided p of the seeds' mean differences having no sign (sign-flip permutation); None for one seed.

    All 2^S flips are made, up to 2^13; of S seeds the least p is 2/2^S.
    """
    return _flips(d_sq.mean(axis=1)) if len(d_sq) > 1 else None


def flips_over_questions(d_sq: np.ndarray) -> float:
    """Two-sided p of the questions' mean differences having no sign, with these seeds (sign flips, 9999 draws)."""
    return _flips(d_sq.mean(axis=0))


def _flips(gaps: np.ndarray) -> float:
    gaps = gaps[gaps != 0]  # the mean's sign-flip distribution is that of the gaps which are not zero
    if len(gaps) < 2:
        return 1.0  # both signs of a single gap are equally far from zero
    test = stats.permutation_test(
        (gaps,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        batch=BATCH,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def holm(p: list[float | None]) -> list[float | None]:
    """Holm's (1979) p values for as many comparisons; None stays None and does not count."""
    order = sorted((i for i, value in enumerate(p) if value is not None), key=lambda i: p[i])
    adjusted: list[float | None] = [None] * len(p)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted
