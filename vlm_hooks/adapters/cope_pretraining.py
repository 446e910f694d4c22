"""CoPE-VideoLM's pre-training (section 3.3): Δ-tokens must tell what the host's vision tower would make of the P-frame.

    X̂_warped = θ_ref(X_I of the frame before, motion tokens)     how things moved (Eq. 10)
    X̂_P      = θ_warped(X̂_warped, residual tokens)               what changed besides (Eq. 11)

X̂_P is compared with the tower's tokens of the frame itself, token by token (Eq. 12). Both transformers are thrown away
afterwards; before, they answer which frame of the video comes next (section G.6).

Legend: N P-frames, H × W tokens of a frame (M in all), K Δ-tokens, D the host's hidden size, E the inner width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vdm_priors.errors import SampleError
from vlm_hooks.adapters import base
from vlm_hooks.adapters.cope_encoder import CoPEConfig
from vlm_hooks.adapters.motion_tensors import frame_inputs
from vlm_hooks.adapters.query_transformer import Transformer, sine_positions


class DeltaPretraining(nn.Module):
    """θ_ref and θ_warped, alike in shape to the Δ-encoder's own transformers.

    The prediction is added to the frame before, and begins as 0: at first nothing moves and nothing changes. The paper
    regresses the tokens as they are and does not say how it begins.
    """

    def __init__(self, config: CoPEConfig, hidden: int) -> None:
        super().__init__()
        width = config.width
        self.motion_tokens, self.width = config.motion_tokens, width
        self.frame_in, self.motion_in = (
            nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, width)) for _ in range(2)
        )
        self.residual_in = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, width))
        self.reference = Transformer(width, config.layers, config.heads)
        self.warped = Transformer(width, config.layers, config.heads)
        self.out = nn.Linear(width, hidden)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def predict(self, before_nhwd: Tensor, delta_nkd: Tensor) -> Tensor:
        """X̂_P [N, H, W, D] from the tokens of the frames before and the P-frames' Δ-tokens, motion first."""
        _, rows, columns, _ = before_nhwd.shape
        motion, residual = delta_nkd[:, : self.motion_tokens], delta_nkd[:, self.motion_tokens :]
        places = sine_positions(rows, columns, self.width).to(before_nhwd)
        frame = self.frame_in(before_nhwd.flatten(1, 2)) + places
        frame = self.reference(torch.cat([frame, self.motion_in(motion)], dim=1))[:, : rows * columns]
        frame = self.warped(torch.cat([frame, self.residual_in(residual)], dim=1))[:, : rows * columns]
        return before_nhwd + self.out(frame).view_as(before_nhwd)

    def forward(self, before_nhwd: Tensor, delta_nkd: Tensor, target_nhwd: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """X̂_P [N, H, W, D], and "loss": Eq. 12, with the mean over D too; "of_copying": the loss as a
        share of what the frame before would have, 1 before training."""
        predicted = self.predict(before_nhwd, delta_nkd)
        loss = F.mse_loss(predicted, target_nhwd)
        copying = F.mse_loss(before_nhwd, target_nhwd).clamp(min=1e-12)
        return predicted, {"loss": loss, "of_copying": loss.detach() / copying}


def next_frame_recall(
    queries: Tensor, frames: Tensor, at: Tensor, most: Sequence[int] = (1, 2, 5)
) -> dict[int, Tensor]:
    """Section G.6's next-frame retrieval in one video: for each k of `most`, [N] bool: found among the first k.

    frames [F, …]: tokens of all frames; at [N]: frames that are looked for; queries [N, …]: what is thought to follow
    the frame before each (that frame itself is the baseline). Candidates are all frames but the one before; they are
    compared by the cosine of all their tokens in one vector, where things are being part of it (the paper does not say
    how). Ties count against.
    """
    vectors = F.normalize(frames.flatten(1).float(), dim=1)
    similarity = F.normalize(queries.flatten(1).float(), dim=1) @ vectors.T
    better = similarity >= similarity.gather(1, at[:, None])
    better = better.scatter(1, at[:, None], False).scatter(1, at[:, None] - 1, False)
    return {k: better.sum(1) < k for k in most}


class Pretraining(base.Objective):
    """Pre-training as a stage's objective, "pretraining". Clips are MotionClips that keep their steps' pictures.

    The frame before a P-frame is the picture before it, be it a key frame or another P-frame's, as in Eq. 9. With the
    loss comes next-frame retrieval on the batch's own clips, before the step learns from them: "recall1" for what
    was predicted and "recall1_frame" for the frame before itself, and the same of 2 and 5.
    """

    def __init__(self, model: nn.Module, labels: Mapping[str, Sequence[str]]) -> None:
        super().__init__(model, labels)
        self.head = DeltaPretraining(model.adapter.config, model.adapter.host.hidden)

    def check(self, clip: Any) -> None:
        if not any(len(motion.times) for motion in clip.motion):
            raise SampleError("It has no P-frame, which CoPE's pre-training predicts.")

    def batch(self, clips: Sequence[Any], samples: Sequence[Any]) -> dict[str, Tensor]:
        """Also cope_moving [B, F] bool: which of a clip's F pictures, in the order of time, are P-frames'."""
        if any(motion.pictures is None and len(motion.times) for clip in clips for motion in clip.motion):
            raise SampleError("CoPE's pre-training needs the P-frames' pictures: set reading.pictures to true.")
        pixels = frame_inputs(self.model, [_all_pictures(clip) for clip in clips])
        counts = [[n > 0 for motion in clip.motion for n in range(len(motion.times) + 1)] for clip in clips]
        moving = torch.zeros(len(clips), max(map(len, counts)), dtype=torch.bool)
        for row, own in enumerate(counts):
            moving[row, : len(own)] = torch.tensor(own)
        return {**pixels, **self.model.adapter.inputs(clips), "cope_moving": moving}

    def forward(
        self, cope_vectors: Tensor, cope_errors: Tensor, cope_known: Tensor, cope_moving: Tensor, **pixels: Tensor
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            frames = [clip.tokens for clip in self.model.frame_tokens(pixels)]
        at = [moving[: len(own)].nonzero()[:, 0] for own, moving in zip(frames, cope_moving, strict=True)]
        before, target = (
            torch.cat([own[places - back] for own, places in zip(frames, at, strict=True)]) for back in (1, 0)
        )
        delta = self.model.adapter.delta(cope_vectors[cope_known], cope_errors[cope_known])
        predicted, losses = self.head(before, delta, target)
        return losses | _retrieval(frames, at, predicted.detach())


def _all_pictures(clip: Any) -> Any:
    """The clip with its P-frames' pictures among its key frames, in the order of time."""
    every = copy.copy(clip)
    pictures = [
        part
        for key, motion in zip(clip.frames, clip.motion, strict=True)
        for part in (key[None], motion.pictures)
        if part is not None
    ]
    every.frames = np.concatenate(pictures)
    every.times = [
        t for key, motion in zip(clip.times, clip.motion, strict=True) for t in (key, *motion.times.tolist())
    ]
    return every


def _retrieval(frames: Sequence[Tensor], at: Sequence[Tensor], predicted: Tensor) -> dict[str, Tensor]:
    """Means over the batch's P-frames; frames [B] of [F, H, W, D], at [B]: places of the P-frames among them."""
    found: dict[str, list[Tensor]] = {}
    for own, places, query in zip(frames, at, predicted.split([len(places) for places in at]), strict=True):
        for name, queries in (("", query), ("_frame", own[places - 1])):
            for k, hits in next_frame_recall(queries, own, places).items():
                found.setdefault(f"recall{k}{name}", []).append(hits)
    return {name: torch.cat(hits).float().mean() for name, hits in found.items()}
