"""What a codec adapter needs of a family: its vision tower frame by frame, and sequences written token by token.

A stock processor expands one video into one run of visual tokens. An adapter writes a *stream* instead: frames and
motion tokens in the order of time, with text between them. A family says which token stands for a frame's tokens,
which marks it expects around a frame, what its tower makes of the frames, and which positions the stream's tokens have.

Legend: B clips, T rows in time of visual tokens (frames, or pairs of them), H×W tokens of a frame, D hidden size of the
language model, S sequence positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from vdm_priors.errors import ModelError


class FrameTokens(NamedTuple):
    """A clip's visual tokens after the merger: tokens [T, H, W, D], and deep [T, H, W, D] each, which are added to them
    in the decoder's first layers (Qwen3-VL's DeepStack; empty elsewhere)."""

    tokens: Tensor
    deep: tuple[Tensor, ...] = ()

    def map(self, change) -> FrameTokens:
        """`change` ([T, H, W, D] -> any [T', H', W', D]) done to all of them alike."""
        return FrameTokens(change(self.tokens), tuple(change(deep) for deep in self.deep))


@dataclass(frozen=True)
class StreamPlaces:
    """Where the tokens of one unpadded sequence lie: all [S].

    stream: between the stream's first and last character (visual tokens, labels and marks); visual: a token with a
    cell; block: number of the visual token's row in time, rising by one; time: seconds after the stream's first visual
    token, of labels that of the visual token that follows (of what stands behind the last one, that of the last);
    row, column: of visual tokens, within their frame.
    """

    stream: Tensor
    visual: Tensor
    block: Tensor
    time: Tensor
    row: Tensor
    column: Tensor


class FrameMarks(NamedTuple):
    """What a family writes for a frame: label (which names it) + opening, its tokens, closing."""

    label: str = ""
    opening: str = ""
    closing: str = ""


class FrameStream(ABC):
    """The part of a Student that adapters use. A Student has `model`, `processor` and `_process` besides."""

    PIXELS: ClassVar[tuple[str, ...]] = ("pixel_values_videos",)  # the processor's entries for the tower
    PATCH_EMBEDDING: ClassVar[str]  # module whose output the tower's first block reads
    STREAM_END: ClassVar[str] = ""  # a visual placeholder without a cell that ends every video

    model: Any
    processor: Any

    @property
    def frame_token(self) -> str:
        """The token that the model replaces by a frame's visual tokens."""
        return self.processor.video_token

    def frame_marks(self, number: int, time: float, count: int) -> FrameMarks:
        """The marks of frame `number` (from 1) of `count`, shown at `time` seconds."""
        return FrameMarks()

    def frame_inputs(self, clips: Sequence[Any]) -> dict[str, Tensor]:
        """The tower's inputs for clips' frames, as the stock processor makes them. Raises SampleError as it does."""
        names = [f"number {index} of the batch" for index in range(len(clips))]
        made = self._process([self.processor.video_token] * len(clips), [[clip] for clip in clips], names, "right")
        return {name: made[name] for name in self.PIXELS}

    @abstractmethod
    def frame_shapes(self, pixels: dict[str, Tensor], counts: Sequence[int]) -> list[tuple[int, int, int]]:
        """T, H, W [B] of what `frame_tokens` gives for these inputs; counts [B]: frames of each clip."""

    @abstractmethod
    def frame_tokens(self, pixels: dict[str, Tensor], counts: Sequence[int], group: int = 1) -> list[FrameTokens]:
        """Runs the vision tower and the merger: the tokens [B] of clips whose inputs `frame_inputs` made.

        group: so many rows in time attend to each other in the tower (clips begin groups of their own);
        `prepare_groups` must have been called with it.
        """

    def prepare_groups(self, group: int) -> None:
        """Sets the tower up for groups of so many rows in time; 1 is as it was before."""

    @property
    def vision_width(self) -> int:
        """Width of the tower's patches."""
        return self.model.config.vision_config.hidden_size

    @abstractmethod
    def rows_of_patches(self, pixels: dict[str, Tensor], counts: Sequence[int]) -> Tensor:
        """Which row in time of its clip each entry along the first axis of the patch embedding's output is of."""

    @contextmanager
    def added_to_patches(self, pixels: dict[str, Tensor], counts: Sequence[int], places_gd: Tensor) -> Iterator[None]:
        """While it is open, patches of a row in time t get places[t mod G], G × width of the tower, before the tower's
        first block (by a forward hook)."""
        rows = self.rows_of_patches(pixels, counts).to(places_gd.device) % len(places_gd)

        def add(_module: nn.Module, _args: tuple, patches: Tensor) -> Tensor:
            own = places_gd[rows].to(patches)
            return patches + own.view(len(rows), *[1] * (patches.ndim - 2), -1)

        handle = self.model.get_submodule(self.PATCH_EMBEDDING).register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    @abstractmethod
    def encoder_outputs(self, tokens: Sequence[FrameTokens]) -> dict[str, Any]:
        """The model's `mm_encoder_outputs` for a batch whose sequences have these visual tokens [B]."""

    def stream_positions(self, places: StreamPlaces) -> Tensor | None:
        """Position ids [3, S] of an unpadded sequence; None where the model counts its tokens in one dimension."""
        return None

    def keep_positions(self, positions: Tensor, attention_mask: Tensor) -> None:
        """Called after a forward with position ids [3, B, S], whose cache may be continued without any."""

    def embedding_rows(self) -> int:
        """How many tokens the model has embeddings for."""
        return self.model.get_input_embeddings().num_embeddings


def check_divisible(counts: Sequence[int], group: int) -> None:
    """ModelError where a clip's rows in time do not fill whole groups."""
    wrong = sorted({count for count in counts if count % group})
    if wrong:
        raise ModelError(
            f"Clips of {', '.join(map(str, wrong))} frames (or pairs of them) do not fill groups of {group}: "
            "sample a multiple of it."
        )
