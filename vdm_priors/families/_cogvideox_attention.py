"""CogVideoX's attention processor with recorders and cross-stream memory.

Legend: b batch, h heads, s tokens (text first, then vision), d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers.models.attention_processor import (
    CogVideoXAttnProcessor2_0,
    FusedCogVideoXAttnProcessor2_0,
)
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from vdm_priors.attention import Layout
from vdm_priors.errors import ModelError
from vdm_priors.families._processors import RecordingProcessor, split_heads
from vdm_priors.kernels import attention


@dataclass(frozen=True, eq=False)
class CogVideoXAttention(RecordingProcessor):
    """Joint attention over [text, vision], rotary positions on vision only, nothing masked."""

    fused: bool = False

    STANDS_FOR = (CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0)

    @classmethod
    def like(cls, previous: Any) -> Self:
        return cls(fused=type(previous) is FusedCogVideoXAttnProcessor2_0)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if attention_mask is not None:
            raise ModelError("CogVideoX attention: an attention mask cannot be harvested.")
        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        q, k, v = self.project(attn, joint, text, image_rotary_emb)
        out = self.attend(q, k, v, Layout.text_first(text, q.shape[2]))
        out = attn.to_out[1](attn.to_out[0](out))
        return out[:, text:], out[:, :text]

    def kernel(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        return attention  # diffusers' own asks PyTorch, not the dispatcher

    def project(
        self, attn: Any, joint: Tensor, text: int, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [b, h, s, d] after normalisation, with rotary positions on vision only."""
        if self.fused:
            parts = attn.to_qkv(joint).chunk(3, dim=-1)
        else:
            parts = (attn.to_q(joint), attn.to_k(joint), attn.to_v(joint))
        q, k, v = (split_heads(part, attn.heads) for part in parts)
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        if rotary is not None:
            for x in (q, k):
                x[:, :, text:] = apply_rotary_emb(x[:, :, text:], rotary)
        return q, k, v
