"""CoPE-VideoLM's Δ-encoder (Sarkar et al., 2026, section 3.2 and D): a fused P-frame to a few tokens.

    motion vectors -> patches of 16 px -> two-layer MLP -> transformer with K learnt queries -> K motion tokens
    residual       -> ResNet-18's trunk                -> transformer with K learnt queries -> K residual tokens

What the paper leaves open, or what its numbers cannot all hold at once, is said beside the setting.

Legend: N P-frames, R × C motion cells (8 px each), H × W pixels, K queries, E inner width, D the host's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_hooks.adapters.conv_trunk import ConvTrunk
from vlm_hooks.adapters.query_transformer import QueryTransformer, sine_positions

PATCH = 2  # motion cells of a patch's side: 16 px
NORMALISED = ("fixed", "clip")


@dataclass(frozen=True)
class DeltaConfig:
    """Sizes of a Δ-encoder.

    motion_tokens, residual_tokens: K of either branch; 4 and 4 (section 3.2). width: inner width; the paper writes both
    "hidden dimension d" = 1152 and "< 15 M parameters", of which two transformers of 4 layers and 1152 have 128 M: so
    the inner width is a setting of its own, and a last linear layer brings tokens to the host's width. layers 4 and
    heads 9, as written. trunk_width, trunk_blocks: 64 and 2 are ResNet-18. normalise: "fixed" divides displacements by
    `largest` (a share of the frame) and cuts off beyond; "clip" divides by the clip's own largest. The paper says
    min-max and not of what; taken of every frame by itself, slow and fast motion would look the same.
    """

    motion_tokens: int = 4
    residual_tokens: int = 4
    width: int = 180
    layers: int = 4
    heads: int = 9
    trunk_width: int = 64
    trunk_blocks: int = 2
    normalise: str = "fixed"
    largest: float = 0.25

    def __post_init__(self) -> None:
        if self.normalise not in NORMALISED:
            raise ValueError(f"DeltaConfig: normalise is {self.normalise!r}: choose {' or '.join(NORMALISED)}.")
        if self.motion_tokens < 1 or self.residual_tokens < 0 or self.largest <= 0:
            raise ValueError("DeltaConfig: motion_tokens must be 1 or more, residual_tokens 0 or more, largest positive.")

    @property
    def tokens(self) -> int:
        """N of the paper: tokens of a fused P-frame."""
        return self.motion_tokens + self.residual_tokens


class DeltaEncoder(nn.Module):
    """ϕ_Δ of Eq. 5: displacement [N, R, C, 2], valid [N, R, C] and error [N, 3, H, W] to tokens [N, K_τ + K_δ, D].

    displacement is in fractions of the frame and 0 where not valid, error in −1..1. What is not valid is told to the
    network as such by a third channel, which the paper, whose vectors are zero there, does not have.
    """

    def __init__(self, config: DeltaConfig, hidden: int) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.motion_patches = nn.Sequential(
            nn.Linear(3 * PATCH * PATCH, width), nn.GELU(), nn.Linear(width, width)
        )  # vectors are the same all over a cell of 8 × 8 px: a patch's 16 · 16 pixels hold 2 · 2 different ones
        self.motion = QueryTransformer(width, config.layers, config.heads, config.motion_tokens)
        self.motion_out = nn.Linear(width, hidden)
        if config.residual_tokens:
            self.trunk = ConvTrunk(3, config.trunk_width, config.trunk_blocks, stride=16)
            self.residual_patches = nn.Linear(self.trunk.features, width)
            self.residual = QueryTransformer(width, config.layers, config.heads, config.residual_tokens)
            self.residual_out = nn.Linear(width, hidden)

    def forward(self, displacement: Tensor, valid: Tensor, error: Tensor, largest: Tensor | None = None) -> Tensor:
        """largest [N]: of normalise "clip", each frame's clip's largest displacement (both axes), in fractions."""
        motion = self.motion_tokens(displacement, valid, largest)
        return torch.cat([motion, self.residual_tokens(error)], dim=1) if self.config.residual_tokens else motion

    def motion_tokens(self, displacement: Tensor, valid: Tensor, largest: Tensor | None = None) -> Tensor:
        """τ_tok [N, K_τ, D] of Eq. 6."""
        scale = self.config.largest if self.config.normalise == "fixed" else largest[:, None, None, None].clamp(min=1e-6)
        cells = torch.cat([(displacement / scale).clamp(-1, 1), valid[..., None].to(displacement)], dim=-1)
        patches, rows, columns = _patches(cells)
        patches = self.motion_patches(patches) + self._places(rows, columns, patches)
        return self.motion_out(self.motion(patches))

    def residual_tokens(self, error: Tensor) -> Tensor:
        """δ_tok [N, K_δ, D] of Eq. 7."""
        places = self.trunk(error)
        rows, columns = places.shape[-2:]
        patches = self.residual_patches(places.flatten(2).transpose(1, 2))
        return self.residual_out(self.residual(patches + self._places(rows, columns, patches)))

    def _places(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """The paper names no positions; without them the queries could not tell where anything moved."""
        return sine_positions(rows, columns, self.config.width).to(like)


def _patches(cells: Tensor) -> tuple[Tensor, int, int]:
    """[N, R, C, 3] to patches [N, ⌈R/2⌉·⌈C/2⌉, 12], their rows and columns; a cell beyond the edge is not valid."""
    count, rows, columns, channels = cells.shape
    cells = F.pad(cells, (0, 0, 0, columns % PATCH, 0, rows % PATCH))
    blocks = cells.unflatten(1, (-1, PATCH)).unflatten(3, (-1, PATCH)).transpose(2, 3)
    return blocks.reshape(count, -1, PATCH * PATCH * channels), blocks.shape[1], blocks.shape[2]
