"""Intervals over seeds and questions against plain loops and simulation; permutation tests; sentences and the page."""

from __future__ import annotations

import math
import runpy
import shutil
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enhancer.evaluation.scores import mcnemar
from enhancer.experiment.claims import headline, notes, verdict
from enhancer.experiment.page import write_page
from enhancer.experiment.results import make_results
from enhancer.experiment.statistics import estimate, flips_over_questions, flips_over_seeds, holm
from enhancer.experiment.tables import markdown
from enhancer.runfolder import read_json, write_json, write_lines
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


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_what_two_seeds_cannot_tell_is_said(seeds):
    said = " ".join(notes({"seeds": list(range(seeds)), "unparsed": 0, "chance": None, "rows": []}))
    assert ("missed the truth" in said) is (seeds == 2) and ("no difference is claimed" in said) is (seeds == 1)


def test_two_seeds_that_differ_much_miss_the_truth_as_often_as_is_said():
    rng, missed, runs = np.random.default_rng(0), 0, 400
    for _ in range(runs):
        found = estimate(rng.normal(0, 0.1, (2, 1)) + rng.normal(0, 0.7, (2, 400)))
        missed += not found.low <= 0 <= found.high
    assert 0.08 <= missed / runs <= 0.16


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


def test_one_differing_question_or_seed_has_no_sign():
    d_sq = np.array([[0, 1, 0], [0, 1, 0]], float)
    assert flips_over_questions(d_sq) == 1.0 and flips_over_seeds(d_sq) == 0.5
    assert flips_over_seeds(np.array([[0, 1], [0, 0]], float)) == 1.0


def test_every_student_is_held_against_the_reference_as_well(folder):
    alone = make_results(folder)
    plan = read_json(folder / "plan.json", {})
    write_json(folder / "plan.json", {**plan, "reference": "better"})
    results = make_results(folder)
    rows, before = ({row["name"]: row for row in of["rows"]} for of in (results, alone))
    assert results["reference"] == "better" and rows["better"]["reference"] is None
    assert rows["before training"]["reference"] is None and rows["none"]["reference"] is not None
    for name in ("alike", HOSTILE):
        gap = rows[name]["reference"]
        assert gap["value"] == pytest.approx(rows[name]["overall"]["value"] - rows["better"]["overall"]["value"])
        assert rows[name]["difference"] == before[name]["difference"]  # Holm's correction is of each kind alone
    assert rows["none"]["reference"]["value"] == pytest.approx(-rows["better"]["difference"]["value"])
    assert any(s.startswith(f"{HOSTILE}: lowers accuracy") and "against better" in s for s in results["sentences"])
    text = markdown(results)
    assert "Δ better" in text and "paired tests against better" in text and "Δ better" not in markdown(alone)
    assert write_page(folder / "report.html", [folder]).read_text().count("<svg") == 3


def test_of_a_damaged_moved_or_older_matrix_the_rest_is_shown(folder):
    answers = folder.parent / "shared" / "students/1/asked/a/seed2/answers.jsonl"
    answers.write_text(answers.read_text()[:-20])
    (folder / "run.json").write_text('{"status": "fin')
    results = make_results(folder)
    better = next(row for row in results["rows"] if row["name"] == "better")
    assert better["seeds"] == [0, 1, 3, 4] and better["difference"]["seeds"] == 4
    assert f"{answers} is damaged: delete {answers.parent}" in " ".join(results["missing"])
    page = write_page(folder / "report.html", [folder]).read_text()
    assert "run.json is damaged" in page and "| better |" in markdown(results)
    (folder.parent / "shared").rename(folder.parent / "elsewhere")
    results = make_results(folder)
    assert "a matrix is moved together with its pool" in results["missing"][0] and "Nothing can be compared" in results["headline"]
    plan = read_json(folder / "plan.json", {})
    write_json(folder / "plan.json", {**plan, "cells": [{k: v for k, v in plan["cells"][0].items() if k != "arm"}], "pool": ".."})
    with pytest.raises(UserError, match="of another version: it lacks cells.arm. Run the matrix's command again"):
        make_results(folder)


def test_docs_get_a_finished_matrix_only(folder, tmp_path, monkeypatch):
    """docs/tools/matrices.py: a matrix's part stands between its marks, and its pictures stand alone."""
    tool = runpy.run_path(str(Path(__file__).resolve().parents[2] / "docs" / "tools" / "matrices.py"))
    publish, page = tool["main"], tmp_path / "compare.md"
    (tmp_path / "pictures").mkdir()
    page.write_text("by hand\n<!-- matrix mine -->\nlast time\n<!-- end -->\nalso by hand\n")
    monkeypatch.setitem(publish.__globals__, "DOCS", tmp_path)
    monkeypatch.setitem(publish.__globals__, "PAGE", page)
    record = {"status": "finished", "machine": "2 cores", "finished": "2026-11-22T03:56:29+00:00"}
    record |= {"command": "enhancer compare mine output=/secret -q", "seconds": {"students": 90.0, "data": 30.0}}
    write_json(folder / "run.json", record)
    plan = read_json(folder / "plan.json", {})
    with pytest.raises(SystemExit, match="is not finished"):  # a seed's answers are missing
        publish([folder])
    cells = [cell for cell in plan["cells"] if cell["name"] != "late"]
    write_json(folder / "plan.json", {**plan, "name": "mine", "reference": "better", "cells": cells})
    shutil.copytree(folder.parent / "shared/students/0/asked/a/seed0", folder.parent / "shared/base/b/asked/a/base")
    publish([folder])
    publish([folder])  # again: in place of what was there
    text = page.read_text()
    assert text.startswith("by hand\n<!-- matrix mine -->\n") and text.endswith("<!-- end -->\nalso by hand\n")
    assert "`enhancer compare mine` on 2 cores, 2026-11-22: 2 minutes." in text and "last time" not in text
    assert text.count("| better |") == 2 and text.count("![") == 2 and "raises accuracy" in text  # scores, by type
    for name in ("mine", "mine-reference"):
        drawn = ElementTree.parse(tmp_path / "pictures" / f"{name}.svg").getroot()
        assert drawn.tag == "{http://www.w3.org/2000/svg}svg" and "script" not in {part.tag for part in drawn.iter()}
    write_json(folder / "plan.json", {**plan, "name": "unknown", "cells": cells})
    with pytest.raises(SystemExit, match="has no line `<!-- matrix unknown -->`"):
        publish([folder])
