"""Worker process: `python -m enhancer.pipeline_arm RUN_FOLDER ARM SEED [--no-evaluate]` (ARM `base` has no seed: `-`).

Started by `enhancer run` where parallel_arms > 1; speaks to it as enhancer.workers says.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from enhancer.runfolder import peak_memory_mb
from enhancer.workers import WorkerConsole


def main(arguments: list[str]) -> int:
    """Trains and evaluates one student of a run; 0 where it is finished."""
    console = WorkerConsole()
    try:
        from enhancer.pipeline import run_student  # heavy; its faults shall reach the parent

        run, arm, seed = Path(arguments[0]), arguments[1], None if arguments[2] == "-" else int(arguments[2])
        run_student(run, arm, seed, console, evaluate="--no-evaluate" not in arguments[3:])
        console.send(peak_mb=peak_memory_mb())
        return 0
    except BrokenPipeError:  # the parent is gone
        os._exit(1)
    except Exception as error:
        from vdm_priors.errors import UserError

        if not isinstance(error, UserError):
            traceback.print_exc()
            console.send(error=f"{type(error).__name__}: {error} (traceback in its log.txt)")
        else:
            console.send(error=str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
