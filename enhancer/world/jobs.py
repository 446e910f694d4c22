"""The two jobs that make the shipped models: `job: world_teacher` and `job: world_student`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from enhancer.console import Console
from enhancer.jobs import Job
from enhancer.recipe import option
from enhancer.runfolder import readable_write_errors
from enhancer.world.student import StudentTraining, train_student
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


@dataclass
class StudentRecipe:
    """Trains the small Qwen2.5-VL of the embedded world, which sees but does not read motion."""

    job: str = option("world_student", "which job the recipe describes", choices=("world_student",))
    name: str = option("world-student", "the run's name; its folder is <output>/<name>", pattern=NAME)
    output: str = option("runs", "folder that holds the run folders")
    threads: int = option(2, "CPU threads", min=1, max=1024)
    training: StudentTraining = option(StudentTraining())


def _run(recipe, console: Console, train, what: str) -> Path:
    import torch

    torch.set_num_threads(recipe.threads)
    folder = Path(recipe.output) / recipe.name
    with readable_write_errors(folder), console.bar(what) as bar:
        folder.mkdir(parents=True, exist_ok=True)
        model = train(folder, recipe.training, bar)
    console.print(f"{what}: {model}", markup=False)
    return folder


def run_teacher(recipe: TeacherRecipe, console: Console, fresh: bool = False) -> Path:
    return _run(recipe, console, train_teacher, "teacher")


def run_student(recipe: StudentRecipe, console: Console, fresh: bool = False) -> Path:
    return _run(recipe, console, train_student, "student")


def validate(recipe, console: Console) -> bool:
    world = recipe.training.world
    console.print(f"{recipe.name}: {world.train_clips} clips of {world.frames} frames of {world.height} x {world.width}, "
                  f"{recipe.training.steps} steps", markup=False)
    return True


JOBS = {
    "world_teacher": Job(TeacherRecipe, run_teacher, validate),
    "world_student": Job(StudentRecipe, run_student, validate),
}
