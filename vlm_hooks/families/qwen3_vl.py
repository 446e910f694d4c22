"""Qwen3-VL: a group of <|video_pad|> tokens for every two frames, with their time before it.

    <0.3 seconds><|vision_start|>…<|vision_end|><1.3 seconds><|vision_start|>…<|vision_end|>…

So a video's tokens are not contiguous, and images or other videos may stand between two videos but never inside one.
The rest is Qwen2-VL's geometry: frames in pairs (an odd last frame is repeated), 2×2 patches a token, resized and never
cropped.

What is pinned, because the processor would do otherwise: it samples 2 frames a second by default, and takes frames
without known times for 24 a second. The times it writes are the mean of each pair's and are given to it in
milliseconds. It refuses a lone frame, which is therefore given twice. The stock chat template puts <|vision_start|>,
<|vision_end|> around the whole video as well; they are left as stock transformers leaves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm_hooks.families import qwen2_vl
from vlm_hooks.mrope import block_positions
from vlm_hooks.streams import FrameMarks, FrameTokens, StreamPlaces

MODEL_TYPES = ("qwen3_vl",)
PER_SECOND = 1000  # the processor's "frames" are milliseconds, so that uneven times stay what they are
LONGEST = 999.0  # seconds; three digits before the point


@dataclass
class DeepOutput(BaseModelOutputWithPooling):
    """A tower's output with tokens for the decoder's first layers: a list of clips' [tokens, D] for each layer."""

    deepstack_features: list[list[Tensor]] | None = None


class Student(qwen2_vl.Student):
    """A Qwen3-VL model with its processor."""

    MERGERS = ("merger", "deepstack_merger_list")

    def num_video_tokens(self, frames: int, height: int, width: int, times: Sequence[float] | None = None) -> int:
        depth = self.frames_per_token()
        times = [LONGEST] * frames if times is None else times
        pairs = [times[first : first + depth] for first in range(0, len(times), depth)]
        written = [f"<{(pair[0] + pair[-1]) / 2:.1f} seconds>" for pair in pairs]
        marks = sum(len(ids) + 2 for ids in self.tokenizer(written)["input_ids"])  # with vision_start and vision_end
        return super().num_video_tokens(max(frames, 2), height, width) + marks

    def processor_settings(self, clips: Sequence[Any]) -> dict[str, Any]:
        settings = super().processor_settings(clips)
        videos = (np.repeat(clip.frames, 2, axis=0) if len(clip.frames) == 1 else clip.frames for clip in clips)
        settings["videos"] = list(videos)
        return settings

    def _metadata(self, clip: Any) -> dict[str, Any]:
        milliseconds = [round(PER_SECOND * time) for time in clip.times]
        if len(milliseconds) == 1:
            milliseconds *= 2
        return {"total_num_frames": len(milliseconds), "fps": PER_SECOND, "frames_indices": milliseconds,
                "duration": clip.duration}

    def frame_marks(self, number: int, time: float, count: int) -> FrameMarks:
        return FrameMarks(f"<{time:.1f} seconds>", "<|vision_start|>", "<|vision_end|>")

    def encoder_outputs(self, tokens: Sequence[FrameTokens]) -> dict[str, Any]:
        output = super().encoder_outputs(tokens)["video"]
        layers = zip(*(clip.deep for clip in tokens), strict=True)
        deep = [[clip.flatten(0, 2) for clip in layer] for layer in layers]
        return {"video": DeepOutput(pooler_output=output.pooler_output, deepstack_features=deep)}

    def stream_positions(self, places: StreamPlaces) -> Tensor:
        """See the base class. Time is told in text before each frame."""
        return block_positions(places)
