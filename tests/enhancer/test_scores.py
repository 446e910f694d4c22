from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enhancer.evaluation.scores import mcnemar, paired_difference, summarise, wilson
from vdm_priors.errors import UserError


def row(id, correct, type="MR", **more):
    return {"id": str(id), "question_type": type, "correct": correct, **more}


@given(n=st.integers(1, 3000), data=st.data())
@settings(max_examples=60, deadline=None)
def test_wilson_holds_the_share_and_solves_its_equation(n, data):
    k = data.draw(st.integers(0, n))
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for end in (low, high):  # (p - k/n)^2 = z^2 p(1-p)/n at both ends
        assert (end - k / n) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / n, abs=1e-12)
    assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low))


def test_wilson_against_a_published_value_and_without_data():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Newcombe 1998
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 correct of 2"):
        wilson(3, 2)


def test_summary_counts_types_hidden_answers_and_errors():
    rows = [row(1, True), row(2, False), row(3, True, "CM"), row(4, None), row(5, None, error="no such video")]
    summary = summarise(rows)
    assert summary["overall"]["n"] == 3 and summary["overall"]["correct"] == 2
    assert summary["average"] == pytest.approx((0.5 + 1) / 2)
    assert summary["types"]["MR"]["accuracy"] == 0.5
    assert summary["not_scored"] == 1
    assert summary["errors"] == [{"id": "5", "reason": "no such video"}] and not summary["complete"]


def test_summary_without_a_scored_row():
    summary = summarise([row(1, None)])
    assert summary["overall"]["accuracy"] is None and summary["average"] is None and summary["complete"]


@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_mcnemar_is_scipys_binomial_test(only_a, only_b):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar(only_a, only_b) == pytest.approx(expected)
    assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a)


def test_mcnemar_of_thousands_does_not_overflow():
    assert 0 < mcnemar(2000, 2200) < 0.01


def test_pairs_by_id_and_is_antisymmetric():
    a = [row(i, i % 3 != 0) for i in range(90)]
    b = [row(i, i % 2 == 0) for i in reversed(range(90))] + [row("only b", True)]
    ab, ba = paired_difference(a, b), paired_difference(b, a)
    assert ab["n"] == 90 and ab["difference"] == pytest.approx(60 / 90 - 45 / 90)
    assert ab["difference"] == -ba["difference"] and ab["p"] == ba["p"]
    assert ab["low"] < ab["difference"] < ab["high"]
    assert ab == paired_difference(a, b)


def test_bootstrap_matches_a_loop_over_resamples():
    import numpy as np

    rng = np.random.default_rng(1)
    hits_a, hits_b = rng.random(200) < 0.6, rng.random(200) < 0.4
    gaps = hits_a.astype(float) - hits_b
    means = [rng.choice(gaps, 200).mean() for _ in range(4000)]
    result = paired_difference([row(i, h) for i, h in enumerate(hits_a)], [row(i, h) for i, h in enumerate(hits_b)])
    assert result["low"] == pytest.approx(np.quantile(means, 0.025), abs=0.02)
    assert result["high"] == pytest.approx(np.quantile(means, 0.975), abs=0.02)


def test_several_seeds_count_each_question_once():
    a = [row(i, True) for i in range(10)] * 3
    b = [row(i, i < 5) for i in range(10)] * 3
    result = paired_difference(a, b)
    assert result["n"] == 10 and result["difference"] == 0.5 and result["p"] == pytest.approx(2 / 2**5)


def test_refuses_answers_that_cannot_be_compared():
    with pytest.raises(UserError, match="share no scored question"):
        paired_difference([row(1, True)], [row(2, True)])
    with pytest.raises(UserError, match="equal numbers of seeds"):
        paired_difference([row(1, True)] * 2, [row(1, True)])
