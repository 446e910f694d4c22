"""`job: adapter`: data, the chain of stages, the frames-only baseline, evaluation with controls, the table.

    <run>/stages/<n>-<name>/{history.jsonl, model, stage.json}    <run>/baseline/…    <run>/answers/<arm>.jsonl
    <run>/results.json

What is finished is on disk: the same command goes on at the stage that was interrupted (and inside it, from its newest
checkpoint, where training.save_every keeps any).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from enhancer.adapters.schema import ANSWER, AdapterRecipe, ReadingSettings, StageSettings
from enhancer.console import Console
from enhancer.data.samples import Problem, Sample, load_samples
from enhancer.jobs import Job
from enhancer.processes import Process
from enhancer.recipe import build
from enhancer.runfolder import RunFolder, readable_write_errors, report_skipped, write_json
from enhancer.shipped import quiet_libraries, student_path, torch_device
from enhancer.train_settings import AlignmentSettings
from enhancer.world import make_world
from enhancer.world.make import finished
from vdm_priors.errors import UserError


def run_adapter(recipe: AdapterRecipe, console: Console, fresh: bool = False) -> Path:
    """Runs a checked recipe; the run folder. Raises UserError for what a user can mend."""
    import torch

    torch.set_num_threads(recipe.threads)
    quiet_libraries()
    if Process.this().count > 1:
        raise UserError(
            "job: adapter trains in one process, on one GPU: start it without torchrun or accelerate launch, and "
            "reach a larger batch with training.accumulate."
        )
    run = RunFolder.open(Path(recipe.output) / recipe.name, recipe, resume=recipe.resume, fresh=fresh)
    status = "failed"
    try:
        console.step("Data")
        with run.step("data"):
            root = prepared(recipe, console)
            test = questions(recipe, root)
        console.step("Stages")
        with run.step("stages"):
            model = train_chain(run, recipe, root, console)
        console.step("Evaluation")
        with run.step("evaluation"):
            evaluate_arms(run, recipe, root, test, model, console)
        show(run, recipe, console)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        run.close(status)
    return run.folder


# ---- data ----------------------------------------------------------------------------------------


def data_root(recipe: AdapterRecipe) -> Path:
    """The folder of the data: data.root, or the folder of the recipe's own world."""
    return Path(recipe.data.root) if recipe.data.root else Path(recipe.output) / "worlds" / recipe.world.digest()[:12]


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


def samples_of(recipe: AdapterRecipe, stage: StageSettings, root: Path) -> tuple[list[Sample], list[Problem]]:
    """A stage's training samples."""
    from enhancer.adapters.samples import stage_samples

    file = root / (stage.train or recipe.data.train)
    return stage_samples(file, root, recipe.data.format, stage.text, recipe.caption_question, recipe.data.limit_train)


# ---- training ------------------------------------------------------------------------------------


def train_chain(run: RunFolder, recipe: AdapterRecipe, root: Path, console: Console):
    """The adapter after all stages; finished ones are loaded, not trained again."""
    from enhancer.adapters.reading import ClipReader
    from vlm_hooks.adapters import find_adapter

    folders = [run.folder / "stages" / f"{number}-{stage.name}" for number, stage in enumerate(recipe.stages, start=1)]
    return _chain(
        run,
        recipe,
        recipe.stages,
        folders,
        find_adapter(recipe.adapter),
        recipe.config(),
        ClipReader(recipe.reading),
        root,
        console,
    )


def train_baseline(run: RunFolder, recipe: AdapterRecipe, root: Path, console: Console):
    """The host on frames alone after the chain's answer stages (without them, if baseline.train is false)."""
    from enhancer.adapters.reading import ClipReader
    from vlm_hooks.adapters.te_fusion import Adapter as Frames

    stages = [stage for stage in recipe.stages if stage.objective == ANSWER] if recipe.baseline.train else []
    plain = AlignmentSettings(weight=0.0)
    stages = [replace(stage, training=replace(stage.training, rates={}, alignment=plain)) for stage in stages]
    stages = [stage for stage in stages if any(stage.training.rate(part) for part in ("llm", "merger", "vision"))]
    folders = [run.folder / "baseline" / f"{number}-{stage.name}" for number, stage in enumerate(stages, start=1)]
    reader = ClipReader(baseline_reading(recipe))
    return _chain(run, recipe, stages, folders, Frames, Frames.Config(k=1), reader, root, console)


def baseline_reading(recipe: AdapterRecipe) -> ReadingSettings:
    """Frames alone."""
    return ReadingSettings(clips="frames", frames=recipe.baseline.frames)


def _chain(
    run: RunFolder,
    recipe: AdapterRecipe,
    stages: list[StageSettings],
    folders: list[Path],
    kind,
    config,
    reader,
    root: Path,
    console: Console,
):
    import torch

    from enhancer.adapters.stages import is_done, run_stage, stage_summary
    from vlm_hooks.adapters.model import AdapterModel

    loading = {"dtype": getattr(torch, recipe.dtype), "device": torch_device(recipe.device)}
    done = [folder for folder in folders if is_done(folder)]
    torch.manual_seed(recipe.seed)
    host = student_path(recipe.host)
    model = (
        AdapterModel.from_pretrained(host, done[-1] / "model", **loading)
        if done
        else AdapterModel.create(host, kind, config, **loading)
    )
    for stage, folder in zip(stages, folders, strict=True):
        if folder in done:
            console.note(f"{stage.name}: finished before")
            continue
        samples, problems = samples_of(recipe, stage, root)
        with readable_write_errors(run.folder), console.bar(stage.name, unit="step") as bar:
            problems += run_stage(model, stage, samples, reader, folder, recipe.seed, bar, stored_priors(recipe, stage))
        report_skipped(run, f"{folder.parent.name}/{folder.name}", problems, console)
        told = ", ".join(
            f"{name.replace('_', ' ')} {value:.3g}"
            for name, value in stage_summary(folder).items()
            if isinstance(value, float)
        )
        console.note(f"{stage.name}: {told}")
    return model.eval()


def stored_priors(recipe: AdapterRecipe, stage: StageSettings):
    """The priors that a stage is aligned to, by sample; None where it is aligned to none. UserError for another
    folder."""
    if not stage.training.alignment.weight:
        return None
    from enhancer.arms import StoredPriors
    from enhancer.recipe_schema import EnhanceRecipe

    run = RunFolder.existing(Path(recipe.priors.run)).folder
    made_by = build(
        EnhanceRecipe, yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8")), str(run / "recipe.yaml")
    )
    return StoredPriors(run, made_by, recipe.priors.source)


# ---- evaluation ----------------------------------------------------------------------------------


def evaluate_arms(
    run: RunFolder, recipe: AdapterRecipe, root: Path, test: list[Sample], model, console: Console
) -> None:
    """Asks all arms; the baseline is trained first if it is needed."""
    from enhancer.adapters import arms
    from enhancer.adapters.reading import ClipReader
    from vlm_hooks.adapters.model import AdapterModel
    from vlm_hooks.adapters.te_fusion import Adapter as Frames

    folder = run.folder / "answers"
    folder.mkdir(exist_ok=True)

    def ask(asked, arm: str, reader) -> None:
        with console.bar(arms.TITLES[arm], unit="question") as bar:
            arms.ask(asked, arm, test, reader, folder, recipe.evaluate, recipe.seed, bar)

    reader = ClipReader(recipe.reading)
    for arm in (arms.ADAPTER, arms.STILL, arms.EXCHANGED):
        ask(model, arm, reader)
    if recipe.baseline is not None:
        frames = ClipReader(baseline_reading(recipe))
        if not (folder / f"{arms.HOST}.json").is_file():
            stock = AdapterModel.create(
                student_path(recipe.host), Frames, Frames.Config(k=1), device=torch_device(recipe.device)
            )
            ask(stock, arms.HOST, frames)
        if recipe.baseline.train and not (folder / f"{arms.FRAMES}.json").is_file():
            ask(train_baseline(run, recipe, root, console), arms.FRAMES, frames)


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
