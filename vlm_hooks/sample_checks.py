"""What a student refuses of a sample, by name and before the model sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from vdm_priors.errors import SampleError


class SampleChecks:
    """The part of a student that raises SampleError for texts and lengths that it cannot take."""

    processor: Any
    tokenizer: Any
    SIZE_KNOB: ClassVar[str] = ""  # what besides fewer frames makes fewer tokens, for messages

    def _refuse_special_tokens(self, text: str) -> None:
        for token in [*self.tokenizer.all_special_tokens, self.processor.image_token, self.processor.video_token]:
            if token in text:
                raise SampleError(
                    f"The text {text[:60]!r} holds {token!r}, which the model reads as a control token and not as "
                    "text: remove it from the sample."
                )

    def _check_one_video(self, name: str, prompt: str) -> None:
        videos, images = prompt.count(self.processor.video_token), prompt.count(self.processor.image_token)
        if (videos, images) != (1, 0):
            raise SampleError(
                f"The prompt of sample {name} has {videos} videos and {images} images, but it is about one clip: make "
                "it with `prompt`."
            )

    def _check_answer(self, name: str, answer: str) -> None:
        self._refuse_special_tokens(answer)
        if not answer or answer != answer.strip():
            raise SampleError(
                f"The answer {answer!r} of sample {name} is empty or has white space at its ends: write it without."
            )

    def _check_lengths(
        self, mask: Tensor, visual: Tensor, clips: Sequence[Any], names: Sequence[str], limit: int
    ) -> None:
        for length, seen, clip, name in zip(mask.sum(1).tolist(), visual.sum(1).tolist(), clips, names, strict=True):
            if length > limit:
                raise SampleError(
                    f"Sample {name} has {length} tokens ({seen} visual tokens of {len(clip.frames)} frames and "
                    f"{length - seen} of text), more than max_length {limit}. Visual tokens are never cut off: lower "
                    f"sampling.frames or sampling.fps{self.SIZE_KNOB}, or raise max_length."
                )
