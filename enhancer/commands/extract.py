"""`enhancer extract --video FILE --text TEXT`: one prior, and what can be said about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import rich.table
from rich.markup import escape

from enhancer.console import Console
from enhancer.data.samples import Sample
from enhancer.filling import fill_store
from enhancer.recipe import build, option
from enhancer.recipe_files import apply_override
from enhancer.recipe_schema import TeacherSettings
from enhancer.shipped import quiet_libraries, teacher_path, torch_device
from enhancer.sources import SourceContext, build_source
from vdm_priors.errors import RecipeError, UserError
from vdm_priors.fingerprint import fingerprint
from vdm_priors.prior import MotionPrior
from vdm_priors.store import PriorStore

SHOWN_WORDS = 10  # words without a prior that are named
SHOWN_HEADS = 8


@dataclass
class VideoExtraction:
    """The keys that may be changed on the command line."""

    teacher: TeacherSettings = option(TeacherSettings())
    device: str = option("auto", "where the teacher computes: auto takes a GPU if there is one",
                         pattern="auto|cpu|mps|cuda(:[0-9]+)?")
    threads: int = option(1, "CPU threads", min=1, max=1024)


def extract_video(
    video: Path, text: str, teacher: str | None, out: Path, overrides: list[str], console: Console
) -> str:
    """Makes (or reuses) the prior of one video and text, prints what it is, and returns its key."""
    import torch

    from vdm_priors.families import load_teacher, trained_frames

    settings = _settings(teacher, overrides)
    if not text.strip():
        raise UserError("--text is empty; give the words to look for in the video.")
    torch.set_num_threads(settings.threads)
    quiet_libraries()
    path = teacher_path(settings.teacher.model)

    def load():
        console.note(f"loading the teacher {path}")
        dtype = getattr(torch, settings.teacher.dtype)
        return load_teacher(path, dtype, torch_device(settings.device), settings.teacher.offload)

    sampling, own = settings.teacher.sampling, ""
    if sampling.frames is None:
        sampling = replace(sampling, frames=trained_frames(path))
        own = " (as many as the teacher was trained on)"
    sample = Sample(id=video.name, video=video, question=text.strip(), answer="NA")
    context = SourceContext(
        samples=[sample], store=PriorStore(out), sampling=sampling.sampling(),
        teacher_fingerprint=fingerprint(path), load_teacher=load, settings=settings.teacher.extraction, batch_size=1,
        size=tuple(settings.teacher.size) if settings.teacher.size else None, fit=settings.teacher.fit,
        dtype=settings.teacher.dtype)
    clip = context.frames.get(video, context.sampling)  # a bad file is told before the teacher loads
    with console.bar("extracting", 1, "clip") as bar:
        filled = fill_store(build_source("vdm", context), [sample], context.store, progress=bar)
    if filled.problems:
        raise UserError(filled.problems[0].reason)
    key = filled.rows[0][1]
    _describe(context.store.get(key), clip.duration, clip.notes, own, console)
    console.print(f"{'reused' if filled.reused else 'stored'}: {context.store.path(key)}", markup=False, soft_wrap=True)
    return key


def _settings(teacher: str | None, overrides: list[str]) -> VideoExtraction:
    raw: dict = {}
    for override in overrides:
        apply_override(raw, override)
    if teacher is not None:
        raw.setdefault("teacher", {})["model"] = teacher
    settings = build(VideoExtraction, raw, "the keys on the command line")
    if settings.teacher.text != "question":
        raise RecipeError("teacher.text: with --video the text is that of --text; leave the key out.")
    if settings.teacher.store is not None:
        raise RecipeError("teacher.store: with --video the store is that of --out; leave the key out.")
    return settings


def _describe(prior: MotionPrior, duration: float, notes: list[str], own: str, console: Console) -> None:
    facts = prior.provenance
    seconds = facts["seconds"]
    listed = ", ".join(f"{t:.2f}" for t in seconds)
    console.print(f"sampled {len(seconds)} frames of {duration:.2f} s, at seconds {listed}{own}", markup=False)
    for note in notes:
        console.warn(note)
    table = rich.table.Table("word", "motion score", "mean", "fluctuation", "kept", box=None, padding=(0, 2, 0, 0))
    for word in facts["word_scores"]:
        style = "bold" if word["selected"] else "dim"
        table.add_row(escape(word["text"]), f"{word['score']:.3g}", f"{word['mean']:.3g}", f"{word['fluctuation']:.3g}",
                      "yes" if word["selected"] else "", style=style)
    console.print(table)
    if facts.get("not_covered"):
        cut = facts["not_covered"]
        more = f" and {len(cut) - SHOWN_WORDS} more" if len(cut) > SHOWN_WORDS else ""
        console.warn(f"beyond the teacher's text limit, so without a prior: {', '.join(cut[:SHOWN_WORDS])}{more}")
    if facts.get("head_scores"):
        for line in _heads(facts["head_scores"]):
            console.print(line, markup=False)
    if facts.get("confidence"):
        console.print(_confidence(prior), markup=False)
    quality = facts.get("reconstruction") or {}
    if quality.get("psnr_db") is not None:
        console.print(f"reconstruction after inversion: {quality['psnr_db']:.1f} dB PSNR, latent relative L2 "
                      f"{quality['latent_relative_l2']:.3f}", markup=False)
    frames, rows, columns = prior.grid.shape
    selected = ", ".join(word.text for word in prior.words)
    console.print(f"prior: {len(prior.words)} words ({selected}) × {frames} frames × {rows} rows × {columns} columns",
                  markup=False)


def _heads(scores: dict) -> list[str]:
    """Which heads were kept, the best of them, and how sure the choice is."""
    kept = [i for i, selected in enumerate(scores["selected"]) if selected]
    best = sorted(kept, key=lambda i: -scores["score"][i])[:SHOWN_HEADS]
    shown = ", ".join(f"{i} ({scores['score'][i]:+.2f})" for i in best)
    more = f" and {len(kept) - len(best)} more" if len(kept) > len(best) else ""
    lines = [f"motion-sensitive heads: {len(kept)} of {len(scores['selected'])}, by score {shown}{more}"]
    rows, cells = scores["rows"]
    if rows == cells:
        lines.append(f"  judged by all {cells} rows: no sampling error")
    elif scores["exchanged"] is None:
        lines.append(f"  judged by {rows} of {cells} rows, too few to say how sure the choice is")
    else:
        lines.append(f"  judged by {rows} of {cells} rows: another draw would exchange about "
                     f"{scores['exchanged']:.1f} of the {len(kept)}")
    return lines


def _confidence(prior: MotionPrior) -> str:
    """How far the maps are from uniform and how much they change from frame to frame, both 0 to 1, and the weights."""
    facts = prior.provenance["confidence"]
    measured = ", ".join(f"{name} {facts[name]['prior']:.2f}" for name in ("concentration", "mobility"))
    weights = prior.weight.tolist()
    listed = ", ".join(f"{word.text} {weight:.2f}" for word, weight in zip(prior.words, weights, strict=True))
    gated = "" if all(weight == 1 for weight in weights) else f"; weights: {listed}"
    return f"confidence (0 to 1, mean of the kept words): {measured}{gated}"
