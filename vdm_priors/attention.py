"""Exact attention probabilities of chosen rows, and a change of processors that undoes itself.

Legend: b batch, h heads, r query rows, k keys, d head width, s tokens of a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from vdm_priors.errors import ModelError

CHUNK_ELEMENTS = 2**25  # probabilities held at once: 128 MiB in float32


def probability_chunks(
    q_bhrd: Tensor, k_bhkd: Tensor, scale: float, chunk_elements: int = CHUNK_ELEMENTS
) -> Iterator[tuple[slice, Tensor]]:
    """softmax(q Kᵀ · scale) over all keys, some rows at a time: (rows, float32 [b, h, rows, k]).

    Each row sees all of its keys at once, so no log-sum-exp has to be carried between chunks;
    at most `chunk_elements` probabilities (one row of all heads at least) exist at a time.
    """
    batch, heads, rows, _ = q_bhrd.shape
    step = max(1, chunk_elements // (batch * heads * k_bhkd.shape[2]))
    k_bhdk = k_bhkd.float().transpose(2, 3)
    for start in range(0, rows, step):
        chosen = slice(start, min(start + step, rows))
        logits_bhrk = (q_bhrd[:, :, chosen].float() * scale) @ k_bhdk
        yield chosen, logits_bhrk.softmax(dim=-1)


@contextmanager
def swapped_processors(model: Any, build: Callable[[int, str, Any], Any]) -> Iterator[None]:
    """Set `build(layer index, layer name, processor)` on every attention layer of a diffusers model.

    Uses the public `attn_processors` and `set_attn_processor`; on exit the very same objects
    are back, whatever happened inside.
    """
    before = dict(model.attn_processors)
    try:
        built = {
            key: build(index, key.removesuffix(".processor"), processor)
            for index, (key, processor) in enumerate(before.items())
        }
        model.set_attn_processor(built)
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
