"""What a run would need, said before any model loads: tokens, memory, disk, missing or bad files.

Only configurations and tokenizers are read. Estimates name what they stand on.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rich.table

from enhancer.console import Console
from enhancer.data.samples import Problem, Sample
from enhancer.recipe_schema import EnhanceRecipe
from enhancer.runfolder import machine_memory
from enhancer.shipped import student_path, teacher_path, weights_bytes
from enhancer.video.clip import Sampling, read_clip
from vdm_priors.errors import ModelError, UserError

MB = 2**20
TRAIN_COPIES = 4  # weights, gradients and AdamW's two moments
ACTIVATIONS = 34  # bytes-per-token-and-width factor of a transformer layer (Korthikanti et al. 2022, eq. 2, 16-bit)
TOKENIZED = 2000  # samples whose text is tokenized; more only repeat the picture


@dataclass
class Preflight:
    """lines: (what, how much, what it stands on); warnings go on, faults stop the run."""

    lines: list[tuple[str, str, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def preflight(recipe: EnhanceRecipe, data: Any, probe_limit: int | None = None, console: Console | None = None) -> Preflight:
    """Estimates for read data. probe_limit: how many clips are opened (None: all)."""
    report = Preflight()
    shapes = _probe([*data.train, *data.test], recipe.student.sampling.sampling(), report, probe_limit, console)
    longest = _student_tokens(recipe, data, shapes, report)
    _memory(recipe, longest, report)
    _disk(recipe, report)
    return report


def _probe(samples: list[Sample], sampling: Sampling, report: Preflight, limit: int | None,
           console: Console | None) -> dict[Path, tuple[int, int, int]]:
    """(frames, height, width) of each opened clip as the student samples it."""
    shapes = {}
    first_of = {sample.video: sample for sample in reversed(samples)}
    videos = list(dict.fromkeys(sample.video for sample in samples))[:limit]
    with (console or Console(quiet=True)).bar("opening clips", len(videos), "clip") as bar:
        for video in videos:
            try:
                frames = read_clip(video, sampling).frames
                shapes[video] = frames.shape[:3]
            except UserError as error:
                report.problems.append(Problem(first_of[video].id, str(error)))
            bar.advance()
    part = "" if limit is None or len(first_of) <= limit else f" of {len(first_of)}"
    report.lines.append(("clips opened", f"{len(shapes)}{part} readable", f"{len(report.problems)} not"))
    if not shapes:
        report.faults.append(f"none of {len(videos)} clips can be read; the first: {report.problems[0].reason}")
    return shapes


def _student_tokens(recipe: EnhanceRecipe, data: Any, shapes: dict, report: Preflight) -> int:
    """The longest sample in tokens; 0 where the student's configuration cannot be read."""
    name = student_path(recipe.student.model)
    try:
        student, limit = light_student(name)
    except ModelError as error:
        report.faults.append(str(error))
        return 0
    longest, longest_id, visual_of, visual_counts, too_long = 0, "", {}, [], []
    for sample in [*data.train, *data.test][:TOKENIZED]:
        if sample.video not in shapes:
            continue
        shape = shapes[sample.video]
        visual = visual_of.setdefault(shape, student.num_video_tokens(*shape))
        try:
            text = student.prompt(sample.question, sample.options if recipe.evaluate.protocol == "letter" else ()).text
        except UserError:
            continue  # training and evaluation list such samples
        answers = max([sample.answer, *sample.options], key=len)
        total = len(student.tokenizer(text + answers)["input_ids"]) + visual
        if total > limit:
            too_long.append(Problem(sample.id, f"has {total} tokens, {visual} of them visual, more than the {limit} that {name} takes: "
                                               f"lower student.sampling.frames (visual tokens are never cut off), or shorten its text"))
            continue
        visual_counts.append(visual)
        if total > longest:
            longest, longest_id = total, sample.id
    if visual_counts:
        report.lines.append(("student tokens a sample", f"at most {longest}", f"{min(visual_counts)} to {max(visual_counts)} of "
                             f"them visual; longest: {longest_id}; the model takes {limit}"))
    elif too_long:
        report.faults.append(f"every sample is too long; the first, {too_long[0].id}, {too_long[0].reason}.")
    report.problems += too_long
    return longest


def light_student(name: str) -> tuple[Any, int]:
    """A student without its model, for prompts and token counts, and the longest sequence it takes."""
    from transformers import AutoConfig, AutoProcessor

    from vlm_hooks.families import known_families

    try:
        config = AutoConfig.from_pretrained(name)
        families = known_families()
        if config.model_type not in families:
            raise ModelError(f"The student {name} is of the family {config.model_type!r}; known: {', '.join(families)}.")
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"The student {name} cannot be read: {' '.join(str(error).split())[:300]}") from error
    student = families[config.model_type].Student(model=None, processor=processor, folder=name)
    return student, config.get_text_config().max_position_embeddings


def _memory(recipe: EnhanceRecipe, longest: int, report: Preflight) -> None:
    """Weights are exact; activations are the usual formula and only a rough guide."""
    from transformers import AutoConfig

    size = weights_bytes(student_path(recipe.student.model))
    if size is None:
        report.warnings.append(f"{recipe.student.model} is not on this machine yet: its memory and disk are not estimated")
        return
    if not longest:
        return
    text = AutoConfig.from_pretrained(student_path(recipe.student.model)).get_text_config()
    layers = 1 if recipe.training.gradient_checkpointing else text.num_hidden_layers
    per_token = ACTIVATIONS * text.hidden_size * (1 if recipe.training.bf16 else 2)
    # logits in float32 and their gradient dwarf small layers
    activations = recipe.training.batch_size * longest * (layers * per_token + 8 * text.vocab_size)
    one = TRAIN_COPIES * size + activations
    processes = min(recipe.parallel_arms, len(recipe.arms) * len(recipe.seeds) + 1)
    total = one * processes
    report.lines.append(("memory of training", f"about {total / MB:,.0f} MB", f"{processes} × (weights {size / MB:,.0f} MB × "
                         f"{TRAIN_COPIES} + activations {activations / MB:,.0f} MB), beside the libraries' own"))
    teacher = weights_bytes(teacher_path(recipe.teacher.model)) if _uses_teacher(recipe) else 0
    if teacher:
        report.lines.append(("memory of the teacher", f"at least {teacher / MB:,.0f} MB", "its weights"))
    have = machine_memory()
    if have and max(total, teacher or 0) > have:
        report.warnings.append(f"this machine has {have / MB:,.0f} MB: lower training.batch_size or parallel_arms, or set "
                               f"training.gradient_checkpointing")


def _uses_teacher(recipe: EnhanceRecipe) -> bool:
    return any(arm.source == "vdm" or arm.source in ("shuffled", "uniform") and arm.base == "vdm" for arm in recipe.arms)


def _disk(recipe: EnhanceRecipe, report: Preflight) -> None:
    size = weights_bytes(student_path(recipe.student.model))
    if size is None:
        return
    students = len(recipe.arms) * len(recipe.seeds)
    checkpoints = 2 * 3 * size if recipe.training.save_every else 0
    needed = students * size + checkpoints * min(recipe.parallel_arms, students)
    place = Path(recipe.output).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    report.lines.append(("disk for students", f"about {needed / MB:,.0f} MB", f"{students} exports of {size / MB:,.0f} MB; "
                         f"{free / MB:,.0f} MB free in {place}"))
    if needed > free:
        report.faults.append(f"{place} has {free / MB:,.0f} MB free, the students need {needed / MB:,.0f} MB: free some or set `output`.")


# ---- saying it -----------------------------------------------------------------------------------

def print_preflight(report: Preflight, console: Console) -> None:
    """Notes and warnings; raises UserError where the run could not work."""
    for what, much, stands_on in report.lines:
        console.note(f"{what}: {much} ({stands_on})")
    for warning in report.warnings:
        console.warn(warning)
    if report.faults:
        raise UserError("This run cannot work: " + " ".join(report.faults))


def validate(recipe: EnhanceRecipe, console: Console) -> bool:
    """`enhancer validate`: the whole preflight over all clips; False where the run could not work."""
    from enhancer.pipeline import data_root, read_data
    from enhancer.world.make import finished

    root = data_root(recipe)
    table = rich.table.Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    if recipe.world is not None and not finished(root, recipe.world):
        world = recipe.world
        console.print(f"The world is not made yet: the run will write {world.train_clips} training, {world.validation_clips} "
                      f"validation and {world.test_clips} test clips to {root}. Validate again after "
                      f"`enhancer world make` for counts per sample.", markup=False, highlight=False)
        report = Preflight()
        _disk(recipe, report)
    else:
        data = read_data(recipe)
        report = preflight(recipe, data, console=console)
        report.problems = data.problems + report.problems
        table.add_row("samples", f"{len(data.train)} to train on, {len(data.test)} to ask", str(root))
    for line in report.lines:
        table.add_row(*line)
    console.print(table)
    for problem in report.problems:
        console.warn(f"{problem.id}: {problem.reason}")
    for warning in report.warnings:
        console.warn(warning)
    for fault in report.faults:
        console.print(f"✗ {fault}", style="red", markup=False)
    if not report.faults:
        count = len(report.problems)
        left_out = f"; {count} sample{'s' if count > 1 else ''} would be left out" if count else ""
        console.print(f"✓ the recipe is valid and the run can start{left_out}", style="green", markup=False)
    return not report.faults
