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

from vdm_priors.errors import UserError
from vlm_hooks.adapters import base
from vlm_hooks.adapters.base import setting
from vlm_hooks.adapters.conv_trunk import ConvTrunk
from vlm_hooks.adapters.query_transformer import QueryTransformer, sine_positions

PATCH = 2  # motion cells of a patch's side: 16 px


@dataclass
class CoPEConfig(base.AdapterConfig):
    motion_tokens: int = setting(
        4, "K of the motion branch: tokens of a fused P-frame's vectors (section 3.2: 4)", min=1
    )
    residual_tokens: int = setting(4, "K of the residual branch (4); 0 leaves the branch out", min=0)
    width: int = setting(
        180,
        'inner width. The paper writes both "hidden dimension d" = 1152 and "< 15 M parameters", and two '
        "transformers of 4 layers and 1152 have 128 M: 180 keeps the second, 1152 the first",
        min=8,
    )
    layers: int = setting(4, "layers of each of the transformers, those of pre-training too", min=1)
    heads: int = setting(9, "their attention heads", min=1)
    trunk_width: int = setting(64, "channels of the residual branch's first stage; 64 is ResNet-18", min=1)
    trunk_blocks: int = setting(2, "its blocks a stage; 2 is ResNet-18", min=1)
    normalise: str = setting(
        "fixed",
        "vectors are brought to -1..1 by a `fixed` share of the frame, or by the largest of the "
        "clip. The paper says min-max and not of what; of each frame by itself, slow and fast "
        "motion would look the same",
        choices=("fixed", "clip"),
    )
    largest: float = setting(
        0.25, "of `fixed`: the share of the frame, moved in a step, that is 1; more is cut off", min=1e-6
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads or self.width % 4:
            raise UserError(
                f"width ({self.width}) must be a multiple of heads ({self.heads}), and of 4 for its positions"
            )

    @property
    def tokens(self) -> int:
        """N of the paper: tokens of a fused P-frame."""
        return self.motion_tokens + self.residual_tokens


class DeltaEncoder(nn.Module):
    """ϕ_Δ of Eq. 5: vectors [N, R, C, 3] and errors [N, 3, H, W] in −1..1 to tokens [N, K_τ + K_δ, D].

    vectors are (right, down, valid): what is not known is told to the network as such, and is 0 besides. The paper's
    vectors are zero there, and nothing says so.
    """

    def __init__(self, config: CoPEConfig, hidden: int) -> None:
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

    def forward(self, vectors: Tensor, errors: Tensor) -> Tensor:
        motion = self.motion_tokens(vectors)
        return torch.cat([motion, self.residual_tokens(errors)], dim=1) if self.config.residual_tokens else motion

    def motion_tokens(self, vectors: Tensor) -> Tensor:
        """τ_tok [N, K_τ, D] of Eq. 6. Vectors beyond −1..1 are cut off."""
        patches, rows, columns = _patches(vectors.clamp(-1, 1).to(self.motion_out.weight))
        patches = self.motion_patches(patches) + self._places(rows, columns, patches)
        return self.motion_out(self.motion(patches))

    def residual_tokens(self, errors: Tensor) -> Tensor:
        """δ_tok [N, K_δ, D] of Eq. 7."""
        places = self.trunk(errors.to(self.residual_out.weight))
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
