"""EMA: each group of pictures becomes one frame's tokens, which know the motion that follows the frame.

Zhao et al., "Efficient Motion-Aware Video MLLM" (CVPR 2025). A GOP is a key frame and up to M vector fields (eq. 4).
The host's tower encodes the frame (eq. 5), a small transformer the fields (eq. 6), which are averaged over time (eq. 7)
and fused into the frame by cross-attention with a residual (eq. 8, 9); a temporal prompt stands before each GOP (eq.
10).
What the paper leaves open, and what is done here, stands beside each setting. Further:

- Key frames pass the host's own merger before they are pooled and fused: in the families' towers it pools and projects
  at once, and sees what it was trained on. The paper's MLP projector is then the host's.
- The last layer of the fusion begins as 0: an untrained adapter leaves the (pooled) frames as they are.
- Vectors are shares of the frame a step, times `scale`. Where no motion is known they are 0, and a third channel says
  so (1 known, 0 not); "a blank motion vector" for pictures is 0 and known.

Legend: B clips, N GOPs of a clip, M fields of a GOP, s×s a field's cells, P patches, E width of the motion encoder,
H×W pooled tokens of a frame, D the host's hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from vdm_priors.grid import TokenGrid
from vlm_hooks.adapters import base
from vlm_hooks.adapters.base import AdapterOutput, HostShape, Segment, setting
from vlm_hooks.adapters.ema_warmup import MotionClassifier
from vlm_hooks.adapters.inputs import MotionClip
from vlm_hooks.streams import FrameTokens

CHANNELS = 3  # right, down, known


@dataclass
class EMAConfig(base.AdapterConfig):
    fusion: str = setting(
        "crossattn",
        "how motion enters the frame (Table 4, exp. 0 to 4): none leaves it out",
        choices=("crossattn", "add", "concat", "none"),
    )
    aggregate: bool = setting(
        True,
        "average the fields over time and pool them to the frame's grid before the fusion; false "
        "gives crossattn all patches of all fields",
    )
    position: str = setting(
        "pre",
        "when a field learns its place in time: before the motion encoder (the paper), after, not",
        choices=("pre", "post", "none"),
    )
    layers: int = setting(2, "layers of the motion encoder; 0 is the patches' projection alone", min=0, max=64)
    width: int = setting(256, "width of the motion encoder (appendix A: 256)", min=8)
    heads: int = setting(
        4, 'its attention heads (appendix A says "2 channels", which are the vectors\', and no heads)', min=1
    )
    fusion_heads: int = setting(8, "heads of the cross-attention (not said)", min=1)
    pooling: int = setting(
        3,
        "kernel of the pooling of a frame's tokens (Table 7): 3 makes 81 of 729; 1 is none. Tokens that do "
        "not fill a kernel make one of their own (27 / 2 -> 14, as in the paper)",
        min=1,
        max=64,
    )
    cells: int = setting(96, "rows and columns of a vector map", min=1)
    patch: int = setting(
        7,
        "cells of a patch's side. 96 is no multiple of 7: maps get unknown cells on the right and below, "
        "98 × 98 (not said)",
        min=1,
    )
    vectors: int = setting(8, "fields of a GOP at most, chosen evenly", min=1)
    scale: float = setting(32.0, "vectors are multiplied by this: 1/32 of the frame a step is 1 (not said)", min=1e-6)
    prompt: str = setting(
        "Segment {number}: ",
        "text before each GOP, with {number} from 1 and {time} in seconds; empty writes "
        "what the host writes for a frame",
    )


class Adapter(base.Adapter):
    """See the module. Takes MotionClips."""

    NAME = "ema"
    Config = EMAConfig
    INPUTS = ("ema_vectors", "ema_fields")
    OBJECTIVES = {"classify": MotionClassifier}

    def __init__(self, config: EMAConfig, host: HostShape) -> None:
        super().__init__(config, host)
        self.motion = MotionEncoder(config)
        self.fusion = None if config.fusion == "none" else FUSIONS[config.fusion](config, host.hidden)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return ()

    def plan(self, clip: MotionClip, shape: tuple[int, int, int]) -> list[Segment]:
        """One frame's tokens a GOP; its cells last to the next one."""
        _, rows, columns = shape
        rows, columns = math.ceil(rows / self.config.pooling), math.ceil(columns / self.config.pooling)
        return [
            Segment(
                TokenGrid.regular([span], rows, columns, clip.box),
                (time,),
                label=self.config.prompt.format(number=number, time=f"{time:.1f}") or None,
            )
            for number, (span, time) in enumerate(zip(clip.spans, clip.times, strict=True), start=1)
        ]

    def inputs(self, clips: Sequence[MotionClip]) -> dict[str, Tensor]:
        """ema_vectors [B, N, M, 3, s, s] float32, 0 and unknown where a clip has fewer; ema_fields [B, N]: how many."""
        c = self.config
        gops = max(len(clip.motion) for clip in clips)
        fields = [[_evenly(motion.vectors, c.vectors) for motion in clip.motion] for clip in clips]
        most = max(1, *(len(field) for clip in fields for field in clip))
        vectors = torch.zeros(len(clips), gops, most, CHANNELS, c.cells, c.cells)
        counts = torch.zeros(len(clips), gops, dtype=torch.long)
        for b, clip in enumerate(fields):
            for n, field in enumerate(clip):
                counts[b, n] = max(1, len(field))
                vectors[b, n, : counts[b, n]] = _maps(field, c.cells)
        vectors[:, :, :, :2] *= c.scale
        return {"ema_vectors": vectors, "ema_fields": counts}

    def without_motion(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Zero vectors, as known as the real ones."""
        vectors = inputs["ema_vectors"].clone()
        vectors[:, :, :, :2] = 0
        return {**inputs, "ema_vectors": vectors}

    def forward(self, frames: list[FrameTokens], ema_vectors: Tensor, ema_fields: Tensor) -> AdapterOutput:
        pooled = [clip.map(self._pool) for clip in frames]
        if self.fusion is None:
            return AdapterOutput(pooled)
        counts = [len(clip.tokens) for clip in frames]
        used = [(b, n) for b, count in enumerate(counts) for n in range(count)]
        batch, gop = map(list, zip(*used, strict=True))
        motion = self.motion(ema_vectors[batch, gop], ema_fields[batch, gop])  # of all clips' GOPs
        out = []
        for clip, own in zip(pooled, zip(*(part.split(counts) for part in motion), strict=True), strict=True):
            out.append(FrameTokens(self.fusion(clip.tokens, *own), clip.deep))
        return AdapterOutput(out)

    def _pool(self, tokens: Tensor) -> Tensor:
        """[N, h, w, D] -> [N, H, W, D]."""
        if self.config.pooling == 1:
            return tokens
        size = [math.ceil(side / self.config.pooling) for side in tokens.shape[1:3]]
        return adaptive_avg_pool2d(tokens.movedim(3, 1), size).movedim(1, 3)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        fusion = [] if self.fusion is None else list(self.fusion.parameters())
        return {"motion": list(self.motion.parameters()), "fusion": fusion}


class MotionEncoder(nn.Module):
    """Vector fields to features, each field for itself (eq. 6): pre-norm transformer over its patches.

    Called with vectors [G, M, 3, s, s] and fields [G] (how many of the M there are); gives features [G, M, P, E] with
    zeros for those there are not, and the mask [G, M] bool. P = rows × rows patches, row by row.
    """

    def __init__(self, config: EMAConfig) -> None:
        super().__init__()
        self.position, self.patch = config.position, config.patch
        self.rows = math.ceil(config.cells / config.patch)
        self.pad = self.rows * config.patch - config.cells
        self.project = nn.Conv2d(CHANNELS, config.width, config.patch, config.patch)
        self.place = nn.Parameter(torch.randn(self.rows**2, config.width) * 0.02)
        self.time = nn.Parameter(torch.randn(config.vectors, 1, config.width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            config.width, config.heads, 4 * config.width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False) if config.layers else None
        self.norm = nn.LayerNorm(config.width)

    def forward(self, vectors: Tensor, fields: Tensor) -> tuple[Tensor, Tensor]:
        groups, moments = vectors.shape[:2]
        maps = nn.functional.pad(vectors.flatten(0, 1).to(self.project.weight.dtype), (0, self.pad, 0, self.pad))
        features = self.project(maps).flatten(2).transpose(1, 2).unflatten(0, (groups, moments)) + self.place
        if self.position == "pre":
            features = features + self.time[:moments]
        if self.layers is not None:
            features = self.layers(features.flatten(0, 1)).unflatten(0, (groups, moments))
        features = self.norm(features)
        if self.position == "post":
            features = features + self.time[:moments]
        there = torch.arange(moments, device=fields.device) < fields[:, None]
        return features * there[..., None, None], there


class Fusion(nn.Module):
    """Frames [G, H, W, D] and motion features [G, M, P, E] with their mask [G, M] to frames that know their motion."""

    def __init__(self, config: EMAConfig, hidden: int) -> None:
        super().__init__()
        self.project = nn.Linear(config.width, hidden)

    def pooled(self, features: Tensor, there: Tensor, size: Sequence[int]) -> Tensor:
        """Mean over the fields there are (eq. 7), and the patches of each cell of the frame's grid: [G, H, W, E]."""
        mean = features.sum(dim=1) / there.sum(dim=1).clamp(min=1)[:, None, None]
        side = math.isqrt(mean.shape[1])
        return adaptive_avg_pool2d(mean.transpose(1, 2).unflatten(2, (side, side)), size).movedim(1, 3)


class CrossAttention(Fusion):
    """Eq. 8 and 9: Q frame, K and V motion; FFN of what is attended to, and the frame as the residual.

    The frame's normalised tokens and the motion's are the inputs; the paper does not say where it normalises.
    """

    def __init__(self, config: EMAConfig, hidden: int) -> None:
        super().__init__(config, hidden)
        self.aggregate = config.aggregate
        self.norm = nn.LayerNorm(hidden)
        self.attention = nn.MultiheadAttention(hidden, config.fusion_heads, batch_first=True)
        self.ffn = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden)
        )
        _zero(self.ffn[-1])

    def forward(self, frames: Tensor, features: Tensor, there: Tensor) -> Tensor:
        missing = None
        if self.aggregate:
            motion = self.pooled(features, there, frames.shape[1:3]).flatten(1, 2)
        else:
            motion = features.flatten(1, 2)
            missing = ~there.repeat_interleave(features.shape[2], dim=1)
        motion = self.project(motion)
        queries = self.norm(frames).flatten(1, 2)
        attended, _ = self.attention(queries, motion, motion, key_padding_mask=missing, need_weights=False)
        return frames + self.ffn(attended).view_as(frames)


class Add(Fusion):
    """The motion at a frame's place is added to it."""

    def __init__(self, config: EMAConfig, hidden: int) -> None:
        super().__init__(config, hidden)
        _zero(self.project)

    def forward(self, frames: Tensor, features: Tensor, there: Tensor) -> Tensor:
        return frames + self.project(self.pooled(features, there, frames.shape[1:3]))


class Concat(Fusion):
    """Frame and motion of a place side by side through an MLP, with the frame as the residual."""

    def __init__(self, config: EMAConfig, hidden: int) -> None:
        super().__init__(config, hidden)
        self.mix = nn.Sequential(
            nn.LayerNorm(2 * hidden), nn.Linear(2 * hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        _zero(self.mix[-1])

    def forward(self, frames: Tensor, features: Tensor, there: Tensor) -> Tensor:
        motion = self.project(self.pooled(features, there, frames.shape[1:3]))
        return frames + self.mix(torch.cat([frames, motion], dim=-1))


FUSIONS: dict[str, type[Fusion]] = {"crossattn": CrossAttention, "add": Add, "concat": Concat}


def _zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def _evenly(fields: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the fields [M, ...], evenly spaced, the last one among them."""
    if len(fields) <= most:
        return fields
    return fields[np.rint(np.linspace(0, len(fields) - 1, most)).astype(int)]


def _maps(field: np.ndarray, cells: int) -> Tensor:
    """Vectors [M, R, C, 2] with NaN to maps [max(M, 1), 3, cells, cells]; without any, the blank one of a picture.

    A cell of the map shows the vector of the field's cell at its middle: blocks' vectors hold for the whole block.
    """
    if not len(field):
        return torch.cat([torch.zeros(1, 2, cells, cells), torch.ones(1, 1, cells, cells)], dim=1)
    vectors = torch.from_numpy(np.ascontiguousarray(field)).float().movedim(3, 1)
    known = vectors.isfinite().all(dim=1, keepdim=True)
    maps = torch.cat([torch.where(known, vectors, 0.0), known.float()], dim=1)
    return interpolate(maps, size=(cells, cells), mode="nearest-exact")
