"""A warm-up for TE Fusion that is not in its paper: its tokens learn to name motion before a language model reads them.

A small host whose answers alone teach it stays at chance for hundreds of steps (docs/adapters.md), though its tower
tells motion after a hundred when it is asked directly. The head reads the mean over a clip's tokens.

Legend: B clips, D the host's hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlm_hooks.adapters.classification import Classifier
from vlm_hooks.adapters.motion_tensors import frame_inputs


class FrameClassifier(Classifier):
    """Reads the mean over groups and places, normalised; see the module."""

    def __init__(self, model: nn.Module, labels: Mapping[str, Sequence[str]]) -> None:
        super().__init__(model, labels, model.adapter.host.hidden)

    def inputs(self, clips: Sequence[Any]) -> dict[str, Tensor]:
        return frame_inputs(self.model, clips)

    def features(self, **pixels: Tensor) -> Tensor:
        """[B, D]."""
        mean_bd = torch.stack([clip.tokens.mean(dim=(0, 1, 2)) for clip in self.model.visual_tokens(**pixels).frames])
        return nn.functional.layer_norm(mean_bd, mean_bd.shape[-1:])
