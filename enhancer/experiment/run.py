"""The job `compare`, in call order: cells, data, priors, plan, students, results, report.

    run_compare(recipe, console) -> the matrix's folder

Whatever is finished lies in the pool (enhancer/experiment/pool.py), so that the same command continues, and another
matrix begins with what this one has made. Under torchrun or accelerate launch each process trains its own students.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from enhancer.console import Console
from enhancer.experiment.cells import make_cells
from enhancer.experiment.plan import Plan, make_plan, rotated
from enhancer.experiment.pool import Work, answered_at
from enhancer.experiment.results import PLAN
from enhancer.experiment.schema import CompareRecipe
from enhancer.experiment.work import KEPT, finish_student
from enhancer.processes import Process, ended_in_order
from enhancer.recipe import to_yaml
from enhancer.runfolder import RunFolder, machine, read_json, readable_write_errors, versions, write_json, write_text
from vdm_priors.errors import UserError

JOB = "compare"
NO_SEED = "-"
SHOWN_FAILURES = 5


def run_compare(recipe: CompareRecipe, console: Console, fresh: bool = False) -> Path:
    """Runs a matrix and returns its folder; raises UserError for what a user can mend, after the report of the rest.

    fresh: train its students anew.
    """
    import torch

    from enhancer.shipped import quiet_libraries

    process = Process.this()
    if process.count > 1 and fresh:
        raise UserError("--fresh deletes what other processes may just have made: run it in one process first.")
    if process.rank > 0:
        console = Console(quiet=True)
    quiet_libraries()
    cells = make_cells(recipe)
    torch.set_num_threads(max(cell.recipe.threads for cell in cells))
    run = _opened(recipe, process)
    status = "failed"
    try:
        with ended_in_order():
            plan = make_plan(recipe, cells, run, console, process)
            if fresh:
                _forget(plan)
            if process.rank == 0:
                write_json(run.folder / PLAN, plan.as_json(recipe))
            failures = _trained(recipe, plan, run, console, process)
        status = "incomplete" if plan.todo() else "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        if process.rank == 0:
            run.close(status)
    if process.rank == 0:
        show_results(run.folder, console)
    if failures:
        listed = "\n".join(f"  - {failure}" for failure in failures[:SHOWN_FAILURES])
        more = f"\n  and {len(failures) - SHOWN_FAILURES} more" if len(failures) > SHOWN_FAILURES else ""
        raise UserError(
            f"{len(failures)} students did not finish; the report shows the others:\n{listed}{more}\nMend the "
            f"cause and run the same command again."
        )
    return run.folder


def _opened(recipe: CompareRecipe, process: Process) -> RunFolder:
    """The matrix's folder with its record; processes beside the first have one below it. Another matrix of the same
    name is replaced: students are in the pool."""
    run = RunFolder(recipe.folder if process.rank == 0 else recipe.folder / "processes" / str(process.rank))
    run.record = read_json(run.folder / "run.json", {})
    if run.record.get("job", JOB) != JOB or run.record and "job" not in run.record:
        raise UserError(f"{run.folder} holds a run of another job; give this matrix another `name`.")
    with readable_write_errors(run.folder):
        write_text(run.folder / "recipe.yaml", to_yaml(recipe))
    run.record.update(
        job=JOB,
        name=recipe.name,
        command=" ".join(["enhancer", *sys.argv[1:]]),
        status="running",
        versions=versions(),
        machine=machine(),
    )
    for key in ("seconds", "steps"):
        run.record.setdefault(key, {})
    run.record.setdefault("started", time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()))
    run.save()
    return run


# ---- students ------------------------------------------------------------------------------------


def _forget(plan: Plan) -> None:
    """Deletes the record of the matrix's students and answers, so that they are made anew."""
    for work in [*plan.works, *plan.controls, *plan.bases]:
        for seed in work.seeds:
            (answered_at(work.asked, seed) / "scores.json").unlink(missing_ok=True)
            (work.place(seed) / "train.json").unlink(missing_ok=True)


def _trained(recipe: CompareRecipe, plan: Plan, run: RunFolder, console: Console, process: Process) -> list[str]:
    """Trains and asks all students; returns why those that did not finish did not."""
    todo = rotated(plan.todo(), process)
    if not todo:
        return []
    console.step("Students")
    with run.step("students"):
        if recipe.parallel == 1 and process.count == 1:
            return _one_by_one(recipe, todo, console)
        from enhancer.workers import Work as Job
        from enhancer.workers import python_command, run_workers

        gpus = _gpus(process)
        jobs = [
            Job(
                _title(work, seed, number),
                python_command(
                    "enhancer.experiment.work",
                    str(work.asked),
                    NO_SEED if seed is None else str(seed),
                    KEPT if recipe.keep_students else "drop",
                    gpus[number % len(gpus)],
                ),
                work.place(seed) / "log.txt",
            )
            for number, (work, seed) in enumerate(todo)
        ]
        failures, peak = run_workers(jobs, recipe.parallel, console, max(work.recipe.threads for work, _ in todo))
        run.record["peak_memory_mb"] = max(run.record.get("peak_memory_mb") or 0.0, peak)
    return [f"{failure.title}: {failure.reason}" for failure in failures]


def _one_by_one(recipe: CompareRecipe, todo: list[tuple[Work, int | None]], console: Console) -> list[str]:
    failures = []
    with console.bar("students", len(todo), "student") as bar:
        for number, (work, seed) in enumerate(todo):
            console.note(_title(work, seed, number))
            try:
                finish_student(work.asked, seed, console, recipe.keep_students)
            except UserError as error:
                failures.append(f"{_title(work, seed, number)}: {error}")
            bar.advance()
    return failures


def _title(work: Work, seed: int | None, number: int) -> str:
    """Of one student, on the screen; the start of its hash tells those of one source apart."""
    what = "base" if seed is None else f"{work.recipe.arms[0].name} seed {seed}"
    return f"{number + 1} {what} ({work.student.name[:6]})"


def _gpus(process: Process) -> list[str]:
    """Numbers of the GPUs that workers take in turn; `-` leaves it to them. A launched process keeps to its own."""
    import torch

    count = torch.cuda.device_count()
    if process.count > 1 and count:
        return [str(process.local % count)]
    return [str(number) for number in range(count)] if count > 1 else [NO_SEED]


# ---- results -------------------------------------------------------------------------------------


def show_results(folder: Path, console: Console) -> dict[str, Any]:
    """table.json, table.md and report.html from what is on disk, and the table in the terminal; returns the table.

    Raises UserError where the folder has no plan: no matrix was begun in it.
    """
    from enhancer.experiment.page import write_page
    from enhancer.experiment.results import make_results
    from enhancer.experiment.tables import markdown, rich_tables

    results = make_results(folder)
    write_json(folder / "table.json", results)
    write_text(folder / "table.md", markdown(results))
    page = write_page(folder / "report.html", [folder])
    for table in rich_tables(results):
        console.print(table)
    for sentence in [results["headline"], *results["sentences"], *results["notes"], *results["missing"]]:
        console.print(f"• {sentence}", markup=False)
    console.print(f"report: {page}", markup=False)
    return results


def validate_compare(recipe: CompareRecipe, console: Console) -> bool:
    """Says before any model loads what the first cell with a prior needs, and how many students there are."""
    from enhancer.pipeline import validate_enhance

    cells = make_cells(recipe)
    shown = next((cell for cell in cells if not cell.is_control), cells[0])
    console.print(
        f"{len(cells)} cells × {len(recipe.seeds)} seeds, {recipe.parallel} at once. The cell '{shown.name}':", markup=False
    )
    return validate_enhance(shown.recipe, console)
