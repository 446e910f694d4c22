"""What the families' attention processors share: recorders, reference streams, and how one extends another.

Legend: b batch, h heads, s tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from vdm_priors.attention import Layout
from vdm_priors.errors import ModelError
from vdm_priors.memory import Streams, attend


@dataclass(frozen=True, eq=False)
class RecordingProcessor:
    """A family's processor, operation for operation, with recorders and memory.

    Without memory its outputs are bit for bit those of the processor that it stands for. Subclasses define
    `__call__` as diffusers' does and name in `STANDS_FOR` the classes whose result they repeat.
    """

    backend: Any = None  # that of diffusers' attention dispatcher, where the processor has one
    recorders: tuple[tuple[int, Any], ...] = ()  # (layer index, Harvest)
    streams: Streams | None = None

    STANDS_FOR = ()

    @classmethod
    def like(cls, previous: Any) -> Self:
        """The subclass's processor that computes what `previous`, one of STANDS_FOR, does."""
        if getattr(previous, "_parallel_config", None) is not None:
            raise ModelError(
                "The teacher's attention is split over several devices, which cannot be harvested. Load it on one."
            )
        return cls(backend=getattr(previous, "_attention_backend", None))

    @classmethod
    def extending(
        cls, layer: str, previous: Any, recorder: tuple[int, Any] | None, streams: Streams | None
    ) -> Self:
        """A processor like `previous` that also records, or also attends to a reference stream.

        Raises ModelError if `previous` is none whose result is known.
        """
        own = previous
        if not isinstance(previous, cls):
            if type(previous) not in cls.STANDS_FOR:
                raise ModelError(
                    f"Layer {layer} of the teacher has the attention processor "
                    f"{type(previous).__name__}, whose result cannot be repeated. Restore diffusers' "
                    f"own processors before harvesting."
                )
            own = cls.like(previous)
        if recorder is not None:
            own = replace(own, recorders=(*own.recorders, recorder))
        return own if streams is None else replace(own, streams=streams)

    def record(self, q_bhsd: Tensor, k_bhsd: Tensor, layout: Layout, bias_b11s: Tensor | None = None) -> None:
        """Tell the recorders of a joint or a self-attention."""
        for index, recorder in self.recorders:
            recorder.record(index, q_bhsd, k_bhsd, layout, q_bhsd.shape[-1] ** -0.5, self.streams, bias_b11s)

    def record_cross(self, q_bhsd: Tensor, k_bhld: Tensor, bias_b11l: Tensor | None = None) -> None:
        """Tell the recorders of a cross-attention."""
        for index, recorder in self.recorders:
            recorder.record_cross(index, q_bhsd, k_bhld, q_bhsd.shape[-1] ** -0.5, self.streams, bias_b11l)

    def kernel(self) -> Callable[..., Tensor]:
        """diffusers' attention dispatcher on [b, h, s, d], as PyTorch's own attention is called."""

        def dispatched(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return dispatch_attention_fn(q, k, v, attn_mask=attn_mask, backend=self.backend).transpose(1, 2)

        return dispatched

    def attend(
        self, q_bhsd: Tensor, k_bhsd: Tensor, v_bhsd: Tensor, mask_b11s: Tensor | None = None
    ) -> Tensor:
        """The attention's output [b, s, h·d], with the reference streams where there are any."""
        return attend(q_bhsd, k_bhsd, v_bhsd, self.streams, mask_b11s, self.kernel()).transpose(1, 2).flatten(2)


def split_heads(x_bsc: Tensor, heads: int) -> Tensor:
    """[b, s, h·d] -> [b, h, s, d]."""
    return x_bsc.unflatten(-1, (heads, -1)).transpose(1, 2)


def as_bias(visible_b11s: Tensor) -> Tensor:
    """A bias for logits from a bool mask of visible keys: 0, and −inf where hidden."""
    return torch.zeros(visible_b11s.shape, device=visible_b11s.device).masked_fill(~visible_b11s, -torch.inf)
