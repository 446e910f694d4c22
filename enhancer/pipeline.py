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
from enhancer.jobs import Job
from enhancer.preflight import preflight, print_preflight
from enhancer.recipe import build
from enhancer.recipe_schema import CONTROL, EnhanceRecipe
from enhancer.runfolder import OtherInputs, RunFolder, read_json, readable_write_errors, write_json
from enhancer.shipped import quiet_libraries, student_path, teacher_path, torch_device
from enhancer.sources import SourceContext, build_source, fill_store
from enhancer.table import BASE, make_table, rich_tables
from enhancer.world import load_truth, make_world
from vdm_priors.errors import ModelError, UserError
from vdm_priors.fingerprint import fingerprint
from vdm_priors.store import PriorStore, file_digest

SHOWN_PROBLEMS = 3  # left-out samples that are printed; all are in skipped.jsonl
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
    """Runs a checked recipe and returns its run folder; raises UserError for what a user can mend."""
    import torch

    torch.set_num_threads(recipe.threads)
    quiet_libraries()
    recipe = with_own_frames(recipe, console)
    run = RunFolder.open(Path(recipe.output) / recipe.name, recipe, resume=recipe.resume, fresh=fresh)
    run.record["seed"] = recipe.seed
    status = "failed"
    try:
        console.step("Data")
        with run.step("data"):
            data = prepare_data(recipe, console, asked=until == "all")
        run.take_inputs(*_inputs(recipe, data))
        _report_skipped(run, "data", data.problems, console)

        console.step("Preflight")
        with run.step("preflight"):
            print_preflight(preflight(recipe, data, probe_limit=64), console)

        console.step("Priors")
        with run.step("priors"):
            train = extract_priors(run, recipe, data, console)

        if until != "priors":
            console.step("Students")
            with run.step("students"):
                train_and_evaluate(run, recipe, train, data.test, console, evaluate=until == "all")

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
    if recipe.world is not None:
        with readable_write_errors(root), console.bar("making clips", unit="clip") as bar:
            make_world(root, recipe.world, progress=bar)
    data = read_data(recipe, asked)
    questions = f", {len(data.test)} test questions" if asked else ""
    console.note(f"{len(data.train)} training samples{questions} in {root}")
    return data


def read_data(recipe: EnhanceRecipe, asked: bool = True) -> Data:
    """The samples of data that is there. asked: False leaves the test questions out, which need not exist then."""
    root, settings = data_root(recipe), recipe.data
    train, problems = load_samples(root / settings.train, root, settings.format)
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
    if _needs_teacher(recipe):
        hashes["teacher"] = fingerprint(teacher_path(recipe.teacher.model))
    return hashes, named


# ---- priors --------------------------------------------------------------------------------------

def needed_sources(recipe: EnhanceRecipe) -> list[tuple[str, str | None]]:
    """(source, base) of all arms that align, bases first; base is None for a source of its own."""
    needed: list[tuple[str, str | None]] = []
    for arm in recipe.arms:
        if arm.source == CONTROL or recipe.weight(arm) == 0:
            continue
        wraps = arm.source in ("shuffled", "uniform")
        needed += [(arm.base, None), (arm.source, arm.base)] if wraps else [(arm.source, None)]
    return sorted(dict.fromkeys(needed), key=lambda pair: pair[1] is not None)


def _needs_teacher(recipe: EnhanceRecipe) -> bool:
    return ("vdm", None) in needed_sources(recipe)


def with_own_frames(recipe: EnhanceRecipe, console: Console | None = None, ask_hub: bool = True) -> EnhanceRecipe:
    """The recipe with the teacher's own number of frames where teacher.sampling.frames is null.

    Left as it is where the number cannot be read and no arm needs it. Raises ModelError where one does.
    ask_hub: False leaves a hub model's number out, which may need the network.
    """
    sampling = recipe.teacher.sampling
    if sampling.frames is not None:
        return recipe
    from vdm_priors.families import trained_frames

    try:
        teacher = teacher_path(recipe.teacher.model)
        if not Path(teacher).is_dir() and not (ask_hub and needed_sources(recipe)):
            return recipe
        frames = trained_frames(teacher)
    except ModelError:
        if needed_sources(recipe):
            raise
        return recipe
    if console is not None and needed_sources(recipe):
        console.note(f"{frames} frames a clip for priors, as many as the teacher {recipe.teacher.model} was trained on")
    own = dataclasses.replace(sampling, frames=frames)
    return dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, sampling=own))


def source_context(run: Path, recipe: EnhanceRecipe, samples: list[Sample], truth: Any, console: Console) -> SourceContext:
    """What the sources of this recipe are built from; the teacher is loaded when it is first needed."""
    import torch

    from enhancer.arms import store_folder

    teacher = teacher_path(recipe.teacher.model) if _needs_teacher(recipe) else ""

    def load() -> Any:
        from vdm_priors.families import load_teacher

        console.note(f"loading the teacher {teacher}")
        return load_teacher(teacher, dtype=getattr(torch, recipe.teacher.dtype), device=torch_device(recipe.device))

    return SourceContext(
        samples=samples, store=PriorStore(store_folder(run, recipe)), sampling=recipe.teacher.sampling.sampling(),
        text=recipe.teacher.text, seed=recipe.seed, teacher_fingerprint=fingerprint(teacher) if teacher else "",
        load_teacher=load, settings=recipe.teacher.extraction, batch_size=recipe.teacher.batch_size,
        size=tuple(recipe.teacher.size) if recipe.teacher.size else None, dtype=recipe.teacher.dtype, truth=truth)


def extract_priors(run: RunFolder, recipe: EnhanceRecipe, data: Data, console: Console) -> list[Sample]:
    """Fills the store for every source, writes priors.json, and returns the samples to train on.

    Where samples without a prior are left out (missing_prior: skip), every arm leaves them out,
    λ = 0 too, so that all students see the same data.
    """
    from enhancer.arms import source_label

    needed = needed_sources(recipe)
    context = source_context(run.folder, recipe, data.train, data.truth, console) if needed else None
    rows, problems, having = [], [], []
    for name, base in needed:
        if base is not None:
            context = dataclasses.replace(context, base=build_source(base, context))
        source = build_source(name, context)
        label = next((source_label(arm) for arm in recipe.arms if arm.source == name and (base is None or arm.base == base)), name)
        with console.bar(f"{label} priors", len(data.train), "clip") as bar:
            report = fill_store(source, data.train, context.store, progress=bar)
        console.note(f"{label}: {report.made} made, {report.reused} reused from {context.store.folder}"
                     + (f", {report.replaced} damaged ones replaced" if report.replaced else ""))
        problems += [Problem(p.id, f"{label}: {p.reason}") for p in report.problems]
        if not report.rows:
            first = report.problems[0].reason if report.problems else "no samples"
            raise UserError(f"No {label} prior could be made for any of {len(data.train)} samples; the first: {first}")
        rows += [{"sample_id": sample.id, "key": key, "source": label, "question": sample.question,
                  "video": str(sample.video), **report.facts.get(key, {})} for sample, key in report.rows]
        having.append({sample.id for sample, _ in report.rows})
    write_json(run.folder / "priors.json", rows)
    if rows:
        console.note(f"which seconds of each clip were sampled: {run.folder / 'priors.json'}")
    _report_skipped(run, "extract", problems, console)
    policy = recipe.training.alignment.missing_prior
    if policy == "fail" and problems:
        raise UserError(f"{len(problems)} priors could not be made and training.alignment.missing_prior is fail; the first: "
                        f"{problems[0].id}: {problems[0].reason}")
    if policy == "skip" and having:
        shared = set.intersection(*having)
        return [sample for sample in data.train if sample.id in shared]
    return data.train


# ---- students ------------------------------------------------------------------------------------

def train_and_evaluate(run: RunFolder, recipe: EnhanceRecipe, train: list[Sample], test: list[Sample],
                       console: Console, evaluate: bool = True) -> None:
    """Trains every arm with every seed and asks all students and the base model the test questions."""
    from enhancer.arms import arm_folder, is_evaluated, is_trained

    write_json(run.folder / "train_ids.json", [sample.id for sample in train])
    students = [(arm.name, seed) for seed in recipe.seeds for arm in recipe.arms]
    todo = [(arm, seed) for arm, seed in students
            if not is_trained(run.folder, arm, seed) or evaluate and not is_evaluated(run.folder, arm, seed)]
    if evaluate and not is_evaluated(run.folder, BASE, None):
        todo.insert(0, (BASE, None))
    if len(todo) < len(students):
        console.note(f"{len(students) - sum(arm != BASE for arm, _ in todo)} of {len(students)} students are already finished")
    if recipe.parallel_arms > 1 and len(todo) > 1:
        _in_processes(run, recipe, todo, console, evaluate)
    else:
        for arm, seed in todo:
            console.note(arm if seed is None else f"{arm}, seed {seed}")
            run_student(run.folder, arm, seed, console, evaluate)
    problems = [Problem(p["id"], p["reason"]) for arm, seed in students
                for p in read_json(arm_folder(run.folder, arm, seed) / "left_out.json", [])]
    _report_skipped(run, "train", list(dict.fromkeys(problems)), console)
    if evaluate:
        unasked = [Problem(error["id"], error["reason"]) for arm, seed in [(BASE, None), *students]
                   for error in read_json(arm_folder(run.folder, arm, seed) / "scores.json", {}).get("errors", [])]
        _report_skipped(run, "evaluate", list(dict.fromkeys(unasked)), console)


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
            _report_skipped(run, "examples", problems, console)
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


def _report_skipped(run: RunFolder, stage: str, problems: list[Problem], console: Console) -> None:
    run.skip(stage, problems)
    if problems:
        shown = "; ".join(f"{p.id}: {p.reason}" for p in problems[:SHOWN_PROBLEMS])
        more = f" and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        console.warn(f"{len(problems)} left out ({shown}{more}); listed in {run.folder / 'skipped.jsonl'}")


def validate_enhance(recipe: EnhanceRecipe, console: Console) -> bool:
    """Says before any model loads what the job needs, and whether it could run."""
    from enhancer.preflight import validate

    try:
        recipe = with_own_frames(recipe, ask_hub=False)
    except ModelError:
        pass  # the preflight says it beside the other faults
    return validate(recipe, console)


JOBS = {"enhance": Job(schema=EnhanceRecipe, run=run_enhance, validate=validate_enhance)}
