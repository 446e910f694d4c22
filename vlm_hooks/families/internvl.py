"""InternVL3 and InternVL3.5 in transformers' own classes (the `-hf` checkpoints).

    Frame1: <img><IMG_CONTEXT>…</img>
    Frame2: <img><IMG_CONTEXT>…</img>

Every frame is resized to the tower's square without regard to its aspect ratio, never cropped or tiled, and gives a
fixed number of tokens, row by row: 16×16 for 448 pixels, patches of 14 and a pixel shuffle that joins 2×2. Images have
the same token, and the processor returns no grid: a video is found by its frames' numbers. (Images that a text numbers
as "Frame1: …" are a video to the model, and here.)

The processor stacks the clips of a batch and fails where their frames are not equally many; such a batch is made of one
sample each and joined here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vdm_priors.errors import SampleError
from vlm_hooks import student
from vlm_hooks.frame_groups import attend_in_groups
from vlm_hooks.streams import FrameMarks, FrameTokens, check_divisible
from vlm_hooks.videos import Video, clips_of

MODEL_TYPES = ("internvl",)
ORIGINALS = ("internvl_chat", "InternVLChatModel")
FRAME_NUMBER = re.compile(r"Frame(\d+): $")
LABEL_TOKENS = 24  # at most, of "\nFrame123: " in any vocabulary; more are not read


class Student(student.Student):
    """An InternVL model with its processor."""

    VISION = "vision_tower"
    PATCH_EMBEDDING = "model.vision_tower.embeddings"
    MERGERS = ("multi_modal_projector",)
    PIXELS = ("pixel_values",)

    def videos(self, inputs: dict[str, Tensor]) -> list[list[Video]]:
        """See the base class. A video is a row of blocks of one frame's tokens, numbered from 1 on."""
        side = math.isqrt(self.processor.image_seq_length)
        batch = []
        for ids in inputs["input_ids"].cpu():
            videos: list[list[Tensor]] = []  # positions of every frame
            follows = False  # whether the block before is a frame
            before = 0  # first position after the block before
            for block in _runs(ids == self.processor.image_token_id):
                start = int(block[0]) - 1  # of <img>
                text = self.tokenizer.decode(ids[max(before, start - LABEL_TOKENS) : start])
                number = FRAME_NUMBER.search(text)
                frame = int(number[1]) if number and len(block) == self.processor.image_seq_length else None
                if frame == 1:
                    videos.append([block])
                elif follows and frame == len(videos[-1]) + 1 and text == f"\nFrame{frame}: ":
                    videos[-1].append(block)
                else:
                    frame = None
                follows, before = frame is not None, int(block[-1]) + 2
            batch.append([Video(torch.cat(blocks), (len(blocks), side, side)) for blocks in videos])
        return batch

    def num_video_tokens(self, frames: int, height: int, width: int, times: Sequence[float] | None = None) -> int:
        written = [f"Frame{number + 1}: " for number in range(frames)]
        marks = sum(len(ids) + 2 for ids in self.tokenizer(written)["input_ids"])  # with <img> and </img>
        lines = (frames - 1) * len(self.tokenizer("\n")["input_ids"])
        return frames * self.processor.image_seq_length + marks + lines

    def same_in_both(self) -> list[tuple[str, Any, Any]]:
        config, video = self.model.config, self.processor.video_processor
        (height, width), (patch_height, patch_width) = config.vision_config.image_size, config.vision_config.patch_size
        rows, columns = (int(side * config.downsample_ratio) for side in (height // patch_height, width // patch_width))
        return [
            ("a square of tokens", True, rows == columns),
            ("tokens a frame", rows * columns, self.processor.image_seq_length),
            ("image_token_id", config.image_token_id, self.processor.image_token_id),
            ("image_size", (height, width), (video.size["height"], video.size["width"])),
            ("do_resize", True, bool(video.do_resize)),
            ("do_center_crop", False, bool(video.do_center_crop)),
        ]

    # ---- streams ------------------------------------------------------------------------------

    @property
    def frame_token(self) -> str:
        return self.processor.image_token

    def frame_marks(self, number: int, time: float, count: int) -> FrameMarks:
        return FrameMarks(f"Frame{number}: ", self.processor.start_image_token,
                          self.processor.end_image_token + ("\n" if number < count else ""))

    def frame_shapes(self, pixels: dict[str, Tensor], counts: Sequence[int]) -> list[tuple[int, int, int]]:
        side = math.isqrt(self.processor.image_seq_length)
        return [(count, side, side) for count in counts]

    def frame_tokens(self, pixels: dict[str, Tensor], counts: Sequence[int], group: int = 1) -> list[FrameTokens]:
        check_divisible(counts, group)
        tokens = self.model.get_image_features(pixels["pixel_values"], return_dict=True).pooler_output
        side = math.isqrt(self.processor.image_seq_length)
        return [FrameTokens(clip.unflatten(1, (side, side))) for clip in tokens.split(list(counts))]

    def rows_of_patches(self, pixels: dict[str, Tensor], counts: Sequence[int]) -> Tensor:
        return torch.cat([torch.arange(count) for count in counts])

    def prepare_groups(self, group: int) -> None:
        attend_in_groups(self.model, group)

    def encoder_outputs(self, tokens: Sequence[FrameTokens]) -> dict[str, Any]:
        flat = torch.cat([clip.tokens.flatten(1, 2) for clip in tokens])
        return {"image": BaseModelOutputWithPooling(pooler_output=flat)}

    def _process(
        self, texts: list[str], shown: Sequence[Sequence[Any]], names: Sequence[str], padding_side: str
    ) -> dict[str, Any]:
        counts = [{len(clip.frames) for clip in clips_of(media)} for media in shown]
        if len(set().union(*counts)) == 1:
            return super()._process(texts, shown, names, padding_side)
        for name, several in zip(names, counts, strict=True):
            if len(several) > 1:
                raise SampleError(
                    f"InternVL's processor takes the videos of a sample with equally many frames only, but those of "
                    f"{name} have {', '.join(map(str, sorted(several)))}. Sample a fixed number of frames "
                    "(sampling.frames without sampling.fps)."
                )
        alone = super()._process
        samples = zip(texts, shown, names, strict=True)
        parts = [alone([text], [media], [name], padding_side) for text, media, name in samples]
        length = max(part["input_ids"].shape[1] for part in parts)
        fill = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "offset_mapping": 0}
        joined: dict[str, Any] = {}
        for name in parts[0]:
            values = [part[name] for part in parts]
            if name in fill:
                values = [_pad(value, length, fill[name], padding_side) for value in values]
            joined[name] = torch.cat(values) if isinstance(values[0], Tensor) else sum(values, [])
        return joined


def stock_checkpoint(name: str) -> str:
    """OpenGVLab/InternVL3-8B -> OpenGVLab/InternVL3-8B-hf; those of 3.5 end in -HF."""
    model = name.rstrip("/").split("/")[-1]
    if not model.startswith("InternVL3"):
        return "an InternVL3 checkpoint whose name ends in -hf, like OpenGVLab/InternVL3-8B-hf"
    return f"OpenGVLab/{model}{'-HF' if model.startswith('InternVL3_5') else '-hf'}"


def _runs(mask_s: Tensor) -> list[Tensor]:
    """Positions of each run of True."""
    positions = mask_s.nonzero()[:, 0]
    breaks = (positions.diff() > 1).nonzero()[:, 0] + 1
    return [run for run in positions.tensor_split(breaks.tolist()) if len(run)]


def _pad(value: Tensor, length: int, fill: int, side: str) -> Tensor:
    """[1, S, …] made [1, length, …] on one side."""
    padding = value.new_full((1, length - value.shape[1], *value.shape[2:]), fill)
    return torch.cat([value, padding] if side == "right" else [padding, value], dim=1)
