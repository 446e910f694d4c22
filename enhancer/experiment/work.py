"""Worker: `python -m enhancer.experiment.work ASKED_FOLDER SEED KEEP GPU` (`-`: a base model's seed, any GPU).

Trains one student of the pool, unless that is done, and asks it the questions, unless that is done. Another process
that has begun the same student is waited for, so that any number of experiments may share a pool.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from enhancer.console import Console
from enhancer.processes import COUNT, LOCAL, RANK

KEPT = "keep"


def finish_student(asked: Path, seed: int | None, console: Console, keep: bool = True) -> None:
    """Trains and asks the student of `asked` (a folder of the pool) and `seed`; None is the base model.

    keep: whether its weights stay.
    """
    import torch
    import yaml

    from enhancer.arms import is_trained, loaded_student, train_arm
    from enhancer.evaluation.multiple_choice import evaluate
    from enhancer.evaluation.scores import summarise
    from enhancer.experiment.pool import answered_at, trained_at
    from enhancer.pipeline import read_data
    from enhancer.processes import one_at_a_time
    from enhancer.recipe import build
    from enhancer.recipe_schema import EnhanceRecipe
    from enhancer.runfolder import read_json, write_json, write_lines
    from enhancer.shipped import quiet_libraries, student_path
    from enhancer.video.clip import FrameCache
    from enhancer.video.guard import clip_reader

    quiet_libraries()
    recipe = build(
        EnhanceRecipe, yaml.safe_load((asked / "recipe.yaml").read_text(encoding="utf-8")), str(asked / "recipe.yaml")
    )
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
            problems = train_arm(folder, recipe, arm, seed, [s for s in data.train if s.id in ids], console)
            if problems:
                write_json(place / "left_out.json", [vars(problem) for problem in problems])
        model = student_path(recipe.student.model) if seed is None else str(place / "model")
        with console.bar("evaluate", len(data.test), "question") as bar:
            rows = evaluate(
                loaded_student(model, recipe),
                data.test,
                sampling=recipe.student.sampling.sampling(),
                frame_cache=FrameCache(read=clip_reader(recipe.data.timeout, folder)),
                batch_size=recipe.evaluate.batch_size,
                protocol=recipe.evaluate.protocol,
                progress=bar,
            )
        write_lines(answered / "answers.jsonl", rows)
        write_json(answered / "scores.json", summarise(rows))
        if seed is not None and not keep:
            shutil.rmtree(place / "model", ignore_errors=True)


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
