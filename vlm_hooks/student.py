"""A student: a vision-language model with its processor, and where its visual tokens lie.

`Student` does what all families have in common: prompts, batches with labels and character offsets, the grid of the
visual tokens, parameters by part. A family (one file in vlm_hooks/families) adds what only it knows: which positions of
the sequence are a video's, how many frames and which part of the frame a token covers, what its processor needs.

Legend: B samples, N frames, S sequence positions, F×H×W visual tokens of a video.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from vdm_priors.errors import ModelError, SampleError
from vdm_priors.grid import TokenGrid
from vlm_hooks.encoding import Encoding, Prompt, answer_labels, original_offsets
from vlm_hooks.sample_checks import SampleChecks
from vlm_hooks.streams import FrameStream
from vlm_hooks.videos import Video, chosen_video, seconds_per_frame, token_spans

PARTS = ("vision", "merger", "llm")
LETTER_REQUEST = "Answer with the option's letter."
# stands for the question while the chat template is rendered; private-use characters
_PLACEHOLDER = "\ue000question\ue001"


@dataclass
class Student(SampleChecks, FrameStream):
    """A model with its processor; `folder` is where it was loaded from. Families derive from it.

    A clip has frames (uint8 [N, H, W, 3]), times (N rising seconds), duration (seconds of the whole video) and box
    (top, left, bottom, right of its frames in the normalised source frame).
    """

    model: PreTrainedModel
    processor: Any
    folder: str

    VISION: ClassVar[str]  # module of the vision tower
    MERGERS: ClassVar[tuple[str, ...]]  # modules and parameters between vision tower and language model

    # ---- what a family says -------------------------------------------------------------------

    @abstractmethod
    def videos(self, inputs: dict[str, Tensor]) -> list[list[Video]]:
        """The videos [B][n] of each sample, in the order of the sequence. Images are left out."""

    @abstractmethod
    def num_video_tokens(self, frames: int, height: int, width: int, times: Sequence[float] | None = None) -> int:
        """Tokens that a clip of `frames` frames of height × width pixels takes in the sequence.

        Visual tokens, and what the processor writes between them. Where that depends on the frames' `times`
        (seconds), it is the most for a video of up to 999 s without them.
        """

    def clip_tokens(self, clip: Any) -> int:
        """Tokens that a clip takes in the sequence, as `num_video_tokens` counts them."""
        frames, height, width, _ = clip.frames.shape
        return self.num_video_tokens(frames, height, width, clip.times)

    def frames_per_token(self) -> int:
        """How many frames one visual token joins."""
        return 1

    def covered_box(self, box: Sequence[float]) -> tuple[float, float, float, float]:
        """The part of the frames' box (top, left, bottom, right) that the visual tokens see."""
        return tuple(box)

    def processor_settings(self, clips: Sequence[Any]) -> dict[str, Any]:
        """Arguments that make the processor take the clips' frames as they are, at their times."""
        return {
            "videos": [clip.frames for clip in clips],
            "video_metadata": [self._metadata(clip) for clip in clips],
            "do_sample_frames": False,
            "input_data_format": "channels_last",
        }

    def same_in_both(self) -> list[tuple[str, Any, Any]]:
        """(name, the model's value, the processor's value) of what both must agree on."""
        return []

    # ---- loading ------------------------------------------------------------------------------

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
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, attn_implementation=attn)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"The student model {name!r} cannot be loaded: {error} A complete folder holds config.json, "
                "model.safetensors, the tokenizer and the processor's files."
            ) from error
        student = cls(model.to(device), processor, name)
        student._check_processor()
        return student

    @classmethod
    def without_weights(cls, path_or_hub: str | Path) -> Student:
        """A student for prompts, batches, token counts and grids: its model has a `config` and nothing to run.

        Raises ModelError.
        """
        name = str(path_or_hub)
        try:
            processor, config = AutoProcessor.from_pretrained(name), AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"The student model {name!r} cannot be read: {reason}") from error
        student = cls(SimpleNamespace(config=config, device="cpu"), processor, name)
        student._check_processor()
        return student

    def _check_processor(self) -> None:
        """Raises ModelError where processor and model disagree on the patches or the tokens."""
        for name, ours, theirs in self.same_in_both():
            if ours != theirs:
                raise ModelError(
                    f"The student model {self.folder!r} has {name} {ours}, but its processor {theirs}: the processor's "
                    "files belong to another model."
                )

    # ---- facts --------------------------------------------------------------------------------

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
        return self.model.config.get_text_config().max_position_embeddings

    def parts(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named parameters of the vision tower, the merger and the LLM, each exactly once."""
        parts: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
        for name, parameter in self.model.named_parameters():
            inside = name.split(".")
            if any(merger in inside for merger in self.MERGERS):
                parts["merger"].append((name, parameter))
            else:
                parts["vision" if self.VISION in inside else "llm"].append((name, parameter))
        return parts

    # ---- text ---------------------------------------------------------------------------------

    def prompt(self, question: str, options: Sequence[str] | None = None, system: str | None = None) -> Prompt:
        """The processor's chat prompt for one video and a question, ready for the answer.

        With options they are listed as "A. …" after the question and the letter is asked for. Raises SampleError if a
        text holds a special token, ModelError if the chat template changes the question.
        """
        options = options or ()
        if len(options) > 26:
            raise SampleError(
                f"The question {question[:60]!r} has {len(options)} options; letters A to Z name at most 26: drop some."
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
        rendered = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if rendered.count(_PLACEHOLDER) != 1 or rendered.count(self.processor.video_token) != 1:
            raise ModelError(
                f"The chat template of {self.folder!r} does not write one video and the question once, but: "
                f"{rendered.replace(_PLACEHOLDER, '{question}')!r}. Use the template of the model's own processor."
            )
        start = rendered.index(_PLACEHOLDER)
        return Prompt(rendered.replace(_PLACEHOLDER, question), start)

    # ---- batches ------------------------------------------------------------------------------

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
        """A batch of B clips, the prompts with one video each, and answers.

        With answers, labels are the answer's and the end token, all else is ignored. Frames are taken as they are,
        nothing is sampled and nothing is ever cut off: a sequence longer than `max_length` (default: the model's)
        raises SampleError, which calls the sample by its entry in `names`. The tensors go to `device` (default: the
        model's; data loaders' workers take "cpu").
        """
        names = names or [f"number {index} of the batch" for index in range(len(prompts))]
        starts = [len(prompt) for prompt in prompts]
        for name, prompt in zip(names, prompts, strict=True):
            self._check_one_video(name, prompt)
        texts = list(prompts)
        if answers is not None:
            for name, answer in zip(names, answers, strict=True):
                self._check_answer(name, answer)
            texts = [prompt + answer + self.end_token for prompt, answer in zip(prompts, answers, strict=True)]
        inputs = self._process(texts, clips, names, padding_side)
        spans, replaced = inputs.pop("offset_mapping"), inputs.pop("text_replacement_offsets")
        ids = inputs["input_ids"]
        visual = torch.isin(ids, self._visual_ids())
        self._check_lengths(inputs["attention_mask"], visual, clips, names, max_length or self.max_length)
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids)) | visual
        offsets = original_offsets(spans, replaced, special)
        if answers is not None:
            inputs["labels"] = answer_labels(ids, inputs["attention_mask"], offsets, starts, names)
        device = self.model.device if device is None else device
        inputs = {name: value.to(device) for name, value in inputs.items()}
        return Encoding(inputs, texts, offsets, starts)

    def _process(
        self, texts: list[str], clips: Sequence[Any], names: Sequence[str], padding_side: str
    ) -> dict[str, Any]:
        """The processor's batch, with "offset_mapping" [B, S, 2] and "text_replacement_offsets" [B]."""
        return dict(self.processor(
            text=texts, padding=True, padding_side=padding_side, return_tensors="pt", return_offsets_mapping=True,
            return_text_replacement_offsets=True, **self.processor_settings(clips)))

    def _metadata(self, clip: Any) -> dict[str, Any]:
        """Which frames of which video the clip's are, in transformers' words: each once, at their mean distance."""
        seconds = seconds_per_frame(clip)
        count = len(clip.frames)
        return {"total_num_frames": count, "fps": 1 / seconds, "frames_indices": list(range(count)),
                "duration": seconds * count}

    def _visual_ids(self) -> Tensor:
        placeholders = [self.processor.image_token, self.processor.video_token]
        return torch.tensor(self.tokenizer.convert_tokens_to_ids(placeholders))

    # ---- where visual tokens lie --------------------------------------------------------------

    def grids(
        self, inputs: dict[str, Tensor], clips: Sequence[Any], which: Sequence[int] | None = None
    ) -> tuple[list[TokenGrid], list[Tensor]]:
        """Where the visual tokens of each sample's clip lie: TokenGrid [B] and sequence positions [B][F·H·W].

        Positions are in the grid's order: frame by frame, then row by row. A batch made with the processor itself may
        hold images and other videos besides: `which` [B] says the how-manieth video of its sample each clip is. Raises
        ModelError if it is needed and not given, or if a video does not have its clip's frames.
        """
        grids: list[TokenGrid] = []
        columns: list[Tensor] = []
        known: dict[tuple, TokenGrid] = {}
        for index, (clip, videos) in enumerate(zip(clips, self.videos(inputs), strict=True)):
            video = chosen_video(index, videos, None if which is None else which[index])
            _, rows, cols = video.shape
            key = (tuple(clip.times), clip.duration, tuple(clip.box), rows, cols)
            if key not in known:
                spans = token_spans(clip, self.frames_per_token())
                known[key] = TokenGrid.regular(spans, rows, cols, box=self.covered_box(clip.box))
            grid = known[key]
            if grid.shape != video.shape or len(video.positions) != grid.num_tokens:
                raise ModelError(
                    f"Sample {index} of the batch has {len(video.positions)} visual tokens of a {video.shape} video, "
                    f"but its clip of {len(clip.times)} frames gives a grid of {grid.shape}: encode and grids need the "
                    "same clips."
                )
            grids.append(grid)
            columns.append(video.positions)
        return grids, columns
