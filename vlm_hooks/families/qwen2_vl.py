"""Qwen2-VL: one contiguous run of <|video_pad|> tokens a video, frame by frame, then row by row.

The processor cuts frames into patches, two frames deep (an odd last frame is repeated), and the merger joins 2×2
patches to one visual token: video_grid_thw (t, h, w) gives t × h/2 × w/2 tokens. The frame is resized, never cropped,
so the tokens tile the clip's whole box.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vdm_priors.errors import ModelError
from vlm_hooks import student
from vlm_hooks.mrope import timed_positions
from vlm_hooks.streams import FrameTokens, StreamPlaces, check_divisible
from vlm_hooks.videos import Video

MODEL_TYPES = ("qwen2_vl",)


class Student(student.Student):
    """A Qwen2-VL model with its processor."""

    VISION = "visual"
    MERGERS = ("merger",)
    PATCH_EMBEDDING = "model.visual.patch_embed"
    PIXELS = ("pixel_values_videos", "video_grid_thw")
    SIZE_KNOB = ', or the video processor\'s size["longest_edge"]'

    def videos(self, inputs: dict[str, Tensor]) -> list[list[Video]]:
        """See the base class. The grids come in the order of the batch, and a run may hold several videos."""
        merge = self.model.config.vision_config.spatial_merge_size
        grids = inputs["video_grid_thw"].tolist() if "video_grid_thw" in inputs else []
        shapes = [(frames, height // merge, width // merge) for frames, height, width in grids]
        videos: list[list[Video]] = []
        for ids in inputs["input_ids"].cpu():
            positions = (ids == self.model.config.video_token_id).nonzero()[:, 0]
            videos.append([])
            while len(positions) and shapes:
                frames, rows, columns = shapes.pop(0)
                count = frames * rows * columns
                videos[-1].append(Video(positions[:count], (frames, rows, columns)))
                positions = positions[count:]
            if len(positions):
                raise ModelError(
                    f"{len(positions)} visual tokens belong to no entry of video_grid_thw: a batch needs both whole."
                )
        return videos

    def frames_per_token(self) -> int:
        return self.processor.video_processor.temporal_patch_size

    def num_video_tokens(self, frames: int, height: int, width: int, times: Sequence[float] | None = None) -> int:
        patches = self.processor.video_processor.get_num_of_video_patches(frames, height, width, {})
        return patches // self.processor.video_processor.merge_size**2

    def processor_settings(self, clips: Sequence[Any]) -> dict[str, Any]:
        settings = super().processor_settings(clips)
        settings["return_mm_token_type_ids"] = True  # without them M-RoPE silently becomes 1-D
        if getattr(self.processor.video_processor, "cap_pixels_per_frame", False) is None:
            # pinned: transformers is about to change what leaving it open means
            settings["cap_pixels_per_frame"] = False
        return settings

    def same_in_both(self) -> list[tuple[str, Any, Any]]:
        vision, video = self.model.config.vision_config, self.processor.video_processor
        return [
            ("patch_size", vision.patch_size, video.patch_size),
            ("temporal_patch_size", vision.temporal_patch_size, video.temporal_patch_size),
            ("spatial_merge_size", vision.spatial_merge_size, video.merge_size),
            ("video_token_id", self.model.config.video_token_id, self.processor.video_token_id),
        ]

    # ---- streams ------------------------------------------------------------------------------

    def frame_shapes(self, pixels: dict[str, Tensor], counts: Sequence[int]) -> list[tuple[int, int, int]]:
        merge = self.model.config.vision_config.spatial_merge_size
        grids = pixels["video_grid_thw"].tolist()
        return [(frames, height // merge, width // merge) for frames, height, width in grids]

    def frame_tokens(self, pixels: dict[str, Tensor], counts: Sequence[int], group: int = 1) -> list[FrameTokens]:
        """See the base class. Of Qwen2.5-VL's tower, the blocks with full attention see the group; those with windows
        keep to the windows of their frame."""
        grid = pixels["video_grid_thw"]
        check_divisible(grid[:, 0].tolist(), group)
        extra = {}
        if group > 1:
            grids = grid.tolist()
            lengths = [height * width * group for frames, height, width in grids for _ in range(frames // group)]
            ends = torch.tensor([0, *lengths], device=grid.device).cumsum(0)
            extra["video_cu_seqlens"] = ends.to(torch.int32)  # as the tower's own
        output = self.model.get_video_features(pixels["pixel_values_videos"], grid, return_dict=True, **extra)
        shapes = self.frame_shapes(pixels, counts)
        deep = getattr(output, "deepstack_features", None) or ()
        return [FrameTokens(tokens.view(*shape, -1), tuple(layer[clip].view(*shape, -1) for layer in deep))
                for clip, (tokens, shape) in enumerate(zip(output.pooler_output, shapes, strict=True))]

    @property
    def vision_width(self) -> int:
        vision = self.model.config.vision_config
        return getattr(vision, "embed_dim", vision.hidden_size)  # Qwen2-VL's hidden_size is the language model's

    def rows_of_patches(self, pixels: dict[str, Tensor], counts: Sequence[int]) -> Tensor:
        return torch.cat([torch.arange(frames).repeat_interleave(height * width)
                          for frames, height, width in pixels["video_grid_thw"].tolist()])

    def encoder_outputs(self, tokens: Sequence[FrameTokens]) -> dict[str, Any]:
        flat = tuple(clip.tokens.flatten(0, 2) for clip in tokens)
        return {"video": BaseModelOutputWithPooling(pooler_output=flat)}

    def stream_positions(self, places: StreamPlaces) -> Tensor:
        """See the base class. Qwen2-VL counts frames: the step of its temporal axis is the stream's mean step in time."""
        frames = places.time[places.visual].unique()
        step = float(frames.max()) / (len(frames) - 1) if len(frames) > 1 else 1.0
        return timed_positions(places, lambda seconds: (seconds / step).round().long())

    def keep_positions(self, positions: Tensor, attention_mask: Tensor) -> None:
        lengths = attention_mask.sum(dim=1, keepdim=True)
        last = positions.masked_fill(attention_mask[None] == 0, -1).amax(dim=(0, 2))
        self.model.model.rope_deltas = last[:, None] + 1 - lengths
