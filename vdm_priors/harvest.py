"""Harvest: true attention probabilities of a video diffusion transformer, per head.

    with harvest(teacher, HarvestRequest(text_tokens=12, rows=rows)) as harvested:
        reconstruct(teacher, trajectory, embeds)
    harvested.t2v   # [B, heads, T, S_v], averaged over layers and forwards

Rows are softmax(q Kᵀ·scale) over **all** keys, text and vision, in float32; only what was asked
for is kept, and never an S×S matrix at once. The model's outputs are bit for bit those without
a harvest, and on exit its processors are the same objects as before, also after an error.

Legend: B harvested batch entries, H heads (layers × heads for head_scope "layer_head"), T text
tokens, R vision rows, S_v vision tokens, L text length of the model's sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdm_priors.attention import probability_chunks, require_finite, swapped_processors
from vdm_priors.errors import ModelError
from vdm_priors.memory import Streams

DIRECTIONS = ("t2v", "v2t", "both")
HEAD_SCOPES = ("head", "layer_head")
MEMORY_COLUMNS = ("sum", "own")


@dataclass(frozen=True, eq=False)
class HarvestRequest:
    """What to keep of every forward.

    text_tokens: T, the first T text tokens are harvested.
    rows: vision tokens [R] whose rows over vision are kept (v2v); None keeps none.
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

    def __post_init__(self) -> None:
        for name, known in (
            ("direction", DIRECTIONS),
            ("head_scope", HEAD_SCOPES),
            ("memory_columns", MEMORY_COLUMNS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"HarvestRequest: {name} must be one of {', '.join(known)}, got "
                    f"{getattr(self, name)!r}."
                )
        if self.text_tokens < 1:
            raise ValueError(f"HarvestRequest: text_tokens must be ≥ 1, got {self.text_tokens}.")


class Harvest:
    """Sums of what was asked for; `t2v`, `v2t` and `v2v` are their means, None if not asked for."""

    def __init__(self, request: HarvestRequest, layers: dict[int, str]) -> None:
        self.request = request
        self.layers = layers
        self.forwards = 0
        self._slot = {index: slot for slot, index in enumerate(layers)}
        self._sums: dict[str, list[Tensor]] = {}
        self._counts = [0] * len(layers)

    @property
    def t2v(self) -> Tensor | None:
        """[B, H, T, S_v] float32: text rows over vision columns; a row sums to less than 1."""
        return self._mean("t2v", self.request.direction != "v2t")

    @property
    def v2t(self) -> Tensor | None:
        """[B, H, T, S_v] float32: vision rows over text columns, transposed; columns sum to less than 1."""
        return self._mean("v2t", self.request.direction != "t2v")

    @property
    def v2v(self) -> Tensor | None:
        """[B, H, R, S_v] float32: the requested vision rows over vision columns."""
        return self._mean("v2v", self.request.rows is not None)

    @torch.no_grad()
    def record(
        self, index: int, q_bhsd: Tensor, k_bhsd: Tensor, text: int, scale: float,
        streams: Streams | None,
    ) -> None:
        """Add one layer's rows of one forward: q, k [b, h, L + S_v, d] as attention uses them.

        Called by the family's attention processor; `text` is L, text first. Raises ModelError
        for a request that does not fit the forward, and for NaN or infinite probabilities.
        """
        request, slot = self.request, self._slot[index]
        entries = self._entries(len(q_bhsd), text, q_bhsd.shape[2] - text, streams)
        q = q_bhsd[torch.tensor(entries, device=q_bhsd.device)]
        if streams is None:
            k = k_bhsd[torch.tensor(entries, device=k_bhsd.device)]
        else:
            k = streams.with_reference(k_bhsd, entries)
        if slot == 0:
            self.forwards += 1
        self._counts[slot] += 1
        if request.direction != "v2t":
            rows = q[:, :, : request.text_tokens]
            self._add("t2v", index, self._over_vision(rows, k, text, q.shape[2], scale))
        if request.direction != "t2v":
            self._add("v2t", index, self._over_text(q[:, :, text:], k, scale))
        if request.rows is not None:
            rows = q[:, :, text:][:, :, request.rows.to(q.device)]
            self._add("v2v", index, self._over_vision(rows, k, text, q.shape[2], scale))

    def _over_vision(self, q: Tensor, k: Tensor, text: int, tokens: int, scale: float) -> Tensor:
        """Probabilities [B, h, rows, S_v] of query rows over the vision columns."""
        kept = q.new_empty(*q.shape[:3], tokens - text, dtype=torch.float32)
        for chosen, p in probability_chunks(q, k, scale):
            kept[:, :, chosen] = p[..., text:tokens]
            if self.request.memory_columns == "sum" and p.shape[-1] > tokens:
                kept[:, :, chosen] += p[..., tokens + text :]
        return kept

    def _over_text(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Probabilities [B, h, T, S_v] of all vision rows over the first T text columns."""
        kept = q.new_empty(*q.shape[:2], self.request.text_tokens, q.shape[2], dtype=torch.float32)
        for chosen, p in probability_chunks(q, k, scale):
            kept[..., chosen] = p[..., : self.request.text_tokens].transpose(2, 3)
        return kept

    def _add(self, name: str, index: int, values: Tensor) -> None:
        require_finite(
            values,
            f"The attention ({name}) of layer {self.layers[index]}, recorded "
            f"forward {self.forwards},",
            "Load the teacher in float32 or bfloat16 instead of float16, and check its weights.",
        )
        sums = self._sums.setdefault(name, [])
        place = self._slot[index] if self.request.head_scope == "layer_head" else 0
        if place < len(sums):
            if sums[place].shape != values.shape:
                raise ModelError(
                    f"Harvest: {name} was [B, heads, rows, columns] = {list(sums[place].shape)}, "
                    f"and is {list(values.shape)} in a later forward. Harvest clips of one size "
                    f"and one batch at a time."
                )
            sums[place] += values
        else:
            sums.append(values)

    def _mean(self, name: str, asked: bool) -> Tensor | None:
        if not asked:
            return None
        if name not in self._sums:
            raise ModelError(
                "Harvest: nothing was recorded. Run the teacher inside `with harvest(...)`."
            )
        if self.request.head_scope == "head":
            return self._sums[name][0] / sum(self._counts)
        pairs = zip(self._sums[name], self._counts, strict=True)
        return torch.cat([total / count for total, count in pairs], dim=1)

    def _entries(self, batch: int, text: int, vision: int, streams: Streams | None) -> list[int]:
        request = self.request
        available = batch if streams is None else streams.generated
        entries = list(range(available) if request.batch_index is None else request.batch_index)
        if not entries or min(entries) < 0 or max(entries) >= available:
            raise ModelError(
                f"Harvest: batch_index {entries} does not name entries of the {available} "
                f"{'generated streams' if streams else 'clips'} of this forward."
            )
        if request.text_tokens > text:
            raise ModelError(
                f"Harvest: {request.text_tokens} text tokens were asked for, the model has {text}."
            )
        if request.rows is not None and (len(request.rows) == 0 or int(request.rows.max()) >= vision):
            raise ModelError(
                f"Harvest: the rows must be vision tokens below {vision}, at least one; got "
                f"{len(request.rows)} rows up to {int(request.rows.max()) if len(request.rows) else None}."
            )
        return entries


@contextmanager
def harvest(teacher: Any, request: HarvestRequest) -> Iterator[Harvest]:
    """Record attention of every forward of `teacher.transformer` inside the context.

    May be nested with `reference_memory` and with itself. Raises ModelError for layers that the
    model does not have.
    """
    names = [key.removesuffix(".processor") for key in teacher.transformer.attn_processors]
    chosen = range(len(names)) if request.layers == "all" else request.layers
    unknown = [index for index in chosen if not 0 <= index < len(names)]
    if unknown or len(chosen) == 0:
        raise ModelError(
            f"Harvest: layers {list(chosen)} cannot be harvested; the teacher has attention layers "
            f"0 to {len(names) - 1}."
        )
    harvested = Harvest(request, {index: names[index] for index in sorted(set(chosen))})

    def build(index: int, layer: str, processor: Any) -> Any:
        if index not in harvested.layers:
            return processor
        return teacher.attention_processor(layer, processor, recorder=(index, harvested))

    with swapped_processors(teacher.transformer, build):
        yield harvested
