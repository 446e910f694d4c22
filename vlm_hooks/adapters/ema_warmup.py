"""EMA's warm-up (section 3.4): the motion encoder learns to name actions from motion vectors alone.

"An external classification head is added to the motion encoder, and it is trained with cross-entropy loss against the
ground-truth action labels prior to Stage 1." The paper does not say what the head reads: here the mean over a clip's
GOPs, fields and patches, through a linear layer. A clip may have several labels (each thing's motion, the camera's);
the target is then spread evenly over them.

Legend: B clips, C classes, N GOPs, M fields, P patches, E width of the motion encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vdm_priors.errors import SampleError
from vlm_hooks.adapters.base import Objective


class MotionClassifier(Objective):
    """Cross-entropy (nats) of the clips' labels; `accuracy` is the share of clips whose best class is among theirs."""

    def __init__(self, model: nn.Module, labels: Mapping[str, Sequence[str]]) -> None:
        super().__init__(model, labels)
        names = sorted({name for own in labels.values() for name in own})
        if len(names) < 2:
            raise SampleError(
                f"The warm-up needs two classes at least, and the samples have {', '.join(names) or 'none'}: "
                "give a file with captions or answers that name motions (stages.<name>.train, text)."
            )
        self.classes = {name: number for number, name in enumerate(names)}
        self.labels = labels
        self.head = nn.Linear(model.adapter.config.width, len(names))

    def batch(self, clips: Sequence[Any], samples: Sequence[Any]) -> dict[str, Tensor]:
        """The adapter's inputs, and targets [B, C] whose rows add up to 1."""
        targets = torch.zeros(len(samples), len(self.classes))
        for row, sample in zip(targets, samples, strict=True):
            row[[self.classes[name] for name in self.labels[sample.id]]] = 1
        return {**self.model.adapter.inputs(clips), "targets": targets / targets.sum(dim=1, keepdim=True)}

    def forward(self, ema_vectors: Tensor, ema_fields: Tensor, targets: Tensor) -> dict[str, Tensor]:
        features, there = self.model.adapter.motion(ema_vectors.flatten(0, 1), ema_fields.flatten())
        summed, counted = (part.unflatten(0, targets.shape[:1] + (-1,)) for part in (features, there))  # [B, N, M, …]
        fields = counted.sum(dim=(1, 2)).clamp(min=1)
        mean_be = summed.mean(dim=3).sum(dim=(1, 2)) / fields[:, None]
        logits = self.head(mean_be)
        chosen = targets.gather(1, logits.argmax(dim=1, keepdim=True)) > 0
        return {"loss": nn.functional.cross_entropy(logits, targets), "accuracy": chosen.float().mean().detach()}
