"""Priors of several sources for the same clips and texts, measured: what `enhancer compare --priors-only` writes.

    compared_recipe(recipe, names) -> a recipe with one arm a source; measure_sources(...) -> the document

The maps compared are the means over the words that the ground truth speaks of, as far as a prior has them; without a
ground truth, over all its words. All are carried to one grid a clip: a slice a sampled frame, 16 rows.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from enhancer.agreement import MEASURES, GridMap, agreement, mean_interval, on_grid, rank_correlation, words_map
from enhancer.console import Console
from enhancer.data.samples import Problem, Sample
from enhancer.extraction import needed_sources, source_contexts
from enhancer.filling import FillReport, fill_store
from enhancer.recipe_schema import OWN_SOURCES, WRAPPING, ArmSettings, EnhanceRecipe
from enhancer.sources import SourceContext, SourceSpec, build_spec, shared_text
from enhancer.video.clip import FrameCache
from enhancer.video.codec.guarded import read_with_energy
from enhancer.world.text import CAMERA
from enhancer.world.truth import WorldTruth
from vdm_priors.errors import RecipeError, SampleError, UserError
from vdm_priors.grid import TokenGrid, frame_spans
from vdm_priors.prior import MotionPrior
from vdm_priors.words import Word, split_words

FORMAT = "agreement-1"
ROWS = 16  # of the grid that maps are compared on; columns follow the frame's shape
EVERYTHING = "all"
TIMES = np.linspace(0, 1, 33)  # of a clip, for the length of a thing's way


@dataclass(frozen=True)
class Case:
    """One clip and text. grid: the common one; seconds: of the sampled frames; words, truth: what the ground truth
    speaks of and its map, none without one; groups: what the clip counts among, e.g. "motion slide"."""

    sample: Sample
    grid: TokenGrid
    seconds: np.ndarray
    words: list[Word]
    truth: GridMap | None
    groups: tuple[str, ...] = (EVERYTHING,)


@dataclass
class Measured:
    """document: what is written; priors: by source and sample id; cases: by sample id."""

    document: dict[str, Any]
    priors: dict[str, dict[str, MotionPrior]]
    cases: dict[str, Case]


def compared_recipe(recipe: EnhanceRecipe, names: list[str]) -> EnhanceRecipe:
    """The recipe with one arm for each named source; RecipeError for what cannot be compared.

    shuffled and uniform take their words from the first named source of its own; an ensemble's members are all of these
    but the oracle.
    """
    own = [name for name in names if name in OWN_SOURCES]
    unknown = sorted(set(names) - {*OWN_SOURCES, *WRAPPING, "ensemble"})
    if unknown or not own or len(set(names)) < len(names):
        made_of_others = (*WRAPPING, "ensemble")
        raise RecipeError(f"--sources: give different ones of {', '.join((*OWN_SOURCES, *made_of_others))}, and not only "
                          f"{', '.join(made_of_others)}, which are made from others; not {', '.join(names) or 'none'}.")
    members = [name for name in own if name != "oracle"]
    arms = [ArmSettings(name=name, source=name, weight=1.0, base=own[0] if name in WRAPPING else "vdm",
                        members=members if name == "ensemble" else []) for name in names]
    compared = replace(recipe, arms=arms)
    if faults := compared.check():
        raise RecipeError("; ".join(faults))
    return compared


def short_label(label: str) -> str:
    """A compared source's name without what it is made from, which is the same for all of one name."""
    return label.split("(")[0]


def measure_sources(recipe: EnhanceRecipe, samples: list[Sample], truth: WorldTruth | None, store: Path,
                    console: Console) -> Measured:
    """Makes what the store lacks, and measures every source of a compared recipe on these samples."""
    if truth is not None and recipe.teacher.text != "question":
        raise RecipeError("teacher.text: ground truth is known for questions only; use teacher.text=question.")
    contexts = source_contexts(store.parent, recipe, samples, truth, console, store)
    wanted = {arm.spec().label for arm in recipe.arms}
    cases, unreadable = _cases(samples, truth, contexts[""])
    samples = [sample for sample in samples if sample.id in cases]
    document: dict[str, Any] = {
        "format": FORMAT, "recipe": recipe.name, "clips": len(samples), "ground_truth": truth is not None,
        "unreadable": [vars(problem) for problem in unreadable], "sources": {},
        "groups": {case.sample.id: list(case.groups) for case in cases.values()}}
    priors: dict[str, dict[str, MotionPrior]] = {}
    for spec in needed_sources(recipe):
        report, cost = _filled(spec, contexts, samples, console)
        if spec.label in wanted:
            shared = contexts[""].store
            priors[spec.label] = {sample.id: shared.get(key) for sample, key in report.rows if sample.id in cases}
            size = [shared.entry(key).bytes for _, key in report.rows]
            entry = {**cost, "bytes": float(np.mean(size)) if size else None}
            agreed = _against_truth(priors[spec.label], cases, report.problems, recipe.seed)
            document["sources"][spec.label] = entry | agreed
    maps = {label: {key: _shared_map(of[key], cases[key]) for key in of} for label, of in priors.items()}
    document["correlation"] = [_correlation(first, second, maps, recipe.seed)
                               for first, second in combinations(priors, 2)]
    return Measured(document, priors, cases)


# ---- clips ---------------------------------------------------------------------------------------

def _cases(samples: list[Sample], truth: WorldTruth | None,
           context: SourceContext) -> tuple[dict[str, Case], list[Problem]]:
    found, unreadable = {}, []
    for sample in samples:
        try:
            clip = context.frames.get(sample.video, context.sampling)
            height, width = clip.frames.shape[1:3]
            spans, columns = frame_spans(clip.times, clip.duration), max(1, round(ROWS * width / height))
            grid = TokenGrid.regular(spans, ROWS, columns, clip.box)
            case = Case(sample, grid, np.asarray(clip.times), split_words(shared_text(sample, context.text)), None)
            found[sample.id] = _with_truth(case, truth) if truth is not None else case
        except UserError as error:
            unreadable.append(Problem(sample.id, str(error)))
    halves = _halves(found, truth) if truth is not None else {}
    return {key: replace(case, groups=(*case.groups, *halves.get(key, ()))) for key, case in found.items()}, unreadable


def _with_truth(case: Case, truth: WorldTruth) -> Case:
    sample = case.sample
    evidence = truth.evidence(sample.video.name, sample.question, case.words, case.grid)
    seen = evidence.sum(dim=(1, 2, 3)) > 0
    if not seen.any():
        raise SampleError("no word of its text has evidence in the ground truth")
    thing = _target(sample, truth)
    motion = "camera" if thing is None else thing.motion.kind
    return replace(case, words=[word for word, there in zip(case.words, seen.tolist(), strict=True) if there],
                   truth=on_grid(evidence[seen].double().mean(dim=0), case.grid, case.grid),
                   groups=(EVERYTHING, f"type {sample.question_type}", f"motion {motion}"))


def _target(sample: Sample, truth: WorldTruth) -> Any:
    """The thing that the question is about; None for the camera."""
    number = truth.mentions(sample.video.name, sample.question)[0].thing
    return None if number == CAMERA else truth.scene(sample.video.name).things[number]


def _halves(cases: dict[str, Case], truth: WorldTruth) -> dict[str, tuple[str, ...]]:
    """The half of the clips about things that each is in, by the thing's size, and of those whose thing changes place,
    by the length of its way."""
    things = {key: thing for key, case in cases.items() if (thing := _target(case.sample, truth)) is not None}
    ways = {key: float(np.hypot(*np.diff([thing.motion.offset(t)[:2] for t in TIMES], axis=0).T).sum())
            for key, thing in things.items()}
    moving = [way for way in ways.values() if way > 0]
    small, slow = (float(np.median(of)) if of else 0.0 for of in ([thing.size for thing in things.values()], moving))
    return {key: ("things smaller" if thing.size < small else "things larger",
                  *([] if not ways[key] else ["way shorter" if ways[key] < slow else "way longer"]))
            for key, thing in things.items()}


# ---- sources -------------------------------------------------------------------------------------

def _filled(spec: SourceSpec, contexts: dict[str, SourceContext], samples: list[Sample],
            console: Console) -> tuple[FillReport, dict[str, Any]]:
    """The source's priors, and what one cost: {"made", "reused", "seconds", "cpu_seconds"} (of the clock, and of all
    threads), with decoding, without loading the teacher; null where none was made. Bases and members do not count."""
    loading = np.zeros(2)

    def timed(load: Any) -> Any:
        def run() -> Any:
            begun = _clocks()
            teacher = load()
            loading[:] += _clocks() - begun
            return teacher
        return run

    own = {name: replace(context, frames=FrameCache(), motion=read_with_energy,  # here, where its time is counted
                         load_teacher=timed(context.load_teacher)) for name, context in contexts.items()}
    source = build_spec(spec, own)
    with console.bar(f"{spec.label} priors", len(samples), "clip") as bar:
        begun = _clocks()
        report = fill_store(source, samples, contexts[""].store, bar)
        spent = _clocks() - begun - loading
    seconds, cpu = (spent / report.made).tolist() if report.made else (None, None)
    return report, {"made": report.made, "reused": report.reused, "seconds": seconds, "cpu_seconds": cpu}


def _clocks() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def _against_truth(priors: dict[str, MotionPrior], cases: dict[str, Case], problems: list[Problem],
                   seed: int) -> dict[str, Any]:
    """{"clips": each one's measures, "groups": their means with intervals, "without": clips without a say, and why}."""
    clips: dict[str, dict[str, Any]] = {}
    without = [vars(problem) for problem in problems]
    for key, prior in priors.items():
        case = cases[key]
        if case.truth is None:
            continue
        try:
            clips[key] = agreement(on_grid(words_map(prior, case.words), prior.grid, case.grid), case.truth, case.grid)
        except SampleError as error:
            without.append({"id": key, "reason": str(error)})
    named = {group for key in clips for group in cases[key].groups}
    groups = {group: {measure: mean_interval([clips[key][measure] for key in clips if group in cases[key].groups], seed)
                      for measure in (*MEASURES, "known")} for group in sorted(named)}
    return {"without": without, "groups": groups, "clips": {key: _json(of) for key, of in clips.items()}}


def _json(measured: dict[str, Any]) -> dict[str, Any]:
    """NaN as null, which JSON has."""
    known = lambda value: value if np.isfinite(value) else None  # noqa: E731
    return {name: [known(v) for v in value] if isinstance(value, list) else known(value)
            for name, value in measured.items()}


# ---- source against source -----------------------------------------------------------------------

def _shared_map(prior: MotionPrior, case: Case) -> GridMap | None:
    """The map that two sources are compared by; None where the prior has none of the words."""
    try:
        return on_grid(words_map(prior, case.words), prior.grid, case.grid)
    except SampleError:
        return None


def _correlation(first: str, second: str, maps: dict[str, dict[str, GridMap | None]], seed: int) -> dict[str, Any]:
    values = []
    for key in maps[first].keys() & maps[second].keys():
        pair = maps[first][key], maps[second][key]
        if None not in pair:
            values.append((key, rank_correlation(*pair)))
    return {"first": first, "second": second, **mean_interval([value for _, value in sorted(values)], seed)}
