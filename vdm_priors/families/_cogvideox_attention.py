"""CogVideoX's attention processor with recorders and cross-stream memory.

Legend: b batch, h heads, s tokens (text first, then vision), d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.attention_processor import (
    CogVideoXAttnProcessor2_0,
    FusedCogVideoXAttnProcessor2_0,
)
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from vdm_priors.errors import ModelError
from vdm_priors.memory import Streams, attend


def attention_processor(
    layer: str,
    previous: Any,
    recorder: tuple[int, Any] | None = None,
    streams: Streams | None = None,
) -> CogVideoXAttention:
    """A processor like `previous` that also records, or also attends to a reference stream.

    Raises ModelError if `previous` is none whose result is known.
    """
    own = previous
    if not isinstance(previous, CogVideoXAttention):
        if type(previous) not in (CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0):
            raise ModelError(
                f"Layer {layer} of the teacher has the attention processor "
                f"{type(previous).__name__}, whose result cannot be repeated. Restore diffusers' "
                f"own processors before harvesting."
            )
        own = CogVideoXAttention(fused=type(previous) is FusedCogVideoXAttnProcessor2_0)
    if recorder is not None:
        own = replace(own, recorders=(*own.recorders, recorder))
    return own if streams is None else replace(own, streams=streams)


@dataclass(frozen=True, eq=False)
class CogVideoXAttention:
    """diffusers' CogVideoX processors, operation for operation, with recorders and memory.

    Without memory its outputs are bit for bit those of the processor that it stands for.
    """

    fused: bool = False
    recorders: tuple[tuple[int, Any], ...] = ()  # (layer index, Harvest)
    streams: Streams | None = None

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
        for index, recorder in self.recorders:
            recorder.record(index, q, k, text, q.shape[-1] ** -0.5, self.streams)
        out = attend(q, k, v, self.streams).transpose(1, 2).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        return out[:, text:], out[:, :text]

    def project(
        self, attn: Any, joint: Tensor, text: int, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [b, h, s, d] after normalisation, with rotary positions on vision only."""
        if self.fused:
            parts = attn.to_qkv(joint).chunk(3, dim=-1)
        else:
            parts = (attn.to_q(joint), attn.to_k(joint), attn.to_v(joint))
        q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        if rotary is not None:
            q = torch.cat([q[:, :, :text], apply_rotary_emb(q[:, :, text:], rotary)], dim=2)
            k = torch.cat([k[:, :, :text], apply_rotary_emb(k[:, :, text:], rotary)], dim=2)
        return q, k, v
