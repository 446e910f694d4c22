"""EMA's warm-up (section 3.4): the motion encoder learns to name actions from motion vectors alone.

"An external classification head is added to the motion encoder, and it is trained with cross-entropy loss against the
ground-truth action labels prior to Stage 1." The paper does not say what the head reads: here the mean over a clip's
GOPs, fields and patches, through a linear layer.

Legend: B clips, N GOPs, M fields, E width of the motion encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vlm_hooks.adapters.classification import Classifier


class MotionClassifier(Classifier):
    """Reads the mean over GOPs, fields and patches; see the module."""

    def __init__(self, model: nn.Module, labels: Mapping[str, Sequence[str]]) -> None:
        super().__init__(model, labels, model.adapter.config.width)

    def inputs(self, clips: Sequence[Any]) -> dict[str, Tensor]:
        return self.model.adapter.inputs(clips)

    def features(self, ema_vectors: Tensor, ema_fields: Tensor) -> Tensor:
        features, there = self.model.adapter.motion(ema_vectors.flatten(0, 1), ema_fields.flatten())
        summed, counted = (part.unflatten(0, (len(ema_vectors), -1)) for part in (features, there))  # [B, N, M, …]
        fields = counted.sum(dim=(1, 2)).clamp(min=1)
        return summed.mean(dim=3).sum(dim=(1, 2)) / fields[:, None]
