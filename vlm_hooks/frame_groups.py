"""Attention over groups of frames in vision towers that take a clip's frames as a batch.

Legend: N frames, G frames of a group, h heads, S patches of a frame, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

VISION_CONFIG = "vision_config"
BASES: dict[str, str] = {}  # names of grouped attention -> what they attend with


def attend_in_groups(model: PreTrainedModel, group: int) -> None:
    """From now on each patch attends to all patches of its `group` adjacent frames (1: of its own, as before).

    The way in is transformers' AttentionInterface. It stays until it is set again, since gradient checkpointing attends
    once more in the backward.
    """
    before = model.config.vision_config._attn_implementation
    base = BASES.get(before, before)
    name = base
    if group > 1:
        # transformers treats names that contain "sdpa" or "flash" specially
        name = f"groups_of_{group}_{base.replace('flash', 'fl').replace('sdpa', 'sdp')}"
        BASES[name] = base
        AttentionInterface.register(name, _grouped(AttentionInterface()[base], group))
    model.set_attn_implementation({VISION_CONFIG: name})


def _grouped(attend: Callable, group: int) -> Callable:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        frames, _, patches, _ = query.shape
        joined = (t_nhsd.unflatten(0, (-1, group)).transpose(1, 2).flatten(2, 3) for t_nhsd in (query, key, value))
        output_bshd, _ = attend(module, *joined, attention_mask, **kwargs)
        return output_bshd.unflatten(1, (group, patches)).reshape(frames, patches, *output_bshd.shape[2:]), None

    return attention
