"""Fills a store with a source's priors: keeps what is stored and stores the rest as it is made, so that an interrupted
extraction continues and several processes share one."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from enhancer.data.samples import Problem, Sample
from enhancer.processes import Process, Team
from enhancer.sources import MotionSource
from vdm_priors.errors import StoreError, UserError
from vdm_priors.prior import MotionPrior
from vdm_priors.store import Claims, PriorStore

Progress = Callable[..., None]  # bar(done, total, text)
WAITING_WRITES = 16  # priors that may wait to be written while the next are made
LOOK_AGAIN = 0.2  # seconds between two looks at what other processes make


@dataclass
class FillReport:
    """What happened to a source's priors: rows are (sample, key) of all that are now stored;
    facts: by key, what their provenance says of the clip (sampled seconds, notes); made: by all processes."""

    rows: list[tuple[Sample, str]] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    reused: int = 0
    made: int = 0
    replaced: int = 0  # stored files that were damaged and made again


def fill_store(source: MotionSource, samples: list[Sample], store: PriorStore, progress: Progress | None = None,
               team: Team | None = None, label: str = "") -> FillReport:
    """Makes the priors that the store lacks; every one is written, in a thread, as soon as it is made.

    A prior that another process makes meanwhile is left to it. Process 0 of a `team` (and one without a team) returns
    when every prior is there or known to be impossible, and makes what a process that died left over; the others return
    when nothing is left that nobody makes. Two samples of the same clip and text share one prior.
    label: what the team's records call this source.
    """
    return _Filling(source, samples, store, progress, team, label).run()


class _Filling:
    """One call of fill_store."""

    def __init__(self, source: MotionSource, samples: list[Sample], store: PriorStore, progress: Progress | None,
                 team: Team | None, label: str) -> None:
        self.source, self.samples, self.store = source, samples, store
        self.progress, self.team, self.label = progress, team, label
        self.process = team.process if team else Process()
        self.report = FillReport()
        self.keys: dict[str, str] = {}  # by sample id
        self.count: Counter[str] = Counter()  # by key, how many samples share its prior
        self.missing: dict[str, Sample] = {}  # by key, the sample that a prior still has to be made from
        self.part: dict[str, int] = {}  # by key, the process that makes it if none is quicker
        self.damaged: set[str] = set()
        self.failed: dict[str, str] = {}  # by key, why there is no prior
        self.done = 0  # samples settled, as far as is known here
        self.elsewhere = 0  # and those that the others had settled then
        self.said = 0

    def run(self) -> FillReport:
        self._look_through()
        lacking = len(self.missing)
        if self.missing:
            self.store.prepare()
            with Claims(self.store.folder, needed=self.process.count > 1) as claims:
                while self.missing:
                    settled = self._make(claims)
                    self._drop_settled()
                    if self.process.rank > 0:
                        break
                    if self.missing and not settled:
                        time.sleep(LOOK_AGAIN)
        self.report.made = lacking - len(self.missing) - len(self.failed)
        for sample in self.samples:
            key = self.keys.get(sample.id)
            if key in self.failed:
                self.report.problems.append(Problem(sample.id, self.failed[key]))
            elif key is not None and key not in self.missing:
                self.report.rows.append((sample, key))
                if key not in self.report.facts:  # another process made it
                    self.report.facts[key] = _facts(self.store.entry(key).provenance)
        return self.report

    def _look_through(self) -> None:
        """Keys of all samples, and which priors are missing or damaged; each process reads its part of those stored."""
        first: dict[str, Sample] = {}
        for sample in self.samples:
            try:
                key = self.keys[sample.id] = self.source.key(sample)
                first.setdefault(key, sample)
            except UserError as error:
                self.report.problems.append(Problem(sample.id, str(error)))
        self.count = Counter(self.keys.values())
        self.elsewhere = self.team.settled(self.label) if self.team else 0
        for n, (key, sample) in enumerate(first.items()):
            self.part[key] = n % self.process.count
            if key not in self.store:
                self.missing[key] = sample
                continue
            if self.part[key] == self.process.rank:
                stored = _undamaged(self.store, key)
                if stored is None:
                    self.missing[key] = sample
                    self.damaged.add(key)
                    continue
                self.report.facts[key] = _facts(stored.provenance)
            self.report.reused += self.count[key]
        self.done = self.report.reused
        self._say()

    def _make(self, claims: Claims) -> int:
        """Makes what is missing and nobody else makes; how many were settled here."""
        settled, writing = 0, deque()

        def written(sample: Sample, prior: MotionPrior, write: Any) -> None:
            write.result()
            self.report.facts[self.keys[sample.id]] = _facts(prior.provenance)
            self._settle(sample, claims)

        with ThreadPoolExecutor(1) as writer:  # what is made is written even where the next cannot be made
            for sample, result in self.source.extract(self._claimed(claims)):
                settled += 1
                if isinstance(result, Problem):
                    self._settle(sample, claims, result.reason)
                else:
                    key = result.provenance["key"] = self.keys[sample.id]
                    writing.append((sample, result, writer.submit(self.store.put, key, result)))
                while writing and (writing[0][-1].done() or len(writing) > WAITING_WRITES):
                    written(*writing.popleft())
            while writing:
                written(*writing.popleft())
        return settled

    def _claimed(self, claims: Claims) -> Iterator[Sample]:
        """Missing samples, claimed one by one: this process's part first, then from the end of what the others have."""
        missing = list(self.missing.items())
        own = [(key, sample) for key, sample in missing if self.part[key] == self.process.rank]
        others = [(key, sample) for key, sample in missing[::-1] if self.part[key] != self.process.rank]
        for key, sample in own + others:
            if not claims.take(key):
                continue
            if key not in self.store:
                yield sample
            elif key in self.damaged and _undamaged(self.store, key) is None:
                self.store.discard(key)
                self.report.replaced += 1
                yield sample
            else:  # made meanwhile
                claims.release(key)

    def _settle(self, sample: Sample, claims: Claims, problem: str | None = None) -> None:
        key = self.keys[sample.id]
        if problem is not None:
            self.failed[key] = problem
        self._drop(key)
        if self.team:
            self.team.settle(self.label, key, self.count[key], problem)
        claims.release(key)
        self._say()

    def _drop_settled(self) -> None:
        """Takes what other processes have settled off the missing."""
        problems = self.team.problems() if self.team else {}
        self.elsewhere = self.team.settled(self.label) if self.team else 0
        for key in list(self.missing):
            if key in problems:
                self.failed[key] = problems[key]
                self._drop(key)
            elif key in self.store and (key not in self.damaged or _undamaged(self.store, key) is not None):
                self._drop(key)
        self._say()

    def _drop(self, key: str) -> None:
        del self.missing[key]
        self.damaged.discard(key)
        self.done += self.count[key]

    def _say(self) -> None:
        """Progress of all processes together; what the others say comes late, so it never goes back."""
        if self.progress:
            others = self.team.settled(self.label) - self.elsewhere if self.team else 0
            self.said = max(self.said, min(self.done + others, len(self.keys)))
            self.progress(self.said, len(self.samples))


def stored_prior(store: PriorStore, key: str) -> MotionPrior:
    """The prior of `key`. StoreError if it is missing, damaged, or says that it was made for another text or clip.

    A key is a hash of both; a prior of before they wrote it down is taken at its file's word.
    """
    prior = store.get(key)
    made_for = prior.provenance.get("key", key)
    if made_for != key:
        raise StoreError(
            f"The prior {store.path(key)} was made for another text or clip: its own key is {made_for}, so it was "
            f"renamed or copied there. Delete it."
        )
    return prior


def _undamaged(store: PriorStore, key: str) -> MotionPrior | None:
    try:
        return stored_prior(store, key) if key in store else None
    except StoreError:
        return None


def _facts(provenance: dict[str, Any]) -> dict[str, Any]:
    return {name: provenance[name] for name in ("seconds", "notes") if provenance.get(name)}
