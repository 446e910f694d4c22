"""Qwen2.5-VL: one contiguous run of <|video_pad|> tokens, t-major then row-major.

The processor cuts frames into patches, two frames deep (an odd last frame is repeated), and
the merger joins 2×2 patches to one visual token: video_grid_thw (t, h, w) gives t × h/2 × w/2
tokens. The frame is resized, never cropped, so the tokens tile the clip's whole box.

Legend: B samples, N frames, S sequence positions, F×H×W visual tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from vdm_priors.errors import ModelError, SampleError
from vdm_priors.grid import TokenGrid, frame_spans, merge_spans

MODEL_TYPES = ("qwen2_5_vl",)
PARTS = ("vision", "merger", "llm")
IGNORED = -100  # label of positions that are not learnt
LETTER_REQUEST = "Answer with the option's letter."
# stands for the question while the chat template is rendered; private-use characters
_PLACEHOLDER = "\ue000question\ue001"


class Prompt(NamedTuple):
    """A prompt's text, with one unexpanded video, and where its question begins."""

    text: str
    question_start: int


@dataclass(frozen=True)
class Encoding:
    """A batch for the model and where its tokens come from.

    inputs: keyword arguments of the model; texts [B]: prompt + answer + end token, with the
    video placeholder unexpanded; offsets [B][S]: each position's characters in that text,
    (0, 0) for special, visual and padding tokens; answer_starts [B]: character at which the
    answer begins (the text's length without answers).
    """

    inputs: dict[str, Tensor]
    texts: list[str]
    offsets: list[list[tuple[int, int]]]
    answer_starts: list[int]


@dataclass
class Student:
    """A Qwen2.5-VL model with its processor; `folder` is where it was loaded from."""

    model: Qwen2_5_VLForConditionalGeneration
    processor: Any
    folder: str

    @classmethod
    def load(
        cls,
        path_or_hub: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        attn: str = "sdpa",
    ) -> Student:
        """Model and processor of a folder or hub name. Raises ModelError if it is incomplete."""
        name = str(path_or_hub)
        try:
            processor = AutoProcessor.from_pretrained(name)
            model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                name, dtype=dtype, attn_implementation=attn
            )
        except (OSError, ValueError) as error:
            raise ModelError(
                f"The student model {name!r} cannot be loaded: {error} A complete folder holds "
                "config.json, model.safetensors, the tokenizer and the processor's files."
            ) from error
        student = cls(model.to(device), processor, name)
        student._check_processor()
        return student

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def end_token(self) -> str:
        """The token that ends an answer (<|im_end|>)."""
        return self.tokenizer.eos_token

    @property
    def max_length(self) -> int:
        """Longest sequence, in tokens, that the model was made for."""
        return self.model.config.text_config.max_position_embeddings

    def prompt(
        self, question: str, options: Sequence[str] | None = None, system: str | None = None
    ) -> Prompt:
        """The processor's chat prompt for one video and a question, ready for the answer.

        With options they are listed as "A. …" after the question and the letter is asked for.
        Raises SampleError if a text holds a special token, ModelError if the chat template
        changes the question.
        """
        options = options or ()
        if len(options) > 26:
            raise SampleError(
                f"The question {question[:60]!r} has {len(options)} options; letters A to Z name "
                "at most 26: drop some."
            )
        for text in (question, *options, system or ""):
            self._refuse_special_tokens(text)
        body = _PLACEHOLDER
        if options:
            lines = [f"{chr(65 + i)}. {option}" for i, option in enumerate(options)]
            body = "\n".join([_PLACEHOLDER, *lines, LETTER_REQUEST])
        content = [{"type": "video"}, {"type": "text", "text": body}]
        messages = [{"role": "user", "content": content}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        rendered = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        if rendered.count(_PLACEHOLDER) != 1 or rendered.count(self.processor.video_token) != 1:
            raise ModelError(
                f"The chat template of {self.folder!r} does not write one video and the question "
                f"once, but: {rendered.replace(_PLACEHOLDER, '{question}')!r}. Use the template "
                "of the model's own processor."
            )
        start = rendered.index(_PLACEHOLDER)
        return Prompt(rendered.replace(_PLACEHOLDER, question), start)

    def encode(
        self,
        clips: Sequence[Any],
        prompts: Sequence[str],
        answers: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        max_length: int | None = None,
        padding_side: str = "right",
        device: str | torch.device | None = None,
    ) -> Encoding:
        """A batch of B clips (frames uint8 [N, H, W, 3], times, duration), prompts, answers.

        With answers, labels are the answer's and the end token, all else is ignored. Frames
        are taken as they are, nothing is sampled and nothing is ever cut off: a sequence longer
        than `max_length` (default: the model's) raises SampleError, which calls the sample by
        its entry in `names`. The tensors go to `device` (default: the model's; data loaders'
        workers take "cpu").
        """
        names = names or [f"number {index} of the batch" for index in range(len(prompts))]
        starts = [len(prompt) for prompt in prompts]
        texts = list(prompts)
        if answers is not None:
            for name, answer in zip(names, answers, strict=True):
                self._refuse_special_tokens(answer)
                if not answer or answer != answer.strip():
                    raise SampleError(
                        f"The answer {answer!r} of sample {name} is empty or has white space at "
                        "its ends: write it without."
                    )
            pairs = zip(prompts, answers, strict=True)
            texts = [prompt + answer + self.end_token for prompt, answer in pairs]
        processed = self.processor(
            text=texts,
            videos=[clip.frames for clip in clips],
            padding=True,
            padding_side=padding_side,
            return_tensors="pt",
            return_mm_token_type_ids=True,  # without them M-RoPE silently becomes 1-D
            return_offsets_mapping=True,
            **self._video_arguments(clips),
        )
        offset_mapping = processed.pop("offset_mapping")
        inputs = dict(processed)
        self._check_lengths(inputs, clips, names, max_length or self.max_length)
        ids = inputs["input_ids"]
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids))
        special |= inputs["mm_token_type_ids"] > 0
        spans = offset_mapping.masked_fill(special[..., None], 0)
        # the processor wrote the one placeholder as many times as there are visual tokens
        token = self.processor.video_token
        places = torch.tensor([[text.index(token) + len(token)] for text in texts])
        added = ((ids == self.processor.video_token_id).sum(dim=1, keepdim=True) - 1) * len(token)
        after = spans[:, :, 0] >= places + added
        spans = spans - (added * after)[..., None]
        offsets = [[tuple(span) for span in sample] for sample in spans.tolist()]
        if answers is not None:
            inputs["labels"] = self._labels(inputs, offsets, starts, names)
        device = self.model.device if device is None else device
        inputs = {name: value.to(device) for name, value in inputs.items()}
        return Encoding(inputs, texts, offsets, starts)

    def grids(
        self, inputs: dict[str, Tensor], clips: Sequence[Any]
    ) -> tuple[list[TokenGrid], list[Tensor]]:
        """Where each sample's visual tokens lie: TokenGrid [B] and sequence positions [B][n].

        Positions are t-major, then row-major, like the grid. Raises ModelError if a sample has
        not as many visual tokens as its grid has cells.
        """
        merge = self.model.config.vision_config.spatial_merge_size
        depth = self.model.config.vision_config.temporal_patch_size
        video = (inputs["input_ids"] == self.model.config.video_token_id).cpu()
        grids: list[TokenGrid] = []
        columns = []
        known: dict[tuple, TokenGrid] = {}
        for index, (clip, thw) in enumerate(
            zip(clips, inputs["video_grid_thw"].tolist(), strict=True)
        ):
            frames, rows, cols = thw[0], thw[1] // merge, thw[2] // merge
            key = (tuple(clip.times), clip.duration, tuple(clip.box), rows, cols)
            if key not in known:
                # the processor repeats the last frame of an odd count: its span is not longer
                groups = [
                    list(range(first, min(first + depth, len(clip.times))))
                    for first in range(0, len(clip.times), depth)
                ]
                spans = merge_spans(frame_spans(clip.times, clip.duration), groups)
                known[key] = TokenGrid.regular(spans, rows, cols, box=clip.box)
            grid = known[key]
            positions = video[index].nonzero()[:, 0]
            if grid.frames != frames or len(positions) != grid.num_tokens:
                raise ModelError(
                    f"Sample {index} of the batch has {len(positions)} visual tokens in "
                    f"{frames}×{rows}×{cols} patches, but its clip of {len(clip.times)} frames "
                    f"gives a grid of {grid.shape}: encode and grids need the same clips."
                )
            grids.append(grid)
            columns.append(positions)
        return grids, columns

    def parts(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named parameters of the vision tower, the merger and the LLM, each exactly once."""
        parts: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
        for name, parameter in self.model.named_parameters():
            inside = name.split(".")
            if "visual" not in inside:
                parts["llm"].append((name, parameter))
            else:
                parts["merger" if "merger" in inside else "vision"].append((name, parameter))
        return parts

    def num_video_tokens(self, frames: int, height: int, width: int) -> int:
        """Visual tokens of a clip of `frames` frames of height × width pixels."""
        patches = self.processor.video_processor.get_num_of_video_patches(frames, height, width, {})
        return patches // self.processor.video_processor.merge_size**2

    def _video_arguments(self, clips: Sequence[Any]) -> dict[str, Any]:
        """Arguments that make the video processor take the frames as they are, at true times."""
        metadata = [
            {
                "total_num_frames": len(clip.frames),
                "fps": 1 / _seconds_per_frame(clip),
                "frames_indices": list(range(len(clip.frames))),
                "duration": _seconds_per_frame(clip) * len(clip.frames),
            }
            for clip in clips
        ]
        video_processor = self.processor.video_processor
        arguments = {
            "video_metadata": metadata,
            "do_sample_frames": False,
            "input_data_format": "channels_last",
        }
        if getattr(video_processor, "cap_pixels_per_frame", False) is None:
            # pinned: transformers is about to change what leaving it open means
            arguments["cap_pixels_per_frame"] = False
        return arguments

    def _labels(
        self,
        inputs: dict[str, Tensor],
        offsets: Sequence[Sequence[tuple[int, int]]],
        starts: Sequence[int],
        names: Sequence[str],
    ) -> Tensor:
        """Labels [B, S]: from the answer's first token to the end of the sequence."""
        labels = inputs["input_ids"].clone()
        for index, (spans, start, name) in enumerate(zip(offsets, starts, names, strict=True)):
            first = next(i for i, span in enumerate(spans) if span[1] > start)
            if spans[first][0] != start:
                raise SampleError(
                    f"The answer of sample {name} does not begin at a token of its own after the "
                    "prompt: end the prompt as the processor's chat template does."
                )
            labels[index, :first] = IGNORED
        return labels.masked_fill(inputs["attention_mask"] == 0, IGNORED)

    def _check_lengths(
        self, inputs: dict[str, Tensor], clips: Sequence[Any], names: Sequence[str], limit: int
    ) -> None:
        for index, name in enumerate(names):
            length = int(inputs["attention_mask"][index].sum())
            if length > limit:
                visual = int((inputs["mm_token_type_ids"][index] > 0).sum())
                frames = len(clips[index].frames)
                raise SampleError(
                    f"Sample {name} has {length} tokens ({visual} visual tokens of {frames} frames "
                    f"and {length - visual} of text), more than max_length {limit}. Visual tokens "
                    "are never cut off: lower sampling.frames or sampling.fps, or the video "
                    'processor\'s size["longest_edge"], or raise max_length.'
                )

    def _refuse_special_tokens(self, text: str) -> None:
        pads = [self.processor.image_token, self.processor.video_token]
        for token in [*self.tokenizer.all_special_tokens, *pads]:
            if token in text:
                raise SampleError(
                    f"The text {text[:60]!r} holds {token!r}, which the model reads as a control "
                    "token and not as text: remove it from the sample."
                )

    def _check_processor(self) -> None:
        """Raises ModelError where processor and model disagree on the patches or the tokens."""
        vision, video = self.model.config.vision_config, self.processor.video_processor
        for name, ours, theirs in (
            ("patch_size", vision.patch_size, video.patch_size),
            ("temporal_patch_size", vision.temporal_patch_size, video.temporal_patch_size),
            ("spatial_merge_size", vision.spatial_merge_size, video.merge_size),
            ("video_token_id", self.model.config.video_token_id, self.processor.video_token_id),
        ):
            if ours != theirs:
                raise ModelError(
                    f"The student model {self.folder!r} has {name} {ours}, but its processor "
                    f"{theirs}: the processor's files belong to another model."
                )


def _seconds_per_frame(clip: Any) -> float:
    """Mean spacing of the sampled frames; a lone frame lasts the clip's duration, or a second."""
    if len(clip.times) > 1 and clip.times[-1] > clip.times[0]:
        return (clip.times[-1] - clip.times[0]) / (len(clip.times) - 1)
    return clip.duration or 1.0
