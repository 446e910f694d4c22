"""Worker process: `python -m enhancer.pipeline_arm RUN_FOLDER ARM SEED [--no-evaluate]` (ARM `base` has no seed: `-`).

Started by `enhancer run` where parallel_arms > 1; speaks to it as enhancer.workers says.
"""

from __future__ import annotations

import sys
from pathlib import Path

from enhancer.console import Console
from enhancer.workers import serve


def main(arguments: list[str]) -> int:
    """Trains and evaluates one student of a run; 0 where it is finished."""
    def work(console: Console) -> None:
        from enhancer.pipeline import run_student  # heavy; its faults shall reach the parent

        run, arm, seed = Path(arguments[0]), arguments[1], None if arguments[2] == "-" else int(arguments[2])
        run_student(run, arm, seed, console, evaluate="--no-evaluate" not in arguments[3:])

    return serve(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
