"""Learning to name what a clip's captions say of motion, by a linear layer on what an adapter makes of it.

Legend: B clips, C classes, E width of the features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vdm_priors.errors import SampleError
from vlm_hooks.adapters.base import Objective


class Classifier(Objective):
    """Cross-entropy (nats) of the clips' labels; `accuracy` is the share of clips whose best class is among theirs.

    A clip may have several labels (each thing's motion, the camera's); the target is then spread evenly over them.
    Subclasses say what is read: `features`, and their width.
    """

    def __init__(self, model: nn.Module, labels: Mapping[str, Sequence[str]], width: int) -> None:
        super().__init__(model, labels)
        names = sorted({name for own in labels.values() for name in own})
        if len(names) < 2:
            raise SampleError(
                f"The warm-up needs two classes at least, and the samples have {', '.join(names) or 'none'}: "
                "give a file with captions or answers that name motions (stages.<name>.train, text)."
            )
        self.classes = {name: number for number, name in enumerate(names)}
        self.labels = labels
        self.head = nn.Linear(width, len(names))

    @abstractmethod
    def inputs(self, clips: Sequence[Any]) -> dict[str, Tensor]:
        """What `features` takes."""

    @abstractmethod
    def features(self, **inputs: Tensor) -> Tensor:
        """[B, E]."""

    def batch(self, clips: Sequence[Any], samples: Sequence[Any]) -> dict[str, Tensor]:
        """The inputs, and targets [B, C] whose rows add up to 1."""
        targets = torch.zeros(len(samples), len(self.classes))
        for row, sample in zip(targets, samples, strict=True):
            row[[self.classes[name] for name in self.labels[sample.id]]] = 1
        return {**self.inputs(clips), "targets": targets / targets.sum(dim=1, keepdim=True)}

    def forward(self, targets: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.features(**inputs))
        chosen = targets.gather(1, logits.argmax(dim=1, keepdim=True)) > 0
        return {"loss": nn.functional.cross_entropy(logits, targets), "accuracy": chosen.float().mean().detach()}
