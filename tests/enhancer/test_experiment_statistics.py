"""Intervals over seeds and questions against plain loops and simulation; permutation tests; sentences and the page."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enhancer.evaluation.scores import mcnemar
from enhancer.experiment.claims import headline, verdict
from enhancer.experiment.page import write_page
from enhancer.experiment.results import make_results
from enhancer.experiment.statistics import estimate, flips_over_questions, flips_over_seeds, holm
from enhancer.experiment.tables import markdown
from enhancer.runfolder import write_json, write_lines
from vdm_priors.errors import UserError


def two_way_by_loops(x):
    """Variance of the mean of a seeds × questions table: mean squares of the two-way layout, by loops."""
    seeds, questions = len(x), len(x[0])
    mean = sum(map(sum, x)) / (seeds * questions)
    of_seed = [sum(row) / questions for row in x]
    of_question = [sum(x[s][q] for s in range(seeds)) / seeds for q in range(questions)]
    ms_seeds = questions * sum((m - mean) ** 2 for m in of_seed) / (seeds - 1)
    ms_questions = seeds * sum((m - mean) ** 2 for m in of_question) / (questions - 1)
    ms_residual = sum(
        (x[s][q] - of_seed[s] - of_question[q] + mean) ** 2 for s in range(seeds) for q in range(questions)
    )
    ms_residual /= (seeds - 1) * (questions - 1)
    return mean, max(ms_seeds + ms_questions - ms_residual, ms_seeds, ms_questions) / (seeds * questions)


@given(st.integers(2, 4), st.integers(3, 7), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_the_interval_is_that_of_the_mean_squares(seeds, questions, seed):
    x = np.random.default_rng(seed).integers(-1, 2, (seeds, questions)).astype(float)
    mean, variance = two_way_by_loops(x.tolist())
    found = estimate(x)
    assert found.value == pytest.approx(mean)
    if variance == 0:
        assert found.low is None
        return
    assert found.low < found.value < found.high and found.high - found.value == pytest.approx(found.value - found.low)
    half = found.high - found.value  # between the normal quantile and that of one degree of freedom
    assert 1.959 <= half / math.sqrt(variance) <= 12.8


@pytest.mark.parametrize("seeds, seed_effect", [(5, 0.0), (5, 0.05), (2, 0.05), (1, 0.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds, seed_effect):
    rng, hits, runs = np.random.default_rng(seeds), 0, 200
    for _ in range(runs):
        truth = rng.normal(0, 0.2, 120) + rng.normal(0, seed_effect, (seeds, 1))
        found = estimate(truth + rng.normal(0, 0.5, (seeds, 120)))
        hits += found.low <= 0 <= found.high
    assert 0.91 <= hits / runs <= 0.995


def test_the_average_weighs_types_alike():
    x = np.array([[1.0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 1]])
    types = ["MR", "MR", "MR", "MR", "CM", "CM"]
    assert estimate(x, types).value == pytest.approx((1 + 0.25) / 2)
    assert estimate(x, ["MR"] * 6) == estimate(x)
    assert estimate(x, ["MR"] * 5 + ["CM"]).low is None  # one question tells no variance


def test_sign_flips_against_all_of_them_and_against_mcnemar():
    d = np.random.default_rng(3).normal(0.3, 1, (6, 9))
    gaps = d.mean(axis=1)
    at_least = [
        abs(sum(s * g for s, g in zip(signs, gaps))) >= abs(gaps.sum()) - 1e-12 for signs in product((1, -1), repeat=6)
    ]
    assert flips_over_seeds(d) == pytest.approx(sum(at_least) / 64)
    assert flips_over_seeds(np.ones((5, 8))) == pytest.approx(2 / 2**5) and flips_over_seeds(d[:1]) is None
    one = np.array([[1.0] * 9 + [-1.0] * 2 + [0.0] * 30])  # one seed: 11 discordant pairs
    assert flips_over_questions(one) == pytest.approx(mcnemar(9, 2))
    assert flips_over_questions(np.zeros((3, 4))) == 1.0


def test_holm_by_hand():
    assert [round(p, 6) if p is not None else None for p in holm([0.01, None, 0.04, 0.03])] == [0.03, None, 0.06, 0.06]
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


# ---- from answers to sentences -------------------------------------------------------------------

HOSTILE = '<script>alert(1)</script> & "x"'


@pytest.fixture
def folder(tmp_path):
    """A matrix of made-up answers: a cell far above λ = 0, one far below, one like it, one that lacks a seed."""
    rng, cells = np.random.default_rng(0), []
    for number, (name, share) in enumerate(
        [("none", 0.5), ("better", 0.75), (HOSTILE, 0.25), ("alike", 0.5), ("late", 0.5)]
    ):
        asked = f"students/{number}/asked/a"
        for seed in range(5):
            rows = [
                {
                    "id": str(n),
                    "question_type": ["MR", "CM"][n % 2],
                    "options": ["a", "b"],
                    "correct": bool(rng.random() < share),
                }
                for n in range(120)
            ]
            if (name, seed) != ("late", 4):
                write_lines(tmp_path / "shared" / asked / f"seed{seed}" / "answers.jsonl", rows)
                write_json(tmp_path / "shared" / asked / f"seed{seed}" / "scores.json", {})
        cells.append(
            {
                "name": name,
                "levels": {"source": name},
                "source": None if number == 0 else "x",
                "lambda": 1.0,
                "arm": "x",
                "asked": asked,
                "against": "students/0/asked/a",
                "base": "base/b/asked/a",
                "cost": {},
            }
        )
    write_json(
        tmp_path / "m" / "plan.json",
        {
            "name": HOSTILE,
            "design": "product",
            "seeds": [0, 1, 2, 3, 4],
            "cells": cells,
            "axes": [{"name": "source", "levels": [c["name"] for c in cells]}],
            "pool": "../shared",
        },
    )
    return tmp_path / "m"


def test_sentences_say_what_the_intervals_say(folder):
    results = make_results(folder)
    rows = {row["name"]: row for row in results["rows"]}
    assert [verdict(rows[name]["difference"]) for name in ("better", HOSTILE, "alike", "late")] == [1, -1, 0, 0]
    assert headline(results) == "1 of 4 cells beats λ = 0; 1 falls below it; for 2 no difference is shown."
    said = {
        name: next(s for s in results["sentences"] if s.startswith(f"{name}: "))
        for name in ("better", HOSTILE, "alike")
    }
    assert "raises accuracy" in said["better"] and "lowers accuracy" in said[HOSTILE]
    assert "raises" not in said["alike"] and "lowers" not in said["alike"]  # by chance a lead, which is said to be none
    assert "Best is better: it beats every other student" in " ".join(results["sentences"])
    assert rows["better"]["rank"] == [1, 1] and rows[HOSTILE]["rank"] == [5, 5] and rows["alike"]["rank"] == [2, 4]
    assert rows["late"]["difference"]["seeds"] == 4 and rows["late"]["seeds"] == [0, 1, 2, 3]
    assert rows["before training"]["overall"] is None
    assert results["missing"] == [
        "before training: no answers yet; run the same command again.",
        "late with seed 4: no answers yet; run the same command again.",
    ]


def test_one_seed_or_a_lead_alone_is_never_claimed(folder):
    results = make_results(folder)
    better = next(row for row in results["rows"] if row["name"] == "better")["difference"]
    assert verdict({**better, "seeds": 1}) == 0 and verdict({**better, "holm": 0.06}) == 0 and verdict(None) == 0
    assert verdict({**better, "low": None}) == 0


def test_the_page_escapes_and_stands_alone(folder):
    page = write_page(folder / "report.html", [folder]).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "Not everything is here" in page
    assert "src=" not in page and "url(" not in page and page.count("<svg") == 2
    text = markdown(make_results(folder))
    assert "| better |" in text and "▲" in text and "▼" in text
    with pytest.raises(UserError, match="not a matrix's folder"):
        write_page(folder / "report.html", [folder.parent])
