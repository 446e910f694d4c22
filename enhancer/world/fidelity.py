"""What each way of harvesting costs and gives: a table over the world's clips, for choosing an extraction.

For steps × memory × guidance × where it is harvested (denoise, inversion, noise): PSNR of the reconstruction, AUC of the
priors' nouns and motion words against the ground truth for each direction of the map, and seconds a clip.

A cell is one such setting. Its figures are stored as soon as it is measured, and a second call goes on with the rest.
Guidance and memory exist while denoising only, so the other two have one cell a number of steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from enhancer.runfolder import write_json, write_text
from enhancer.video.clip import Sampling, read_clip
from enhancer.world.measure import localisation
from enhancer.world.truth import WorldTruth
from vdm_priors.errors import UserError
from vdm_priors.extract import ExtractionSettings, extract_priors
from vdm_priors.harvest import DIRECTIONS

STEPS, GUIDANCES = (2, 5, 10, 25), (1.0, 3.0, 6.0)
ABOUT_THINGS = ("MR", "LM", "AO", "RC")  # question types that name a thing
BATCH = 16  # clips
FORMAT = "fidelity-1"


@dataclass(frozen=True)
class Cell:
    """One way of harvesting; memory and guidance are None where nothing is denoised."""

    steps: int
    harvest_at: str
    memory: bool | None = None
    guidance: float | None = None

    @property
    def name(self) -> str:
        parts = [self.harvest_at, f"{self.steps} step" + "s" * (self.steps > 1)]
        if self.memory is not None:
            parts += ["memory" if self.memory else "no memory", f"guidance {self.guidance:g}"]
        return ", ".join(parts)

    def settings(self, base: ExtractionSettings) -> ExtractionSettings:
        """Of the extraction; a reconstruction is made and decoded where it is part of the way itself."""
        denoises = self.harvest_at == "denoise"
        own = {"memory": self.memory, "guidance": self.guidance} if denoises else {}
        return replace(base, steps=self.steps, harvest_at=self.harvest_at, reconstruction=denoises, **own)


def cells(steps: Iterable[int] = STEPS, guidances: Iterable[float] = GUIDANCES) -> list[Cell]:
    """The whole table, cheap rows first."""
    guidances, found = list(guidances), []
    for count in steps:
        found += [Cell(count, "noise"), Cell(count, "inversion")]
        found += [Cell(count, "denoise", memory, guidance) for memory, guidance in product((True, False), guidances)]
    return found


def measure_cells(
    teacher: Any, world: Path, truth: WorldTruth, wanted: list[Cell], out: Path, clips: int = 48,
    settings: ExtractionSettings | None = None, progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Measures the cells that `out` lacks on the first `clips` test clips about things; returns and writes all.

    settings: what the cells leave open (heads, masks, seed); words are all kept unless they say otherwise. Writes
    `out` after every cell, and the table beside it as Markdown. Raises UserError where `out` holds another measurement.
    """
    base = settings or ExtractionSettings(token_selection=False)
    rows = [row for row in json.loads((world / "test.json").read_text(encoding="utf-8"))
            if row["question_type"] in ABOUT_THINGS][:clips]
    if not rows:
        raise UserError(f"{world / 'test.json'} has no question about a thing ({', '.join(ABOUT_THINGS)}): make a world "
                        f"with such questions.")
    document = _document(out, {"format": FORMAT, "teacher": teacher.fingerprint(), "world": world.resolve().name,
                               "clips": len(rows), "settings": asdict(base)})
    read = [read_clip(world / row["video"], Sampling(frames=teacher.trained_frames)) for row in rows]
    for done, cell in enumerate(wanted):
        if progress:
            progress(done, len(wanted), cell.name)
        if cell.name not in document["cells"]:
            document["cells"][cell.name] = {**asdict(cell), **_measured(teacher, rows, read, truth, cell.settings(base))}
            write_json(out, document)
            write_text(out.with_suffix(".md"), markdown(document))
    if progress:
        progress(len(wanted), len(wanted), "")
    return document


def _document(out: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """What `out` holds, or a new one. Raises UserError if it is of another teacher, world, clips or settings."""
    if not out.is_file() or not out.stat().st_size:
        return {**measured, "threads": torch.get_num_threads(), "cells": {}}
    try:
        document = json.loads(out.read_text(encoding="utf-8"))
        differing = [key for key, value in measured.items() if document.get(key) != value]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{out} is no fidelity table ({error}): give another file.") from error
    if differing:
        raise UserError(f"{out} holds figures that differ in {', '.join(differing)}: give another file, or delete it.")
    return document


def _measured(teacher: Any, rows: list[dict], read: list[Any], truth: WorldTruth, settings: ExtractionSettings) -> dict:
    """psnr_db, seconds a clip (t2v), and AUC and number of words by direction: {"t2v": {"nouns", "motion"}, ...}."""
    figures: dict[str, Any] = {}
    texts = [row["conversations"][0]["value"].removeprefix("<video>\n") for row in rows]
    for direction in DIRECTIONS:
        begun, priors = time.perf_counter(), []
        chosen = replace(settings, direction=direction, reconstruction=settings.reconstruction and direction == "t2v")
        for start in range(0, len(rows), BATCH):
            part = slice(start, start + BATCH)
            priors += extract_priors(teacher, read[part], texts[part], chosen)
        if direction == "t2v":
            figures["seconds"] = round((time.perf_counter() - begun) / len(rows), 3)
            found = [prior.provenance["reconstruction"]["psnr_db"] for prior in priors]
            figures["psnr_db"] = round(float(np.mean(found)), 2) if chosen.reconstruction else None
        figures[direction] = localisation(priors, [row["video"] for row in rows], truth)
    return figures


def markdown(document: dict[str, Any]) -> str:
    """The table: AUC ×100 of nouns / motion words, chance 50."""
    lines = [
        "| harvested at | steps | memory | guidance | PSNR dB | " + " | ".join(DIRECTIONS) + " | s a clip |",
        "|---|--:|---|--:|--:|" + "--:|" * len(DIRECTIONS) + "--:|",
    ]
    for cell in document["cells"].values():
        memory = {None: "", True: "on", False: "off"}[cell["memory"]]
        guidance = "" if cell["guidance"] is None else f"{cell['guidance']:g}"
        psnr = "" if cell["psnr_db"] is None else f"{cell['psnr_db']:.1f}"
        found = (" / ".join(_percent(cell[direction][kind]["auc"]) for kind in ("nouns", "motion"))
                 for direction in DIRECTIONS)
        lines.append(f"| {cell['harvest_at']} | {cell['steps']} | {memory} | {guidance} | {psnr} | "
                     + " | ".join(found) + f" | {cell['seconds']:.2f} |")
    threads = "one thread" if document["threads"] == 1 else f"{document['threads']} threads"
    lines += ["", f"{document['clips']} test clips, {threads}. AUC × 100 of nouns / motion words, chance 50; seconds are those "
                  f"of t2v, decoding of the reconstruction included."]
    return "\n".join(lines) + "\n"


def _percent(auc: float | None) -> str:
    return "–" if auc is None else f"{100 * auc:.1f}"
