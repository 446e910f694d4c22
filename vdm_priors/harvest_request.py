"""What a harvest is asked to keep (vdm_priors.harvest), and who takes the rows that it does not keep.

Legend: H heads, R vision rows, r rows of a chunk, S_v vision tokens, T text tokens, n other keys, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vdm_priors.errors import ModelError
from vdm_priors.memory import Memory

DIRECTIONS = ("t2v", "v2t", "both")
HEAD_SCOPES = ("head", "layer_head")
MEMORY_COLUMNS = ("sum", "own")


class RowTaker(Protocol):
    """What a streamed harvest gives its vision rows to (vdm_priors.heads.HeadAccumulator).

    It gets each layer's rows once, either as probabilities, some rows at a time (`add`), or, where `reads_queries`,
    as all that they follow from (`add_queries`).
    """

    def add(self, rows_hrs: Tensor, tokens: Tensor) -> None: ...

    def reads_queries(self, device: torch.device) -> bool: ...

    def add_queries(
        self, q_hsd: Tensor, shown_hsd: Sequence[Tensor], lse_hs: Tensor, scale: float,
        rest_hnd: Tensor | None, rest_bias_n: Tensor | None,
    ) -> None: ...


@dataclass(frozen=True, eq=False)
class HarvestRequest:
    """What to keep of every forward.

    text_tokens: T, the first T text tokens are harvested.
    rows: vision tokens [R] whose rows over vision are kept (v2v); None keeps none.
    row_taker: where given, those rows are not kept but handed on a chunk at a time, so that R may be
        all of S_v: `row_taker(i)` makes, for the i-th harvested entry, what has
        add(rows_hrs [H, r, S_v], tokens [r]), or takes their queries; see RowTaker and `Harvest.row_takers`.
    direction: "t2v" text rows over vision columns, "v2t" vision rows over text columns, "both".
    batch_index: the entries of a forward's batch that are harvested; None means all. With
        guidance and memory in one batch, name the entries of the guided text.
    layers: indices into the model's attention layers, or "all".
    head_scope: "head" averages a head over layers (Algorithm 1), "layer_head" keeps each.
    memory_columns: with a reference stream, a row's softmax runs over its own *and* the
        reference's keys. Both streams show the same place of the same clip in the same cell,
        so "sum" adds the reference's vision columns to the generated ones of the same cell:
        all the mass that a row puts on a place. "own" leaves them out. The reference's text
        columns belong to another text (the one the clip was inverted under) and are never
        added to the harvested text's.
    """

    text_tokens: int
    rows: Tensor | None = None
    direction: str = "t2v"
    batch_index: Sequence[int] | None = None
    layers: Sequence[int] | str = "all"
    head_scope: str = "head"
    memory_columns: str = "sum"
    row_taker: Callable[[int], RowTaker] | None = None

    def __post_init__(self) -> None:
        choices = {"direction": DIRECTIONS, "head_scope": HEAD_SCOPES, "memory_columns": MEMORY_COLUMNS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"HarvestRequest: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}."
                )
        if self.text_tokens < 1:
            raise ValueError(f"HarvestRequest: text_tokens must be ≥ 1, got {self.text_tokens}.")

    def entries(self, batch: int, streams: Memory | None) -> list[int]:
        """The batch entries of a forward that are harvested. Raises ModelError for those that it lacks."""
        available = batch if streams is None else streams.generated
        entries = list(range(available) if self.batch_index is None else self.batch_index)
        if not entries or min(entries) < 0 or max(entries) >= available:
            raise ModelError(
                f"Harvest: batch_index {entries} does not name entries of the {available} "
                f"{'generated streams' if streams else 'clips'} of this forward."
            )
        return entries

    def check_text(self, text: int) -> None:
        """Raises ModelError if the model has fewer text tokens."""
        if self.text_tokens > text:
            raise ModelError(f"Harvest: {self.text_tokens} text tokens were asked for, the model has {text}.")

    def check_rows(self, vision: int) -> None:
        """Raises ModelError if a row is none of the vision tokens, or there is none."""
        if self.rows is not None and (len(self.rows) == 0 or int(self.rows.max()) >= vision):
            raise ModelError(
                f"Harvest: the rows must be vision tokens below {vision}, at least one; got "
                f"{len(self.rows)} rows up to {int(self.rows.max()) if len(self.rows) else None}."
            )
