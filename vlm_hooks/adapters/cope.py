"""CoPE-VideoLM: key frames as the host sees them, and a few Δ-tokens for each fused P-frame between them.

Sarkar et al., "CoPE-VideoLM: Codec Primitives for Efficient Video Language Models" (2026). The stream is interleaved in
the order of time (Eq. 8): a key frame's M tokens, then N Δ-tokens of each P-frame until the next key frame. The
Δ-encoder is in cope_encoder.py, its pre-training in cope_pretraining.py. What the paper leaves open, or cannot all
hold, stands beside the settings (CoPEConfig). Further:

- Δ-tokens have the language model's width and stand beside the tokens that leave the host's merger. The paper's
  lie beside its tower's tokens, before a projector of one token each; Qwen's mergers join four, which Δ-tokens are not.
- A Δ-token has no place in the frame: its cell is the whole frame, over a part of the time since the step before.

Legend: B clips, P P-frames of a clip, R × C motion cells, H × W pixels, K tokens of one, D the host's hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from vdm_priors.grid import TokenGrid
from vlm_hooks.adapters import base
from vlm_hooks.adapters.base import AdapterOutput, HostShape, Segment
from vlm_hooks.adapters.cope_encoder import CoPEConfig, DeltaEncoder
from vlm_hooks.adapters.cope_pretraining import Pretraining
from vlm_hooks.adapters.inputs import MotionClip
from vlm_hooks.adapters.motion_tensors import error_tensor, padded, steps_of, vector_tensor
from vlm_hooks.streams import FrameTokens


class Adapter(base.Adapter):
    """See the module. Takes MotionClips with residuals."""

    NAME = "cope"
    Config = CoPEConfig
    INPUTS = ("cope_vectors", "cope_errors", "cope_known")
    OBJECTIVES = {"pretraining": Pretraining}

    def __init__(self, config: CoPEConfig, host: HostShape) -> None:
        super().__init__(config, host)
        self.delta = DeltaEncoder(config, host.hidden)

    def plan(self, clip: MotionClip, shape: tuple[int, int, int]) -> list[Segment]:
        """Each key frame, then its P-frames; a P-frame lies at the time at which it is shown."""
        _, rows, columns = shape
        segments = []
        for span, key, motion in zip(clip.spans, clip.times, clip.motion, strict=True):
            segments.append(Segment(TokenGrid.regular([span], rows, columns, clip.box), (key,)))
            before = key
            for time in motion.times.tolist():
                segments.append(Segment.of_motion((before, time), self.config.tokens, time, clip.box))
                before = time
        return segments

    def inputs(self, clips: Sequence[MotionClip]) -> dict[str, Tensor]:
        """cope_vectors [B, P, R, C, 3] (right, down, valid), cope_errors [B, P, 3, H, W] float16 in −1..1, cope_known
        [B, P] bool: the P-frames that there are. Vectors are shares of the frame, or of the clip's largest one."""
        parts = [zip(*(steps_of(clip, motion) for motion in clip.motion), strict=True) for clip in clips]
        vectors, errors = zip(*([np.concatenate(arrays) for arrays in clip] for clip in parts), strict=True)
        tensors = [vector_tensor(fields) for fields in vectors]
        for fields in tensors:
            largest = fields[..., :2].abs().amax().clamp(min=1e-6) if fields.numel() else torch.tensor(1.0)
            fields[..., :2] /= largest if self.config.normalise == "clip" else self.config.largest
        values, known = padded(tensors)
        return {
            "cope_vectors": values,
            "cope_errors": padded([error_tensor(e) for e in errors])[0],
            "cope_known": known,
        }

    def without_motion(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Nothing moves and nothing changes, as far as it was known: vectors and errors are 0."""
        still = inputs["cope_vectors"].clone()
        still[..., :2] = 0
        return {**inputs, "cope_vectors": still, "cope_errors": torch.zeros_like(inputs["cope_errors"])}

    def forward(
        self, frames: list[FrameTokens], cope_vectors: Tensor, cope_errors: Tensor, cope_known: Tensor
    ) -> AdapterOutput:
        counts = cope_known.sum(1).tolist()
        if not sum(counts):
            return AdapterOutput(frames, [clip.tokens.new_zeros(0, self.host.hidden) for clip in frames])
        tokens = self.delta(cope_vectors[cope_known], cope_errors[cope_known])
        return AdapterOutput(frames, [own.flatten(0, 1) for own in tokens.split(counts)])

    def parts(self) -> dict[str, list[nn.Parameter]]:
        motion = [p for name, p in self.delta.named_parameters() if name.startswith("motion")]
        residual = [p for name, p in self.delta.named_parameters() if not name.startswith("motion")]
        return {"motion": motion, "residual": residual}
