"""A selective state-space block in plain PyTorch (Gu & Dao, "Mamba", 2023): HY-Himmel's "MotionSSM" over an interval.

Legend: N sequences, L steps, D width, I inner width, S states of each inner feature.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def scan(decay: Tensor, inflow: Tensor) -> Tensor:
    """h_t = decay_t · h_{t−1} + inflow_t with h_0 = 0, over dimension 1 of [N, L, …]. Differentiable; out of place.

    Step by step: an interval has 16 or fewer, and a scan in ⌈log₂ L⌉ passes reads and writes all of it in every one (a
    fifth of the speed, measured forward and backward at L = 8).
    """
    states = [inflow[:, 0]]
    for fade, flow in zip(decay.unbind(1)[1:], inflow.unbind(1)[1:], strict=True):
        states.append(torch.addcmul(flow, fade, states[-1]))
    return torch.stack(states, dim=1)


class StateSpaceBlock(nn.Module):
    """Norm, gated selective scan, residual. tokens [N, L, D] and known [N, L] bool -> [N, L, D].

    A step that is not known neither changes the state nor fades it: its step size Δ is 0. width: D; states: S.
    """

    def __init__(self, width: int, states: int = 8, expand: int = 2) -> None:
        super().__init__()
        inner = expand * width
        self.states = states
        self.norm = nn.LayerNorm(width)
        self.enter = nn.Linear(width, 2 * inner)
        self.select = nn.Linear(inner, 2 * states)
        self.pace = nn.Linear(inner, inner)
        self.log_rates = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.leave = nn.Linear(inner, width)
        nn.init.constant_(self.pace.bias, -2.0)  # softplus(−2) ≈ 0.13: the slowest state remembers some 8 steps

    def forward(self, tokens: Tensor, known: Tensor) -> Tensor:
        values, gate = self.enter(self.norm(tokens)).chunk(2, dim=-1)
        values = F.silu(values)
        into, out_of = self.select(values).chunk(2, dim=-1)  # B and C of the paper
        pace = F.softplus(self.pace(values)) * known[..., None]  # its Δ
        decay = torch.exp(-pace[..., None] * self.log_rates.exp())
        states = scan(decay, (pace * values)[..., None] * into[:, :, None])
        read = (states * out_of[:, :, None]).sum(-1) + self.skip * values
        return tokens + self.leave(read * F.silu(gate))


class MotionSSM(nn.Module):
    """State-space blocks over the steps of an interval, read at the last known one. [N, L, D], [N, L] -> [N, D].

    An interval of which no step is known gives a learnt vector.
    """

    def __init__(self, width: int, blocks: int = 2, states: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(StateSpaceBlock(width, states) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.nothing = nn.Parameter(torch.zeros(width))

    def forward(self, tokens: Tensor, known: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens, known)
        steps = torch.arange(known.shape[1], device=known.device)
        last = torch.where(known, steps, -1).amax(1)
        read = self.norm(tokens)[torch.arange(len(tokens), device=tokens.device), last.clamp(min=0)]
        return torch.where((last >= 0)[:, None], read, self.nothing)


class MotionMean(nn.Module):
    """What the encoder without state-space blocks does with an interval's steps: their mean. [N, L, D] -> [N, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.nothing = nn.Parameter(torch.zeros(width))

    def forward(self, tokens: Tensor, known: Tensor) -> Tensor:
        count = known.sum(1, keepdim=True)
        mean = (tokens * known[..., None]).sum(1) / count.clamp(min=1)
        return torch.where(count > 0, self.norm(mean), self.nothing)
