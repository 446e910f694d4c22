"""Student attention rows: chosen queries × chosen keys of every decoder layer, differentiable.

    request = CaptureRequest(rows, row_mask, columns, column_mask)
    with capture(student.model):
        output = student.model(**inputs, motion_capture=request)
    attention = request.mean()  # [B, R, C]

The model's output comes from its own attention (sdpa, or flash attention), unchanged bit for
bit. Beside it, the wanted rows of softmax(Q Kᵀ · scale) are computed over all keys the row may
attend to, and only the wanted columns are kept: no S×S matrix exists.

Legend: B batch, Hq query heads, Hkv key heads, D head size, S sequence, R wanted rows, C wanted columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from vlm_hooks.attention_rows import MeanRows, allowed_keys, row_probabilities
from vlm_hooks.capture_request import CaptureError, CaptureRequest

ATTENTION_NAME = "motion_capture"
TEXT_CONFIG = "text_config"
TOKEN_TYPES = "mm_token_type_ids"
# how callers hand several samples in one row to flash attention
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")


def attention_heads(
    request: CaptureRequest, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None,
    window: int | None = None,
) -> Tensor:
    """Probabilities [B, Hq, R, C] float32 of the wanted rows and columns of one layer, head by head.

    query [B, Hq, S, D] and key [B, Hkv, S, D] after RoPE; mask and window: of `allowed_keys`.
    """
    allowed, added = allowed_keys(request.rows, query.shape[2], module.is_causal, mask, window)
    with torch.autocast(query.device.type, enabled=False):
        p_bhrs = row_probabilities(_query_rows(request, query), key, allowed, added, module.scaling)
    columns = request.columns[:, None, None, :].expand(-1, *p_bhrs.shape[1:3], -1)
    return torch.where(_kept(request)[:, None], p_bhrs.gather(3, columns), 0.0)


def _query_rows(request: CaptureRequest, query: Tensor) -> Tensor:
    """The wanted queries [B, Hq, R, D]."""
    index = request.rows[:, None, :, None]
    return query.gather(2, index.expand(-1, query.shape[1], -1, query.shape[3]))


def _kept(request: CaptureRequest) -> Tensor:
    """Which entries [B, R, C] are of a wanted row and a wanted column."""
    return request.row_mask[:, :, None] & request.column_mask[:, None, :]


def _store(
    request: CaptureRequest, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, extras: dict[str, Any]
) -> None:
    """Compute and keep one layer's rows, once."""
    if not request.wants(module, query.shape[2], key.shape[2]):
        return
    if request.rows.device != query.device:
        request.to(query.device)
    _refuse_what_rows_cannot_follow(mask, extras)
    # masks of all four dimensions have the window in them already
    window = extras.get("sliding_window") if mask is None or mask.ndim == 2 else None
    # Hidden from non-reentrant checkpointing, which would count what is saved here and miss it
    # in a recomputation after `capture` has ended.
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        allowed, added = allowed_keys(request.rows, query.shape[2], module.is_causal, mask, window)
        mean_brc = MeanRows.apply(
            _query_rows(request, query), key, allowed, added, module.scaling, request.columns, _kept(request)
        )
    request.keep(module, mean_brc)
    if request.keep_layers:
        with torch.no_grad():
            request.layer_rows[module.layer_idx] = attention_heads(request, module, query, key, mask, window)


def _refuse_what_rows_cannot_follow(mask: Tensor | None, extras: dict[str, Any]) -> None:
    """CaptureError where the model's attention is another one than softmax(Q Kᵀ · scale) over the mask's keys."""
    if mask is not None and not isinstance(mask, Tensor):
        raise CaptureError(f"Capture cannot read an attention mask of the type {type(mask).__name__}: load the model "
                           'with attn_implementation="sdpa".')
    for name in ("softcap", "s_aux"):
        if extras.get(name) is not None:
            raise CaptureError(f"This model's attention has {name}, which captured rows do not follow.")
    if mask is not None and mask.ndim == 4:
        return  # packed samples, if any, are apart in it
    positions = extras.get("position_ids")
    restarts = isinstance(positions, Tensor) and positions.ndim == 2 and len(positions) == 1 and mask is None \
        and bool((positions.diff(dim=-1) < 0).any())
    if restarts or any(extras.get(name) is not None for name in PACKING):
        raise CaptureError(
            "Several samples are packed in one row (position_ids that start again, or cu_seq_lens), and no mask keeps "
            "them apart: a row would see the other samples. Pad the batch instead of packing it."
        )


def _capturing(base: Callable) -> Callable:
    """An attention function as transformers registers them: `base`, with the rows of a request kept on the side."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        motion_capture: CaptureRequest | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if motion_capture is not None:
            _store(motion_capture, module, query, key, attention_mask, kwargs)
        return base(module, query, key, value, attention_mask, **kwargs)

    return attention


def _register(base: str) -> str:
    """The name under which transformers finds `base` with capture."""
    # transformers treats names that contain "sdpa" or "flash" specially
    beneath = base.replace("flash", "fl").replace("sdpa", "sdp")
    name = ATTENTION_NAME if base == "sdpa" else f"{ATTENTION_NAME}_{beneath}"
    functions, masks = AttentionInterface(), AttentionMaskInterface()
    if base not in functions or base not in masks:
        raise CaptureError(
            f"Capture computes beside an attention that transformers has registered with its mask, but the decoder "
            f"uses {base!r}"
            ': load the model with attn_implementation="sdpa" or "flash_attention_2".'
        )
    AttentionInterface.register(name, _capturing(functions[base]))
    # without a mask of the same name, transformers drops the mask and padding is attended
    AttentionMaskInterface.register(name, masks[base])
    return name


def check_token_types(model: nn.Module, inputs: dict[str, Any]) -> None:
    """CaptureError for visual inputs without the token types from which a model derives its M-RoPE positions.

    Such a model would silently number all tokens in one dimension, and learn other positions than it was trained with.
    """
    visual = any(inputs.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))
    if not visual or inputs.get(TOKEN_TYPES) is not None or inputs.get("position_ids") is not None:
        return
    if TOKEN_TYPES in inspect.signature(unwrapped(model).forward).parameters:
        raise CaptureError(
            f"The batch has pixels but no {TOKEN_TYPES}, so that {type(unwrapped(model)).__name__} would number its "
            "positions in one dimension: a collator dropped them; ask the processor for "
            "return_mm_token_type_ids=True and pass all it returns."
        )


@contextmanager
def capture(model: nn.Module) -> Iterator[None]:
    """Let `model(**batch, motion_capture=CaptureRequest(…))` keep attention rows.

    `model` may be wrapped (DDP, FSDP2, PEFT). Only the text decoder's attention is switched, and
    it is as before on exit, also after an error. Raises CaptureError if the decoder's attention
    cannot be computed beside, is already being captured, or is compiled.
    """
    pretrained = unwrapped(model)
    _refuse_compiled(model, pretrained)
    text_config = pretrained.config.get_text_config()
    before = text_config._attn_implementation
    if before.startswith(ATTENTION_NAME):
        raise CaptureError("This model is being captured already: leave the capture that is open first.")
    name = _register(before)

    def check(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        request = kwargs.get("motion_capture")
        if request is None:
            return
        if not isinstance(request, CaptureRequest):
            raise CaptureError(
                f"motion_capture must be a CaptureRequest, not {type(request).__name__}."
            )
        check_token_types(pretrained, kwargs)
        given = [args[0] if args else None, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        shape = next((t.shape for t in given if isinstance(t, Tensor)), (None, None))
        request.start(text_config.num_hidden_layers, shape[0], shape[1])

    handle = pretrained.register_forward_pre_hook(check, with_kwargs=True)
    try:
        pretrained.set_attn_implementation({TEXT_CONFIG: name})
        if text_config._attn_implementation != name:
            raise CaptureError(
                f"{type(pretrained).__name__} does not let its text decoder's attention be set."
            )
        yield
    finally:
        handle.remove()
        pretrained.set_attn_implementation({TEXT_CONFIG: before})


def _refuse_compiled(model: nn.Module, pretrained: PreTrainedModel) -> None:
    modules = (model, *pretrained.modules())
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in modules):
        raise CaptureError(
            f"{type(pretrained).__name__} is compiled (torch.compile): what it was compiled to has no capture in it. "
            "Train the model without torch.compile, and compile the exported one."
        )


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers: DDP and DeepSpeed (`module`), PEFT (`base_model`), torch.compile."""
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        else:
            raise CaptureError(
                f"{type(model).__name__} is not a transformers model nor a wrapper around one."
            )
    return inner
