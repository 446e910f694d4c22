"""Motion read in a process of its own, with a time limit, as enhancer/video/guard.py does for clips.

    motion = motion_reader(60.0, run_folder)
    field, energy = motion(path, 0.0, None, energy=True)

Run as a program, this module is that process. Its quarantine list is its own: a file whose motion takes too long to
read may well be decoded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from sys import executable
from typing import Any

import numpy as np

from enhancer.video.clip import regular_file
from enhancer.video.codec.field import MotionField
from enhancer.video.codec.reading import read_motion
from enhancer.video.codec.residual import energy_map
from enhancer.video.decoder import Answer, main
from enhancer.video.guard import Guard
from enhancer.video.quarantine import Quarantine

QUARANTINE = "quarantine_motion.jsonl"  # in the run folder
PROCESS = (executable, "-m", "enhancer.video.codec.guarded")

Motion = tuple[MotionField, np.ndarray | None]  # a field and, where wanted, its energy_map


def motion_reader(timeout: float | None, folder: Path | None = None) -> Callable[..., Motion]:
    """What reads the motion of a run whose folder keeps the quarantine list (None: in memory).

    timeout: seconds a file; None: read_with_energy itself.
    """
    if timeout is None:
        return read_with_energy
    return GuardedMotion(timeout, Quarantine(None if folder is None else Path(folder) / QUARANTINE))


def read_with_energy(path: Path, start: float = 0.0, end: float | None = None, *, energy: bool = False,
                     **how: Any) -> Motion:
    """read_motion, and with `energy` the field's energy_map; `how` are read_motion's other arguments."""
    field = read_motion(path, start, end, **how)
    return field, energy_map(field) if energy else None


class GuardedMotion(Guard):
    """read_with_energy in another process. timeout: seconds a file."""

    def __init__(self, timeout: float, quarantine: Quarantine, command: Sequence[str] = PROCESS,
                 limit: str = "data.timeout") -> None:
        super().__init__(timeout, quarantine, command, "reading its motion", limit)

    def __call__(self, path: Path, start: float = 0.0, end: float | None = None, *, energy: bool = False,
                 **how: Any) -> Motion:
        """As read_with_energy; ClipError also for a file that is or comes on the quarantine list."""
        path = regular_file(path)
        request = {"path": str(path), "start": start, "end": end, "energy": energy, **how}
        return self.ask(path, json.dumps(request).encode(), _motion_of)


def answer(request: dict) -> Answer:
    """The motion that a request of GuardedMotion asks for."""
    field, energy = read_with_energy(Path(request.pop("path")), **request)
    values = {f.name: getattr(field, f.name) for f in dataclasses.fields(field)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    facts = {name: value for name, value in values.items() if name not in arrays}
    return {"field": {**facts, "path": str(field.path)}}, arrays if energy is None else {**arrays, "energy": energy}


def _motion_of(header: dict, arrays: dict[str, np.ndarray]) -> Motion:
    facts = header["field"]
    energy = arrays.pop("energy", None)
    return MotionField(**{**facts, "path": Path(facts["path"])}, **arrays), energy


if __name__ == "__main__":
    main(answer)
