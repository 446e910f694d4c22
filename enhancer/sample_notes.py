"""What a training finds out about its samples: which it left out, what is to know of the others, words that matched."""

from __future__ import annotations

from typing import Any

from accelerate.utils import gather_object

from enhancer.collate import BatchNotes
from enhancer.data.samples import Problem
from vdm_priors.errors import UserError

ENOUGH_WORDS = 50  # below this, a share of unmatched words says little
KINDS = ("problems", "remarks")


class SampleNotes:
    """Collected from batch to batch, each note once; kept in checkpoints, so that a resumed training knows them too."""

    def __init__(self, max_unmatched: float) -> None:
        self._max_unmatched = max_unmatched
        self._notes: dict[str, dict[tuple[str, str], Problem]] = {kind: {} for kind in KINDS}
        self._words = {"matched": 0, "total": 0}

    @property
    def problems(self) -> list[Problem]:
        """Samples that were left out."""
        return list(self._notes["problems"].values())

    @property
    def remarks(self) -> list[Problem]:
        """What is to know about samples that were used."""
        return list(self._notes["remarks"].values())

    def add(self, batch: BatchNotes) -> None:
        """Takes up a batch's notes and words. Raises UserError where too many words have no token."""
        for kind in KINDS:
            self._notes[kind].update({(note.id, note.reason): note for note in getattr(batch, kind)})
        for match in batch.matches:
            if match is not None:
                self._words["matched"] += len(match.pairs)
                self._words["total"] += match.total
        self.check_words(least=ENOUGH_WORDS)

    def check_words(self, least: int = 1) -> None:
        """UserError if, of `least` words or more, a larger share than training.alignment.max_unmatched has no token."""
        matched, total = self._words["matched"], self._words["total"]
        if total >= least and 1 - matched / total > self._max_unmatched:
            raise UserError(
                f"{total - matched} of {total} words of the priors have no token in the student's prompts "
                f"(training.alignment.max_unmatched is {self._max_unmatched:g}): the priors belong to other texts. For "
                f"example: {'; '.join(f'{r.id}: {r.reason}' for r in self.remarks[-2:])}. Extract priors of these "
                "samples' questions."
            )

    def join(self) -> None:
        """What any process has noted of samples is known to all of them, which must all call it."""
        for kind in KINDS:
            notes = gather_object(list(self._notes[kind].values()))
            self._notes[kind].update({(note.id, note.reason): note for note in notes})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        notes = {kind: [[note.id, note.reason] for note in self._notes[kind].values()] for kind in KINDS}
        return {"words": self._words, **notes}

    def restore(self, kept: dict[str, Any]) -> None:
        """What `to_dict` gave, instead of what is known."""
        self._words = dict(kept["words"])
        self._notes = {kind: {tuple(entry): Problem(*entry) for entry in kept[kind]} for kind in KINDS}
