"""Motion sources: where a prior for a sample comes from, one file each, found by name.

A source is a module of this package with `build(context) -> MotionSource`; its name is the
module's. `fill_store` runs a source over samples, keeps what is stored and stores the rest as
it is made, so that an interrupted extraction continues.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from enhancer.data.samples import Problem, Sample
from enhancer.video.clip import FrameCache, Sampling
from vdm_priors.errors import StoreError, UserError
from vdm_priors.prior import MotionPrior
from vdm_priors.store import PriorStore

Progress = Callable[..., None]  # bar(done, total, text)


class MotionSource(Protocol):
    """What every source offers."""

    name: str

    def key(self, sample: Sample) -> str:
        """The store key: a hash of everything that determines this sample's prior."""

    def extract(self, samples: list[Sample], progress: Progress | None = None) -> Iterator[tuple[Sample, MotionPrior | Problem]]:
        """Priors as they are ready, in any order; a sample that cannot have one gives a Problem."""


@dataclass
class SourceContext:
    """What sources are built from. `load_teacher` is called only when a prior must be made.

    samples: all samples of the job (shuffled exchanges among them); truth: the world's ground
    truth or None; base: the source that shuffled and uniform wrap; settings: of the extraction.
    """

    samples: list[Sample]
    store: PriorStore
    sampling: Sampling
    text: str = "question"
    seed: int = 0
    frames: FrameCache = field(default_factory=FrameCache)
    teacher_fingerprint: str = ""
    load_teacher: Callable[[], Any] | None = None
    settings: Any = None
    batch_size: int = 8
    size: tuple[int, int] | None = None
    dtype: str = "float32"
    truth: Any = None
    base: MotionSource | None = None


def source_names() -> list[str]:
    """Names of all sources, without importing them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def build_source(name: str, context: SourceContext) -> MotionSource:
    """The source of that name; UserError naming the known ones."""
    if name not in source_names():
        raise UserError(f"There is no motion source '{name}'; known: {', '.join(source_names())}.")
    return importlib.import_module(f"{__name__}.{name}").build(context)


def shared_text(sample: Sample, mode: str) -> str:
    """The text whose words teacher and student share: mode question, answer or question_answer."""
    texts = {"question": sample.question, "answer": sample.answer, "question_answer": f"{sample.question}\n{sample.answer}"}
    return texts[mode]


# ---- filling a store -----------------------------------------------------------------------------

@dataclass
class FillReport:
    """What happened to a source's priors: rows are (sample, key) of all that are now stored;
    facts: by key, what their provenance says of the clip (sampled seconds, notes)."""

    rows: list[tuple[Sample, str]] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    reused: int = 0
    made: int = 0
    replaced: int = 0  # stored files that were damaged and made again


def fill_store(source: MotionSource, samples: list[Sample], store: PriorStore, progress: Progress | None = None) -> FillReport:
    """Makes the priors that the store lacks; every one is on disk as soon as it is made."""
    report, keys, todo, pending = FillReport(), {}, [], set()
    for sample in samples:
        try:
            key = source.key(sample)
        except UserError as error:
            report.problems.append(Problem(sample.id, str(error)))
            continue
        keys[sample.id] = key
        stored = _undamaged(store, key)
        if stored is not None:
            report.reused += 1
            report.facts[key] = _facts(stored)
        elif key not in pending:  # two samples of the same clip and text share one prior
            if key in store:
                store.discard(key)
                report.replaced += 1
            pending.add(key)
            todo.append(sample)
    if progress:
        progress(report.reused, len(samples))
    failed: dict[str, str] = {}
    if todo:
        store.prepare()
        for done, (sample, result) in enumerate(source.extract(todo), 1):
            if isinstance(result, Problem):
                failed[keys[sample.id]] = result.reason
            else:
                store.put(keys[sample.id], result)
                report.made += 1
                report.facts[keys[sample.id]] = _facts(result)
            if progress:
                progress(report.reused + done, len(samples))
    for sample in samples:
        if sample.id in keys and keys[sample.id] in failed:
            report.problems.append(Problem(sample.id, failed[keys[sample.id]]))
        elif sample.id in keys:
            report.rows.append((sample, keys[sample.id]))
    return report


def _undamaged(store: PriorStore, key: str) -> MotionPrior | None:
    try:
        return store.get(key) if key in store else None
    except StoreError:
        return None


def _facts(prior: MotionPrior) -> dict[str, Any]:
    return {name: prior.provenance[name] for name in ("seconds", "notes") if prior.provenance.get(name)}
