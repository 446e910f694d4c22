"""Student attention rows: chosen queries × chosen keys of every decoder layer, differentiable.

    request = CaptureRequest(rows, row_mask, columns, column_mask)
    with capture(student.model):
        output = student.model(**inputs, motion_capture=request)
    attention = request.mean()  # [B, R, C]

The model's output comes from its own sdpa attention, unchanged bit for bit. Beside it, the
wanted rows of softmax(Q Kᵀ · scale) are computed over all keys the row may attend to, and
only the wanted columns are kept: no S×S matrix exists.

Legend: B batch, Hq query heads, Hkv key heads, G = Hq/Hkv, D head size, S sequence,
R wanted rows (queries), C wanted columns (keys), L captured layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

# transformers treats names that contain "sdpa" or "flash" specially
ATTENTION_NAME = "motion_capture"
TEXT_CONFIG = "text_config"


class CaptureError(RuntimeError):
    """Attention rows were asked for where they cannot be had; the message says why."""


@dataclass
class CaptureRequest:
    """Which attention to keep during one forward, and, afterwards, what was kept.

    rows [B, R], columns [B, C]: positions in the (padded) sequence, any value where row_mask
    [B, R] or column_mask [B, C] is False; layers: decoder layers to average (None: all);
    keep_layers: also keep every layer's heads in `layer_rows`. One request serves one forward.
    """

    rows: Tensor
    row_mask: Tensor
    columns: Tensor
    column_mask: Tensor
    layers: Sequence[int] | None = None
    keep_layers: bool = False
    layer_rows: dict[int, Tensor] = field(default_factory=dict, init=False)  # [B, Hq, R, C]
    _means: dict[int, Tensor] = field(default_factory=dict, init=False)  # [B, R, C]
    _grad: bool | None = field(default=None, init=False)
    _empty_because: str = field(
        default="the model was not called inside `with capture(model)` with "
        "motion_capture=request",
        init=False,
    )

    def __post_init__(self) -> None:
        for name, mask_name in (("rows", "row_mask"), ("columns", "column_mask")):
            positions, mask = getattr(self, name), getattr(self, mask_name)
            if positions.ndim != 2 or positions.shape != mask.shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"CaptureRequest: {name} must be [B, n] positions with a bool {mask_name} of "
                    f"the same shape, got {list(positions.shape)} and {mask.dtype} "
                    f"{list(mask.shape)}."
                )
        if len(self.rows) != len(self.columns):
            raise ValueError(
                f"CaptureRequest: rows are of {len(self.rows)} samples, columns of "
                f"{len(self.columns)}."
            )
        # masked positions must be safe to gather
        self.rows = self.rows.masked_fill(~self.row_mask, 0)
        self.columns = self.columns.masked_fill(~self.column_mask, 0)

    @classmethod
    def from_positions(
        cls,
        rows: Sequence[Sequence[int] | Tensor],
        columns: Sequence[Sequence[int] | Tensor],
        layers: Sequence[int] | None = None,
        keep_layers: bool = False,
        device: torch.device | str = "cpu",
    ) -> CaptureRequest:
        """A request from one list of row and of column positions a sample, of any lengths."""
        padded = (*_pad(rows, device), *_pad(columns, device))
        return cls(*padded, layers=layers, keep_layers=keep_layers)

    @property
    def captured_layers(self) -> list[int]:
        """Indices of the layers whose rows were captured."""
        return sorted(self._means)

    def layer(self, index: int) -> Tensor:
        """Rows [B, R, C] of one layer, averaged over its heads."""
        if index not in self._means:
            raise CaptureError(
                f"Layer {index} was not captured; captured layers: {self.captured_layers}."
            )
        return self._means[index]

    def mean(self) -> Tensor:
        """Rows [B, R, C] float32, averaged over layers and heads; masked entries are 0.

        Raises CaptureError if no layer was captured. (METHOD.md step 4, A_VLM.)
        """
        if not self._means:
            raise CaptureError(f"No attention layer was captured: {self._empty_because}.")
        return torch.stack([self._means[i] for i in self.captured_layers]).mean(dim=0)

    def _start(self, num_layers: int, batch: int | None, length: int | None) -> None:
        """Check the request against the forward that begins."""
        if self._grad is not None:
            raise CaptureError(
                "This CaptureRequest has already served a forward; make a new one for each."
            )
        strange = sorted(set(self.layers or ()) - set(range(num_layers)))
        if strange or (self.layers is not None and not self.layers):
            raise CaptureError(
                f"CaptureRequest.layers names {strange or 'no layer'}, but the model's decoder "
                f"layers are 0 to {num_layers - 1}."
            )
        if batch is not None and batch != len(self.rows):
            raise CaptureError(
                f"CaptureRequest is for {len(self.rows)} samples, but the model got {batch}."
            )
        for name in ("rows", "columns"):
            positions = getattr(self, name)
            if length is not None and positions.numel() and not (
                0 <= int(positions.min()) and int(positions.max()) < length
            ):
                raise CaptureError(
                    f"CaptureRequest.{name} holds position {int(positions.max())} (smallest "
                    f"{int(positions.min())}), but the sequence has {length} tokens."
                )
        self._grad = torch.is_grad_enabled()
        self._empty_because = "no captured attention module ran in the forward"

    def _store(self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None) -> None:
        """Compute and keep one layer's rows, once."""
        index = module.layer_idx
        if self.layers is not None and index not in self.layers:
            return
        if index in self._means:
            return  # gradient checkpointing runs the layer again in the backward pass
        if self._grad is None:
            raise CaptureError(
                "A motion_capture request reached the attention without passing the model that "
                "`capture` holds: call that model itself."
            )
        if query.shape[2] == 1:
            self._empty_because = "the forward had a single query (generation with a cache)"
            return
        if self._grad and not torch.is_grad_enabled():
            raise CaptureError(
                "Reentrant gradient checkpointing would silently give the alignment loss a zero "
                "gradient: enable checkpointing with use_reentrant=False."
            )
        if key.shape[2] != query.shape[2]:
            raise CaptureError(
                f"Capture needs the whole sequence in one forward, but {query.shape[2]} queries "
                f"met {key.shape[2]} keys: call the model without past_key_values."
            )
        # Hidden from non-reentrant checkpointing, which would count what is saved here and
        # miss it in a recomputation after `capture` has ended; costs Hq·R·S + Hkv·S·D floats.
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            heads_bhrc = attention_rows(self, module, query, key, mask)
            self._means[index] = heads_bhrc.mean(dim=1)
        if self.keep_layers:
            self.layer_rows[index] = heads_bhrc


def attention_rows(
    request: CaptureRequest, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None
) -> Tensor:
    """Probabilities [B, Hq, R, C] float32 of the wanted rows and columns of one layer.

    query [B, Hq, S, D] and key [B, Hkv, S, D] after RoPE; mask: None (purely causal), bool
    (True: attend) or float (added to the scores), [B or 1, 1 or Hq, S, S].
    """
    batch, query_heads, length, size = query.shape
    key_heads, wanted = key.shape[1], request.rows.shape[1]
    rows = request.rows.to(query.device)
    row_index = rows[:, None, :, None]
    query_bhrd = query.gather(2, row_index.expand(-1, query_heads, -1, size)).float()
    # grouped queries share their key head: the keys are never repeated
    grouped = query_bhrd.reshape(batch, key_heads, -1, size)
    scores = grouped @ key.float().transpose(2, 3) * module.scaling
    scores = scores.reshape(batch, query_heads, wanted, length)

    allowed = torch.ones(batch, 1, wanted, length, dtype=torch.bool, device=query.device)
    if module.is_causal:
        allowed = rows[:, None, :, None] >= torch.arange(length, device=query.device)
    if mask is not None:
        mask = mask.expand(batch, -1, -1, -1)
        mask_rows = mask.gather(2, row_index.expand(-1, mask.shape[1], -1, length))
        if mask_rows.dtype == torch.bool:
            allowed = allowed & mask_rows
        else:
            scores = scores + mask_rows.float()
            # the smallest number of half types stands for "never" as well as -inf does
            allowed = allowed & (mask_rows > torch.finfo(mask_rows.dtype).min)
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(dim=-1)

    columns = request.columns.to(query.device)[:, None, None, :]
    captured = probabilities.gather(3, columns.expand(-1, query_heads, wanted, -1))
    # a row that may attend to nothing (padding) has no distribution
    kept = request.row_mask.to(query.device)[:, None, :, None] & allowed.any(-1, keepdim=True)
    kept = kept & request.column_mask.to(query.device)[:, None, None, :]
    return torch.where(kept, captured, 0.0)


def _capturing_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    motion_capture: CaptureRequest | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, with the rows of a request kept on the side."""
    if motion_capture is not None:
        motion_capture._store(module, query, key, attention_mask)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION_NAME, _capturing_attention)
# without a mask of the same name, transformers drops the mask and padding is attended
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


@contextmanager
def capture(model: nn.Module) -> Iterator[None]:
    """Let `model(**batch, motion_capture=CaptureRequest(…))` keep attention rows.

    `model` may be wrapped (DDP, PEFT). Only the text decoder's attention is switched, and it
    is as before on exit, also after an error. Raises CaptureError if the decoder does not use
    sdpa attention or is already being captured.
    """
    pretrained = _unwrap(model)
    text_config = pretrained.config.get_text_config()
    before = text_config._attn_implementation
    if before != "sdpa":
        raise CaptureError(
            f"Capture computes beside sdpa attention, but the decoder uses {before!r}"
            ": leave the capture that is open first, or load the model with "
            'attn_implementation="sdpa".'
        )

    def check(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        request = kwargs.get("motion_capture")
        if request is None:
            return
        if not isinstance(request, CaptureRequest):
            raise CaptureError(
                f"motion_capture must be a CaptureRequest, not {type(request).__name__}."
            )
        given = [args[0] if args else None, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        shape = next((t.shape for t in given if isinstance(t, Tensor)), (None, None))
        request._start(text_config.num_hidden_layers, shape[0], shape[1])

    handle = pretrained.register_forward_pre_hook(check, with_kwargs=True)
    try:
        pretrained.set_attn_implementation({TEXT_CONFIG: ATTENTION_NAME})
        if text_config._attn_implementation != ATTENTION_NAME:
            raise CaptureError(
                f"{type(pretrained).__name__} does not let its text decoder's attention be set."
            )
        yield
    finally:
        handle.remove()
        pretrained.set_attn_implementation({TEXT_CONFIG: before})


def _unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers of DDP (`module`) and PEFT (`base_model`)."""
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        else:
            raise CaptureError(
                f"{type(model).__name__} is not a transformers model nor a wrapper around one."
            )
    return inner


def _pad(
    lists: Sequence[Sequence[int] | Tensor], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Positions [B, n] and mask [B, n] of lists of different lengths."""
    parts = [torch.as_tensor(one, dtype=torch.long) for one in lists]
    positions = nn.utils.rnn.pad_sequence(parts, batch_first=True)
    lengths = torch.tensor([len(part) for part in parts])
    mask = torch.arange(positions.shape[1])[None] < lengths[:, None]
    return positions.to(device), mask.to(device)
