"""What a matrix consists of: its data and priors made, its cells with the trainings that they are.

make_plan(recipe, cells, run, console, process) -> Plan
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enhancer.console import Console
from enhancer.data.samples import Problem, Sample
from enhancer.experiment.cells import Cell, control_of
from enhancer.experiment.costs import add_cost, cost_key, cost_of
from enhancer.experiment.pool import Work, base_work, work_of
from enhancer.experiment.schema import CompareRecipe
from enhancer.extraction import fill_stores, with_own_frames
from enhancer.processes import Process, one_at_a_time
from enhancer.recipe import to_plain
from enhancer.runfolder import RunFolder, report_skipped
from vdm_priors.errors import UserError
from vdm_priors.store import PriorStore, content_key


@dataclass
class Plan:
    """What the matrix consists of. works: of each cell, in the cells' order; controls: of each cell, λ = 0 on its data;
    bases: of each cell, its model before training; of equal hash they are equal. problems: clips without a prior."""

    cells: list[Cell]
    works: list[Work] = field(default_factory=list)
    controls: list[Work] = field(default_factory=list)
    bases: list[Work] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def todo(self) -> list[tuple[Work, int | None]]:
        """Work and seed of every student that is not finished, each once; seed by seed, so that a table of few seeds is
        whole early."""
        works = {work.asked: work for work in [*self.bases, *self.controls, *self.works]}
        pairs = [(work, seed) for work in works.values() for seed in work.seeds]
        order = {seed: n for n, seed in enumerate(dict.fromkeys(seed for _, seed in pairs))}
        return sorted((pair for pair in pairs if not pair[0].is_finished(pair[1])), key=lambda pair: order[pair[1]])

    def as_json(self, recipe: CompareRecipe) -> dict[str, Any]:
        """What enhancer.experiment.results reads; paths are relative, so that pool and matrix may be moved together."""

        def place(work: Work) -> str:
            return work.asked.relative_to(recipe.shared).as_posix()

        rows = []
        for cell, work, control, base in zip(self.cells, self.works, self.controls, self.bases, strict=True):
            spec = None if cell.is_control else cell.arm.spec()
            cost = {} if spec is None else cost_of(recipe.shared, with_own_frames(cell.recipe, ask_hub=False), spec)
            rows.append(
                {
                    "name": cell.name,
                    "levels": cell.levels,
                    "source": None if spec is None else spec.label,
                    "lambda": cell.recipe.weight(cell.arm),
                    "arm": cell.arm.name,
                    "asked": place(work),
                    "against": place(control),
                    "base": place(base),
                    "cost": cost,
                }
            )
        return {
            "name": recipe.name,
            "design": recipe.design,
            "seeds": recipe.seeds,
            "reference": recipe.reference,
            "cells": rows,
            "axes": [{"name": axis.name, "levels": [level.name for level in axis.levels]} for axis in recipe.axes],
            "pool": os.path.relpath(recipe.shared, recipe.folder),
        }


def make_plan(recipe: CompareRecipe, cells: list[Cell], run: RunFolder, console: Console, process: Process) -> Plan:
    """Makes data and priors, and says which trainings the cells are."""
    plan = Plan(cells)
    with run.step("data"):
        console.step("Data")
        data = _all_data(cells, console)
    with run.step("priors"):
        console.step("Priors")
        priors = _all_priors(recipe.shared, cells, data, console, process, plan.problems)
    trained = _samples_of(cells, data, priors)
    for cell in cells:
        samples, of, rows = trained[_data_key(cell)], data[_data_key(cell)], priors[_prior_key(cell)]
        plan.works.append(work_of(recipe.shared, cell, of.root, samples, of.test, rows, recipe.seeds))
        plan.controls.append(work_of(recipe.shared, control_of(cell), of.root, samples, of.test, [], recipe.seeds))
        plan.bases.append(base_work(recipe.shared, cell, of.test))
    report_skipped(run, "priors", plan.problems, console)
    students = {(work.student, seed) for work in [*plan.works, *plan.controls] for seed in work.seeds}
    left = {(work.student, seed) for work, seed in plan.todo() if not work.is_base}
    console.note(
        f"{len(cells)} cells, {len(students)} different students with their λ = 0; {len(students) - len(left)} of them "
        f"are already in {recipe.shared}"
    )
    return plan


def _data_key(cell: Cell) -> str:
    plain = to_plain(cell.recipe)
    return content_key(world=plain["world"], data=plain["data"])


def _prior_key(cell: Cell) -> str:
    """Of what a cell's priors are made from, but for its own λ."""
    plain = to_plain(cell.recipe)
    arm = {**plain["arms"][0], "name": "", "weight": None}
    return content_key(
        data=_data_key(cell),
        teacher=plain["teacher"],
        teachers=plain["teachers"],
        sources=plain["sources"],
        seed=plain["seed"],
        arm=None if cell.is_control else arm,
    )


def _all_data(cells: list[Cell], console: Console) -> dict[str, Any]:
    from enhancer.run_data import prepare_data

    data: dict[str, Any] = {}
    for cell in cells:
        if _data_key(cell) not in data:
            data[_data_key(cell)] = prepare_data(cell.recipe, console)
    return data


def _all_priors(
    shared: Path, cells: list[Cell], data: dict[str, Any], console: Console, process: Process, problems: list[Problem]
) -> dict[str, list[dict]]:
    """Rows of priors.json by prior key; the store is filled. Several processes fill it for different cells."""
    wanted = {_prior_key(cell): cell for cell in cells}
    rows: dict[str, list[dict]] = {}
    for key, cell in rotated(list(wanted.items()), process):
        rows[key] = []
        if cell.is_control:
            continue
        with one_at_a_time(shared / "filling" / key):
            rows[key] = _fill(shared, cell, data[_data_key(cell)], console, problems)
    return rows


def _fill(shared: Path, cell: Cell, data: Any, console: Console, problems: list[Problem]) -> list[dict]:
    from enhancer.arms import store_folder

    recipe = with_own_frames(cell.recipe, console)
    store = PriorStore(store_folder(shared, recipe))
    rows: list[dict] = []
    begun = time.perf_counter()
    for spec, report in fill_stores(shared, recipe, data, console):
        if not report.rows:
            first = report.problems[0].reason if report.problems else "no samples"
            raise UserError(
                f"{cell.name}: no {spec.label} prior could be made for any of {len(data.train)} samples; the first: "
                f"{first}"
            )
        sizes = [store.entry(key).bytes for _, key in report.rows]
        add_cost(shared, cost_key(recipe, spec), spec.label, time.perf_counter() - begun, report.made, sizes)
        known = {(problem.id, problem.reason) for problem in problems}
        found = [Problem(problem.id, f"{spec.label}: {problem.reason}") for problem in report.problems]
        problems += [problem for problem in found if (problem.id, problem.reason) not in known]
        rows += [
            {
                "sample_id": sample.id,
                "key": key,
                "source": spec.label,
                "question": sample.question,
                "video": str(sample.video),
            }
            for sample, key in report.rows
        ]
        begun = time.perf_counter()
    return rows


def _samples_of(cells: list[Cell], data: dict[str, Any], priors: dict[str, list[dict]]) -> dict[str, list[Sample]]:
    """The samples that all cells of the same data train on: all, or where those without a prior are left out
    (missing_prior: skip) the ones that every such cell has a prior of."""
    samples = {key: of.train for key, of in data.items()}
    for cell in cells:
        policy, rows = cell.recipe.training.alignment.missing_prior, priors[_prior_key(cell)]
        if policy == "skip" and not cell.is_control:
            having = {row["sample_id"] for row in rows if row["source"] == cell.arm.spec().label}
            samples[_data_key(cell)] = [sample for sample in samples[_data_key(cell)] if sample.id in having]
    return samples


def rotated(items: list, process: Process) -> list:
    """The items, begun at this process's share: those of the others come later, and most are then finished."""
    return [
        item for turn in range(process.count) for item in items[(process.rank + turn) % process.count :: process.count]
    ]
