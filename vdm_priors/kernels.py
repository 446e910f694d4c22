"""Attention with the log-sum-exp of its rows, from the very kernel that computes the output, and exact logits.

softmax(q Kᵀ·scale) of a whole row needs all of its keys; with the row's log-sum-exp, a probability needs its own key
alone: p = exp(q·k·scale − lse). So all vision rows over a few text columns, and sums of squares over all keys, cost no
S×S numbers. PyTorch's fused kernels compute the log-sum-exp for their backward pass and return it beside the output.

Legend: b batch, h heads, s query tokens, k keys, d head width.
"""

from __future__ import annotations

from math import frexp, log

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

FLASH, EFFICIENT, CUDNN = 1, 2, 3  # torch's own numbers of its kernels (SDPBackend)
LOG2_E = 1 / log(2)
CHUNK_ELEMENTS = 2**25  # logits held at once where no fused kernel can be had: 128 MiB in float32


def attention(
    q_bhsd: Tensor, k_bhkd: Tensor, v_bhkd: Tensor, attn_mask: Tensor | None = None, lse: bool | None = False
) -> tuple[Tensor, Tensor | None]:
    """PyTorch's attention; with `lse` also the rows' log-sum-exp (`attention_and_lse`), else None.

    lse None: where the kernel that PyTorch chooses has it anyway, so that it costs nothing.
    """
    if lse:
        return attention_and_lse(q_bhsd, k_bhkd, v_bhkd, attn_mask)
    if lse is None and (found := _fused(q_bhsd, k_bhkd, v_bhkd, attn_mask, q_bhsd.shape[-1] ** -0.5)) is not None:
        return found
    return scaled_dot_product_attention(q_bhsd, k_bhkd, v_bhkd, attn_mask=attn_mask), None


def attention_and_lse(
    q_bhsd: Tensor, k_bhkd: Tensor, v_bhkd: Tensor, attn_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """scaled_dot_product_attention's output, bit for bit, and the log-sum-exp of its rows' logits, float32 [b, h, s].

    attn_mask: bool (True is seen) or a bias, broadcastable to [b, h, s, k]. Calls the kernel that PyTorch chooses for
    these inputs; where that one has no log-sum-exp to give, it is computed beside it.
    """
    found = _fused(q_bhsd, k_bhkd, v_bhkd, attn_mask, q_bhsd.shape[-1] ** -0.5)
    if found is not None:
        return found
    out = scaled_dot_product_attention(q_bhsd, k_bhkd, v_bhkd, attn_mask=attn_mask)
    return out, lse_beside(q_bhsd, k_bhkd, attn_mask)


def lse_beside(q_bhsd: Tensor, k_bhkd: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """The log-sum-exp [b, h, s] of an attention that was computed by other means; see `attention_and_lse`."""
    scale = q_bhsd.shape[-1] ** -0.5
    if attn_mask is None or attn_mask.dtype != torch.bool or attn_mask.shape[1:3] != (1, 1):
        return sharpened_lse(q_bhsd, k_bhkd, scale, 1.0, as_bias(attn_mask))
    # without their hidden keys, entries need no mask, which the fused kernels of a GPU would not take
    return torch.cat([
        sharpened_lse(q_bhsd[i : i + 1], k_bhkd[i : i + 1, :, seen_k], scale, 1.0)
        for i, seen_k in enumerate(attn_mask[:, 0, 0].expand(len(q_bhsd), -1))
    ])


def sharpened_lse(q_bhsd: Tensor, k_bhkd: Tensor, scale: float, power: float, bias: Tensor | None = None) -> Tensor:
    """log Σ_k exp(power · (q·k·scale + bias)), float32 [b, h, s]: with it Σ_k p^power = exp(this − power · lse).

    Costs one fused attention where there is one.
    """
    mask = None if bias is None else power * bias
    # values are not asked for, but every fused kernel wants some of the keys' width
    found = _fused(q_bhsd, k_bhkd, k_bhkd, mask, power * scale)
    return log_sum_exp(q_bhsd, k_bhkd, power * scale, mask) if found is None else found[1]


def log_sum_exp(q_bhsd: Tensor, k_bhkd: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """log Σ_k exp(q·k·scale + bias), float32 [b, h, s]; never more than a chunk of logits at once."""
    batch, heads, _, _ = q_bhsd.shape
    step = max(1, CHUNK_ELEMENTS // max(1, batch * heads * k_bhkd.shape[2]))
    parts = []
    for number, chunk in enumerate(q_bhsd.split(step, dim=2)):
        logits = scaled_products(chunk, k_bhkd, scale)
        if bias is not None:
            logits = logits + (bias if bias.shape[2] == 1 else bias[:, :, number * step : (number + 1) * step])
        parts.append(logits.logsumexp(dim=-1))
    return torch.cat(parts, dim=2)


def probabilities(
    q_bhrd: Tensor, k_bhkd: Tensor, lse: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """exp(q·k·scale + bias − lse) of every pair, float32 [b, h, r, k]; lse and bias broadcast to it."""
    p = scaled_products(q_bhrd, k_bhkd, scale)
    if bias is not None:
        p += bias
    p -= lse
    # a CPU takes powers of two three times as fast as those of e, and as exactly
    return p.mul_(LOG2_E).exp2_() if p.device.type == "cpu" else p.exp_()


def scaled_products(q_bhrd: Tensor, k_bhkd: Tensor, scale: float) -> Tensor:
    """q·k·scale of every pair in float32 [b, h, r, k], of half-precision numbers too."""
    if q_bhrd.device.type != "cuda" or q_bhrd.dtype not in (torch.bfloat16, torch.float16):
        return (q_bhrd.float() * scale) @ k_bhkd.float().transpose(2, 3)
    # tensor cores take half-precision factors and sum their exact products in float32
    exact = frexp(scale)[0] == 0.5  # a power of two, as 1/√64 is, changes no digit of q
    products = torch.bmm(
        (q_bhrd * scale if exact else q_bhrd).flatten(0, 1), k_bhkd.flatten(0, 1).transpose(1, 2),
        out_dtype=torch.float32,
    ).unflatten(0, q_bhrd.shape[:2])
    return products if exact else products.mul_(scale)


def as_bias(attn_mask: Tensor | None) -> Tensor | None:
    """A bias for logits from a mask: 0 where a key is seen and −inf where it is hidden; a bias stays one."""
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return attn_mask
    return torch.zeros(attn_mask.shape, device=attn_mask.device).masked_fill(~attn_mask, -torch.inf)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor] | None:
    """(output, log-sum-exp) of the fused kernel that PyTorch would choose; None where it is not known to have both."""
    if q.requires_grad or k.requires_grad or v.requires_grad:
        return None  # these calls are for frozen models; with gradients PyTorch may choose otherwise
    choice = torch._fused_sdp_choice(q, k, v, attn_mask=mask, scale=scale)
    aten = torch.ops.aten
    if q.device.type == "cpu" and choice == FLASH:
        bias = as_bias(mask)
        if bias is not None:
            bias = bias.to(q.dtype).expand(*torch.broadcast_shapes(bias.shape, (1, 1, q.shape[2], k.shape[2])))
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
    if q.device.type != "cuda" or mask is not None or q.shape[-1] % 8:
        return None  # PyTorch pads widths and masks before the kernel: the bits might differ
    rows = q.shape[2]
    if choice == FLASH:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[:2]
    elif choice == EFFICIENT:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[:2]
    elif choice == CUDNN:
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
    else:
        return None
    return out, lse.reshape(*lse.shape[:3])[:, :, :rows].float()
