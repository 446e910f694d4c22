"""The results of a matrix: table.json from plan.json and the answers in the pool, whatever of them is there.

A cell's difference is paired with λ = 0 on the same data: the same seeds (and so the same batches), the same questions.
A matrix with a `reference` has a second one, of every student from that cell.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from enhancer.evaluation.scores import wilson
from enhancer.experiment.claims import headline, notes, sentences
from enhancer.experiment.pool import answered_at
from enhancer.experiment.statistics import Estimate, estimate, flips_over_questions, flips_over_seeds, holm
from enhancer.runfolder import read_json, read_lines
from enhancer.table import BASE
from vdm_priors.errors import UserError

PLAN = "plan.json"
PLAN_KEYS = ("name", "design", "seeds", "cells", "axes", "pool")
CELL_KEYS = ("name", "levels", "source", "lambda", "arm", "asked", "against", "base", "cost")
CELL, CONTROL = "cell", "control"
CONTROL_ARM = "lambda0"
CLAIM = 0.05  # Holm's p below which two rows are ranked


@dataclass
class Row:
    """One line of the table: a student with all its seeds. right: by seed and question; places: of answers by seed;
    unparsed: answers in the student's own words that mean none of the options; damaged: files that cannot be read."""

    name: str
    kind: str
    asked: str
    cells: list[dict]
    places: dict[int | None, Path]
    right: dict[int | None, dict[str, bool]]
    types: dict[str, str]
    errors: list[dict]
    options: list[int]
    unparsed: int = 0
    damaged: list[Path] = field(default_factory=list)

    @property
    def missing(self) -> list[int | None]:
        """Seeds that have not answered."""
        return [seed for seed in self.places if seed not in self.right]


def make_results(folder: Path) -> dict[str, Any]:
    """The table and its sentences as plain values; UserError where no matrix was planned in the folder, or by another
    version."""
    plan = _plan(Path(folder))
    pool = (Path(folder) / plan["pool"]).resolve()
    rows = _rows(plan, pool)
    by_place = {row.asked: row for row in rows}
    types = sorted({kind for row in rows for kind in row.types.values()})
    table = [_described(row, by_place, types, pool) for row in rows]
    reference = _refer(rows, table, plan.get("reference"))
    for key in ("difference", "reference"):
        _adjust([row[key] for row in table])
    _rank(rows, table)
    sizes = [size for row in rows for size in row.options]
    results = {
        "name": plan["name"],
        "design": plan["design"],
        "axes": plan["axes"],
        "seeds": plan["seeds"],
        "reference": reference,
        "types": types,
        "chance": statistics.fmean(1 / size for size in sizes) if sizes else None,
        "rows": table,
        "missing": _missing(rows, pool),
        "unparsed": sum(row.unparsed for row in rows),
    }
    return {**results, "headline": headline(results), "sentences": sentences(results), "notes": notes(results)}


def _plan(folder: Path) -> dict:
    plan = read_json(folder / PLAN, None)
    if plan is None:
        raise UserError(f"{folder} is not a matrix's folder: it has no {PLAN}. `enhancer compare RECIPE` makes one.")
    lacking = [key for key in PLAN_KEYS if key not in plan]
    lacking += sorted({f"cells.{key}" for cell in plan.get("cells", []) for key in CELL_KEYS if key not in cell})
    if lacking:
        raise UserError(
            f"{folder / PLAN} is of another version: it lacks {', '.join(lacking)}. Run the matrix's command again, which "
            f"writes it anew; students in the pool are not trained again."
        )
    return plan


# ---- rows ----------------------------------------------------------------------------------------


def _rows(plan: dict, pool: Path) -> list[Row]:
    """Base models, cells, and the λ = 0 that no cell is; cells of one training are one row."""
    bases, controls, cells = ({} for _ in range(3))
    for cell in plan["cells"]:
        bases.setdefault(cell["base"], []).append(cell)
        controls.setdefault(cell["against"], []).append(cell)
        cells.setdefault(cell["asked"], []).append(cell)
    rows = [
        _read(_name("before training", of, plan, len(bases)), BASE, asked, of, pool, [None])
        for asked, of in bases.items()
    ]
    rows += [
        _read(_name("λ = 0", of, plan, len(controls)), CONTROL, asked, of, pool, plan["seeds"])
        for asked, of in controls.items()
        if asked not in cells
    ]
    for asked, of in cells.items():
        name = (
            of[0]["name"]
            if len(of) == 1 or plan["design"] != "product"
            else " · ".join(_common(of).values()) or of[0]["name"]
        )
        rows.append(_read(name, CONTROL if asked in controls else CELL, asked, of, pool, plan["seeds"]))
    return rows


def _common(cells: list[dict]) -> dict[str, str]:
    """Levels that all these cells have, by axis."""
    return {
        axis: level
        for axis, level in cells[0]["levels"].items()
        if all(cell["levels"][axis] == level for cell in cells)
    }


def _name(what: str, cells: list[dict], plan: dict, count: int) -> str:
    """`what`, and where there are several of it the levels that tell this one apart."""
    if count == 1:
        return what
    everywhere = _common(plan["cells"])
    return " · ".join([what, *(level for axis, level in _common(cells).items() if axis not in everywhere)])


def _read(name: str, kind: str, asked: str, cells: list[dict], pool: Path, seeds: list) -> Row:
    row = Row(name, kind, asked, cells, {seed: answered_at(pool / asked, seed) for seed in seeds}, {}, {}, [], [])
    for seed, place in row.places.items():
        if not (place / "scores.json").is_file():
            continue
        try:
            answers = read_lines(place / "answers.jsonl")
        except ValueError:  # half a line
            row.damaged.append(place / "answers.jsonl")
            continue
        row.right[seed] = {answer["id"]: bool(answer["correct"]) for answer in answers if answer["correct"] is not None}
        row.types |= {answer["id"]: answer["question_type"] for answer in answers if answer["correct"] is not None}
        row.unparsed += sum("response" in answer and answer["correct"] is False and answer["chosen"] is None for answer in answers)
        row.options = row.options or [len(answer["options"]) for answer in answers if answer.get("options")]
        row.errors += [
            answer for answer in answers if answer.get("error") and answer["id"] not in {e["id"] for e in row.errors}
        ]
    return row


def _described(row: Row, by_place: dict[str, Row], types: list[str], pool: Path) -> dict[str, Any]:
    first = row.cells[0]
    aligned = row.kind == CELL
    entry = {
        "name": row.name,
        "kind": row.kind,
        "levels": _common(row.cells),
        "source": first["source"] if aligned else None,
        "lambda": first["lambda"] if aligned else None if row.kind == BASE else 0.0,
        "seeds": [seed for seed in row.right if seed is not None],
        "questions": 0,
        "overall": None,
        "average": None,
        "types": {},
        "per_seed": [],
        "against": None,
        "difference": None,
        "reference": None,
        "rank": None,
        "errors": len(row.errors),
        "cost": {**(first["cost"] if aligned else {}), **_training_cost(row, pool), "tokens": _tokens(row)},
    }
    if row.right:
        x_sq, ids = _matrix([row], list(row.right))
        kinds = [row.types[i] for i in ids]
        entry |= {
            "questions": len(ids),
            "overall": _accuracy(x_sq[0]),
            "average": _bounded(estimate(x_sq[0], kinds)),
            "per_seed": x_sq[0].mean(axis=1).tolist(),
        }
        entry["types"] = {kind: _accuracy(x_sq[0][:, [k == kind for k in kinds]]) for kind in types if kind in kinds}
    control = by_place.get(first["against"])
    if row.kind == CELL and control is not None:
        entry |= {"against": control.name, "difference": _difference(row, control)}
    return entry


def _training_cost(row: Row, pool: Path) -> dict[str, Any]:
    """Mean seconds of a training, over its seeds; None where nothing was trained or its record is gone."""
    student, arm = pool / row.asked.partition("/asked/")[0], CONTROL_ARM if row.kind == CONTROL else row.cells[0]["arm"]
    found = [read_json(student / "arms" / arm / f"seed{seed}" / "train.json", {}).get("seconds") for seed in row.right]
    found = [seconds for seconds in found if seconds is not None]
    return {"training": statistics.fmean(found) if found else None}


def _tokens(row: Row) -> int | None:
    """Tokens of the first clip in the student's sequence; None where its answers do not say."""
    known = [read_json(row.places[seed] / "scores.json", {}).get("clip_tokens") for seed in row.right]
    return next((count for count in known if count is not None), None)


def _matrix(rows: list[Row], seeds: list) -> tuple[list[np.ndarray], list[str]]:
    """For each row [S, Q] of 0 and 1, over the questions that all of them answered with all of these seeds."""
    ids = sorted(set.intersection(*(set(row.right[seed]) for row in rows for seed in seeds)))
    return [np.array([[row.right[seed][i] for i in ids] for seed in seeds], float) for row in rows], ids


def _accuracy(x_sq: np.ndarray) -> dict[str, float | None]:
    """Of one seed Wilson's interval over questions; so too of several whose answers do not vary."""
    found = estimate(x_sq)
    if len(x_sq) > 1 and found.low is not None:
        return _bounded(found)
    low, high = wilson(round(found.value * x_sq.shape[1]), x_sq.shape[1])
    return {"value": found.value, "low": low, "high": high}


def _bounded(found: Estimate) -> dict[str, float | None]:
    """An accuracy: its interval ends at 0 and 1."""
    low, high = (None if end is None else min(max(end, 0.0), 1.0) for end in (found.low, found.high))
    return {"value": found.value, "low": low, "high": high}


# ---- pairs ---------------------------------------------------------------------------------------


def _difference(row: Row, control: Row) -> dict[str, Any] | None:
    """Paired with the control, and the tests; None where they share no seed or no question."""
    gap = _gap(row, control)
    if gap is None:
        return None
    d_sq, kinds = gap
    average = estimate(d_sq, kinds)
    return {
        **asdict(estimate(d_sq)),
        "holm": None,
        "seeds": len(d_sq),
        "questions": d_sq.shape[1],
        "per_seed": d_sq.mean(axis=1).tolist(),
        "p_seeds": flips_over_seeds(d_sq),
        "p_questions": flips_over_questions(d_sq),
        "average": {"value": average.value, "low": average.low, "high": average.high},
    }


def _gap(first: Row, second: Row) -> tuple[np.ndarray, list[str]] | None:
    """Differences [S, Q] of two rows over what both answered, and the questions' types."""
    seeds = [seed for seed in first.right if seed in second.right]
    if not seeds:
        return None
    (a_sq, b_sq), ids = _matrix([first, second], seeds)
    return (a_sq - b_sq, [first.types[i] for i in ids]) if ids else None


def _refer(rows: list[Row], table: list[dict], name: str | None) -> str | None:
    """Adds every other trained student's difference from the row of the cell `name`; returns what that row is called."""
    found = next((row for row in rows if row.kind != BASE and name in [cell["name"] for cell in row.cells]), None)
    if name is None or found is None:
        return None
    for row, entry in zip(rows, table, strict=True):
        if row.kind != BASE and row is not found:
            entry["reference"] = _difference(row, found)
    return found.name


def _adjust(differences: list[dict | None]) -> None:
    """Holm's p over all these comparisons."""
    found = [difference for difference in differences if difference is not None]
    for difference, adjusted in zip(found, holm([difference["p"] for difference in found]), strict=True):
        difference["holm"] = adjusted


def _rank(rows: list[Row], table: list[dict]) -> None:
    """The places that each row may have in the order of accuracies: only pairs that differ, by Holm's p over all pairs,
    are ordered. Rows of one seed or of other questions are not ranked."""
    trained = [n for n, row in enumerate(rows) if row.kind != BASE and len(row.right) > 1]
    pairs = [
        (a, b, gap[0])
        for a, b in combinations(trained, 2)
        if (gap := _gap(rows[a], rows[b])) is not None and len(gap[0]) > 1
    ]
    found = [estimate(d_sq) for _, _, d_sq in pairs]
    above, below = dict.fromkeys(trained, 0), dict.fromkeys(trained, 0)
    for (a, b, _), difference, p in zip(pairs, found, holm([f.p for f in found]), strict=True):
        if p is not None and p < CLAIM:
            better, worse = (a, b) if difference.value > 0 else (b, a)
            above[worse] += 1
            below[better] += 1
    for n in trained if len(trained) > 1 else []:
        table[n]["rank"] = [1 + above[n], len(trained) - below[n]]


def _missing(rows: list[Row], pool: Path) -> list[str]:
    """Sentences on what is not there."""
    said = [] if pool.is_dir() else [f"The students' folder {pool} is not there: a matrix is moved together with its pool."]
    for row in rows:
        said += [f"{path} is damaged: delete {path.parent} and run the same command again." for path in row.damaged]
        if row.missing:
            seeds = "" if row.kind == BASE else " with " + ", ".join(f"seed {seed}" for seed in row.missing)
            said.append(f"{row.name}{seeds}: no answers yet; run the same command again.")
        if row.errors:
            said.append(
                f"{row.name}: {len(row.errors)} questions could not be asked and count for nothing; the first: "
                f"{row.errors[0]['id']}: {row.errors[0]['error']}"
            )
    return said
