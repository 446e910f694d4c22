"""`enhancer export`: a student's folder made a checkpoint of its own."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np

from enhancer.console import Console
from enhancer.model_card import NAME as CARD
from enhancer.model_card import model_card
from enhancer.runfolder import RunFolder, readable_write_errors
from enhancer.shipped import quiet_libraries
from enhancer.video.clip import Clip
from vdm_priors.errors import ModelError, UserError


def export_model(run_folder: Path, to: Path, arm: str, seed: int | None, console: Console) -> Path:
    """Copies a student's folder, proves the copy (stock classes load it, with the arm's logits), adds a model card.

    Adapters were merged when the arm was trained. Nothing stays where that fails. Raises UserError for an unknown
    student or an existing folder, ModelError for a copy that does not load or answers otherwise.
    """
    quiet_libraries()
    RunFolder.existing(run_folder)
    students = sorted(path.parent for path in run_folder.glob("arms/*/seed*/train.json"))
    chosen = [place for place in students if place.parent.name == arm and (seed is None or place.name == f"seed{seed}")]
    if not chosen:
        have = ", ".join(f"{p.parent.name} {p.name}" for p in students) or "none yet"
        which = f"'{arm}'" + ("" if seed is None else f" of seed {seed}")
        raise UserError(f"{run_folder} has no trained student {which}; it has: {have}.")
    if to.exists():
        raise UserError(f"{to} exists already; give a new folder.")
    partial = to.with_name(f".{to.name}.part")
    try:
        with readable_write_errors(to):
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(chosen[0] / "model", partial)
            count, difference = _verified(chosen[0] / "model", partial)
            card = model_card(run_folder, chosen[0], to.name, difference)
            (partial / CARD).write_text(card, encoding="utf-8")
            partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    console.print(f"{to}: {count / 1e6:.1f} M parameters, loads with stock transformers (from_pretrained, "
                  f"AutoProcessor); largest difference of its logits from the arm's: {difference:g}", markup=False)
    return to


def _verified(arm: Path, exported: Path) -> tuple[int, float]:
    """Number of parameters, and the largest difference of logits on a clip of noise, of two folders of one student.

    Raises ModelError where stock classes cannot load the exported one, or it prepares or answers a clip otherwise.
    """
    import torch
    from transformers import AutoProcessor

    from vlm_hooks.export import prove_export
    from vlm_hooks.families import load_student

    student = load_student(arm)
    stock = copy.copy(student)  # with the exported processor instead
    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    clip = Clip(path=exported, frames=frames, times=[0.0, 0.25, 0.5, 0.75], duration=1.0)
    prompt = student.prompt("Which way does it move?").text
    try:
        stock.processor = AutoProcessor.from_pretrained(exported)
    except (OSError, ValueError) as error:
        raise ModelError(f"The processor exported to {exported} cannot be loaded with stock transformers: {error} "
                         f"Free disk space and export it again.") from error
    ours, theirs = (each.encode([clip], [prompt]).inputs for each in (student, stock))
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    if differing:
        raise ModelError(f"The processor exported to {exported} prepares a clip otherwise than the arm's "
                         f"({', '.join(differing)}): the copy is not usable; compare the two folders.")
    difference = prove_export(student, exported, [clip], [prompt])
    return sum(parameter.numel() for parameter in student.model.parameters()), difference
