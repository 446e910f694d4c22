"""Harvest: true attention probabilities of a video diffusion transformer, per head.

    with harvest(teacher, HarvestRequest(text_tokens=12, rows=rows)) as harvested:
        reconstruct(teacher, trajectory, embeds)
    harvested.t2v   # [B, heads, T, S_v], averaged over layers and forwards

Rows are softmax(q Kᵀ·scale) over **all** keys, text and vision, in float32; only what was asked for is kept, and never
an S×S matrix at once. The model's outputs are bit for bit those without a harvest, and on exit its processors are the
same objects as before, also after an error.

Where text is attended to separately (Wan, LTX-Video), vision's rows over vision are those of the self-attention and its
rows over text those of the cross-attention; each sums to 1 over its own keys. There text asks nothing of vision: see
`Harvest.t2v` for what a text row means then.

Legend: B harvested batch entries, H heads (layers × heads for head_scope "layer_head"), T text tokens, R vision rows,
S_v vision tokens, L text length of the model's sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from vdm_priors.attention import AttentionLayer, Layout, swapped_processors
from vdm_priors.attention_rows import (
    Where, cell_chunks, columns_by_lse, probability_chunks, rows_by_lse, rows_by_softmax,
)
from vdm_priors.errors import ModelError
from vdm_priors.finite import require_finite
from vdm_priors.harvest_request import DIRECTIONS, HEAD_SCOPES, MEMORY_COLUMNS, HarvestRequest, RowTaker
from vdm_priors.memory import Memory, entries_of
from vdm_priors.running_means import RunningMeans

__all__ = ["DIRECTIONS", "HEAD_SCOPES", "MEMORY_COLUMNS", "Harvest", "HarvestRequest", "harvest", "unrecorded"]

_recording: ContextVar[bool] = ContextVar("recording", default=True)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Forwards inside leave no trace in a harvest: those of the negative text, where it has a call of its own."""
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)


class Harvest:
    """What was asked for: `t2v`, `v2t` and `v2v`, means over layers and forwards, None if not asked for.

    With head_scope "layer_head", H counts the layers that were run: of a model in two stages, those of the stages that
    the timesteps met.
    """

    def __init__(self, request: HarvestRequest, layers: dict[int, AttentionLayer]) -> None:
        self.request = request
        self.layers = layers
        self.forwards = 0
        # a forward runs one model, and begins with that model's first layer
        self._first = {min(i for i in layers if layers[i].model == m) for m in {x.model for x in layers.values()}}
        self._means = RunningMeans(by_layer=request.head_scope == "layer_head")
        self._takers: dict[int, list[RowTaker]] = {}  # by layer, or one for all

    @property
    def t2v(self) -> Tensor | None:
        """[B, H, T, S_v] float32: text rows over vision columns; a row sums to less than 1.

        Of a cross-attention, in which only vision asks: every cell's probability of the word, divided by its sum over
        the cells, so that a row sums to 1. It says where the word is sought, not how much of the text's attention the
        vision gets.
        """
        return self._means.mean("t2v") if self.request.direction != "v2t" else None

    @property
    def v2t(self) -> Tensor | None:
        """[B, H, T, S_v] float32: vision rows over text columns, transposed; columns sum to less than 1."""
        return self._means.mean("v2t") if self.request.direction != "t2v" else None

    @property
    def v2v(self) -> Tensor | None:
        """[B, H, R, S_v] float32: the requested vision rows over vision columns; None if they were handed on."""
        kept = self.request.rows is not None and self.request.row_taker is None
        return self._means.mean("v2v") if kept else None

    def row_takers(self, entry: int) -> list[RowTaker]:
        """What took the rows of the i-th harvested entry: one, or one a layer with head_scope "layer_head"."""
        return [takers[entry] for _, takers in sorted(self._takers.items())]

    def wants_lse(self, layout: Layout) -> bool | None:
        """Whether `record` needs the rows' log-sum-exp of an attention with this layout; None: can use it."""
        if not _recording.get():
            return False
        over_text = bool(layout.text_tokens) and self.request.direction != "t2v"
        if over_text or self.request.row_taker is not None:
            return True
        return None if layout.text_tokens or self.request.rows is not None else False

    def close(self) -> None:
        """No forward is recorded any more."""
        self._means.close()

    @torch.no_grad()
    def record(
        self, index: int, q_bhsd: Tensor, k_bhsd: Tensor, layout: Layout, scale: float,
        streams: Memory | None = None, bias_b11s: Tensor | None = None, lse_ghs: Tensor | None = None,
    ) -> None:
        """Add one layer's rows of one forward: q, k [b, h, s, d] of a joint or a self-attention, as it uses them.

        Called by the family's attention processor; `bias` is added to the logits, −inf where a key is hidden. `lse` is
        the rows' log-sum-exp over all that they see, of the generated streams only if there are streams; given where
        `wants_lse` is true. Raises ModelError for a request that does not fit the forward, and for NaN or infinite
        probabilities.
        """
        if not _recording.get():
            return
        request = self.request
        entries = request.entries(len(q_bhsd), streams)
        request.check_rows(layout.vision_tokens)
        if layout.text_tokens:
            request.check_text(layout.text_tokens)
        q = entries_of(q_bhsd, entries)
        if streams is None:
            k, bias = entries_of(k_bhsd, entries), None if bias_b11s is None else entries_of(bias_b11s, entries)
        else:
            k = streams.keys(k_bhsd, entries)
            bias = None if bias_b11s is None else streams.mask(bias_b11s, entries)
        vision = q[:, :, layout.vision]
        lse_all = None if lse_ghs is None else entries_of(lse_ghs, entries)
        lse = None if lse_all is None else lse_all[:, :, layout.vision]
        if index in self._first:
            self.forwards += 1
        if layout.text_tokens and request.direction != "v2t":
            rows = slice(layout.text.start, layout.text.start + request.text_tokens)
            of_rows = None if lse_all is None else lse_all[:, :, rows]
            self._add_rows("t2v", index, q[:, :, rows], k, layout, scale, bias, of_rows)
        if layout.text_tokens and request.direction != "t2v":
            self._add_over_text(index, vision, k, layout, scale, bias, lse)
        if request.row_taker is not None:
            self._hand_on(index, vision, k, layout, scale, bias, lse)
        elif request.rows is not None:
            rows = request.rows.to(q.device)
            of_rows = None if lse is None else lse[:, :, rows]
            self._add_rows("v2v", index, vision[:, :, rows], k, layout, scale, bias, of_rows)

    @torch.no_grad()
    def record_cross(
        self, index: int, q_bhsd: Tensor, k_bhld: Tensor, scale: float,
        streams: Memory | None = None, bias_b11l: Tensor | None = None,
    ) -> None:
        """Add the rows of one layer's cross-attention: q [b, h, S_v, d] of vision, k [b, h, L, d] of text.

        Otherwise as `record`. The layer's `record` comes before it and has counted the forward.
        """
        if not _recording.get():
            return
        entries = self.request.entries(len(q_bhsd), streams)
        self.request.check_text(k_bhld.shape[2])
        q, k = entries_of(q_bhsd, entries), entries_of(k_bhld, entries)
        bias = None if bias_b11l is None else entries_of(bias_b11l, entries)
        v2t = q.new_empty(*q.shape[:2], self.request.text_tokens, q.shape[2], dtype=torch.float32)
        for chosen, p in probability_chunks(q, k, scale, bias):
            v2t[..., chosen] = p[..., : self.request.text_tokens].transpose(2, 3)
        self._require_finite("v2t", index, v2t)
        if self.request.direction != "t2v":
            self._means.add("v2t", index, v2t.shape, q.device, [(..., v2t)])
        if self.request.direction != "v2t":
            # a token that no cell sees has no place: its row stays 0 instead of becoming NaN
            mass = v2t.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(v2t.dtype).tiny)
            self._means.add("t2v", index, v2t.shape, q.device, [(..., v2t.div_(mass))])

    def _add_rows(
        self, name: str, index: int, q: Tensor, k: Tensor, layout: Layout, scale: float, bias: Tensor | None,
        lse: Tensor | None,
    ) -> None:
        """Add probabilities [B, h, rows, S_v] of query rows over the vision columns.

        With the rows' log-sum-exp [B, h, rows] every probability needs its own key alone.
        """
        cells = self._vision_columns(layout, k.shape[2])
        if lse is not None and (q.is_cuda or q.dtype == torch.float32):  # a CPU's is rough in half precision
            self._require_finite(name, index, lse)
            parts = rows_by_lse(q, k, cells, lse, scale, bias)
        else:
            parts = self._checked(name, index, rows_by_softmax(q, k, cells, scale, bias))
        self._means.add(name, index, (*q.shape[:3], layout.vision_tokens), q.device, parts)

    def _checked(
        self, name: str, index: int, parts: Iterator[tuple[Where, Tensor]]
    ) -> Iterator[tuple[Where, Tensor]]:
        """The parts of a softmax; after the last, raises ModelError if any was not finite."""
        ones = []  # a softmax with a number that is not finite is so in all of its columns
        for where, p in parts:
            ones.append(p[..., 0].flatten().clone())  # a view would keep p
            yield where, p
        self._require_finite(name, index, torch.cat(ones))

    def _add_over_text(
        self, index: int, q: Tensor, k: Tensor, layout: Layout, scale: float, bias: Tensor | None, lse: Tensor
    ) -> None:
        """Add probabilities [B, h, T, S_v] of all vision rows over T text columns, by the rows' log-sum-exp."""
        self._require_finite("v2t", index, lse)
        columns = slice(layout.text.start, layout.text.start + self.request.text_tokens)
        words = k[:, :, columns]
        parts = columns_by_lse(q, words, lse, scale, None if bias is None else bias[..., columns])
        self._means.add("v2t", index, (*words.shape[:3], q.shape[2]), q.device, parts)

    def _hand_on(
        self, index: int, q: Tensor, k: Tensor, layout: Layout, scale: float, bias: Tensor | None, lse: Tensor
    ) -> None:
        """Give the takers of this layer's place its rows, by their queries where they can be read."""
        place = index if self.request.head_scope == "layer_head" else 0
        if place not in self._takers:
            self._takers[place] = [self.request.row_taker(entry) for entry in range(len(q))]
        takers = self._takers[place]
        columns = self._vision_columns(layout, k.shape[2])
        hidden = bias is not None and any(bool(bias[..., part].any()) for part in columns)
        if hidden or not all(taker.reads_queries(q.device) for taker in takers):
            rows = q[:, :, self.request.rows.to(q.device)]
            for chosen, p_bhrs in cell_chunks(rows, k, columns, scale, bias):
                self._require_finite("v2v", index, p_bhrs[..., 0])
                for taker, p_hrs in zip(takers, p_bhrs, strict=True):
                    taker.add(p_hrs, self.request.rows[chosen])
            return
        self._require_finite("v2v", index, lse)
        shown = [k[:, :, part] for part in columns]
        rest = rest_bias = None  # where it is about as long as what is shown, it says nothing cheaper
        if len(columns) * layout.tokens == k.shape[2]:
            texts = layout.in_streams(layout.text, k.shape[2])
            rest = torch.cat([k[:, :, part] for part in texts], dim=2)
            rest_bias = None if bias is None else torch.cat([bias[:, 0, 0, part] for part in texts], dim=1)
        for i, taker in enumerate(takers):
            taker.add_queries(
                q[i], [part[i] for part in shown], lse[i], scale,
                None if rest is None else rest[i], None if rest_bias is None else rest_bias[i],
            )

    def _vision_columns(self, layout: Layout, keys: int) -> list[slice]:
        """Where the keys lie whose probabilities are a cell's: the clip's own and, if asked for, its reference's."""
        return layout.in_streams(layout.vision, keys)[: 1 if self.request.memory_columns == "own" else None]

    def _require_finite(self, name: str, index: int, values: Tensor) -> None:
        require_finite(
            values,
            f"The attention ({name}) of layer {self.layers[index].name}, recorded forward {self.forwards}",
            "Load the teacher in float32 or bfloat16 instead of float16, and check its weights.",
        )


@contextmanager
def harvest(teacher: Any, request: HarvestRequest) -> Iterator[Harvest]:
    """Record attention of every forward of the teacher's transformers inside the context.

    `teacher` has `attention_models`, `attention_layers` and `attention_processor` (vdm_priors.families.Teacher). May be
    nested with `reference_memory` and with itself. Raises ModelError for layers that the model does not have.
    """
    layers = teacher.attention_layers
    chosen = range(len(layers)) if request.layers == "all" else request.layers
    unknown = [index for index in chosen if not 0 <= index < len(layers)]
    if unknown or len(chosen) == 0:
        raise ModelError(
            f"Harvest: layers {list(chosen)} cannot be harvested; the teacher has attention layers 0 to "
            f"{len(layers) - 1}."
        )
    harvested = Harvest(request, {index: layers[index] for index in sorted(set(chosen))})
    with ExitStack() as stack:
        for number, model in enumerate(teacher.attention_models):
            of_key = {
                key: index for index, layer in harvested.layers.items() if layer.model == number for key in layer.keys
            }

            def build(key: str, processor: Any, of_key: dict[str, int] = of_key) -> Any:
                if key not in of_key:
                    return processor
                name = key.removesuffix(".processor")
                return teacher.attention_processor(name, processor, recorder=(of_key[key], harvested))

            stack.enter_context(swapped_processors(model, build))
        yield harvested
    harvested.close()
