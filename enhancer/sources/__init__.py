"""Motion sources: where a prior for a sample comes from, one file each, found by name.

A source is a module of this package with `build(context) -> MotionSource`; its name is the
module's. filling.py runs one over samples into a store.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from enhancer.data.samples import Problem, Sample
from enhancer.video.clip import FrameCache, Sampling
from enhancer.video.codec.guarded import Motion, read_with_energy
from vdm_priors.errors import UserError
from vdm_priors.prior import MotionPrior
from vdm_priors.store import PriorStore


class MotionSource(Protocol):
    """What every source offers."""

    name: str

    def key(self, sample: Sample) -> str:
        """The store key: a hash of everything that determines this sample's prior."""

    def extract(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, MotionPrior | Problem]]:
        """Priors as they are ready, in any order; a sample that cannot have one gives a Problem.

        Samples are taken from `samples`, perhaps in another thread, as they are needed and hardly before: each is
        claimed as it is taken.
        """


@dataclass(frozen=True)
class SourceSpec:
    """Which source, and what it is made from: `of` is the base of shuffled and uniform, the members of an ensemble, and
    what a source of places alone takes its words from.

    teacher: the vdm source's, by its name among the recipe's `teachers`; "" is the recipe's `teacher`. gate: the
    ensemble's.
    """

    name: str
    of: tuple[SourceSpec, ...] = ()
    teacher: str = ""
    gate: str = "none"

    @property
    def label(self) -> str:
        """What priors.json and the report call it; the base is left out where it is the recipe's teacher."""
        inside = "+".join(part.label for part in self.of)
        if not inside:
            return self.teacher or self.name
        if self.name != "ensemble":
            return self.name if inside == "vdm" else f"{self.name}({inside})"
        return f"{self.name}({inside})" if self.gate == "none" else f"{self.name}({inside}, gate {self.gate})"


@dataclass
class SourceContext:
    """What sources are built from. `load_teacher` is called only when a prior must be made.

    samples: all samples of the job (shuffled exchanges among them); truth: the world's ground truth or None; base:
    the source that shuffled and uniform wrap, or whose words are taken; members, gate: of an ensemble (by label);
    settings: of the extraction; camera: remove or keep its motion (codec and flow); words: which ones share a map of
    places; motion: reads a file's codec motion.
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
    fit: str = "resize"
    dtype: str = "float32"
    truth: Any = None
    base: MotionSource | None = None
    members: dict[str, MotionSource] = field(default_factory=dict)
    gate: str = "none"
    camera: str = "remove"
    words: tuple[str, ...] = ("content",)
    motion: Callable[..., Motion] = read_with_energy


def source_names() -> list[str]:
    """Names of all sources, without importing them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def build_source(name: str, context: SourceContext) -> MotionSource:
    """The source of that name; UserError naming the known ones."""
    if name not in source_names():
        raise UserError(f"There is no motion source '{name}'; known: {', '.join(source_names())}.")
    return importlib.import_module(f"{__name__}.{name}").build(context)


def build_spec(spec: SourceSpec, contexts: dict[str, SourceContext]) -> MotionSource:
    """The source that `spec` describes. contexts: by teacher, what sources are built from; "" is the recipe's."""
    parts = {part.label: build_spec(part, contexts) for part in spec.of}
    base = next(iter(parts.values()), None)
    return build_source(spec.name, replace(contexts[spec.teacher], base=base, members=parts, gate=spec.gate))


def shared_text(sample: Sample, mode: str) -> str:
    """The text whose words teacher and student share: mode question, answer or question_answer."""
    both = f"{sample.question}\n{sample.answer}"
    return {"question": sample.question, "answer": sample.answer, "question_answer": both}[mode]


def one_by_one(samples: Iterable[Sample], make: Callable[[Sample], MotionPrior],
               lacking: str = "") -> Iterator[tuple[Sample, MotionPrior | Problem]]:
    """What `make` makes of each sample; a UserError becomes the sample's Problem, with `lacking` before its reason."""
    for sample in samples:
        try:
            result = make(sample)
        except UserError as error:
            result = Problem(sample.id, f"{lacking}{error}")
        yield sample, result
