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
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vdm_priors.errors import ModelError, SampleError
from vdm_priors.grid import TokenGrid
from vlm_hooks.encoding import Encoding, Prompt, answer_labels, original_offsets
from vlm_hooks.loading import Loading
from vlm_hooks.sample_checks import SampleChecks
from vlm_hooks.streams import FrameStream
from vlm_hooks.videos import (
    Video, as_list, chosen_video, clips_of, is_clip, own_videos, seconds_per_frame, token_spans,
)

PARTS = ("vision", "merger", "llm")
LETTER_REQUEST = "Answer with the option's letter."
# stands for the question while the chat template is rendered; private-use characters
_PLACEHOLDER = "\ue000question\ue001"
ONE_VIDEO = ("video",)


@dataclass
class Student(Loading, SampleChecks, FrameStream):
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

    def num_image_tokens(self, height: int, width: int) -> int:
        """Tokens that a picture takes in the sequence, counted on a black one. SampleError where none can be made."""
        black = np.zeros((height, width, 3), np.uint8)
        try:
            made = self.processor(text=[self.processor.image_token], images=[black], input_data_format="channels_last")
        except ValueError as error:
            raise SampleError(
                f"The processor cannot take a picture of {width}×{height} pixels: {error} Give another one."
            ) from error
        return len(made["input_ids"][0])

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

    def prompt(
        self, question: str, options: Sequence[str] | None = None, system: str | None = None,
        shown: Sequence[str] = ONE_VIDEO, request: str = LETTER_REQUEST,
    ) -> Prompt:
        """The processor's chat prompt for what is shown and a question, ready for the answer.

        shown: "video" or "image", in their order, all before the question. With options they are listed as "A. …" after
        the question, and `request` asks for the letter in a line of its own. Raises SampleError if a text holds a special
        token, ModelError if the chat template changes the question.
        """
        options = options or ()
        if len(options) > 26:
            raise SampleError(
                f"The question {question[:60]!r} has {len(options)} options; letters A to Z name at most 26: drop some."
            )
        for text in (question, *options, system or "", request):
            self._refuse_special_tokens(text)
        body = _PLACEHOLDER
        if options:
            lines = [f"{chr(65 + i)}. {option}" for i, option in enumerate(options)]
            body = "\n".join([_PLACEHOLDER, *lines, request])
        content = [*({"type": kind} for kind in shown), {"type": "text", "text": body}]
        messages = [{"role": "user", "content": content}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        rendered = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        counts = shown.count("video"), shown.count("image")
        if rendered.count(_PLACEHOLDER) != 1 or self._placeholders(rendered) != counts:
            what = "one video" if counts == (1, 0) else f"{counts[0]} videos, {counts[1]} images"
            raise ModelError(
                f"The chat template of {self.folder!r} does not write {what} and the question once, but: "
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

        In the place of a clip a sample may have a list of clips and pictures (uint8 [H, W, 3]), in their order, for a
        prompt that shows as many. With answers, labels are the answer's and the end token, all else is ignored. Frames
        are taken as they are, nothing is sampled and nothing is ever cut off: a sequence longer than `max_length`
        (default: the model's) raises SampleError, which calls the sample by its entry in `names`. The tensors go to
        `device` (default: the model's; data loaders' workers take "cpu").
        """
        names = names or [f"number {index} of the batch" for index in range(len(prompts))]
        starts = [len(prompt) for prompt in prompts]
        shown = [as_list(one) for one in clips]
        for name, prompt, media in zip(names, prompts, shown, strict=True):
            self._check_placeholders(name, prompt, media)
        texts = list(prompts)
        if answers is not None:
            for name, answer in zip(names, answers, strict=True):
                self._check_answer(name, answer)
            texts = [prompt + answer + self.end_token for prompt, answer in zip(prompts, answers, strict=True)]
        inputs = self._process(texts, shown, names, padding_side)
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
        self, texts: list[str], shown: Sequence[Sequence[Any]], names: Sequence[str], padding_side: str
    ) -> dict[str, Any]:
        """The processor's batch, with "offset_mapping" [B, S, 2] and "text_replacement_offsets" [B].

        shown: each sample's clips and pictures.
        """
        clips = [one for media in shown for one in clips_of(media)]
        pictures = [one for media in shown for one in media if not is_clip(one)]
        return dict(self.processor(
            text=texts, images=pictures or None, padding=True, padding_side=padding_side, return_tensors="pt",
            return_offsets_mapping=True, return_text_replacement_offsets=True, **self.processor_settings(clips)))

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

        Positions are in the grid's order: frame by frame, then row by row. `clips` are those of `encode`: of a sample
        that shows several, each has its own entry in the result, sample by sample. A batch made with the processor
        itself may hold images and other videos besides: `which` [B] says the how-manieth video of its sample each clip
        is. Raises ModelError if it is needed and not given, or if a video does not have its clip's frames.
        """
        pairs: list[tuple[int, Any, Video]] = []
        for index, (entry, videos) in enumerate(zip(clips, self.videos(inputs), strict=True)):
            shown = clips_of(entry)
            own = own_videos(index, shown, videos) if which is None else [chosen_video(index, videos, which[index])]
            pairs += [(index, clip, video) for clip, video in zip(shown, own, strict=True)]
        grids: list[TokenGrid] = []
        columns: list[Tensor] = []
        known: dict[tuple, TokenGrid] = {}
        for index, clip, video in pairs:
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
