"""The two jobs that make the shipped models: `job: world_teacher` and `job: world_student`."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from enhancer.console import Console
from enhancer.jobs import Job
from enhancer.recipe import option
from enhancer.runfolder import RunFolder, existing_folder, readable_write_errors
from enhancer.world.make import make_world
from enhancer.world.student import CACHE, StudentTraining, train_student
from enhancer.world.teacher import TeacherTraining, train_teacher

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


@dataclass
class TeacherRecipe:
    """Trains the small CogVideoX of the embedded world."""

    job: str = option("world_teacher", "which job the recipe describes", choices=("world_teacher",))
    name: str = option("world-teacher", "the run's name; its folder is <output>/<name>", pattern=NAME)
    output: str = option("runs", "folder that holds the run folders")
    threads: int = option(2, "CPU threads", min=1, max=1024)
    training: TeacherTraining = option(TeacherTraining())

    def check(self) -> list[str]:
        """Faults between keys, as sentences with the dotted path."""
        return self.training.check()


@dataclass
class StudentRecipe:
    """Trains the small Qwen2.5-VL of the embedded world, which sees but does not read motion."""

    job: str = option("world_student", "which job the recipe describes", choices=("world_student",))
    name: str = option("world-student", "the run's name; its folder is <output>/<name>", pattern=NAME)
    output: str = option("runs", "folder that holds the run folders")
    threads: int = option(2, "CPU threads", min=1, max=1024)
    training: StudentTraining = option(StudentTraining())

    def check(self) -> list[str]:
        """Faults between keys, as sentences with the dotted path."""
        return self.training.check()


def _run(recipe, console: Console, train, fresh: bool) -> Path:
    """Trains in a run folder; the same command continues, another recipe in the same folder is refused."""
    import torch

    torch.set_num_threads(recipe.threads)
    run = RunFolder.open(Path(recipe.output) / recipe.name, recipe, fresh=fresh)
    status = "failed"
    try:
        with run.step("training"), readable_write_errors(run.folder), console.bar(recipe.name) as bar:
            model = train(run.folder, recipe.training, bar)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        run.close(status)
    console.print(f"model: {model}", markup=False)
    return run.folder


def run_teacher(recipe: TeacherRecipe, console: Console, fresh: bool = False) -> Path:
    return _run(recipe, console, train_teacher, fresh)


def run_student(recipe: StudentRecipe, console: Console, fresh: bool = False) -> Path:
    return _run(recipe, console, train_student, fresh)


def validate(recipe: TeacherRecipe | StudentRecipe, console: Console) -> bool:
    """Says what the training would read, write and hold, from a few clips that are made to look at."""
    world, folder = recipe.training.world, Path(recipe.output) / recipe.name
    faults = world.check()
    if not faults:
        rounds = len(getattr(recipe.training, "rounds", [None]))
        clips = rounds * (world.train_clips + world.validation_clips + world.test_clips)
        with tempfile.TemporaryDirectory(prefix="enhancer-look-") as look:
            make_world(Path(look), replace(world, train_clips=16, validation_clips=0, test_clips=0))
            needed = clips * sum(path.stat().st_size for path in Path(look).glob("videos/*.mp4")) / 16
        free = shutil.disk_usage(existing_folder(folder)).free
        decoded = world.train_clips * world.frames * world.height * world.width * 3
        console.print(f"clips to make: {clips:,} of {world.frames} frames of {world.height} x {world.width}\n"
                      f"disk for clips: about {needed / 2**20:,.0f} MB ({free / 2**20:,.0f} MB free in {existing_folder(folder)})\n"
                      f"decoded training clips in memory: at most {min(decoded, CACHE) / 2**20:,.0f} MB",
                      markup=False, highlight=False)
        if needed > free:
            faults.append(f"{existing_folder(folder)} has too little space free: free some, or set `output`.")
    for fault in faults:
        console.print(f"✗ {fault}", style="red", markup=False)
    if not faults:
        console.print("✓ the recipe is valid and the training can start", style="green", markup=False)
    return not faults


JOBS = {
    "world_teacher": Job(TeacherRecipe, run_teacher, validate),
    "world_student": Job(StudentRecipe, run_student, validate),
}
