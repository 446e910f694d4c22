"""What the families' attention processors share: recorders, memory, and how one extends another.

Legend: b batch, h heads, s tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor

from vdm_priors.attention import Layout
from vdm_priors.errors import ModelError
from vdm_priors.kernels import as_bias, attention, lse_beside
from vdm_priors.memory import Memory, attend

Keeper = Callable[[Tensor, Tensor, Tensor | None], None]


@dataclass(frozen=True, eq=False)
class RecordingProcessor:
    """A family's processor, operation for operation, with recorders and memory.

    Without memory its outputs are bit for bit those of the processor that it stands for. Subclasses define
    `__call__` as diffusers' does and name in `STANDS_FOR` the classes whose result they repeat.
    """

    backend: Any = None  # that of diffusers' attention dispatcher, where the processor has one
    recorders: tuple[tuple[int, Any], ...] = ()  # (layer index, Harvest)
    streams: Memory | None = None
    keeper: Keeper | None = None  # is given the keys, values and mask of every attention over vision

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
        cls, layer: str, previous: Any, recorder: tuple[int, Any] | None, streams: Memory | None, keeper: Keeper | None
    ) -> Self:
        """A processor like `previous` that also records, attends to a reference as well, or lets its keys be kept.

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
        if keeper is not None:
            own = replace(own, keeper=keeper)
        return own if streams is None else replace(own, streams=streams)

    def attend(
        self, q_bhsd: Tensor, k_bhsd: Tensor, v_bhsd: Tensor, layout: Layout, mask_b11s: Tensor | None = None
    ) -> Tensor:
        """Output [b, s, h·d] of a joint or a self-attention, with reference streams if any; recorders are told."""
        if self.keeper is not None:
            self.keeper(k_bhsd, v_bhsd, mask_b11s)
        wants_lse = self.wants_lse(layout)
        out, lse = attend(q_bhsd, k_bhsd, v_bhsd, self.streams, mask_b11s, self.kernel(), wants_lse)
        self.record(q_bhsd, k_bhsd, layout, as_bias(mask_b11s), lse)
        return out.transpose(1, 2).flatten(2)

    def attend_cross(
        self, q_bhsd: Tensor, k_bhld: Tensor, v_bhld: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Output [b, s, h·d] of a cross-attention of vision to text [l], each stream to its own; recorders are told."""
        bias_b11l = None if mask is None else as_bias(mask)[:, :1].float()
        for index, recorder in self.recorders:
            recorder.record_cross(index, q_bhsd, k_bhld, q_bhsd.shape[-1] ** -0.5, self.streams, bias_b11l)
        return self.kernel()(q_bhsd, k_bhld, v_bhld, attn_mask=mask)[0].transpose(1, 2).flatten(2)

    def wants_lse(self, layout: Layout) -> bool | None:
        """Whether a recorder needs such an attention's log-sum-exp; None: can use it if it costs nothing."""
        wanted = {recorder.wants_lse(layout) for _, recorder in self.recorders}
        return True if True in wanted else None if None in wanted else False

    def record(
        self, q_bhsd: Tensor, k_bhsd: Tensor, layout: Layout, bias_b11s: Tensor | None, lse_ghs: Tensor | None
    ) -> None:
        """Tell the recorders of a joint or a self-attention."""
        for index, recorder in self.recorders:
            recorder.record(index, q_bhsd, k_bhsd, layout, q_bhsd.shape[-1] ** -0.5, self.streams, bias_b11s, lse_ghs)

    def kernel(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """diffusers' attention dispatcher on [b, h, s, d], to be called as vdm_priors.kernels.attention is."""

        def dispatched(
            q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, lse: bool | None = False
        ) -> tuple[Tensor, Tensor | None]:
            if lse is not False and _is_native(self.backend):
                return attention(q, k, v, attn_mask, lse)
            q_bshd, k_bshd, v_bshd = (x.transpose(1, 2) for x in (q, k, v))
            out = dispatch_attention_fn(q_bshd, k_bshd, v_bshd, attn_mask=attn_mask, backend=self.backend)
            return out.transpose(1, 2), lse_beside(q, k, attn_mask) if lse else None

        return dispatched


def _is_native(backend: Any) -> bool:
    """Whether diffusers' dispatcher hands this backend's calls to PyTorch's attention as they are."""
    if backend is None:  # its context manager or the environment says; it has no public way to ask
        backend, _ = _AttentionBackendRegistry.get_active_backend()
    return AttentionBackendName(backend) is AttentionBackendName.NATIVE


def split_heads(x_bsc: Tensor, heads: int) -> Tensor:
    """[b, s, h·d] -> [b, h, s, d]."""
    return x_bsc.unflatten(-1, (heads, -1)).transpose(1, 2)

