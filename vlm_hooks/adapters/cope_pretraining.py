"""CoPE-VideoLM's pre-training (section 3.3): Δ-tokens must tell what the host's vision tower would make of the P-frame.

    X̂_warped = θ_ref(X_I of the frame before, motion tokens)     how things moved (Eq. 10)
    X̂_P      = θ_warped(X̂_warped, residual tokens)               what changed besides (Eq. 11)

X̂_P is compared with the tower's tokens of the frame itself, token by token (Eq. 12). Both transformers are thrown away
afterwards; before, they answer which frame of the video comes next (section G.6).

Legend: N P-frames, H × W tokens of a frame (M in all), K Δ-tokens, D the host's hidden size, E the inner width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_hooks.adapters.cope_encoder import CoPEConfig
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
        self.frame_in, self.motion_in = (nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, width)) for _ in range(2))
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

    def forward(self, before_nhwd: Tensor, delta_nkd: Tensor, target_nhwd: Tensor) -> dict[str, Tensor]:
        """"loss": Eq. 12, with the mean over D beside that over tokens; "of_copying": the loss as a share of what the frame
        before would have, 1 before training."""
        loss = F.mse_loss(self.predict(before_nhwd, delta_nkd), target_nhwd)
        return {"loss": loss, "of_copying": loss.detach() / F.mse_loss(before_nhwd, target_nhwd).clamp(min=1e-12)}


def next_frame_recall(queries: Tensor, frames: Tensor, most: Sequence[int] = (1, 2, 5)) -> dict[int, Tensor]:
    """Section G.6's next-frame retrieval in one video: for each k of `most`, [F − 1] bool: found among the first k.

    frames [F, …]: tokens of all frames; queries [F − 1, …]: of frame t, what is thought to follow frame t − 1 (the frame
    before itself is the baseline). Candidates are all frames but the one before; they are compared by the cosine of all
    their tokens in one vector, where things are being part of it (the paper does not say how). Ties count against.
    """
    vectors = F.normalize(frames.flatten(1).float(), dim=1)
    similarity = F.normalize(queries.flatten(1).float(), dim=1) @ vectors.T
    true = torch.arange(1, len(frames), device=frames.device)
    own = similarity.gather(1, true[:, None])
    better = similarity >= own
    better.scatter_(1, true[:, None], False).scatter_(1, true[:, None] - 1, False)
    rank = better.sum(1)
    return {k: rank < k for k in most}
