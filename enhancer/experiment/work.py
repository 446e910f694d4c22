"""Worker: `python -m enhancer.experiment.work ASKED_FOLDER SEED KEEP GPU` (`-`: a base model's seed, any GPU).

Trains one student of the pool, unless that is done, and asks it the questions, unless that is done. Another process
that has begun the same student is waited for, so that any number of experiments may share a pool.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from enhancer.console import Console
from enhancer.processes import COUNT, LOCAL, RANK
from vdm_priors.errors import UserError

KEPT = "keep"


def finish_student(asked: Path, seed: int | None, console: Console, keep: bool = True) -> None:
    """Trains and asks the student of `asked` (a folder of the pool) and `seed`; None is the base model.

    keep: whether its weights stay.
    """
    import torch

    from enhancer.adapters.schema import AdapterRecipe
    from enhancer.arms import is_trained, train_arm
    from enhancer.evaluation.answering import ask
    from enhancer.evaluation.scores import summarise
    from enhancer.experiment import adapted
    from enhancer.experiment.pool import answered_at, trained_at
    from enhancer.run_data import read_data
    from enhancer.processes import one_at_a_time
    from enhancer.recipe_schema import EnhanceRecipe
    from enhancer.runfolder import read_json, write_json, write_lines
    from enhancer.shipped import quiet_libraries

    quiet_libraries()
    recipe = _kept(EnhanceRecipe, asked / "recipe.yaml")
    adapter = _kept(AdapterRecipe, asked / adapted.FILE) if (asked / adapted.FILE).is_file() else None
    torch.set_num_threads(recipe.threads)
    folder, answered, arm = asked.parents[1], answered_at(asked, seed), recipe.arms[0]
    place = trained_at(folder, recipe, seed)
    with one_at_a_time(place):
        if (answered / "scores.json").is_file():
            return
        data = read_data(recipe)
        if seed is not None:
            if is_trained(folder, arm.name, seed) and not (place / "model").is_dir():
                (place / "train.json").unlink()  # its weights were not kept, and other questions need them
            ids = set(read_json(folder / "train_ids.json", []))
            samples = [sample for sample in data.train if sample.id in ids]
            if adapter is None:
                problems = train_arm(folder, recipe, arm, seed, samples, console)
            else:
                problems = adapted.train_adapter(folder, recipe, adapter, seed, data.root, samples, console)
            if problems:
                write_json(place / "left_out.json", [vars(problem) for problem in problems])
        student, clips = _loaded(recipe, adapter, None if seed is None else place / "model", folder)
        sampling = recipe.student.sampling.sampling()
        with console.bar("evaluate", len(data.test), "question") as bar:
            rows = ask(student, data.test, recipe.evaluate, sampling, clips, bar)
        write_lines(answered / "answers.jsonl", rows)
        write_json(answered / "scores.json", {**summarise(rows), "clip_tokens": _tokens(student, clips, data.test, sampling)})
        if seed is not None and not keep:
            shutil.rmtree(place / "model", ignore_errors=True)


def _kept(schema: type, path: Path) -> Any:
    """A recipe that the pool keeps beside the answers."""
    import yaml

    from enhancer.recipe import build

    return build(schema, yaml.safe_load(path.read_text(encoding="utf-8")), str(path))


def _loaded(recipe: Any, adapter: Any, model: Path | None, folder: Path) -> tuple[Any, Any]:
    """The student and what reads its clips. model: its weights, None those before training, which take frames alone."""
    from enhancer.adapters.reading import ClipReader
    from enhancer.arms import loaded_student
    from enhancer.experiment.adapted import load_adapter
    from enhancer.shipped import student_path
    from enhancer.video.clip import FrameCache
    from enhancer.video.guard import clip_reader

    if adapter is not None and model is not None:
        return load_adapter(model, adapter).student, ClipReader(adapter.reading)
    frames = FrameCache(read=clip_reader(recipe.data.timeout, folder))
    return loaded_student(student_path(recipe.student.model) if model is None else str(model), recipe), frames


def _tokens(student: Any, clips: Any, samples: list, sampling: Any) -> int | None:
    """Tokens that the first clip that can be read takes in the student's sequence."""
    for sample in samples:
        try:
            return student.clip_tokens(clips.get(sample.video, sampling))
        except UserError:
            continue  # its answer says why
    return None


def main(arguments: list[str]) -> int:
    """The work of one process; 0 where the student is finished."""
    from enhancer.workers import serve

    asked, seed, keep, gpu = arguments
    for name in (*RANK, *COUNT, *LOCAL):
        os.environ.pop(name, None)  # of a launcher: its processes each train students of their own
    if gpu != "-":
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    return serve(lambda console: finish_student(Path(asked), None if seed == "-" else int(seed), console, keep == KEPT))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
