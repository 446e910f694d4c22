"""LLaVA-OneVision: one run of <video> tokens a video, frame by frame, row by row, and a newline token at the end.

Every frame is resized to the tower's square (384 pixels) without regard to its aspect ratio, never cropped or tiled.
Patches of 14 pixels fill only 378 of the 384: the tower does not see the last 6 pixels on the right and at the bottom,
and neither does the grid. The 27×27 patches are pooled to 14×14 tokens (bilinearly: a token reads the two patches
nearest to the middle of its cell in each direction). The newline token comes once a video, and has no cell.

The model holds a batch's videos in one tensor: their frames must be equally many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vdm_priors.errors import SampleError
from vlm_hooks import student
from vlm_hooks.frame_groups import attend_in_groups
from vlm_hooks.streams import FrameTokens, check_divisible
from vlm_hooks.videos import Video, clips_of

MODEL_TYPES = ("llava_onevision",)
ORIGINALS = ("LlavaQwenForCausalLM",)
NEWLINE = 1


class Student(student.Student):
    """A LLaVA-OneVision model with its processor."""

    VISION = "vision_tower"
    PATCH_EMBEDDING = "model.vision_tower.embeddings"
    MERGERS = ("multi_modal_projector", "image_newline")
    STREAM_END = "<video>"

    def videos(self, inputs: dict[str, Tensor]) -> list[list[Video]]:
        """See the base class. All videos of a batch have as many frames."""
        pixels = inputs.get("pixel_values_videos")
        batch = []
        for ids in inputs["input_ids"].cpu():
            positions = (ids == self.model.config.video_token_id).nonzero()[:, 0]
            videos = []
            if len(positions):
                shape = (pixels.shape[1], self._side(), self._side())
                runs = positions.split(math.prod(shape) + NEWLINE)
                videos = [Video(run[:-NEWLINE], shape) for run in runs]
            batch.append(videos)
        return batch

    def num_video_tokens(self, frames: int, height: int, width: int, times: Sequence[float] | None = None) -> int:
        return frames * self._side() ** 2 + NEWLINE

    def covered_box(self, box: Sequence[float]) -> tuple[float, float, float, float]:
        vision = self.model.config.vision_config
        share = vision.image_size // vision.patch_size * vision.patch_size / vision.image_size
        top, left, bottom, right = box
        return top, left, top + share * (bottom - top), left + share * (right - left)

    def same_in_both(self) -> list[tuple[str, Any, Any]]:
        config, video = self.model.config, self.processor.video_processor
        size = config.vision_config.image_size
        return [
            ("patches a frame", (size // config.vision_config.patch_size) ** 2, self.processor.num_image_tokens),
            ("video_token_id", config.video_token_id, self.processor.video_token_id),
            ("image_size", (size, size), (video.size["height"], video.size["width"])),
            ("do_resize", True, bool(video.do_resize)),
            ("do_center_crop", False, bool(video.do_center_crop)),
        ]

    # ---- streams ------------------------------------------------------------------------------

    def frame_shapes(self, pixels: dict[str, Tensor], counts: Sequence[int]) -> list[tuple[int, int, int]]:
        return [(count, self._side(), self._side()) for count in counts]

    def frame_tokens(self, pixels: dict[str, Tensor], counts: Sequence[int], group: int = 1) -> list[FrameTokens]:
        check_divisible(counts, group)
        output = self.model.get_video_features(pixels["pixel_values_videos"], return_dict=True)
        shape = (counts[0], self._side(), self._side())  # the same for all clips of a batch
        return [FrameTokens(clip[:-NEWLINE].unflatten(0, shape)) for clip in output.pooler_output]

    def rows_of_patches(self, pixels: dict[str, Tensor], counts: Sequence[int]) -> Tensor:
        return torch.cat([torch.arange(count) for count in counts])

    def prepare_groups(self, group: int) -> None:
        attend_in_groups(self.model, group)

    def encoder_outputs(self, tokens: Sequence[FrameTokens]) -> dict[str, Any]:
        newline = self.model.model.image_newline[None]
        clips = [torch.cat([clip.tokens.flatten(0, 2), newline.to(clip.tokens)]) for clip in tokens]
        return {"video": BaseModelOutputWithPooling(pooler_output=torch.stack(clips))}

    def _side(self) -> int:
        """Rows, and columns, of a frame's tokens."""
        return math.ceil(math.isqrt(self.processor.num_image_tokens) / 2)

    def _process(
        self, texts: list[str], shown: Sequence[Sequence[Any]], names: Sequence[str], padding_side: str
    ) -> dict[str, Any]:
        clips = [(name, clip) for name, media in zip(names, shown, strict=True) for clip in clips_of(media)]
        counts = [len(clip.frames) for _, clip in clips]
        if len(set(counts)) > 1:
            listed = ", ".join(f"{name}: {len(clip.frames)}" for name, clip in clips)
            raise SampleError(
                f"LLaVA-OneVision takes batches of equally many frames only, but these clips have {listed}. Sample a "
                "fixed number of frames (sampling.frames without sampling.fps), or use batches of one."
            )
        return super()._process(texts, shown, names, padding_side)


def stock_checkpoint(name: str) -> str:
    """lmms-lab/llava-onevision-qwen2-7b-ov -> llava-hf/llava-onevision-qwen2-7b-ov-hf."""
    model = name.rstrip("/").split("/")[-1]
    return f"llava-hf/{model if model.startswith('llava-onevision') else 'llava-onevision-qwen2-7b-ov'}-hf"
