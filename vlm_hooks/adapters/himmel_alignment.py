"""HY-Himmel's Stage 1 (section 3.3): motion is brought into the host's visual space, the host frozen.

The target of an interval is the difference of its two anchors' pooled vision embeddings (Eq. 5): what changed on the
way, in the host's own terms.

Legend: N intervals of a batch, P places, E width of the encoder, D width of the host.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OBJECTIVES = ("infonce", "mse", "both")
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
    """The loss of Stage 1, with a head of each stream beside the fused one's; thrown away afterwards but for that one.

    objective: "infonce" (with the cosine term), or Appendix Q's "mse" and "both". cosine: weight of 1 − cos (Eq. 7; the
    paper's own value is not given: 0.5). branch: weight of the mean loss of the streams' own heads (section 3.3; not
    given either: 0.5). The temperature is learnt, from 0.07 on (CLIP's), and kept within 0.01 to 1.
    """

    def __init__(
        self, width: int, hidden: int, streams: tuple[str, ...], objective: str = "infonce", cosine: float = 0.5,
        branch: float = 0.5,
    ) -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise ValueError(f"MotionAlignment: objective is {objective!r}: choose one of {', '.join(OBJECTIVES)}.")
        self.objective, self.cosine, self.branch = objective, cosine, branch
        self.head = AlignmentHead(width, hidden)
        self.branches = nn.ModuleDict({stream: AlignmentHead(width, hidden) for stream in streams})
        self.log_temperature = nn.Parameter(torch.tensor(0.07).log())

    def forward(self, fused: Tensor, hidden: dict[str, Tensor], target_nd: Tensor) -> dict[str, Tensor]:
        """fused and each of hidden [N, P, E] -> "loss", "fused", "branches", and "recall": the share of intervals whose
        own target is nearest. Raises ValueError for less than two intervals: there is nothing to tell them from."""
        if len(target_nd) < 2:
            raise ValueError("MotionAlignment: InfoNCE needs two intervals a batch or more.")
        projected = self.head(fused.mean(1))
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
        temperature = self.log_temperature.exp().clamp(0.01, 1)
        cosine = 1 - F.cosine_similarity(motion_nd, target_nd, dim=-1).mean()
        aligned = two_way_infonce(motion_nd, target_nd, temperature) + self.cosine * cosine
        return aligned + HYBRID_MSE * squares if self.objective == "both" else aligned
