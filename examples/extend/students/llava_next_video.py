"""LLaVA-NeXT-Video: one run of <video> tokens a video, frame by frame, row by row, every 2×2 patches pooled to a token.

Its processor cuts the middle square out of every frame. What lies beside it could never be asked about, nor aligned to a
prior that sees it, so here frames are resized whole to the tower's square instead (`processor_settings`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm_hooks import student
from vlm_hooks.frame_groups import attend_in_groups
from vlm_hooks.streams import FrameTokens, check_divisible
from vlm_hooks.videos import Video

MODEL_TYPES = ("llava_next_video",)


class Student(student.Student):
    """A LLaVA-NeXT-Video model with its processor."""

    VISION = "vision_tower"
    PATCH_EMBEDDING = "model.vision_tower.embeddings"
    MERGERS = ("multi_modal_projector",)

    # ---- where a video's tokens are -----------------------------------------------------------

    def videos(self, inputs: dict[str, Tensor]) -> list[list[Video]]:
        """See the base class. All videos of a batch have as many frames, since one tensor holds them."""
        pixels = inputs.get("pixel_values_videos")
        batch = []
        for ids in inputs["input_ids"].cpu():
            positions = (ids == self.model.config.video_token_id).nonzero()[:, 0]
            shape = (pixels.shape[1], self._side(), self._side()) if len(positions) else (0, 0, 0)
            batch.append([Video(run, shape) for run in positions.split(max(1, shape[0] * shape[1] * shape[2]))]
                         if len(positions) else [])
        return batch

    def num_video_tokens(self, frames: int, height: int, width: int, times: Sequence[float] | None = None) -> int:
        return frames * self._side() ** 2

    def processor_settings(self, clips: Sequence[Any]) -> dict[str, Any]:
        side = self.model.config.vision_config.image_size
        return {**super().processor_settings(clips), "do_center_crop": False, "size": {"height": side, "width": side}}

    def same_in_both(self) -> list[tuple[str, Any, Any]]:
        config = self.model.config
        return [
            ("patch_size", config.vision_config.patch_size, self.processor.patch_size),
            ("video_token_id", config.video_token_id, self.processor.video_token_id),
        ]

    # ---- what codec adapters need -------------------------------------------------------------

    def frame_shapes(self, pixels: dict[str, Tensor], counts: Sequence[int]) -> list[tuple[int, int, int]]:
        return [(count, self._side(), self._side()) for count in counts]

    def frame_tokens(self, pixels: dict[str, Tensor], counts: Sequence[int], group: int = 1) -> list[FrameTokens]:
        check_divisible(counts, group)
        output = self.model.get_video_features(pixels["pixel_values_videos"], return_dict=True)
        return [FrameTokens(clip.unflatten(0, (counts[0], self._side(), self._side()))) for clip in output.pooler_output]

    def rows_of_patches(self, pixels: dict[str, Tensor], counts: Sequence[int]) -> Tensor:
        return torch.cat([torch.arange(count) for count in counts])

    def prepare_groups(self, group: int) -> None:
        attend_in_groups(self.model, group)

    def encoder_outputs(self, tokens: Sequence[FrameTokens]) -> dict[str, Any]:
        return {"video": BaseModelOutputWithPooling(pooler_output=torch.stack([clip.tokens.flatten(0, 2) for clip in tokens]))}

    def _side(self) -> int:
        """Rows, and columns, of a frame's tokens."""
        config = self.model.config
        return config.vision_config.image_size // config.vision_config.patch_size // config.spatial_pool_stride
