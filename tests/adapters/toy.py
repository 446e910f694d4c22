"""A small adapter with motion tokens, for tests of the core: a token a key frame, that says how much moves after it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vdm_priors.grid import TokenGrid
from vlm_hooks.adapters import base
from vlm_hooks.adapters.base import AdapterOutput, Segment, setting


@dataclass
class ToyConfig(base.AdapterConfig):
    tokens: int = setting(2, "motion tokens a key frame", min=1, max=8)


class Adapter(base.Adapter):
    NAME = "toy"
    Config = ToyConfig
    INPUTS = ("toy_motion",)

    def __init__(self, config, host):
        super().__init__(config, host)
        self.project = nn.Linear(2, config.tokens * host.hidden)

    def plan(self, clip, shape):
        _, rows, columns = shape
        segments = []
        for span, time in zip(clip.spans, clip.times, strict=True):
            segments.append(Segment(TokenGrid.regular([span], rows, columns), (time,)))
            segments.append(Segment.of_motion(span, self.config.tokens))
        return segments

    def inputs(self, clips):
        moved = [[np.nan_to_num(np.nanmean(m.vectors, axis=(0, 1, 2))) for m in clip.motion] for clip in clips]
        most = max(map(len, moved))
        return {"toy_motion": torch.tensor(np.array([m + [np.zeros(2)] * (most - len(m)) for m in moved])).float()}

    def forward(self, frames, toy_motion):
        counts = [len(clip.tokens) for clip in frames]
        motion = [
            self.project(own[:n]).view(n * self.config.tokens, -1) for own, n in zip(toy_motion, counts, strict=True)
        ]
        return AdapterOutput(frames, motion)
