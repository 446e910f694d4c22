"""Some rows of an attention matrix and some of their columns, without the matrix, in float32.

The probabilities over all keys, [B, Hq, R, S], exist only while a layer is computed: the
backward pass computes them again from the query rows and the keys, which the attention itself
keeps anyway. So capturing a layer keeps no more than its result.

Legend: B batch, Hq query heads, Hkv key heads, G = Hq/Hkv, D head size, S sequence, R rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def allowed_keys(
    rows_br: Tensor, length: int, causal: bool, mask: Tensor | None, window: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Which keys each wanted row may attend to, bool [B, 1 or Hq, R, S], and what is added to its scores.

    mask: None; [B, S], not 0 for real tokens (flash attention); or [B or 1, 1 or Hq, S, S], bool
    (True: attend) or float (added to the scores). causal: keys after the row are not seen, which
    a mask need not say. window: a row sees only its last `window` keys (sliding attention).
    """
    keys = torch.arange(length, device=rows_br.device)
    rows = rows_br[:, None, :, None]
    allowed = rows >= keys if causal else torch.ones_like(rows >= keys)
    if window is not None:
        allowed = allowed & (rows - keys < window)
    if mask is None:
        return allowed, None
    if mask.ndim == 2:
        return allowed & (mask != 0)[:, None, None, :], None
    mask = mask.expand(len(rows_br), -1, -1, -1)
    mask_rows = mask.gather(2, rows.expand(-1, mask.shape[1], -1, length))
    if mask_rows.dtype == torch.bool:
        return allowed & mask_rows, None
    # the smallest number of half types stands for "never" as well as -inf does
    return allowed & (mask_rows > torch.finfo(mask_rows.dtype).min), mask_rows.float()


def row_probabilities(
    query_bhrd: Tensor, key: Tensor, allowed: Tensor, added: Tensor | None, scaling: float
) -> Tensor:
    """softmax(Q Kᵀ · scaling) [B, Hq, R, S] float32 of some query rows; 0 for a row that may see no key.

    query_bhrd [B, Hq, R, D] and key [B, Hkv, S, D] after RoPE; allowed and added: of `allowed_keys`.
    """
    scores = _grouped(query_bhrd.float(), key) @ key.float().transpose(2, 3)
    scores = scores.reshape(*query_bhrd.shape[:3], key.shape[2]) * scaling
    if added is not None:
        scores = scores + added
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    # a row that may attend to nothing (padding) has no distribution
    return scores.softmax(dim=-1) * allowed.any(dim=-1, keepdim=True)


def _grouped(heads_bhrx: Tensor, key: Tensor) -> Tensor:
    """[B, Hq, R, x] as [B, Hkv, G·R, x]: grouped queries share their key head, keys are never repeated."""
    batch, heads, rows, size = heads_bhrx.shape
    return heads_bhrx.reshape(batch, key.shape[1], heads // key.shape[1] * rows, size)


class MeanRows(torch.autograd.Function):
    """Rows [B, R, C] float32 averaged over heads, from query rows [B, Hq, R, D] and keys [B, Hkv, S, D].

    MeanRows.apply(query_bhrd, key, allowed, added, scaling, columns [B, C], kept [B, R, C]):
    entries outside `kept` are 0.
    """

    @staticmethod
    def forward(ctx, query_bhrd, key, allowed, added, scaling, columns_bc, kept_brc):
        ctx.save_for_backward(query_bhrd, key, allowed, added, columns_bc, kept_brc)
        ctx.scaling = scaling
        with torch.autocast(query_bhrd.device.type, enabled=False):  # which would round the scores
            mean_brs = row_probabilities(query_bhrd, key, allowed, added, scaling).mean(dim=1)
        wanted = columns_bc[:, None, :].expand(-1, mean_brs.shape[1], -1)
        return torch.where(kept_brc, mean_brs.gather(2, wanted), 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_brc):
        query_bhrd, key, allowed, added, columns_bc, kept_brc = ctx.saved_tensors
        heads, rows = query_bhrd.shape[1:3]
        with torch.autocast(query_bhrd.device.type, enabled=False):
            p_bhrs = row_probabilities(query_bhrd, key, allowed, added, ctx.scaling)
            wanted = columns_bc[:, None, :].expand(-1, rows, -1)
            gradient_brs = torch.zeros_like(p_bhrs[:, 0])
            gradient_brs.scatter_add_(2, wanted, torch.where(kept_brc, gradient_brc, 0.0) / heads)
            gradient_p = gradient_brs[:, None]  # every head gets the mean's
            d_scores = p_bhrs * (gradient_p - (p_bhrs * gradient_p).sum(dim=-1, keepdim=True)) * ctx.scaling
            d_grouped = _grouped(d_scores, key)
            d_query = (d_grouped @ key.float()).reshape(query_bhrd.shape).to(query_bhrd.dtype)
            d_key = (d_grouped.transpose(2, 3) @ _grouped(query_bhrd.float(), key)).to(key.dtype)
        return d_query, d_key, None, None, None, None, None
