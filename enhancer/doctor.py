"""`enhancer doctor`: whether this machine can do the work, line by line."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import rich.table
from rich.markup import escape

from enhancer.console import Console
from enhancer.recipe_files import list_recipes, recipes_folder
from enhancer.runfolder import machine, machine_memory, versions
from enhancer.shipped import WORLD, student_path, teacher_path, weights_bytes
from vdm_priors.errors import UserError

NEEDED = ("torch", "torchvision", "transformers", "diffusers", "accelerate", "av", "safetensors", "omegaconf", "cv2")
LEAST_MEMORY_GB, LEAST_DISK_GB = 4, 2
MARKS = {"ok": "[green]✓[/green]", "warn": "[yellow]![/yellow]", "fail": "[red]✗[/red]"}

Finding = tuple[str, str]  # (ok | warn | fail, sentence)


def examine(output: Path, console: Console) -> bool:
    """Prints one line a check; False if one failed."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python), ("packages", _packages), ("machine", _machine), ("accelerator", _accelerator),
        ("video", _video), ("shipped models", _models), ("recipes", _recipes), ("output", lambda: _output(output))]
    table = rich.table.Table(show_header=False, box=None, padding=(0, 1, 0, 0))
    failed = False
    for name, check in checks:
        try:
            state, sentence = check()
        except Exception as error:  # a check that breaks is itself a finding
            state, sentence = "fail", f"{type(error).__name__}: {error}"
        failed |= state == "fail"
        table.add_row(MARKS[state], name, escape(sentence))
    console.print(table)
    return not failed


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return ("ok", version) if sys.version_info >= (3, 11) else ("fail", f"{version}; 3.11 or newer is needed")


def _packages() -> Finding:
    broken = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken binary raises more than ImportError
            broken.append(f"{name} ({type(error).__name__}: {error})")
    if broken:
        return "fail", f"cannot be imported: {'; '.join(broken)}. Install the package again in a clean environment."
    return "ok", ", ".join(f"{name} {version}" for name, version in versions().items() if name != "python")


def _machine() -> Finding:
    gigabytes = machine_memory() / 2**30
    if gigabytes < LEAST_MEMORY_GB:
        return "warn", f"{machine()}; the quickstart needs up to {LEAST_MEMORY_GB} GB of memory"
    return "ok", machine()


def _accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        return "ok", f"{torch.cuda.get_device_name(0)} (CUDA {torch.version.cuda})"
    return "ok", "none: the shipped models run on the CPU; large ones need a GPU"


def _video() -> Finding:
    import av

    missing = [codec for codec in ("h264", "hevc", "mpeg4", "vp9") if codec not in av.codecs_available]
    if "libx264" not in av.codecs_available:
        return "warn", "H.264 can be read but not written, so `enhancer world make` does not work"
    return ("warn", f"no decoder for {', '.join(missing)}") if missing else ("ok", "H.264, HEVC, MPEG-4 and VP9 are read")


def _models() -> Finding:
    try:
        teacher, student = teacher_path(WORLD), student_path(WORLD)
    except UserError as error:
        return "warn", str(error)
    sizes = [weights_bytes(path) or 0 for path in (teacher, student)]
    if not all(sizes):
        return "warn", f"the shipped models have no weights in {Path(teacher).parent}"
    return "ok", f"teacher {sizes[0] / 1e6:.1f} MB, student {sizes[1] / 1e6:.1f} MB"


def _recipes() -> Finding:
    found = list_recipes()
    return ("ok", f"{len(found)} in {recipes_folder()}") if found else ("fail", f"none in {recipes_folder()}")


def _output(output: Path) -> Finding:
    place = output.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        return "fail", f"{place} is a file, so {output} cannot be written; choose another folder with `output=`"
    if not os.access(place, os.W_OK):
        return "fail", f"{place} cannot be written; choose another folder with `output=`"
    free = shutil.disk_usage(place).free / 2**30
    state = "ok" if free > LEAST_DISK_GB else "warn"
    return state, f"{output} can be written, {free:.1f} GB free"
