"""Exact probabilities of chosen attention rows, where text and vision lie, and processors that are put back.

Legend: b batch, h heads, r query rows, k keys, d head width, s tokens of a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdm_priors.errors import ModelError
from vdm_priors.kernels import scaled_products

CHUNK_ELEMENTS = {"cpu": 2**20}  # probabilities held at once: 4 MiB in float32
LARGE_CHUNK = 2**23  # elsewhere: 32 MiB in float32
TILE_ELEMENTS = {"cpu": 2**17}  # where a row's columns need not be there together: half of a core's own cache
TILE_ROWS, TILE_COLUMNS = 512, 256  # of a tile, at most and at least, where there are as many


@dataclass(frozen=True)
class AttentionLayer:
    """One layer as heads are counted: its name, its model's place in `attention_models`, its processors' keys.

    A joint layer has one processor; where text is attended to separately, self- and cross-attention are one layer.
    """

    name: str
    model: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Where text and vision tokens lie in an attention's sequence; `text` is empty where vision attends to itself."""

    text: slice
    vision: slice

    @classmethod
    def text_first(cls, text: int, tokens: int) -> Layout:
        return cls(slice(0, text), slice(text, tokens))

    @classmethod
    def text_last(cls, text: int, tokens: int) -> Layout:
        return cls(slice(tokens - text, tokens), slice(0, tokens - text))

    @classmethod
    def vision_only(cls, tokens: int) -> Layout:
        return cls(slice(0, 0), slice(0, tokens))

    @property
    def text_tokens(self) -> int:
        return self.text.stop - self.text.start

    @property
    def vision_tokens(self) -> int:
        return self.vision.stop - self.vision.start

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.vision_tokens

    def in_streams(self, part: slice, keys: int) -> list[slice]:
        """Where `part`, text or vision, lies among the keys of one stream, or of several one after the other."""
        return [slice(first + part.start, first + part.stop) for first in range(0, keys, self.tokens)]


def probability_chunks(
    q_bhrd: Tensor, k_bhkd: Tensor, scale: float, bias_bhrk: Tensor | None = None,
    chunk_elements: int | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """softmax(q Kᵀ · scale + bias) over all keys, some rows at a time: (rows, float32 [b, h, rows, k]).

    `bias` is broadcast over heads and rows; −inf hides a key. Each row sees all of its keys at once, so no log-sum-exp
    has to be carried between chunks; at most `chunk_elements` probabilities (one row of all heads at least) exist at a
    time.
    """
    batch, heads, rows, _ = q_bhrd.shape
    chunk_elements = chunk_elements or elements_at_once(q_bhrd.device)
    step = max(1, chunk_elements // (batch * heads * k_bhkd.shape[2]))
    for start in range(0, rows, step):
        chosen = slice(start, min(start + step, rows))
        logits_bhrk = scaled_products(q_bhrd[:, :, chosen], k_bhkd, scale)
        if bias_bhrk is not None:
            logits_bhrk = logits_bhrk + bias_bhrk
        yield chosen, logits_bhrk.softmax(dim=-1)


def tiles(
    batch: int, heads: int, rows: int, columns: int, device: torch.device
) -> Iterator[tuple[slice, slice, slice]]:
    """(heads, rows, columns) of parts of a [batch, heads, rows, columns] that a device's cache holds."""
    limit = TILE_ELEMENTS.get(device.type, LARGE_CHUNK) // batch
    row_step = _even_step(rows, TILE_ROWS)
    column_step = _even_step(columns, max(TILE_COLUMNS, limit // row_step))
    head_step = _even_step(heads, max(1, limit // (row_step * column_step)))
    for of in _slices(heads, head_step):
        for chosen in _slices(rows, row_step):
            for part in _slices(columns, column_step):
                yield of, chosen, part


def _even_step(count: int, most: int) -> int:
    """The step of the fewest equal parts of `count` that are no longer than `most`."""
    return -(-count // -(-count // most))


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def elements_at_once(device: torch.device) -> int:
    """How many probabilities should exist at once, so that a device's cache holds them."""
    return CHUNK_ELEMENTS.get(device.type, LARGE_CHUNK)


@contextmanager
def swapped_processors(model: Any, build: Callable[[str, Any], Any]) -> Iterator[None]:
    """Set `build(key, processor)` on every attention layer of a diffusers model.

    Uses the public `attn_processors` and `set_attn_processor`; on exit the very same objects
    are back, whatever happened inside.
    """
    before = dict(model.attn_processors)
    try:
        model.set_attn_processor({key: build(key, processor) for key, processor in before.items()})
        yield
    finally:
        model.set_attn_processor(dict(before))  # diffusers empties the dict that it is given


def require_finite(values: Tensor, what: str, remedy: str) -> None:
    """Raises ModelError, beginning with `what`, if a value is NaN or infinite."""
    # a sum is finite only if all are, or if finite values overflow: then look at each
    if not values.sum().isfinite() and not values.isfinite().all():
        count = int((~values.isfinite()).sum())
        raise ModelError(
            f"{what} holds {count} NaN or infinite values of {values.numel()}. {remedy}"
        )
