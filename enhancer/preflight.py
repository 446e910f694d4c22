"""What a run would need, said before any model loads: tokens, memory, disk, missing or bad files.

Only configurations and tokenizers are read. Estimates name what they stand on.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rich.table

from enhancer.console import Console
from enhancer.data.files import assumed_rates
from enhancer.data.samples import Problem, Sample
from enhancer.launch import launch_faults, processes_of_training
from enhancer.memory import MB, device_memory
from enhancer.preflight_models import Models, check_further_teachers, resolve_models, teacher_costs
from enhancer.preflight_samples import TOKENIZED, footage_of, probe, student_tokens
from enhancer.recipe_schema import EnhanceRecipe
from enhancer.runfolder import existing_folder
from enhancer.shipped import torch_device, weights_bytes
from enhancer.sources import SourceSpec, shared_text
from enhancer.sources.oracle import ROWS
from enhancer.video.footage import files_of
from enhancer.video.guard import clip_reader
from vdm_priors.errors import UserError

FRAMES = 49  # of a clip, where the teacher is not there to say how many it was trained on
HEADER = 16384  # bytes of a stored prior beside its maps, at most about (the scores of all heads are in it)
LOOKED_AT = 16  # clips a split that are made to look at where the world is not made yet


@dataclass
class Preflight:
    """lines: (what, how much, what it stands on); warnings go on, faults stop the run; unchecked: models on the hub."""

    lines: list[tuple[str, str, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


def preflight(recipe: EnhanceRecipe, data: Any, probe_limit: int | None = None, console: Console | None = None,
              offline: bool = False, unmade_clips: int = 0, trains: bool = True, run: Path | None = None) -> Preflight:
    """Estimates for read data. probe_limit: how many clips are opened (None: all).

    offline: a student that only the hub knows, out of reach now, is a warning and not a fault.
    unmade_clips: how many clips the run will write, of which `data` holds a few for a look.
    trains: False where the run ends with its priors, so that students need no disk.
    run: the folder whose quarantine list is kept; None lists nothing.
    """
    from enhancer.extraction import needed_sources

    report = Preflight()
    sources = needed_sources(recipe)
    models = resolve_models(recipe, report, uses_teacher=SourceSpec("vdm") in sources)
    if models.skeleton is not None:
        teacher_costs(recipe.teacher, models.skeleton, report)
    check_further_teachers(recipe, report)
    samples = [*data.train, *data.test]
    read = clip_reader(recipe.data.timeout, run)
    report.warnings += assumed_rates(video for sample in samples for video in sample.videos)
    looks = probe(samples, recipe.student.sampling.sampling(), read, report, probe_limit, console)
    longest = student_tokens(recipe, models.student, samples, looks, report, offline)
    _memory(recipe, models, *longest, report)
    clips = unmade_clips * _mean([sum(file.stat().st_size for file in files_of(footage_of(shown))) for shown in looks])
    count = len(data.train)
    if unmade_clips:
        count = min(recipe.world.train_clips, recipe.data.limit_train or recipe.world.train_clips)
    _disk(recipe, models, clips, len(sources) * count * _prior_bytes(recipe, models, data.train), trains, report)
    return report


def _mean(numbers: list[int]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


def _prior_bytes(recipe: EnhanceRecipe, models: Models, samples: list[Sample]) -> float:
    """At most what a prior's file takes: two bytes a word and cell, and its header."""
    from vdm_priors.estimate import taken_frames

    guess = (recipe.teacher.sampling.frames or FRAMES) * ROWS**2
    cells = guess
    if models.skeleton is not None:
        size = recipe.teacher.size
        frames = taken_frames(models.skeleton, recipe.teacher.sampling.frames)
        cells = models.skeleton.token_grid(range(frames), float(frames), size=tuple(size) if size else None).num_tokens
    words = [len(shared_text(sample, recipe.teacher.text).split()) for sample in samples[:TOKENIZED]]
    return 2 * cells * _mean(words) + HEADER


def _memory(recipe: EnhanceRecipe, models: Models, longest: int, visual: int, report: Preflight) -> None:
    """What a training takes on each device, by the configuration (training_memory)."""
    from enhancer.training_memory import skeleton_student, training_memory

    report.faults += launch_faults(recipe.training)
    if models.student is None or not longest:
        return
    settings, processes = recipe.training, processes_of_training(recipe.training)
    cost = training_memory(skeleton_student(models.student), settings, recipe.student.dtype, longest, visual, processes)
    spread = "" if processes == 1 else f", sharded over {processes} processes" if settings.sharded \
        else f", whole in each of {processes} processes"
    parts = [("weights", cost.weights), ("gradients", cost.gradients), ("optimizer", cost.optimizer),
             ("activations", cost.activations), ("a layer's backward", cost.passing), ("logits", cost.logits),
             ("gathered", cost.gathered)]
    listed = " + ".join(f"{name} {size / MB:,.0f}" for name, size in parts if size)
    report.lines.append(("memory of training", f"about {cost.total / MB:,.0f} MB a process",
                         f"{listed} MB{spread}; gradients come as activations go; beside the libraries' own and what "
                         f"an allocator keeps of freed blocks"))
    report.lines.append(("trained parameters", f"{cost.trained / 1e6:,.1f} million",
                         f"of {cost.parameters / 1e6:,.1f} million"))
    on_gpu, have = torch_device(recipe.device) != "cpu", device_memory()
    at_once = 1 if on_gpu else max(processes, min(recipe.parallel_arms, len(recipe.arms) * len(recipe.seeds) + 1))
    if have and cost.total * at_once > have:
        report.warnings.append(f"{'a GPU' if on_gpu else 'this machine'} has {have / MB:,.0f} MB: lower "
                               f"training.batch_size (and raise training.accumulate) or parallel_arms, or set "
                               f"training.gradient_checkpointing, training.lora or training.fsdp")


def _disk(recipe: EnhanceRecipe, models: Models, clips: float, priors: float, trains: bool,
          report: Preflight) -> None:
    """Holds what is free against the clips to be written, the priors (bytes each) and the exported students."""
    place = existing_folder(Path(recipe.output))
    if not place.is_dir() or not os.access(place, os.W_OK):
        fault = "read-only" if place.is_dir() else "a file"
        report.faults.append(f"{recipe.output} cannot be written: {place} is {fault}. Set `output` to a folder that "
                             f"you may write to.")
        return
    free = shutil.disk_usage(place).free
    needed = 0.0
    if clips:
        report.lines.append(("disk for clips", f"about {clips / MB:,.1f} MB", "from a few that were made to look at"))
        needed += clips
    if priors and existing_folder(Path(recipe.teacher.store or place)).stat().st_dev == place.stat().st_dev:
        report.lines.append(("disk for priors", f"at most {priors / MB:,.1f} MB",
                             "two bytes a word and cell, less where they are there"))
        needed += priors
    size = weights_bytes(models.student) if trains and models.student else None
    if size is not None:
        students = len(recipe.arms) * len(recipe.seeds)
        checkpoints = 2 * 3 * size if recipe.training.save_every else 0
        kept = students * size + checkpoints * min(recipe.parallel_arms, students)
        report.lines.append(("disk for students", f"about {kept / MB:,.0f} MB",
                             f"{students} exports of {size / MB:,.0f} MB; {free / MB:,.0f} MB free in {place}"))
        needed += kept
    if needed > free:
        report.faults.append(f"{place} has {free / MB:,.0f} MB free, the run needs {needed / MB:,.0f} MB: free some or "
                             f"set `output`.")


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
    """`enhancer validate`: the whole preflight over all clips; False where the run could not start.

    Of a world that is not made yet a few clips are made in a temporary folder and looked at.
    """
    from enhancer.run_data import data_root, read_data
    from enhancer.world import make_world
    from enhancer.world.make import finished

    root = data_root(recipe)
    table = rich.table.Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    if recipe.world is None or finished(root, recipe.world):
        data = read_data(recipe)
        report = preflight(recipe, data, console=console, offline=True)
        table.add_row("samples", f"{len(data.train)} to train on, {len(data.test)} to ask", str(root))
    else:
        world = recipe.world
        console.print(f"The world is not made yet: the run will write {world.train_clips} training, "
                      f"{world.validation_clips} validation and {world.test_clips} test clips to {root}. A few like "
                      f"them were made to look at.", markup=False, highlight=False)
        with tempfile.TemporaryDirectory(prefix="enhancer-look-") as folder:
            few = dataclasses.replace(world, train_clips=min(world.train_clips, LOOKED_AT), validation_clips=0,
                                      test_clips=min(world.test_clips, LOOKED_AT))
            make_world(Path(folder), few)
            data = read_data(dataclasses.replace(recipe, world=few, data=dataclasses.replace(recipe.data, root=folder)))
            report = preflight(recipe, data, console=console, offline=True,
                               unmade_clips=world.train_clips + world.validation_clips + world.test_clips)
    report.problems = data.problems + report.problems
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
        hub = " and ".join(report.unchecked)
        provided = f", provided that {hub} can be had from the hub" if hub else ""
        console.print(f"✓ the recipe is valid and the run can start{provided}{left_out}", style="green", markup=False)
    return not report.faults
