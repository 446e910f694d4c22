"""HY-Himmel's tri-stream encoder (Jin et al., 2026, section 3.2): an interval between two anchors to motion tokens.

    motion vectors ─┐ convolutions of every step, then over the steps: state-space blocks or their mean
    residuals      ─┤ -> hidden states h_mv, h_res, h_ctx of each place of a coarse grid
    anchor, small  ─┘ -> gated fusion in two steps -> one token a place

The paper calls h an interval-level hidden state, and has 64 tokens of an interval without saying how one becomes the
other. Here h lies on a grid of as many places as there are tokens (8 × 8 for 64), so that every token has a cell.

Legend: N intervals, L steps, R × C motion cells, H × W pixels, P = rows · columns places, E width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_hooks.adapters.conv_trunk import ConvTrunk
from vlm_hooks.adapters.query_transformer import sine_positions
from vlm_hooks.adapters.state_space import MotionMean, MotionSSM

STREAMS = ("motion", "residual", "context")
ENCODERS = ("ssm", "conv")
FUSIONS = ("gated", "mlp", "weighted", "concat")


@dataclass(frozen=True)
class TriStreamConfig:
    """Sizes of the encoder.

    grid: rows and columns of motion tokens of an interval; 8 × 8 are the paper's 64. streams: those used (Table 1's
    ablation); of one left out, the gate that would weigh it is left out too. encoder: "ssm" (MotionSSM, the default) or
    "conv" (ResNet-18 and the mean over steps). Table 6 lists one MotionSSM beside three ResNet-18 branches: its blocks
    are shared by the streams, the convolutions are not. fusion: "gated" (Eqs. 3 and 4), or section I.6's "mlp",
    "weighted" (one learnt weight a stream) and "concat" (one linear layer). trunk_width 64 and trunk_blocks 2 are
    ResNet-18. largest: displacement, as a share of the frame, that counts as 1; more is cut off.
    """

    grid: tuple[int, int] = (8, 8)
    width: int = 512
    streams: tuple[str, ...] = STREAMS
    encoder: str = "ssm"
    fusion: str = "gated"
    ssm_blocks: int = 4
    ssm_states: int = 16
    trunk_width: int = 64
    trunk_blocks: int = 2
    largest: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        object.__setattr__(self, "streams", tuple(stream for stream in STREAMS if stream in self.streams))
        for name, known in (("encoder", ENCODERS), ("fusion", FUSIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"TriStreamConfig: {name} is {getattr(self, name)!r}: choose one of {', '.join(known)}.")
        if not set(self.streams) & {"motion", "residual"}:
            raise ValueError("TriStreamConfig: streams needs motion, residual or both; without, there is no motion.")

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


class TriStreamEncoder(nn.Module):
    """Streams, their fusion, and what the gates said. See `forward`."""

    def __init__(self, config: TriStreamConfig) -> None:
        super().__init__()
        self.config = config
        self.trunks = nn.ModuleDict({s: _MapReader(config, 8 if s == "motion" else 16) for s in config.streams})
        self.over_steps = (
            MotionSSM(config.width, config.ssm_blocks, config.ssm_states)
            if config.encoder == "ssm"
            else MotionMean(config.width)
        )
        self.fusion = StreamFusion(config)

    def forward(
        self, displacement: Tensor, valid: Tensor, error: Tensor, context: Tensor, known: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Fused hidden states [N, P, E], each stream's [N, P, E], and the gates' mean weights [N] of each stream.

        displacement [N, L, R, C, 2] in fractions of the frame, 0 where not valid [N, L, R, C]; error [N, L, 3, H, W]
        in −1..1; context [N, 3, H', W'] in −1..1; known [N, L] bool: steps that there are. The weights of a sample's
        streams add up to 1; they are there for fusion "gated" and "weighted".
        """
        moved = (displacement / self.config.largest).clamp(-1, 1).movedim(-1, 2)
        maps = {
            "motion": torch.cat([moved, valid[:, :, None].to(moved)], dim=2),
            "residual": error,
            "context": context[:, None],
        }
        steps = {"context": known.new_ones(len(known), 1)}
        hidden = {
            stream: self._over_steps(self.trunks[stream](maps[stream], steps.get(stream, known)), steps.get(stream, known))
            for stream in self.config.streams
        }
        fused, weights = self.fusion(hidden)
        return fused, hidden, weights

    def _over_steps(self, places_nlpe: Tensor, known_nl: Tensor) -> Tensor:
        count, _, places, _ = places_nlpe.shape
        sequences = places_nlpe.transpose(1, 2).flatten(0, 1)
        return self.over_steps(sequences, known_nl.repeat_interleave(places, dim=0)).unflatten(0, (count, places))


class _MapReader(nn.Module):
    """Maps [N, L, 3, H, W] to places [N, L, P, E]. Steps that are not known are not computed, and are 0."""

    def __init__(self, config: TriStreamConfig, stride: int) -> None:
        super().__init__()
        self.config = config
        self.trunk = ConvTrunk(3, config.trunk_width, config.trunk_blocks, stride)
        self.out = nn.Linear(self.trunk.features, config.width)

    def forward(self, maps: Tensor, known: Tensor) -> Tensor:
        rows, columns = self.config.grid
        places = maps.new_zeros(*known.shape, rows * columns, self.config.width)
        if not known.any():
            return places
        read = F.adaptive_avg_pool2d(self.trunk(maps[known]), (rows, columns)).flatten(2).transpose(1, 2)
        read = self.out(read) + sine_positions(rows, columns, self.config.width).to(read)
        return places.masked_scatter(known[..., None, None], read.to(places))


class StreamFusion(nn.Module):
    """Hidden states of the streams to one: two gated steps (Eqs. 3, 4), or one of the ablation's ways."""

    def __init__(self, config: TriStreamConfig) -> None:
        super().__init__()
        self.kind, width, count = config.fusion, config.width, len(config.streams)
        if self.kind == "gated":
            self.gates = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(count - 1))
        elif self.kind == "weighted":
            self.logits = nn.Parameter(torch.zeros(count))
        elif self.kind == "concat":
            self.join = nn.Linear(count * width, width)
        else:
            self.join = nn.Sequential(nn.Linear(count * width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, hidden: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """[N, P, E] of each stream, in their order; and the share [N] of each, where the way has shares."""
        streams, values = list(hidden), list(hidden.values())
        if self.kind in ("concat", "mlp"):
            return self.join(torch.cat(values, dim=-1)), {}
        if self.kind == "weighted":
            shares = self.logits.softmax(0)
            fused = sum(share * value for share, value in zip(shares, values, strict=True))
            return fused, {s: share.detach().expand(len(fused)) for s, share in zip(streams, shares, strict=True)}
        fused, shares = values[0], [torch.ones_like(values[0])]
        for gate, value in zip(self.gates, values[1:], strict=True):
            kept = torch.sigmoid(gate(torch.cat([fused, value], dim=-1)))
            fused = kept * fused + (1 - kept) * value
            shares = [share * kept for share in shares] + [1 - kept]
        return fused, {s: share.detach().mean((1, 2)) for s, share in zip(streams, shares, strict=True)}
