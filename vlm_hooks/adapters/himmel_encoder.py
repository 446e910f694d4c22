"""HY-Himmel's tri-stream encoder (Jin et al., 2026, section 3.2): an interval between two anchors to motion tokens.

    motion vectors ─┐ convolutions of every step, then over the steps: state-space blocks or their mean
    residuals      ─┤ -> hidden states h_mv, h_res, h_ctx of each place of a coarse grid
    anchor, small  ─┘ -> gated fusion in two steps -> one token a place

The paper calls h an interval-level hidden state, and has 64 tokens of an interval without saying how one becomes the
other. Here h lies on a grid of as many places as there are tokens (8 × 8 for 64), so that every token has a cell.

Legend: N intervals, L steps, R × C motion cells, H × W pixels, P = rows · columns places, E width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vdm_priors.errors import UserError
from vlm_hooks.adapters import base
from vlm_hooks.adapters.base import setting
from vlm_hooks.adapters.conv_trunk import ConvTrunk
from vlm_hooks.adapters.query_transformer import sine_positions
from vlm_hooks.adapters.state_space import MotionMean, MotionSSM

STREAMS = ("motion", "residual", "context")


@dataclass
class HimmelConfig(base.AdapterConfig):
    anchors: int = setting(8, "K: pictures that the host's tower encodes, evenly spaced over the clip", min=2)
    rows: int = setting(8, "rows of an interval's motion tokens; 8 × 8 are the paper's 64", min=1)
    columns: int = setting(8, "columns of them; 2 × 4 to 16 × 16 are the ablation's 8 to 256", min=1)
    steps: int = setting(
        16, "maps of an interval at most, evenly spaced (the paper says all frames, and not how many are read)", min=1
    )
    streams: list[str] = setting(
        list(STREAMS),
        "motion, residual, context: those used (Table 1). Of one left out, the gate that "
        "would weigh it is left out too",
    )
    placement: str = setting(
        "anchor",
        "where motion tokens stand: after each anchor (the paper), before all anchors, or behind them (section O.2)",
        choices=("anchor", "prefix", "suffix"),
    )
    encoder: str = setting(
        "ssm",
        "ssm: MotionSSM over an interval's steps (the default); conv: their mean. Table 6 lists one "
        "MotionSSM beside three ResNet-18 branches: its blocks are shared by the streams, the "
        "convolutions are not",
        choices=("ssm", "conv"),
    )
    fusion: str = setting(
        "gated",
        "gated: Eqs. 3 and 4; of section I.6: mlp, weighted (one learnt weight a stream), concat (one linear layer)",
        choices=("gated", "mlp", "weighted", "concat"),
    )
    width: int = setting(512, "E: width of the hidden states (not said; 512 is what ResNet-18 gives)", min=4)
    ssm_blocks: int = setting(4, "state-space blocks (not said)", min=1)
    ssm_states: int = setting(16, "states of each inner feature (not said; Mamba's)", min=1)
    trunk_width: int = setting(64, "channels of a branch's first stage; 64 is ResNet-18", min=1)
    trunk_blocks: int = setting(2, "its blocks a stage; 2 is ResNet-18", min=1)
    context: int = setting(
        112, 'height and width that an anchor is scaled to for the context stream ("a lower spatial resolution")', min=8
    )
    largest: float = setting(
        0.25, "the share of the frame, moved in a step, that counts as 1; more is cut off (not said)", min=1e-6
    )

    alignment: str = setting(
        "infonce",
        "Stage 1's loss: infonce (with the cosine term), mse, or both (appendix Q)",
        choices=("infonce", "mse", "both"),
    )
    cosine_weight: float = setting(0.5, "of infonce: weight of 1 - cosine (Eq. 7; its value is not said)", min=0)
    branch_weight: float = setting(
        0.5, "weight of the mean loss of the streams' own heads (section 3.3; not said)", min=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = sorted(set(self.streams) - set(STREAMS))
        if unknown or not set(self.streams) & {"motion", "residual"}:
            raise UserError(
                f"streams ({', '.join(self.streams)}) may have {', '.join(STREAMS)}, and needs motion or residual"
            )
        if self.width % 4:
            raise UserError(f"width must be a multiple of 4, not {self.width}")
        self.streams = [stream for stream in STREAMS if stream in self.streams]

    @property
    def tokens(self) -> int:
        """Motion tokens of an interval."""
        return self.rows * self.columns


class TriStreamEncoder(nn.Module):
    """Streams, their fusion, and what the gates said. See `forward`."""

    def __init__(self, config: HimmelConfig) -> None:
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
        self, vectors: Tensor, errors: Tensor, context: Tensor, known: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Fused hidden states [N, P, E], each stream's [N, P, E], and the gates' mean weights [N] of each stream.

        vectors [N, L, R, C, 3]: right and down as shares of `largest`, 0 where not known, and whether it is; errors
        [N, L, 3, H, W] and context [N, 3, H', W'] in −1..1; known [N, L] bool: steps that there are. The weights of a
        sample's streams add up to 1; they are there for fusion "gated" and "weighted".
        """
        maps = {"motion": vectors.clamp(-1, 1).movedim(-1, 2), "residual": errors, "context": context[:, None]}
        steps = {"context": known.new_ones(len(known), 1)}
        hidden = {
            stream: self._over_steps(
                self.trunks[stream](maps[stream], steps.get(stream, known)), steps.get(stream, known)
            )
            for stream in self.config.streams
        }
        fused, weights = self.fusion(hidden)
        return fused, hidden, weights

    def _over_steps(self, places_nlpe: Tensor, known_nl: Tensor) -> Tensor:
        count, _, places, _ = places_nlpe.shape
        sequences = places_nlpe.transpose(1, 2).flatten(0, 1)
        return self.over_steps(sequences, known_nl.repeat_interleave(places, dim=0)).unflatten(0, (count, places))


class _MapReader(nn.Module):
    """Maps [N, L, 3, H, W] to places [N, L, P, E]. Steps that are not known are not computed, and are 0.

    The trunk makes one of `stride` × `stride` cells. Maps of fewer cells than places · stride are spread first, else
    neighbouring places would share what they read (8 × 8 vectors would be one place), and could not say where it moves.
    """

    def __init__(self, config: HimmelConfig, stride: int) -> None:
        super().__init__()
        self.config, self.stride = config, stride
        self.trunk = ConvTrunk(3, config.trunk_width, config.trunk_blocks, stride)
        self.out = nn.Linear(self.trunk.features, config.width)

    def forward(self, maps: Tensor, known: Tensor) -> Tensor:
        rows, columns = self.config.rows, self.config.columns
        places = self.out.weight.new_zeros(*known.shape, rows * columns, self.config.width)
        if not known.any():
            return places
        read = self.trunk(self._spread(maps[known].to(self.out.weight)))
        read = self.out(F.adaptive_avg_pool2d(read, (rows, columns)).flatten(2).transpose(1, 2))
        read = read + sine_positions(rows, columns, self.config.width).to(read)
        return places.masked_scatter(known[..., None, None], read)

    def _spread(self, maps: Tensor) -> Tensor:
        """Each cell repeated as often as the trunk needs to keep places apart: a vector holds for all its block."""
        wanted = self.config.rows * self.stride, self.config.columns * self.stride
        times = max(math.ceil(least / side) for least, side in zip(wanted, maps.shape[-2:], strict=True))
        return maps if times <= 1 else F.interpolate(maps, scale_factor=float(times), mode="nearest-exact")


class StreamFusion(nn.Module):
    """Hidden states of the streams to one: two gated steps (Eqs. 3, 4), or one of the ablation's ways."""

    def __init__(self, config: HimmelConfig) -> None:
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
