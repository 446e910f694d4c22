"""What each way of harvesting costs and gives: a table over the world's clips, for choosing an extraction.

For steps × memory × guidance × where it is harvested (denoise, inversion, noise): PSNR of the reconstruction, AUC of
the priors' nouns and motion words against the ground truth for each direction of the map, and CPU seconds a clip.

A cell is one such way. A few clips at a time go through all cells, and what is measured is stored at once: a second
call goes on with the rest, also with more clips. Cells are compared on the clips that all of them have. Guidance and
memory exist while denoising only, so the other two have one cell a number of steps.
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
from enhancer.world.measure import word_aucs
from enhancer.world.truth import WorldTruth
from vdm_priors.errors import UserError
from vdm_priors.extract import ExtractionSettings, extract_directions
from vdm_priors.harvest import DIRECTIONS

STEPS, GUIDANCES = (2, 5, 10, 25), (1.0, 3.0, 6.0)
ABOUT_THINGS = ("MR", "LM", "AO", "RC")  # question types that name a thing
MEMORY = {True: "on", "kept": "kept", False: "off"}  # as the table says it
KINDS = ("nouns", "motion")  # of words
BATCH = 8  # clips
DRAWS = 2000  # of clips, for an interval
FORMAT = "fidelity-2"


@dataclass(frozen=True)
class Cell:
    """One way of harvesting; memory (of a forward, or kept from the inversion) and guidance where it denoises only."""

    steps: int
    harvest_at: str
    memory: bool | str | None = None  # a key of MEMORY
    guidance: float | None = None

    @property
    def name(self) -> str:
        parts = [self.harvest_at, f"{self.steps} step" + "s" * (self.steps > 1)]
        if self.memory is not None:
            parts += [{True: "memory", False: "no memory"}.get(self.memory, "kept memory"), f"guidance {self.guidance:g}"]
        return ", ".join(parts)

    def settings(self, base: ExtractionSettings) -> ExtractionSettings:
        """Of the extraction; a reconstruction is made and decoded where it is part of the way itself."""
        denoises = self.harvest_at == "denoise"
        own = {"memory": bool(self.memory), "guidance": self.guidance} if denoises else {}
        if self.memory == "kept":
            own["memory_from"] = "inversion"
        return replace(base, steps=self.steps, harvest_at=self.harvest_at, reconstruction=denoises, **own)


def cells(steps: Iterable[int] = STEPS, guidances: Iterable[float] = GUIDANCES) -> list[Cell]:
    """The whole table, cheap rows first."""
    guidances, found = list(guidances), []
    for count in steps:
        found += [Cell(count, "noise"), Cell(count, "inversion")]
        found += [Cell(count, "denoise", memory, guidance) for memory, guidance in product(MEMORY, guidances)]
    return found


def measure_cells(
    teacher: Any, world: Path, truth: WorldTruth, wanted: list[Cell], out: Path, clips: int = 48,
    settings: ExtractionSettings | None = None, progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Measures what `out` lacks of the cells on the first `clips` test clips about things; returns and writes all.

    settings: what the cells leave open (heads, masks, seed); words are all kept unless they say otherwise. Writes
    `out` after every batch of a cell, and the table beside it as Markdown. Raises UserError where `out` holds another
    measurement.
    """
    base = settings or ExtractionSettings(token_selection=False)
    rows = [row for row in json.loads((world / "test.json").read_text(encoding="utf-8"))
            if row["question_type"] in ABOUT_THINGS][:clips]
    if not rows:
        raise UserError(f"{world / 'test.json'} has no question about a thing ({', '.join(ABOUT_THINGS)}): make a "
                        f"world with such questions.")
    document = _document(out, {"format": FORMAT, "teacher": teacher.fingerprint(), "world": world.resolve().name,
                               "settings": asdict(base)})
    for cell in wanted:
        document["cells"].setdefault(cell.name, {**asdict(cell), "clips": {}})
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    for number, (batch, cell) in enumerate(product(batches, wanted)):
        if progress:
            progress(number, len(batches) * len(wanted), cell.name)
        measured = document["cells"][cell.name]["clips"]
        missing = [row for row in batch if row["id"] not in measured]
        if missing:
            measured.update(_measured(teacher, missing, world, truth, cell.settings(base)))
            write_json(out, document)
            write_text(out.with_suffix(".md"), markdown(document))
    if progress:
        progress(len(batches) * len(wanted), len(batches) * len(wanted), "")
    return document


def _document(out: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """What `out` holds, or a new one. Raises UserError if it is of another teacher, world, clips or settings."""
    if not out.is_file() or not out.stat().st_size:
        return {**measured, "threads": torch.get_num_threads(), "cells": {}}
    try:
        document = json.loads(out.read_text(encoding="utf-8"))
        # options that came later stand at their defaults
        document["settings"] = {**asdict(ExtractionSettings()), **document.get("settings", {})}
        differing = [key for key, value in measured.items() if document.get(key) != value]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{out} is no fidelity table ({error}): give another file.") from error
    if differing:
        raise UserError(f"{out} holds figures that differ in {', '.join(differing)}: give another file, or delete it.")
    return document


def _measured(teacher: Any, rows: list[dict], world: Path, truth: WorldTruth, settings: ExtractionSettings) -> dict:
    """By clip: psnr_db, cpu_seconds, and every word's AUC by direction: {"t2v": {"nouns": [...], "motion": [...]}}.

    One harvest serves all directions. CPU seconds of all threads end with the last step: choosing heads and words and
    decoding the reconstruction cost every cell the same. Other work on the machine hardly changes them.
    """
    clips = [read_clip(world / row["video"], Sampling(frames=teacher.trained_frames)) for row in rows]
    texts = [row["conversations"][0]["value"].removeprefix("<video>\n") for row in rows]
    ends = [begun := time.process_time()]
    priors = extract_directions(teacher, clips, texts, settings, on_step=lambda *_: ends.append(time.process_time()))
    seconds = (ends[-1] - begun) / len(rows)
    found = {}
    for number, row in enumerate(rows):
        of_clip = {direction: priors[direction][number] for direction in DIRECTIONS}
        psnr = of_clip["t2v"].provenance["reconstruction"]["psnr_db"]
        found[row["id"]] = {
            "psnr_db": None if psnr is None else round(psnr, 3), "cpu_seconds": round(seconds, 4),
            **{direction: {kind: [None if np.isnan(auc) else round(auc, 5) for auc in aucs]
                           for kind, aucs in word_aucs(prior, row["video"], truth).items()}
               for direction, prior in of_clip.items()}}
    return found


# ---- the table -----------------------------------------------------------------------------------

def shared_clips(document: dict[str, Any]) -> list[str]:
    """The clips that every cell has that was begun."""
    begun = [cell["clips"] for cell in document["cells"].values() if cell["clips"]]
    return [clip for clip in begun[0] if all(clip in of_cell for of_cell in begun)] if begun else []


def figures(cell: dict[str, Any], clips: list[str]) -> dict[str, Any]:
    """Means of a cell over these clips: psnr_db (None where nothing is denoised), cpu_seconds, and, by direction and
    kind of word, auc with its 95% interval: {"t2v": {"nouns": {"auc", "low", "high", "n"}, ...}, ...}; None without
    words.
    """
    measured = [cell["clips"][clip] for clip in clips]
    psnr = [of_clip["psnr_db"] for of_clip in measured]
    return {
        "psnr_db": None if None in psnr else float(np.mean(psnr)),
        "cpu_seconds": float(np.mean([of_clip["cpu_seconds"] for of_clip in measured])),
        **{direction: {kind: _mean_auc([of_clip[direction][kind] for of_clip in measured]) for kind in KINDS}
           for direction in DIRECTIONS}}


def _mean_auc(of_clips: list[list[float | None]]) -> dict[str, Any]:
    """Mean over words; the interval is a percentile bootstrap over clips, whose words are not independent."""
    known = [[auc for auc in aucs if auc is not None] for aucs in of_clips]
    sums, counts = np.array([sum(aucs) for aucs in known]), np.array([len(aucs) for aucs in known])
    if not counts.sum():
        return {"auc": None, "low": None, "high": None, "n": 0}
    drawn = np.random.default_rng(0).integers(len(known), size=(DRAWS, len(known)))
    means = sums[drawn].sum(axis=1) / np.maximum(counts[drawn].sum(axis=1), 1)
    low, high = np.percentile(means[counts[drawn].sum(axis=1) > 0], [2.5, 97.5])
    return {"auc": float(sums.sum() / counts.sum()), "low": float(low), "high": float(high), "n": int(counts.sum())}


def difference(
    document: dict[str, Any], first: tuple[str, str], second: tuple[str, str], kind: str = "nouns"
) -> dict[str, float]:
    """Mean AUC of one way, (name of the cell, direction), minus another's, paired over the clips that both have.

    {"difference", "low", "high"}: a 95% percentile bootstrap over clips. ValueError where they share no such word.
    """
    cells = [document["cells"][name]["clips"] for name, _ in (first, second)]
    values = [
        [[auc for auc in of_cell[clip][direction][kind] if auc is not None] for clip in cells[0] if clip in cells[1]]
        for of_cell, (_, direction) in zip(cells, (first, second), strict=True)]
    sums, counts = (np.array([[of(aucs) for aucs in of_way] for of_way in values]) for of in (sum, len))
    if not counts.all(axis=0).any():
        raise ValueError(f"difference: {first} and {second} share no {kind}.")
    drawn = np.random.default_rng(0).integers(sums.shape[1], size=(DRAWS, sums.shape[1]))
    mine, other = (sums[way][drawn].sum(axis=1) / np.maximum(counts[way][drawn].sum(axis=1), 1) for way in (0, 1))
    low, high = np.percentile(mine - other, [2.5, 97.5])
    means = sums.sum(axis=1) / counts.sum(axis=1)
    return {"difference": float(means[0] - means[1]), "low": float(low), "high": float(high)}


def markdown(document: dict[str, Any]) -> str:
    """The table: AUC ×100 of nouns / motion words, chance 50."""
    clips = shared_clips(document)
    lines = [
        "| harvested at | steps | memory | guidance | PSNR dB | " + " | ".join(DIRECTIONS) + " | CPU s a clip |",
        "|---|--:|---|--:|--:|" + "--:|" * len(DIRECTIONS) + "--:|",
    ]
    half_widths: dict[str, list[float]] = {kind: [] for kind in KINDS}
    words = dict.fromkeys(KINDS, 0)
    for cell in document["cells"].values():
        if not cell["clips"]:
            continue
        found = figures(cell, clips)
        memory = MEMORY.get(cell["memory"], "")
        guidance = "" if cell["guidance"] is None else f"{cell['guidance']:g}"
        psnr = "" if found["psnr_db"] is None else f"{found['psnr_db']:.1f}"
        aucs = (" / ".join(_percent(found[direction][kind]["auc"]) for kind in KINDS) for direction in DIRECTIONS)
        lines.append(f"| {cell['harvest_at']} | {cell['steps']} | {memory} | {guidance} | {psnr} | "
                     + " | ".join(aucs) + f" | {found['cpu_seconds']:.2f} |")
        for direction, kind in product(DIRECTIONS, KINDS):
            of = found[direction][kind]
            words[kind] = of["n"]
            half_widths[kind] += [] if of["auc"] is None else [(of["high"] - of["low"]) / 2]
    threads = "one thread" if document["threads"] == 1 else f"{document['threads']} threads"
    widths = " and ".join(f"±{100 * np.median(half_widths[kind]):.0f} ({words[kind]} {name})"
                          for kind, name in zip(KINDS, ("nouns", "motion words"), strict=True) if half_widths[kind])
    lines += ["", f"{len(clips)} test clips, {threads}. AUC × 100 of nouns / motion words, chance 50; 95% intervals, "
                  f"over clips, are about {widths}. Seconds are to the last step, all directions harvested."]
    return "\n".join(lines) + "\n"


def _percent(auc: float | None) -> str:
    return "–" if auc is None else f"{100 * auc:.1f}"
