"""The main job, in call order: data, preflight, priors, students, examples, table, report.

    run_enhance(recipe, console) -> the run folder

Every finished step is on disk, so that the same command continues where it was interrupted.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from enhancer.console import Console
from enhancer.data.samples import Problem, Sample, load_samples
from enhancer.extraction import extract_priors, fill_stores, used_teachers, with_own_frames
from enhancer.jobs import Job
from enhancer.launch import check_launch
from enhancer.preflight import preflight, print_preflight
from enhancer.processes import Process, Team, ended_in_order, one_at_a_time
from enhancer.recipe import build
from enhancer.recipe_schema import EnhanceRecipe
from enhancer.runfolder import OtherInputs, RunFolder, read_json, readable_write_errors, report_skipped, write_json
from enhancer.shipped import quiet_libraries, student_path, teacher_path, torch_device
from enhancer.table import BASE, make_table, rich_tables
from enhancer.together import END, Together
from enhancer.world import load_truth, make_world
from enhancer.world.make import finished
from vdm_priors.errors import ModelError, UserError
from vdm_priors.fingerprint import fingerprint
from vdm_priors.store import content_key, file_digest

STEPS = ("priors", "train", "all")  # where `until` may stop


@dataclass
class Data:
    """Samples of a run: train, test, their folder, and the world's ground truth (None for other data)."""

    root: Path
    train: list[Sample]
    test: list[Sample]
    truth: Any
    problems: list[Problem]


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
        run.take_inputs(*_inputs(recipe, data))
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


# ---- data ----------------------------------------------------------------------------------------

def data_root(recipe: EnhanceRecipe) -> Path:
    """The folder of the data: data.root, or the folder of the recipe's own world."""
    if recipe.data.root is not None:
        return Path(recipe.data.root)
    return Path(recipe.output) / "worlds" / recipe.world.digest()[:12]


def prepare_data(recipe: EnhanceRecipe, console: Console, asked: bool = True) -> Data:
    """Makes the world if the recipe has one, and reads the samples."""
    root = data_root(recipe)
    if recipe.world is not None and not finished(root, recipe.world):
        with one_at_a_time(root), readable_write_errors(root), console.bar("making clips", unit="clip") as bar:
            make_world(root, recipe.world, progress=bar)
    data = read_data(recipe, asked)
    questions = f", {len(data.test)} test questions" if asked else ""
    console.note(f"{len(data.train)} training samples{questions} in {root}")
    return data


def read_data(recipe: EnhanceRecipe, asked: bool = True) -> Data:
    """The samples of data that is there. asked: False leaves the test questions out, which need not exist then."""
    root, settings = data_root(recipe), recipe.data
    train, problems = load_samples(root / settings.train, root, settings.format, training=True)
    test: list[Sample] = []
    if asked:
        test, test_problems = load_samples(root / settings.test, root, settings.format)
        without = [sample for sample in test if not sample.options]
        problems += test_problems + [Problem(sample.id, "a test question needs options to choose from") for sample in without]
        test = [sample for sample in test if sample.options]
        if not test:
            raise UserError(f"{root / settings.test}: no multiple-choice question in it; give rows with `options`.")
    truth = load_truth(root) if recipe.world is not None else None
    return Data(root, train[: settings.limit_train], test[: settings.limit_test], truth, problems)


def _inputs(recipe: EnhanceRecipe, data: Data) -> tuple[dict[str, str], dict[str, str]]:
    """Hashes of the models and data that this recipe's results depend on, and the key and file that each stands for."""
    train, test = data.root / recipe.data.train, data.root / recipe.data.test
    hashes = {"student": fingerprint(student_path(recipe.student.model)), "train": file_digest(train)}
    named = {"student": f"student.model ({recipe.student.model})", "train": f"data.train ({train})",
             "test": f"data.test ({test})", "teacher": f"teacher.model ({recipe.teacher.model})"}
    if data.test:
        hashes["test"] = file_digest(test)
    teachers = [fingerprint(teacher_path(teacher.model)) for teacher in used_teachers(recipe).values()]
    if teachers:
        hashes["teacher"] = teachers[0] if len(teachers) == 1 else content_key(teachers=teachers)
    return hashes, named


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
    """What the processes beside the first one do in a run: help to extract, then train with it what it calls them to."""
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
        console.note(f"{len(students) - sum(arm != BASE for arm, _ in todo)} of {len(students)} students are already finished")
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
    works = [Work(arm if seed is None else f"{arm} seed {seed}",
                  python_command("enhancer.pipeline_arm", str(run.folder), arm, "-" if seed is None else str(seed), *flags),
                  arm_folder(run.folder, arm, seed) / "log.txt") for arm, seed in todo]
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
    recipe = build(EnhanceRecipe, yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")), str(folder / "recipe.yaml"))
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
