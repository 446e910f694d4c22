"""The main job, in call order: data, preflight, priors, students, examples, table, report.

    run_enhance(recipe, console) -> the run folder

Every finished step is on disk, so that the same command continues where it was interrupted.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

from enhancer.console import Console
from enhancer.data.samples import Problem, Sample
from enhancer.extraction import extract_priors, fill_stores, with_own_frames
from enhancer.jobs import Job
from enhancer.launch import check_launch
from enhancer.preflight import preflight, print_preflight
from enhancer.processes import Process, Team, ended_in_order
from enhancer.recipe import build
from enhancer.recipe_schema import EnhanceRecipe
from enhancer.run_data import Data, data_inputs, prepare_data, read_data
from enhancer.runfolder import OtherInputs, RunFolder, read_json, readable_write_errors, report_skipped, write_json
from enhancer.shipped import quiet_libraries, torch_device
from enhancer.table import BASE, make_table, rich_tables
from enhancer.together import END, Together
from vdm_priors.errors import ModelError, UserError

STEPS = ("priors", "train", "all")  # where `until` may stop


def run_enhance(recipe: EnhanceRecipe, console: Console, fresh: bool = False, until: str = "all") -> Path:
    """Runs a checked recipe and returns its run folder; raises UserError for what a user can mend.

    Of several processes (accelerate launch, torchrun), the first one keeps the run folder, evaluates and speaks; the
    others extract priors with it and train every student with it.
    """
    import torch

    torch.set_num_threads(recipe.threads)
    quiet_libraries()
    process = Process.this()
    if process.count == 1:
        return _run(recipe, console, fresh, until)
    with ended_in_order():
        if until == "priors":
            return _run(recipe, console, fresh, until) if process.rank == 0 else help_extract(recipe, process)
        device = torch_device(recipe.device)
        check_launch(recipe.training, device)
        with Together.joined(process, device) as together:
            if process.rank > 0:
                return help_run(recipe, process, together)
            folder = _run(recipe, console, fresh, until, together)
            together.call(END)
            return folder


def _run(recipe: EnhanceRecipe, console: Console, fresh: bool, until: str, together: Together | None = None) -> Path:
    recipe = with_own_frames(recipe, console)
    run = RunFolder.open(Path(recipe.output) / recipe.name, recipe, resume=recipe.resume, fresh=fresh)
    run.record["seed"] = recipe.seed
    status = "failed"
    try:
        console.step("Data")
        with run.step("data"):
            data = prepare_data(recipe, console, asked=until == "all")
        run.take_inputs(*data_inputs(recipe, data))
        report_skipped(run, "data", data.problems, console)

        console.step("Preflight")
        with run.step("preflight"):
            print_preflight(preflight(recipe, data, probe_limit=64, trains=until != "priors", run=run.folder), console)

        console.step("Priors")
        with run.step("priors"):
            train = extract_priors(run, recipe, data, console)

        if until != "priors":
            console.step("Students")
            with run.step("students"):
                train_and_evaluate(run, recipe, train, data.test, console, evaluate=until == "all", together=together)

        if until == "all":
            show_results(run, recipe, data, console)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except OtherInputs:
        status = ""  # the folder's results are another run's, and so is its status
        raise
    finally:
        if status:
            run.close(status)
    if until == "all" and recipe.report:
        write_run_report(run, console)
    return run.folder


# ---- helping processes ---------------------------------------------------------------------------

def help_extract(recipe: EnhanceRecipe, process: Process) -> Path:
    """What the processes beside the first one do: make priors until none is left that nobody makes."""
    from enhancer.arms import store_folder

    console, run = Console(quiet=True), Path(recipe.output) / recipe.name
    try:
        recipe = with_own_frames(recipe)
        with Team(store_folder(run, recipe), recipe.name, process).working() as team:
            for _ in fill_stores(run, recipe, prepare_data(recipe, console, asked=False), console, team):
                pass
    except UserError as error:
        raise type(error)(f"{process}: {error}") from error
    return run


def help_run(recipe: EnhanceRecipe, process: Process, together: Together) -> Path:
    """What the processes beside the first one do in a run: help to extract, then train what it calls them to."""
    run, console = help_extract(recipe, process), Console(quiet=True)
    try:
        for number in together.calls():
            arm, seed = all_students(recipe)[number]
            run_student(run, arm, seed, console, evaluate=False)
    except UserError as error:
        raise type(error)(f"{process}: {error}") from error
    return run


# ---- students ------------------------------------------------------------------------------------

def all_students(recipe: EnhanceRecipe) -> list[tuple[str, int]]:
    """Arm and seed of every student to train, in their order."""
    return [(arm.name, seed) for seed in recipe.seeds for arm in recipe.arms]


def train_and_evaluate(run: RunFolder, recipe: EnhanceRecipe, train: list[Sample], test: list[Sample],
                       console: Console, evaluate: bool = True, together: Together | None = None) -> None:
    """Trains every arm with every seed and asks all students and the base model the test questions.

    together: the processes that train each student with this one, one student after another.
    """
    from enhancer.arms import arm_folder, is_evaluated, is_trained

    write_json(run.folder / "train_ids.json", [sample.id for sample in train])
    students = all_students(recipe)
    todo = [(arm, seed) for arm, seed in students
            if not is_trained(run.folder, arm, seed) or evaluate and not is_evaluated(run.folder, arm, seed)]
    if evaluate and not is_evaluated(run.folder, BASE, None):
        todo.insert(0, (BASE, None))
    if len(todo) < len(students):
        finished = len(students) - sum(arm != BASE for arm, _ in todo)
        console.note(f"{finished} of {len(students)} students are already finished")
    if recipe.parallel_arms > 1 and len(todo) > 1 and together is None:
        _in_processes(run, recipe, todo, console, evaluate)
    else:
        for arm, seed in todo:
            console.note(arm if seed is None else f"{arm}, seed {seed}")
            if together is not None and seed is not None and not is_trained(run.folder, arm, seed):
                together.call(students.index((arm, seed)))
            run_student(run.folder, arm, seed, console, evaluate)
    problems = [Problem(p["id"], p["reason"]) for arm, seed in students
                for p in read_json(arm_folder(run.folder, arm, seed) / "left_out.json", [])]
    report_skipped(run, "train", list(dict.fromkeys(problems)), console)
    if evaluate:
        unasked = [Problem(error["id"], error["reason"]) for arm, seed in [(BASE, None), *students]
                   for error in read_json(arm_folder(run.folder, arm, seed) / "scores.json", {}).get("errors", [])]
        report_skipped(run, "evaluate", list(dict.fromkeys(unasked)), console)


def _in_processes(run: RunFolder, recipe: EnhanceRecipe, todo: list, console: Console, evaluate: bool) -> None:
    from enhancer.arms import arm_folder
    from enhancer.workers import Work, python_command, run_workers

    flags = [] if evaluate else ["--no-evaluate"]
    works = []
    for arm, seed in todo:
        number = "-" if seed is None else str(seed)
        command = python_command("enhancer.pipeline_arm", str(run.folder), arm, number, *flags)
        title = arm if seed is None else f"{arm} seed {seed}"
        works.append(Work(title, command, arm_folder(run.folder, arm, seed) / "log.txt"))
    failures, peak = run_workers(works, recipe.parallel_arms, console, recipe.threads)
    run.record["peak_memory_mb"] = max(run.record.get("peak_memory_mb") or 0.0, peak)
    if failures:
        listed = "\n".join(f"  - {failure.title}: {failure.reason}" for failure in failures)
        raise UserError(f"{len(failures)} of {len(works)} students did not finish; the others are kept:\n{listed}\n"
                        f"Mend the cause and run the same command again.")


def run_student(folder: Path, arm: str, seed: int | None, console: Console, evaluate: bool = True) -> None:
    """Trains and evaluates one student of a run folder; also the work of a worker process."""
    from enhancer.arms import arm_folder, evaluate_arm, train_arm

    quiet_libraries()
    written = folder / "recipe.yaml"
    recipe = build(EnhanceRecipe, yaml.safe_load(written.read_text(encoding="utf-8")), str(written))
    data = read_data(recipe, asked=evaluate)
    if arm != BASE:
        chosen = next(a for a in recipe.arms if a.name == arm)
        ids = set(read_json(folder / "train_ids.json", []))
        problems = train_arm(folder, recipe, chosen, seed, [s for s in data.train if s.id in ids], console)
        if problems:
            write_json(arm_folder(folder, arm, seed) / "left_out.json", [dataclasses.asdict(p) for p in problems])
    if evaluate:
        evaluate_arm(folder, recipe, arm, seed, data.test, console)


# ---- results -------------------------------------------------------------------------------------

def show_results(run: RunFolder, recipe: EnhanceRecipe, data: Data, console: Console) -> None:
    """Examples for the report, table.json, and the table in the terminal."""
    from enhancer.examples import write_examples

    state = [arm.name for arm in recipe.arms]
    if recipe.examples and not run.is_done("examples", state):
        console.step("Examples")
        with run.step("examples", state):
            problems = write_examples(run.folder, recipe, data, console)
            report_skipped(run, "examples", problems, console)
    with run.step("table"):
        table = make_table(run.folder, recipe)
        write_json(run.folder / "table.json", table)
    for shown in rich_tables(table, console.out.width):
        console.print(shown)
    for note in table["notes"]:
        console.print(f"• {note}", markup=False)
    exported = run.folder / "arms" / "<arm>" / "seed<k>" / "model"
    console.print(f"run folder: {run.folder}\nexported students: {exported}", markup=False)


def write_run_report(run: RunFolder, console: Console) -> None:
    """report.html, after run.json has its last word; the results stand even if the page fails."""
    from enhancer.report import write_report

    with readable_write_errors(run.folder):
        console.print(f"report: {write_report(run.folder)}", markup=False)


def validate_enhance(recipe: EnhanceRecipe, console: Console) -> bool:
    """Says before any model loads what the job needs, and whether it could run."""
    from enhancer.preflight import validate

    try:
        recipe = with_own_frames(recipe, ask_hub=False)
    except ModelError:
        pass  # the preflight says it beside the other faults
    return validate(recipe, console)


JOBS = {"enhance": Job(schema=EnhanceRecipe, run=run_enhance, validate=validate_enhance)}
