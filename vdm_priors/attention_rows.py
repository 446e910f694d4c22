"""Exact probabilities of chosen attention rows, a part at a time: never more of them than a device's cache holds.

A part is (index, values): where its numbers stand in the whole [b, h, r, k]. Queries see the keys of one stream or,
with a reference, of two, one after the other; `cells` are the slices of the keys that show the clip's cells, and a
cell's probability is the sum over its keys.

Legend: b batch, h heads, r query rows, k keys, S_v cells, t text keys, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vdm_priors.kernels import probabilities, scaled_products

Where = tuple[slice, slice, slice, slice]

CHUNK_ELEMENTS = {"cpu": 2**20}  # probabilities of whole rows held at once: 4 MiB in float32
TILE_ELEMENTS = {"cpu": 2**18}  # where a row's need not be there together: 1 MiB, a core's own cache
LARGE_CHUNK = 2**23  # elsewhere: 32 MiB in float32
TILE_ROWS, TILE_COLUMNS = 64, 256  # of a tile, at most and at least, where there are as many


def probability_chunks(
    q_bhrd: Tensor, k_bhkd: Tensor, scale: float, bias_bhrk: Tensor | None = None, chunk_elements: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """softmax(q Kᵀ · scale + bias) over all keys, some rows at a time: (rows, float32 [b, h, rows, k]).

    `bias` is broadcast over heads and rows; −inf hides a key. Each row sees all of its keys at once, so no log-sum-exp
    has to be carried between chunks; at most `chunk_elements` probabilities (one row of all heads at least) exist at a
    time.
    """
    batch, heads, rows, _ = q_bhrd.shape
    step = max(1, (chunk_elements or _at_once(q_bhrd.device)) // (batch * heads * k_bhkd.shape[2]))
    for chosen in _slices(rows, step):
        logits_bhrk = scaled_products(q_bhrd[:, :, chosen], k_bhkd, scale)
        if bias_bhrk is not None:
            logits_bhrk = logits_bhrk + bias_bhrk
        yield chosen, logits_bhrk.softmax(dim=-1)


def cell_chunks(
    q_bhrd: Tensor, k_bhkd: Tensor, cells: Sequence[slice], scale: float, bias_b11k: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, probabilities [b, h, rows, S_v] of the cells), some rows at a time."""
    for chosen, p in probability_chunks(q_bhrd, k_bhkd, scale, bias_b11k):
        yield chosen, sum((p[..., part] for part in cells[1:]), start=p[..., cells[0]])


def rows_by_softmax(
    q_bhrd: Tensor, k_bhkd: Tensor, cells: Sequence[slice], scale: float, bias_b11k: Tensor | None = None
) -> Iterator[tuple[Where, Tensor]]:
    """Parts of the probabilities [b, h, r, S_v] of the cells."""
    batch, heads, rows, _ = q_bhrd.shape
    # few heads and many of their rows at a time: keys are read once
    step = max(1, _at_once(q_bhrd.device) // (batch * rows * k_bhkd.shape[2]))
    for of in _slices(heads, step):
        for chosen, p in cell_chunks(q_bhrd[:, of], k_bhkd[:, of], cells, scale, bias_b11k):
            yield (slice(None), of, chosen, slice(None)), p


def rows_by_lse(
    q_bhrd: Tensor, k_bhkd: Tensor, cells: Sequence[slice], lse_bhr: Tensor, scale: float,
    bias_b11k: Tensor | None = None,
) -> Iterator[tuple[Where, Tensor]]:
    """As `rows_by_softmax`, with the rows' log-sum-exp over all keys: only the cells' keys are read."""
    for where in tiles((*q_bhrd.shape[:3], cells[0].stop - cells[0].start), q_bhrd.device):
        _, of, chosen, columns = where
        of_parts = []
        for part in cells:
            keys = slice(part.start + columns.start, part.start + columns.stop)
            bias = None if bias_b11k is None else bias_b11k[..., keys]
            of_parts.append(
                probabilities(q_bhrd[:, of, chosen], k_bhkd[:, of, keys], lse_bhr[:, of, chosen, None], scale, bias)
            )
        yield where, sum(of_parts[1:], start=of_parts[0])


def columns_by_lse(
    q_bhsd: Tensor, k_bhtd: Tensor, lse_bhs: Tensor, scale: float, bias_b11t: Tensor | None = None
) -> Iterator[tuple[Where, Tensor]]:
    """Parts of the probabilities [b, h, t, S_v] of a few keys, transposed, for queries of all cells."""
    for where in tiles((*k_bhtd.shape[:3], q_bhsd.shape[2]), q_bhsd.device):
        _, of, words, queries = where
        bias = None if bias_b11t is None else bias_b11t[..., words].transpose(2, 3)
        yield where, probabilities(
            k_bhtd[:, of, words], q_bhsd[:, of, queries], lse_bhs[:, of, None, queries], scale, bias
        )


def tiles(shape: tuple[int, int, int, int], device: torch.device) -> Iterator[Where]:
    """Indices of parts of a [batch, heads, rows, columns] that a device's cache holds; whole columns first."""
    batch, heads, rows, columns = shape
    limit = TILE_ELEMENTS.get(device.type, LARGE_CHUNK) // batch
    row_step = _even_step(rows, TILE_ROWS)
    column_step = _even_step(columns, max(TILE_COLUMNS, limit // row_step))
    head_step = _even_step(heads, max(1, limit // (row_step * column_step)))
    for of in _slices(heads, head_step):
        for chosen in _slices(rows, row_step):
            for part in _slices(columns, column_step):
                yield slice(None), of, chosen, part


def _at_once(device: torch.device) -> int:
    return CHUNK_ELEMENTS.get(device.type, LARGE_CHUNK)


def _even_step(count: int, most: int) -> int:
    """The step of the fewest equal parts of `count` that are no longer than `most`."""
    return -(-count // -(-count // most))


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
