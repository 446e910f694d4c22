"""The priors of a recipe: which sources its arms need, what those are built from, and filling the store.

    needed_sources(recipe) -> specs; source_contexts(...) -> what they are built from; extract_priors(...) -> samples

One process does it alone, or those of `accelerate launch` or `torchrun` together (enhancer.processes).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from enhancer.console import Console
from enhancer.data.samples import Problem, Sample
from enhancer.filling import FillReport, fill_store
from enhancer.processes import Process, Team
from enhancer.recipe_schema import PLACES_ALONE, EnhanceRecipe, TeacherSettings
from enhancer.runfolder import RunFolder, report_skipped, write_json
from enhancer.shipped import teacher_path, torch_device
from enhancer.sources import SourceContext, SourceSpec, build_spec
from enhancer.video.clip import FrameCache
from enhancer.video.codec.guarded import motion_reader
from enhancer.video.guard import clip_reader
from vdm_priors.errors import ModelError, UserError
from vdm_priors.fingerprint import fingerprint
from vdm_priors.store import PriorStore


def needed_sources(recipe: EnhanceRecipe) -> list[SourceSpec]:
    """The sources of all arms that align; what a source is made from comes before it, sources of their own first."""
    needed: dict[SourceSpec, None] = {}

    def add(spec: SourceSpec) -> None:
        for part in spec.of:
            add(part)
        needed.setdefault(spec)

    for arm in recipe.arms:
        if recipe.weight(arm) > 0:
            add(_with_words(arm.spec(), recipe))
    return sorted(needed, key=lambda spec: bool(spec.of))


def _with_words(spec: SourceSpec, recipe: EnhanceRecipe) -> SourceSpec:
    """The spec in which every source of places alone is made from the teacher's prior, where the words are its."""
    if recipe.sources.words == ["vdm"] and spec.name in PLACES_ALONE:
        return dataclasses.replace(spec, of=(SourceSpec("vdm"),))
    return dataclasses.replace(spec, of=tuple(_with_words(part, recipe) for part in spec.of))


def used_teachers(recipe: EnhanceRecipe) -> dict[str, TeacherSettings]:
    """The teachers that arms take priors from, by name; "" is the recipe's `teacher`."""
    used = {spec.teacher for spec in needed_sources(recipe) if spec.name == "vdm"}
    named = {"": recipe.teacher, **{teacher.name: teacher for teacher in recipe.teachers}}
    return {name: teacher for name, teacher in named.items() if name in used}


def with_own_frames(recipe: EnhanceRecipe, console: Console | None = None, ask_hub: bool = True) -> EnhanceRecipe:
    """The recipe with the teacher's own number of frames where teacher.sampling.frames is null, and `teachers` alike.

    Left as it is where the number cannot be read and no arm needs it. Raises ModelError where one does.
    ask_hub: False leaves a hub model's number out, which may need the network.
    """
    needed, used = bool(needed_sources(recipe)), used_teachers(recipe)  # every source samples as `teacher` does

    def own(teacher: TeacherSettings, needed: bool) -> TeacherSettings:
        return _with_own_frames(teacher, needed, console if needed else None, ask_hub)

    teacher, teachers = own(recipe.teacher, needed), [own(t, t.name in used) for t in recipe.teachers]
    if teacher is recipe.teacher and all(new is old for new, old in zip(teachers, recipe.teachers, strict=True)):
        return recipe
    return dataclasses.replace(recipe, teacher=teacher, teachers=teachers)


def _with_own_frames(teacher: TeacherSettings, needed: bool, console: Console | None, ask_hub: bool) -> TeacherSettings:
    if teacher.sampling.frames is not None:
        return teacher
    from vdm_priors.families import trained_frames

    try:
        folder = teacher_path(teacher.model)
        if not Path(folder).is_dir() and not (ask_hub and needed):
            return teacher
        frames = trained_frames(folder)
    except ModelError:
        if needed:
            raise
        return teacher
    if console is not None:
        console.note(f"{frames} frames a clip for priors, as many as the teacher {teacher.model} was trained on")
    return dataclasses.replace(teacher, sampling=dataclasses.replace(teacher.sampling, frames=frames))


def source_contexts(run: Path, recipe: EnhanceRecipe, samples: list[Sample], truth: Any, console: Console,
                    store: Path | None = None) -> dict[str, SourceContext]:
    """What the recipe's sources are built from, by teacher ("" is `teacher`, there in any case).

    store: its folder, if not the recipe's.
    """
    from enhancer.arms import store_folder

    used = used_teachers(recipe)
    shared = PriorStore(store or store_folder(run, recipe))
    reading = {"frames": FrameCache(read=clip_reader(recipe.data.timeout, run)),
               "motion": motion_reader(recipe.data.timeout, run)}
    return {name: _source_context(recipe, teacher, name in used, samples, truth, console, store=shared, **reading)
            for name, teacher in {"": recipe.teacher, **used}.items()}


def _source_context(recipe: EnhanceRecipe, teacher: TeacherSettings, used: bool, samples: list[Sample], truth: Any,
                    console: Console, **shared: Any) -> SourceContext:
    import torch

    folder = teacher_path(teacher.model) if used else ""

    def load() -> Any:
        from vdm_priors.families import load_teacher

        console.note(f"loading the teacher {folder}")
        device = Process.this().device(torch_device(recipe.device))
        return load_teacher(folder, getattr(torch, teacher.dtype), device, teacher.offload)

    return SourceContext(
        **shared, samples=samples, sampling=teacher.sampling.sampling(), text=teacher.text, seed=recipe.seed,
        teacher_fingerprint=fingerprint(folder) if folder else "", load_teacher=load,
        settings=teacher.extraction, batch_size=teacher.batch_size, size=tuple(teacher.size) if teacher.size else None,
        fit=teacher.fit, dtype=teacher.dtype, truth=truth, camera=recipe.sources.camera,
        words=tuple(recipe.sources.words))


def fill_stores(run: Path, recipe: EnhanceRecipe, data: Any, console: Console,
                team: Team | None = None) -> Iterator[tuple[SourceSpec, FillReport]]:
    """Fills the store for each source in turn. The helpers of a team do so for sources of their own alone: the others
    depend on which of those are there, and take little time."""
    needed = needed_sources(recipe)
    samples = [view for sample in data.train for view in sample.views()]
    contexts = source_contexts(run, recipe, samples, data.truth, console) if needed else {}
    for spec in needed:
        if team and team.process.rank > 0 and spec.of:
            continue
        with console.bar(f"{spec.label} priors", len(samples), "clip") as bar:
            report = fill_store(build_spec(spec, contexts), samples, contexts[""].store, bar, team, spec.label)
        console.note(f"{spec.label}: {report.made} made, {report.reused} reused from {contexts[''].store.folder}"
                     + (f", {report.replaced} damaged ones replaced" if report.replaced else ""))
        yield spec, report


def extract_priors(run: RunFolder, recipe: EnhanceRecipe, data: Any, console: Console) -> list[Sample]:
    """Fills the store for every source, writes priors.json, and returns the samples to train on.

    Of a sample with several videos each has a prior of its own. Where samples without any prior are left out
    (missing_prior: skip), every arm leaves them out, λ = 0 too, so that all students see the same data.
    """
    from enhancer.arms import store_folder

    process = Process.this()
    if process.count == 1:
        return _extract_priors(run, recipe, data, console, None)
    team = Team(store_folder(run.folder, recipe), recipe.name, process)
    try:
        with team.working():
            return _extract_priors(run, recipe, data, console, team)
    finally:
        for sentence in team.lost():
            console.warn(sentence)


def _extract_priors(run: RunFolder, recipe: EnhanceRecipe, data: Any, console: Console,
                    team: Team | None) -> list[Sample]:
    rows, problems, having = [], [], []
    for spec, report in fill_stores(run.folder, recipe, data, console, team):
        problems += [Problem(p.id, f"{spec.label}: {p.reason}") for p in report.problems]
        if not report.rows:
            first = report.problems[0].reason if report.problems else "no samples"
            raise UserError(f"No {spec.label} prior could be made for any of {len(data.train)} samples; the first: "
                            f"{first}")
        rows += [{"sample_id": sample.id, "key": key, "source": spec.label, "question": sample.question,
                  "video": str(sample.video), **report.facts.get(key, {})} for sample, key in report.rows]
        having.append({sample.id for sample, _ in report.rows})
    write_json(run.folder / "priors.json", rows)
    if rows:
        console.note(f"which seconds of each clip were sampled: {run.folder / 'priors.json'}")
    report_skipped(run, "extract", problems, console)
    policy = recipe.training.alignment.missing_prior
    if policy == "fail" and problems:
        raise UserError(f"{len(problems)} priors could not be made and training.alignment.missing_prior is fail; the "
                        f"first: {problems[0].id}: {problems[0].reason}")
    if policy == "skip" and having:
        shared = set.intersection(*having)
        return [sample for sample in data.train if any(view.id in shared for view in sample.views())]
    return data.train
