"""TE Fusion: groups of adjacent frames attend to each other inside the vision encoder, then become one frame's tokens.

MotionBench (Hong et al., 2025, arXiv 2501.02955), section 4 and figure 5: "group-level self-attention across adjacent
frames before compression". With its baselines at the same compression k:

- `through`: the paper's own. Self-attention of the host's tower runs over the k frames of a group.
- `pre`: the frames of a group are joined before the encoder, and the tower sees N/k pictures.
- `post`: every frame is encoded alone, and a group's tokens are joined afterwards.

What the paper leaves open, and what is done here, stands beside each setting. On hosts that join pairs of frames in
their patches (Qwen), a row in time is such a pair, and groups are of pairs.

Legend: N frames, T rows in time, k rows of a group, G = T / k groups, H×W tokens of a frame, D the host's hidden size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vdm_priors.errors import SampleError
from vdm_priors.grid import TokenGrid, merge_spans
from vlm_hooks.adapters import base
from vlm_hooks.adapters.base import AdapterOutput, HostShape, Segment, setting
from vlm_hooks.adapters.te_fusion_warmup import FrameClassifier
from vlm_hooks.streams import FrameTokens
from vlm_hooks.videos import token_spans

FUSIONS = ("through", "pre", "post")
COMPRESSIONS = ("concat", "mean", "qformer")


@dataclass
class TEFusionConfig(base.AdapterConfig):
    k: int = setting(
        4, "rows in time that become one; the paper's 2, 4, 8, 16 (best at 4); 1 compresses nothing", min=1
    )
    fusion: str = setting(
        "through",
        "where the frames of a group meet: through the encoder, before (pre) or after (post)",
        choices=FUSIONS,
    )
    compression: str = setting(
        "concat",
        "how a group's tokens become one frame's: concat projects the k tokens of a place, and begins as their "
        "mean (the text at hand names no operator; this one contains the mean); mean has no weights; qformer "
        "reads the group by one frame's queries (the paper's Q-Former baseline). Done behind the host's merger, "
        "which then sees what it was trained on",
        choices=COMPRESSIONS,
    )
    order: bool = setting(
        True,
        "learn an embedding for each place in a group, added to its patches before the first block: self-attention "
        "alone would not know which frame comes first. It begins as 0",
    )
    heads: int = setting(8, "attention heads of qformer", min=1)


class Adapter(base.Adapter):
    """See the module. It needs no motion: its clips have frames, times, duration and box."""

    NAME = "te_fusion"
    Config = TEFusionConfig
    OBJECTIVES = {"classify": FrameClassifier}

    def __init__(self, config: TEFusionConfig, host: HostShape) -> None:
        super().__init__(config, host)
        self.order = None
        if config.order and config.fusion == "through" and config.k > 1:
            self.order = nn.Parameter(torch.zeros(config.k, host.vision))
        self.compress = None
        if config.fusion != "pre" and config.k > 1:
            self.compress = COMPRESSORS[config.compression](config, host.hidden)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return ()

    @property
    def group(self) -> int:
        return self.config.k if self.config.fusion == "through" else 1

    @property
    def group_places(self) -> Tensor | None:
        return self.order

    @property
    def frames(self) -> int:
        """Frames of a group."""
        return self.config.k * self.host.depth

    def shown(self, clip: Any) -> Any:
        """The frames as they come; for `pre` the mean of each k rows' pictures, at the first one's times."""
        if self.config.fusion != "pre" or self.config.k == 1:
            return clip
        self._check(clip)
        grouped = clip.frames.reshape(-1, self.config.k, self.host.depth, *clip.frames.shape[1:])
        joined = copy.copy(clip)
        joined.frames = np.rint(grouped.mean(axis=1)).astype(np.uint8).reshape(-1, *clip.frames.shape[1:])
        times = np.asarray(clip.times).reshape(-1, self.config.k, self.host.depth)
        joined.times = times[:, 0].reshape(-1).tolist()
        return joined

    def still(self, clip: Any) -> Any:
        """Each group's first frame k times (per pair where the host joins pairs): nothing moves within a group."""
        return self._mixed(clip, clip)

    def exchanged(self, clip: Any, other: Any) -> Any:
        """The first frame of each group, and another clip's frames after it."""
        return self._mixed(clip, other, still=False)

    def _mixed(self, clip: Any, other: Any, still: bool = True) -> Any:
        mixed = copy.copy(clip)
        mixed.frames = (
            clip.frames[np.arange(len(clip.frames)) // self.frames * self.frames] if still else other.frames.copy()
        )
        mixed.frames[:: self.frames] = clip.frames[:: self.frames]
        return mixed

    def plan(self, clip: Any, shape: tuple[int, int, int]) -> list[Segment]:
        """One segment of G frames; a cell lasts as long as its group, and lies at its middle on the temporal axis."""
        self._check(clip)
        _, rows, columns = shape
        groups = [range(first, first + self.frames) for first in range(0, len(clip.frames), self.frames)]
        grid = TokenGrid.regular(merge_spans(token_spans(clip, 1), groups), rows, columns, clip.box)
        return [Segment(grid, tuple(float(np.mean([clip.times[n] for n in group])) for group in groups))]

    def forward(self, frames: list[FrameTokens]) -> AdapterOutput:
        if self.compress is None:
            return AdapterOutput(frames)
        return AdapterOutput(
            [clip.map(lambda t: self.compress(t.unflatten(0, (-1, self.config.k)))) for clip in frames]
        )

    def _check(self, clip: Any) -> None:
        if len(clip.frames) % self.frames:
            raise SampleError(
                f"The clip has {len(clip.frames)} frames, which do not fill groups of {self.frames} "
                f"({self.config.k} × {self.host.depth}, which the tower joins): sample a multiple of that."
            )


class Mean(nn.Module):
    """[G, k, H, W, D] -> [G, H, W, D]."""

    def __init__(self, config: TEFusionConfig, hidden: int) -> None:
        super().__init__()

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(dim=1)


class Concat(nn.Module):
    """[G, k, H, W, D] -> [G, H, W, D]: a projection of the k tokens of a place, the mean at first."""

    def __init__(self, config: TEFusionConfig, hidden: int) -> None:
        super().__init__()
        self.project = nn.Linear(config.k * hidden, hidden)
        with torch.no_grad():
            self.project.weight.copy_(torch.eye(hidden).repeat(1, config.k) / config.k)
            self.project.bias.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.project(tokens.movedim(1, 3).flatten(3))


class QFormer(nn.Module):
    """[G, k, H, W, D] -> [G, H, W, D]: the mean of each place asks all tokens of its group, and adds what it learns."""

    def __init__(self, config: TEFusionConfig, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.attention = nn.MultiheadAttention(hidden, config.heads, batch_first=True)
        self.order = nn.Parameter(torch.zeros(config.k, 1, 1, hidden))
        nn.init.zeros_(self.attention.out_proj.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        queries = tokens.mean(dim=1)
        known = self.norm(tokens + self.order).flatten(1, 3)
        learnt, _ = self.attention(self.norm(queries).flatten(1, 2), known, known, need_weights=False)
        return queries + learnt.view_as(queries)


COMPRESSORS: dict[str, type[nn.Module]] = {"concat": Concat, "mean": Mean, "qformer": QFormer}
assert tuple(COMPRESSORS) == COMPRESSIONS
