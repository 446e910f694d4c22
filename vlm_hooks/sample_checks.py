"""What a student refuses of a sample, by name and before the model sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from vdm_priors.errors import SampleError
from vlm_hooks.videos import clips_of


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

    def _placeholders(self, text: str) -> tuple[int, int]:
        """How many videos and images a prompt shows."""
        return text.count(self.processor.video_token), text.count(self.processor.image_token)

    def _check_one_video(self, name: str, prompt: str) -> None:
        if self._placeholders(prompt) != (1, 0):
            videos, images = self._placeholders(prompt)
            raise SampleError(
                f"The prompt of sample {name} has {videos} videos and {images} images, but it is about one clip: make "
                "it with `prompt`."
            )

    def _check_placeholders(self, name: str, prompt: str, shown: Sequence[Any]) -> None:
        videos = len(clips_of(shown))
        if (videos, len(shown) - videos) == (1, 0):
            self._check_one_video(name, prompt)
        elif self._placeholders(prompt) != (videos, len(shown) - videos):
            there, images = self._placeholders(prompt)
            raise SampleError(
                f"The prompt of sample {name} has {there} videos and {images} images, but {videos} clips and "
                f"{len(shown) - videos} pictures are given: make it with `prompt(question, shown=…)`."
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
        for length, seen, shown, name in zip(mask.sum(1).tolist(), visual.sum(1).tolist(), clips, names, strict=True):
            if length > limit:
                frames = sum(len(clip.frames) for clip in clips_of(shown))
                raise SampleError(
                    f"Sample {name} has {length} tokens ({seen} visual tokens of {frames} frames and "
                    f"{length - seen} of text), more than max_length {limit}. Visual tokens are never cut off: lower "
                    f"sampling.frames or sampling.fps{self.SIZE_KNOB}, or raise max_length."
                )
