"""`job: adapter`: data, the chain of stages, the frames-only baseline, evaluation with controls, the table.

    <run>/stages/<n>-<name>/{history.jsonl, model, stage.json}    <run>/baseline/…    <run>/answers/<arm>.jsonl
    <run>/results.json

What is finished is on disk: the same command goes on at the stage that was interrupted (and inside it, from its newest
checkpoint, where training.save_every keeps any). Of several processes (torchrun, accelerate launch) the first one keeps
the run folder, evaluates and speaks; the others train every stage with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from enhancer.adapters.schema import AdapterRecipe
from enhancer.console import Console
from enhancer.data.samples import Sample, load_samples
from enhancer.jobs import Job
from enhancer.launch import check_launch
from enhancer.run_data import data_root
from enhancer.processes import Process, ended_in_order
from enhancer.runfolder import RunFolder, readable_write_errors, write_json
from enhancer.shipped import quiet_libraries, student_path, torch_device
from enhancer.together import END, Together
from enhancer.world import make_world
from enhancer.world.make import finished
from vdm_priors.errors import UserError

if TYPE_CHECKING:
    from enhancer.adapters.chain import Chain  # needs torch, which a recipe's check does without


def run_adapter(recipe: AdapterRecipe, console: Console, fresh: bool = False) -> Path:
    """Runs a checked recipe; the run folder. Raises UserError for what a user can mend."""
    import torch

    from enhancer.adapters.chain import help_train

    torch.set_num_threads(recipe.threads)
    quiet_libraries()
    process, device = Process.this(), torch_device(recipe.device)
    for stage in recipe.stages:
        check_launch(stage.training, device)
    with ended_in_order(), Together.joined(process, device) as together:
        if process.rank > 0:
            return help_train(recipe, process, together)
        folder = _run(recipe, console, fresh, together)
        together.call(END)
        return folder


def _run(recipe: AdapterRecipe, console: Console, fresh: bool, together: Together) -> Path:
    from enhancer.adapters.chain import chains, train_chain

    run = RunFolder.open(Path(recipe.output) / recipe.name, recipe, resume=recipe.resume, fresh=fresh)
    status = "failed"
    try:
        adapter, baseline = chains(recipe)
        console.step("Data")
        with run.step("data"):
            test = questions(recipe, prepared(recipe, console))
        console.step("Stages")
        with run.step("stages"):
            train_chain(run, adapter, console, together)
        console.step("Evaluation")
        with run.step("evaluation"):
            evaluate_arms(run, recipe, test, adapter, baseline, console, together)
        show(run, recipe, console)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        run.close(status)
    return run.folder


# ---- data ----------------------------------------------------------------------------------------


def prepared(recipe: AdapterRecipe, console: Console) -> Path:
    """The data's folder, with the world in it where the recipe has one."""
    root = data_root(recipe)
    if recipe.world is not None and not finished(root, recipe.world):
        with readable_write_errors(root), console.bar("making clips", unit="clip") as bar:
            make_world(root, recipe.world, progress=bar)
    return root


def questions(recipe: AdapterRecipe, root: Path) -> list[Sample]:
    """The test questions with options. Raises UserError without any."""
    samples, _ = load_samples(root / recipe.data.test, root, recipe.data.format)
    asked = [sample for sample in samples if sample.options][: recipe.data.limit_test]
    if not asked:
        raise UserError(f"{root / recipe.data.test}: no multiple-choice question in it; give rows with `options`.")
    return asked


# ---- evaluation ----------------------------------------------------------------------------------


def evaluate_arms(
    run: RunFolder,
    recipe: AdapterRecipe,
    test: list[Sample],
    adapter: Chain,
    baseline: Chain,
    console: Console,
    together: Together,
) -> None:
    """Asks all arms; the baseline is trained first if it is needed."""
    from enhancer.adapters import arms
    from enhancer.adapters.chain import train_chain

    folder = run.folder / "answers"
    folder.mkdir(exist_ok=True)

    def ask(chain: Chain, arm: str) -> None:
        with console.bar(arms.TITLES[arm], unit="question") as bar:
            arms.ask(chain.model, arm, test, chain.reader, folder, recipe.evaluate, recipe.seed, bar)

    for arm in (arms.ADAPTER, arms.STILL, arms.EXCHANGED):
        ask(adapter, arm)
    adapter.model = None  # the baseline's takes its place in memory
    if recipe.baseline is not None and not (folder / f"{arms.HOST}.json").is_file():
        baseline.load(0)
        ask(baseline, arms.HOST)
        baseline.model = None
    if baseline.stages and not (folder / f"{arms.FRAMES}.json").is_file():
        train_chain(run, baseline, console, together)
        ask(baseline, arms.FRAMES)


def show(run: RunFolder, recipe: AdapterRecipe, console: Console) -> None:
    """results.json, and the table in the terminal."""
    from enhancer.adapters import arms

    table = arms.results(run.folder / "answers", recipe.seed)
    write_json(run.folder / "results.json", table)
    console.print(arms.rich_table(table))
    said = arms.unused_motion(table)
    if said:
        console.warn(said)
    last = run.folder / "stages" / f"{len(recipe.stages)}-{recipe.stages[-1].name}" / "model"
    console.print(f"run folder: {run.folder}\nadapter: {last}", markup=False)


def validate(recipe: AdapterRecipe, console: Console) -> bool:
    """Says before any weights load what is missing: the data, the host, and what the stages name."""
    from vlm_hooks.adapters import find_adapter
    from vlm_hooks.families import find_family

    faults = []
    root = data_root(recipe)
    if recipe.world is None:
        files = {recipe.data.test, *(stage.train or recipe.data.train for stage in recipe.stages)}
        files |= {stage.test for stage in recipe.stages if stage.test}
        faults += [f"data: there is no file {root / file}" for file in sorted(files) if not (root / file).is_file()]
    try:
        family = find_family(student_path(recipe.host))
        console.print(f"host: {recipe.host} ({family.__name__.rsplit('.', 1)[-1]})", markup=False)
    except UserError as error:
        faults.append(f"host: {error}")
    for number, stage in enumerate(recipe.stages, start=1):
        rates = {part: rate for part in ("llm", "merger", "vision") if (rate := stage.training.rate(part))}
        own = stage.training.rates or {"adapter": stage.training.learning_rate_adapter}
        console.print(
            f"stage {number}: {stage.name}, {stage.objective}, {stage.training.steps} steps of "
            f"{stage.training.batch_size * stage.training.accumulate} samples; rates {own | rates}",
            markup=False,
        )
    console.print(f"adapter: {find_adapter(recipe.adapter).NAME} {recipe.config()}", markup=False)
    for fault in faults:
        console.print(f"✗ {fault}", style="red", markup=False)
    if not faults:
        console.print("✓ the recipe is valid and the training can start", style="green", markup=False)
    return not faults


JOBS = {"adapter": Job(AdapterRecipe, run_adapter, validate)}
