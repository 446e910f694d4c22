"""HY-Himmel: K anchors as the host sees them, and motion tokens for every interval between two of them.

Jin et al., "HY-Himmel Technical Report: Hierarchical Interleaved Multi-stream Motion Encoding for Long Video
Understanding" (2026). An interval's motion vectors, residuals and small anchor picture are encoded and fused
(himmel_encoder.py), brought into the host's visual space by Stage 1 (himmel_alignment.py), and stand at
`<|motion_pad|>` after their anchor, put there out of place. What the paper leaves open stands beside the settings
(HimmelConfig). Further:

- Anchors are evenly spaced with the first and the last picture among them, so that every interval lies between two, as
  Stage 1's target needs: K − 1 intervals. An interval of which no motion is known has its tokens all the same.
- A token has the cell of its place in the coarse grid, over the interval's time; it lies at the interval's middle.

Legend: B clips, J intervals of a clip, L steps, R × C motion cells, H × W pixels, P tokens of an interval, D the host's
hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vdm_priors.grid import TokenGrid
from vlm_hooks.adapters import base
from vlm_hooks.adapters.base import AdapterOutput, HostShape, Segment
from vlm_hooks.adapters.himmel_alignment import Alignment, AlignmentHead
from vlm_hooks.adapters.himmel_encoder import HimmelConfig, TriStreamEncoder
from vlm_hooks.adapters.inputs import MotionClip
from vlm_hooks.adapters.motion_tensors import error_tensor, padded, steps_of, vector_tensor
from vlm_hooks.streams import FrameTokens


class Adapter(base.Adapter):
    """See the module. Takes MotionClips whose key frames are the anchors, with residuals."""

    NAME = "himmel"
    Config = HimmelConfig
    INPUTS = ("himmel_vectors", "himmel_errors", "himmel_context", "himmel_steps", "himmel_intervals")
    OBJECTIVES = {"alignment": Alignment}

    def __init__(self, config: HimmelConfig, host: HostShape) -> None:
        super().__init__(config, host)
        self.encoder = TriStreamEncoder(config)
        self.projector = AlignmentHead(config.width, host.hidden)  # Stage 1's head: it goes on as the projector

    def plan(self, clip: MotionClip, shape: tuple[int, int, int]) -> list[Segment]:
        """Anchors and intervals as `placement` has them. Intervals before all anchors or behind them cannot lie at
        their time on the host's axis, on which order is time: they lie at the first or the last anchor's."""
        _, rows, columns = shape
        c, segments, motion = self.config, [], []
        for n, (span, time) in enumerate(zip(clip.spans, clip.times, strict=True)):
            segments.append(Segment(TokenGrid.regular([span], rows, columns, clip.box), (time,)))
            if n + 1 < len(clip.times):
                at = {"anchor": sum(span) / 2, "prefix": clip.times[0], "suffix": clip.times[-1]}[c.placement]
                motion.append(Segment(TokenGrid.regular([span], c.rows, c.columns, clip.box), (at,), moving=True))
        if c.placement == "prefix":
            return motion + segments
        if c.placement == "suffix":
            return segments + motion
        return [part for pair in zip(segments, [*motion, None], strict=True) for part in pair if part is not None]

    def inputs(self, clips: Sequence[MotionClip]) -> dict[str, Tensor]:
        """himmel_vectors [B, J, L, R, C, 3] (right and down as shares of `largest`, valid), himmel_errors
        [B, J, L, 3, H, W] float16 in −1..1, himmel_context [B, J, 3, h, h] in −1..1; himmel_steps [B, J, L] and
        himmel_intervals [B, J] bool: those that there are."""
        most = max(1, *(min(len(motion.times), self.config.steps) for clip in clips for motion in clip.motion))
        tensors = [padded(parts) for parts in zip(*(self._intervals(clip, most) for clip in clips), strict=True)]
        return dict(zip(self.INPUTS, [*(values for values, _ in tensors), tensors[0][1]], strict=True))

    def _intervals(self, clip: MotionClip, most: int) -> tuple[Tensor, ...]:
        """Vectors, errors, context and known steps of a clip's intervals. The last anchor has none."""
        steps = zip(*(self._steps(*steps_of(clip, motion), most) for motion in clip.motion), strict=True)
        vectors, errors, known = (torch.stack(part)[:-1] for part in steps)
        return vectors, errors, self._context(clip.frames)[:-1], known

    def _steps(self, vectors: np.ndarray, residuals: np.ndarray, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """An interval's vectors [L, R, C, 3], errors [L, 3, H, W] and what of them there is [L], L = most."""
        count = min(len(vectors), most)
        kept = np.linspace(0, len(vectors) - 1, count).round().astype(int)
        vectors, errors = vector_tensor(vectors[kept]), error_tensor(residuals[kept])
        vectors[..., :2] /= self.config.largest
        rest = (0, 0) * 3 + (0, most - count)
        return F.pad(vectors, rest), F.pad(errors, rest), torch.arange(most) < count

    def _context(self, frames: np.ndarray) -> Tensor:
        size = (self.config.context, self.config.context)
        pictures = torch.from_numpy(np.ascontiguousarray(frames)).movedim(3, 1).float() / 127.5 - 1
        return F.interpolate(pictures, size, mode="area")

    def without_motion(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Nothing moves and nothing changes, as far as it was known; the context stays, for it is no motion."""
        still = inputs["himmel_vectors"].clone()
        still[..., :2] = 0
        return {**inputs, "himmel_vectors": still, "himmel_errors": torch.zeros_like(inputs["himmel_errors"])}

    def encode(
        self,
        himmel_vectors: Tensor,
        himmel_errors: Tensor,
        himmel_context: Tensor,
        himmel_steps: Tensor,
        himmel_intervals: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """`TriStreamEncoder.forward` of all intervals of the batch, clip by clip."""
        there = himmel_intervals
        return self.encoder(himmel_vectors[there], himmel_errors[there], himmel_context[there], himmel_steps[there])

    def forward(self, frames: list[FrameTokens], himmel_intervals: Tensor, **inputs: Tensor) -> AdapterOutput:
        counts = himmel_intervals.sum(1).tolist()
        if not sum(counts):
            return AdapterOutput(frames, [clip.tokens.new_zeros(0, self.host.hidden) for clip in frames])
        fused, _, _ = self.encode(**inputs, himmel_intervals=himmel_intervals)
        return AdapterOutput(frames, [own.flatten(0, 1) for own in self.projector(fused).split(counts)])

    def gates(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """How much each stream has to say: [B, J] for every stream, adding up to 1; NaN where there is no interval.

        inputs: a batch that has this adapter's. Empty for fusions without shares (mlp, concat).
        """
        there = inputs["himmel_intervals"]
        with torch.no_grad():
            _, _, shares = self.encode(**{name: inputs[name] for name in self.INPUTS})
        nothing = torch.full(there.shape, float("nan"), device=there.device)
        return {s: nothing.masked_scatter(there, share.float()) for s, share in shares.items()}

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {"motion": list(self.encoder.parameters()), "projector": list(self.projector.parameters())}
