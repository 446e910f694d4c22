"""Pace: one motion token a key frame, which says how fast what follows it moves, and where to.

The smallest codec adapter that uses its motion: of the vectors up to the next key frame it takes the mean speed and the
mean direction on a coarse grid, and one linear layer makes a token of them. It begins as a token of zeros.

Legend: B clips, K key frames of a clip, G × G places, D the host's hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vdm_priors.grid import TokenGrid
from vlm_hooks.adapters import base
from vlm_hooks.adapters.base import AdapterOutput, HostShape, Segment, setting
from vlm_hooks.adapters.inputs import MotionClip
from vlm_hooks.streams import FrameTokens


@dataclass
class PaceConfig(base.AdapterConfig):
    places: int = setting(4, "rows, and columns, of the grid on which motion is summed up", min=1, max=64)


class Adapter(base.Adapter):
    """See the module. Takes MotionClips."""

    NAME = "pace"
    Config = PaceConfig
    INPUTS = ("pace_motion",)

    def __init__(self, config: PaceConfig, host: HostShape) -> None:
        super().__init__(config, host)
        self.project = nn.Linear(3 * config.places**2, host.hidden)  # speed, right, down
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def plan(self, clip: MotionClip, shape: tuple[int, int, int]) -> list[Segment]:
        """Each key frame, then one token for the time until the next."""
        _, rows, columns = shape
        segments = []
        for span, key in zip(clip.spans, clip.times, strict=True):
            segments.append(Segment(TokenGrid.regular([span], rows, columns, clip.box), (key,)))
            segments.append(Segment.of_motion(span, 1, box=clip.box))
        return segments

    def inputs(self, clips: Sequence[MotionClip]) -> dict[str, Tensor]:
        """pace_motion [B, K, 3·G·G] float32, zeros beyond a clip's last key frame; what is not known counts nowhere."""
        rows = [torch.stack([self._summary(motion.vectors) for motion in clip.motion]) for clip in clips]
        return {"pace_motion": nn.utils.rnn.pad_sequence(rows, batch_first=True)}

    def forward(self, frames: list[FrameTokens], pace_motion: Tensor) -> AdapterOutput:
        tokens_bkd = self.project(pace_motion.to(self.project.weight))
        return AdapterOutput(frames, [own[: len(clip.tokens)] for own, clip in zip(tokens_bkd, frames, strict=True)])

    def _summary(self, vectors: np.ndarray) -> Tensor:
        """Vectors [M, R, C, 2], NaN where not known -> [3·G·G]: mean speed, right and down of each place."""
        known = np.isfinite(vectors).all(-1)
        moved = np.where(known[..., None], vectors, 0)
        values = np.concatenate([np.linalg.norm(moved, axis=-1, keepdims=True), moved], axis=-1).sum(axis=0)
        sums = _pooled(values, self.config.places)
        counts = _pooled(known.sum(axis=0)[..., None].astype(np.float64), self.config.places)
        return torch.from_numpy((sums / np.maximum(counts, 1)).astype(np.float32)).flatten()


def _pooled(cells_rcx: np.ndarray, places: int) -> np.ndarray:
    """[R, C, X] -> [G, G, X]: sums of the cells whose middle is in each place."""
    rows, columns, kinds = cells_rcx.shape
    sums = np.zeros((places, places, kinds))
    row, column = ((np.arange(n) + 0.5) * places // n for n in (rows, columns))
    np.add.at(sums, (row[:, None].astype(int), column[None].astype(int)), cells_rcx)
    return sums
