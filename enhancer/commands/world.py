"""`enhancer world make | baselines | measure | fidelity`."""

from __future__ import annotations

import json
from pathlib import Path

import rich.table

from enhancer.console import Console
from enhancer.recipe import build
from enhancer.recipe_files import apply_override
from enhancer.runfolder import readable_write_errors
from enhancer.world import WorldSettings, make_world
from enhancer.world.text import TYPES
from vdm_priors.errors import RecipeError


def make(folder: Path, overrides: list[str], console: Console) -> None:
    """Makes a world with the settings given as KEY=VALUE."""
    settings = _settings(overrides)
    with readable_write_errors(folder), console.bar("making clips", unit="clip") as bar:
        make_world(folder, settings, progress=bar)
    console.print(f"{folder}: {settings.train_clips} training, {settings.validation_clips} validation and "
                  f"{settings.test_clips} test clips", markup=False)


def _settings(overrides: list[str]) -> WorldSettings:
    raw: dict = {}
    for override in overrides:
        apply_override(raw, override)
    return build(WorldSettings, raw, "the world's settings")


def baselines(overrides: list[str], questions: int, out: Path | None, console: Console) -> dict:
    """Prints accuracy per question type of the text-only and single-frame guesses."""
    from enhancer.world.baselines import baseline_table

    _check_writable(out)
    with console.bar("guessing", unit="baseline") as bar:
        rows = baseline_table(_settings(overrides), bar, test=questions)
    table = rich.table.Table(title="Accuracy without watching", title_justify="left")
    table.add_column("known")
    for kind in TYPES:
        table.add_column(kind, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{100 * row[kind]:.1f}" if kind in row else "" for kind in TYPES))
    console.print(table)
    _write(out, rows)
    return rows


def measure(folder: Path, teacher: str | None, student: str | None, clips: int, threads: int, out: Path | None,
            console: Console) -> dict:
    """Prints reconstruction and localisation of a teacher, and what a student sees, on the world's test clips."""
    import torch

    from enhancer.shipped import quiet_libraries, student_path, teacher_path
    from enhancer.world.measure import student_report, teacher_report
    from enhancer.world.truth import load_truth
    from vdm_priors.families import load_teacher
    from vlm_hooks.families import load_student

    _check_writable(out)
    quiet_libraries()
    truth = load_truth(folder)
    torch.set_num_threads(threads)
    report: dict = {}
    if teacher is not None:
        loaded = load_teacher(teacher_path(teacher))
        with console.bar("teacher", unit="clip") as bar:
            report["teacher"] = teacher_report(loaded, folder, truth, count=clips, progress=bar)
        _print_teacher(report["teacher"], console)
    if student is not None:
        with console.bar("student", unit="question") as bar:
            report["student"] = student_report(load_student(student_path(student)), folder, truth, progress=bar)
        _print_student(report["student"], console)
    _write(out, report)
    return report


def fidelity(folder: Path, teacher: str, clips: int, out: Path, steps: list[int], guidances: list[float], at: list[str],
             threads: int, console: Console) -> dict:
    """Measures the cells that `out` lacks and prints all of them."""
    import torch

    from enhancer.shipped import quiet_libraries, teacher_path
    from enhancer.world.fidelity import cells, measure_cells
    from enhancer.world.measure import HARVESTS
    from enhancer.world.truth import load_truth
    from vdm_priors.families import load_teacher

    unknown = [name for name in at if name not in HARVESTS]
    if unknown:
        raise RecipeError(f"--at must be one of {', '.join(HARVESTS)}, not {', '.join(unknown)}.")
    _check_writable(out)
    quiet_libraries()
    torch.set_num_threads(threads)
    truth = load_truth(folder)
    wanted = [cell for cell in cells(steps, guidances) if cell.harvest_at in at]
    with console.bar("fidelity", unit="cell") as bar:
        document = measure_cells(load_teacher(teacher_path(teacher)), folder, truth, wanted, out, clips, progress=bar)
    _print_fidelity(document, console)
    console.print(f"{out} and {out.with_suffix('.md')}", markup=False, soft_wrap=True)
    return document


def _print_fidelity(document: dict, console: Console) -> None:
    from enhancer.world.fidelity import KINDS, figures, shared_clips
    from vdm_priors.harvest import DIRECTIONS

    clips = shared_clips(document)
    table = rich.table.Table(title=f"{len(clips)} clips: AUC of nouns / motion words against their masks, chance 50",
                             title_justify="left")
    for column in ("harvested", "PSNR dB", *DIRECTIONS, "CPU s a clip"):
        table.add_column(column, justify="left" if column == "harvested" else "right")
    for name, cell in document["cells"].items():
        if not cell["clips"]:
            continue
        found = figures(cell, clips)
        aucs = (" / ".join("–" if found[d][kind]["auc"] is None else f"{100 * found[d][kind]['auc']:.1f}" for kind in KINDS)
                for d in DIRECTIONS)
        psnr = "" if found["psnr_db"] is None else f"{found['psnr_db']:.1f}"
        table.add_row(name, psnr, *aucs, f"{found['cpu_seconds']:.2f}")
    console.print(table)


def _print_teacher(report: dict, console: Console) -> None:
    from enhancer.world.measure import HARVESTS

    console.print(f"{report['clips']} test clips: VAE {report['vae_psnr_db']} dB, inversion and reconstruction "
                  f"{report['reconstruction_psnr_db']} dB", markup=False)
    table = rich.table.Table(title="Does the attention find the named thing? AUC against its mask, chance 50; best head: (layer.head)",
                             title_justify="left")
    for column in ("map", "harvested at", "mean of heads", "best head", "prior: nouns", "motion words"):
        table.add_column(column, justify="left" if column in ("map", "harvested at") else "right")
    for corner in ("t2v", "v2t"):
        for at in HARVESTS:
            layers, prior = report[f"heads_{at}"][corner], report[f"prior_{corner}_{at}"]
            heads = [value for layer in layers for value in layer]
            layer, head = divmod(heads.index(max(heads)), len(layers[0]))
            table.add_row(corner, at, f"{100 * sum(heads) / len(heads):.1f}", f"{100 * max(heads):.1f} ({layer}.{head})",
                          *(f"{100 * prior[kind]['auc']:.1f}" if prior[kind]["auc"] is not None else "" for kind in ("nouns", "motion")))
    console.print(table)
    count = len(report[f"heads_{HARVESTS[0]}"]["t2v"])
    title = "Which layers have a head that finds it? Best head's AUC; teacher.extraction.layers harvests some alone"
    table = rich.table.Table(title=title, title_justify="left")
    for column in ("map", "harvested at", *(f"layer {layer}" for layer in range(count))):
        table.add_column(column, justify="left" if column in ("map", "harvested at") else "right")
    for corner in ("t2v", "v2t"):
        for at in HARVESTS:
            table.add_row(corner, at, *(f"{100 * max(heads):.1f}" for heads in report[f"heads_{at}"][corner]))
    console.print(table)


def _print_student(report: dict, console: Console) -> None:
    table = rich.table.Table(title="What does the student answer rightly? Test clips, 95% intervals", title_justify="left")
    for column in ("type", "questions", "chance", "accuracy", "interval"):
        table.add_column(column, justify="left" if column == "type" else "right")
    for kind, entry in sorted(report.items(), key=lambda pair: (pair[0] in TYPES, pair[0])):
        table.add_row(kind, str(entry["n"]), f"{100 * entry['chance']:.1f}", f"{100 * entry['accuracy']:.1f}",
                      f"{100 * entry['low']:.1f} to {100 * entry['high']:.1f}")
    console.print(table)


def _check_writable(out: Path | None) -> None:
    """Before minutes of work: can the file be written?"""
    if out is not None:
        with readable_write_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            out.open("a").close()


def _write(out: Path | None, document: dict) -> None:
    if out is not None:
        with readable_write_errors(out):
            out.write_text(json.dumps(document, indent=1), encoding="utf-8")
