"""HY-Himmel's Stage 1 (section 3.3): motion is brought into the host's visual space, the host frozen.

The target of an interval is the difference of its two anchors' pooled vision embeddings (Eq. 5): what changed on the
way, in the host's own terms.

Legend: N intervals of a batch, P places, E width of the encoder, D width of the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vdm_priors.errors import SampleError
from vlm_hooks.adapters import base
from vlm_hooks.adapters.himmel_encoder import HimmelConfig
from vlm_hooks.adapters.motion_tensors import frame_inputs

TEMPERATURE = 0.07  # the learnt temperature begins here, as CLIP's
HYBRID_MSE = 0.5  # weight of the MSE in "both" (Appendix Q.1)


class AlignmentHead(nn.Module):
    """A projection to the host's visual space, E -> D; the motion tokens' projector begins with its weights."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, values: Tensor) -> Tensor:
        return self.layers(values)


def anchor_difference(before_nsd: Tensor, after_nsd: Tensor) -> Tensor:
    """Eq. 5: pooled vision embedding [N, D] of the later anchor minus the earlier one's."""
    return after_nsd.mean(1) - before_nsd.mean(1)


def two_way_infonce(motion_nd: Tensor, target_nd: Tensor, temperature: Tensor) -> Tensor:
    """Eq. 6: each motion is to be nearest to its own target among the batch's, and each target to its own motion."""
    similarity = F.normalize(motion_nd, dim=-1) @ F.normalize(target_nd, dim=-1).T / temperature
    own = torch.arange(len(similarity), device=similarity.device)
    return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2


class MotionAlignment(nn.Module):
    """The loss of Stage 1, with heads of the streams' own beside the fused one's; they are thrown away afterwards."""

    def __init__(self, config: HimmelConfig, hidden: int) -> None:
        super().__init__()
        self.objective, self.cosine, self.branch = config.alignment, config.cosine_weight, config.branch_weight
        self.branches = nn.ModuleDict({stream: AlignmentHead(config.width, hidden) for stream in config.streams})
        self.log_temperature = nn.Parameter(torch.tensor(TEMPERATURE).log())

    def forward(
        self, head: nn.Module, fused: Tensor, hidden: dict[str, Tensor], target_nd: Tensor
    ) -> dict[str, Tensor]:
        """fused and each of hidden [N, P, E] -> "loss", "fused", "branches", and "recall": the share of intervals whose
        own target is nearest. Raises SampleError for less than two intervals: there is nothing to tell them from."""
        if len(target_nd) < 2:
            raise SampleError(
                "HY-Himmel's first stage needs two intervals a batch or more: raise training.batch_size, or "
                "reading.anchors."
            )
        projected = head(fused.mean(1))
        own = self._loss(projected, target_nd)
        branches = [self._loss(self.branches[s](value.mean(1)), target_nd) for s, value in hidden.items()]
        mean = torch.stack(branches).mean()
        nearest = (F.normalize(projected, dim=-1) @ F.normalize(target_nd, dim=-1).T).argmax(1)
        recall = (nearest == torch.arange(len(nearest), device=nearest.device)).float().mean()
        return {"loss": own + self.branch * mean, "fused": own.detach(), "branches": mean.detach(), "recall": recall}

    def _loss(self, motion_nd: Tensor, target_nd: Tensor) -> Tensor:
        squares = F.mse_loss(motion_nd, target_nd)
        if self.objective == "mse":
            return squares
        temperature = self.log_temperature.exp().clamp(0.01, 1)  # a sharper one would follow single intervals
        cosine = 1 - F.cosine_similarity(motion_nd, target_nd, dim=-1).mean()
        aligned = two_way_infonce(motion_nd, target_nd, temperature) + self.cosine * cosine
        return aligned + HYBRID_MSE * squares if self.objective == "both" else aligned


class Alignment(base.Objective):
    """Stage 1 as a stage's objective, "alignment". Clips are MotionClips whose key frames are the anchors."""

    def __init__(self, model: nn.Module, labels: Mapping[str, Sequence[str]]) -> None:
        super().__init__(model, labels)
        self.loss = MotionAlignment(model.adapter.config, model.adapter.host.hidden)

    def check(self, clip: Any) -> None:
        if len(clip.times) < 2:
            raise SampleError("It has one anchor, and no interval to the next, which HY-Himmel's first stage aligns.")

    def batch(self, clips: Sequence[Any], samples: Sequence[Any]) -> dict[str, Tensor]:
        return {**frame_inputs(self.model, clips), **self.model.adapter.inputs(clips)}

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        adapter = self.model.adapter
        own = {name: batch.pop(name) for name in list(batch) if name not in adapter.INPUTS}
        with torch.no_grad():
            frames = [clip.tokens.flatten(1, 2) for clip in self.model.frame_tokens(own)]
        target = torch.cat([anchor_difference(anchors[:-1], anchors[1:]) for anchors in frames])
        fused, hidden, _ = adapter.encode(**batch)
        return self.loss(adapter.projector, fused, hidden, target)
