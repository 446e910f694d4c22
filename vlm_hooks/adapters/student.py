"""AdaptedStudent: a Student whose sequences are an adapter's streams.

It is asked as any Student: prompt, encode, grids, parts; so training, evaluation, `inspect`, `visualize` and alignment
work on it. A clip is what the adapter's `plan` takes (MotionClip, or frames alone).

Legend: B samples, S sequence positions, T rows in time, H×W tokens of a frame.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vdm_priors.errors import ModelError
from vdm_priors.grid import TokenGrid
from vlm_hooks import student
from vlm_hooks.adapters.base import Adapter, Segment
from vlm_hooks.adapters.model import COUNTS
from vlm_hooks.encoding import Encoding, answer_labels, original_offsets
from vlm_hooks.streams import StreamPlaces
from vlm_hooks.videos import Video


@dataclass
class AdaptedStudent(student.Student):
    """See the module. model: the AdapterModel; base: the host's own; still: encode clips as if nothing moved."""

    base: student.Student
    adapter: Adapter
    still: bool = False

    # ---- as the host's ------------------------------------------------------------------------

    def same_in_both(self) -> list[tuple[str, Any, Any]]:
        return self.base.same_in_both()

    def frames_per_token(self) -> int:
        return self.base.frames_per_token()

    def covered_box(self, box: Sequence[float]) -> tuple[float, float, float, float]:
        return self.base.covered_box(box)

    def frame_shapes(self, pixels: dict[str, Tensor], counts: Sequence[int]) -> list[tuple[int, int, int]]:
        return self.base.frame_shapes(pixels, counts)

    def rows_of_patches(self, pixels: dict[str, Tensor], counts: Sequence[int]) -> Tensor:
        return self.base.rows_of_patches(pixels, counts)

    def frame_tokens(self, pixels: dict[str, Tensor], counts: Sequence[int], group: int = 1) -> list:
        return self.base.frame_tokens(pixels, counts, group)

    def encoder_outputs(self, tokens: Sequence[Any]) -> dict[str, Any]:
        return self.base.encoder_outputs(tokens)

    def parts(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named parameters of the host's parts, and of the adapter's under the names that it gives them."""
        names = {parameter: name for name, parameter in self.adapter.named_parameters()}
        own = {part: [(f"adapter.{names[p]}", p) for p in members] for part, members in self.adapter.parts().items()}
        host = {part: [(f"host.{name}", p) for name, p in members] for part, members in self.base.parts().items()}
        return {**host, **own}

    def num_video_tokens(self, frames: int, height: int, width: int, times: Sequence[float] | None = None) -> int:
        raise ModelError(
            "How many tokens an adapter writes depends on a clip's motion, not on its frames alone: use "
            "clip_tokens(clip)."
        )

    def clip_tokens(self, clip: Any) -> int:
        """Tokens of a clip's stream: visual ones, labels and marks."""
        return len(self.tokenizer(self._stream(self._planned([clip])[1][0]))["input_ids"])

    # ---- sequences ----------------------------------------------------------------------------

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
        """As Student.encode, with the adapter's stream in the place of each prompt's video."""
        names = names or [f"number {index} of the batch" for index in range(len(prompts))]
        for name, prompt in zip(names, prompts, strict=True):
            self._check_one_video(name, prompt)
        for name, answer in zip(names, answers or [], strict=answers is not None):
            self._check_answer(name, answer)
        if self.still:
            clips = [self.adapter.still(clip) for clip in clips]
        pixels, plans = self._planned(clips)
        streams = [self._stream(plan) for plan in plans]
        endings = [answer + self.end_token for answer in answers] if answers is not None else [""] * len(prompts)
        texts = [prompt + ending for prompt, ending in zip(prompts, endings, strict=True)]
        spans = [(at, at + len(self.processor.video_token)) for at in map(self._video_at, prompts)]
        written = [
            text[:start] + stream + text[end:] for text, stream, (start, end) in zip(texts, streams, spans, strict=True)
        ]
        made = self.tokenizer(
            written, padding=True, padding_side=padding_side, return_tensors="pt", return_offsets_mapping=True
        )
        ids, mask, offsets = made["input_ids"], made["attention_mask"], made["offset_mapping"]
        visual = torch.isin(ids, self._stream_ids())
        self._check_lengths(mask, visual, clips, names, max_length or self.max_length)

        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **pixels}
        motion = self.adapter.inputs(clips)
        inputs |= self.adapter.without_motion(motion) if self.still else motion
        places = [
            self._places(plan, row[keep.bool()], span[keep.bool()], start, start + len(stream))
            for plan, row, span, keep, stream, (start, _) in zip(plans, ids, offsets, mask, streams, spans, strict=True)
        ]
        inputs["position_ids"] = self._positions(places, mask)
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids)) | visual
        replaced = [
            [{"span": span, "new_span": (span[0], span[0] + len(stream))}]
            for span, stream in zip(spans, streams, strict=True)
        ]
        original = original_offsets(offsets, replaced, special)
        starts = [len(prompt) for prompt in prompts]
        if answers is not None:
            inputs["labels"] = answer_labels(ids, mask, original, starts, names)
        device = self.model.device if device is None else device
        return Encoding({name: value.to(device) for name, value in inputs.items()}, texts, original, starts)

    def visual_tokens(self, clip: Any) -> int:
        """How many visual tokens a clip takes."""
        return sum(segment.num_tokens for segment in self._planned([clip])[1][0])

    def _planned(self, clips: Sequence[Any]) -> tuple[dict[str, Tensor], list[list[Segment]]]:
        """The tower's inputs, and each clip's segments."""
        shown = [self.adapter.shown(clip) for clip in clips]
        counts = [len(clip.frames) for clip in shown]
        pixels = {**self.base.frame_inputs(shown), COUNTS: torch.tensor(counts)}
        shapes = self.base.frame_shapes(pixels, counts)
        return pixels, [self._plan(clip, shape) for clip, shape in zip(clips, shapes, strict=True)]

    def _plan(self, clip: Any, shape: tuple[int, int, int]) -> list[Segment]:
        """The adapter's plan, in whose cells is what the tower sees of the frames."""
        seen = copy.copy(clip)
        seen.box = self.covered_box(clip.box)
        return self.adapter.plan(seen, shape)

    def _video_at(self, prompt: str) -> int:
        return prompt.index(self.processor.video_token)

    def _stream_ids(self) -> Tensor:
        tokens = [self.base.frame_token, *self.adapter.special_tokens]
        return torch.tensor(self.tokenizer.convert_tokens_to_ids(tokens))

    def _stream(self, plan: Sequence[Segment]) -> str:
        """A clip's stream as text: labels, marks and placeholders."""
        rows = sum(segment.grid.frames for segment in plan if not segment.moving)
        text, number = "", 0
        for segment in plan:
            if segment.moving:
                text += (segment.label or "") + self.adapter.special_tokens[0] * segment.num_tokens
                continue
            size = segment.grid.rows * segment.grid.columns
            for row, time in enumerate(segment.times):
                number += 1
                marks = self.base.frame_marks(number, time, rows)
                label = marks.label if segment.label is None else segment.label if row == 0 else ""
                text += label + marks.opening + self.base.frame_token * size + marks.closing
        return text + self.base.STREAM_END

    def _places(self, plan: Sequence[Segment], ids_s: Tensor, spans_s2: Tensor, start: int, end: int) -> StreamPlaces:
        """Where the tokens of one unpadded sequence lie; its stream has the characters [start, end)."""
        stream = (spans_s2[:, 0] >= start) & (spans_s2[:, 1] <= end) & (spans_s2[:, 1] > spans_s2[:, 0])
        cells = [
            (time, row, column, block)
            for block, (time, rows, columns) in enumerate(
                (time, s.grid.rows, s.grid.columns) for s in plan for time in s.times
            )
            for row in range(rows)
            for column in range(columns)
        ]
        at = torch.isin(ids_s, self._stream_ids()).nonzero()[:, 0][: len(cells)]
        time, row, column, block = map(torch.tensor, zip(*cells, strict=True))
        visual = torch.zeros(len(ids_s), dtype=torch.bool).index_fill(0, at, True)
        # of other tokens: the next visual one's, or the last one's
        follows = torch.searchsorted(at, torch.arange(len(ids_s))).clamp(max=len(at) - 1)
        return StreamPlaces(
            stream,
            visual,
            block[follows],
            (time.double() - float(time[0]))[follows],
            row[follows] * visual,
            column[follows] * visual,
        )

    def _positions(self, places: Sequence[StreamPlaces], mask_bs: Tensor) -> Tensor:
        """[3, B, S] for a host with M-RoPE, else [B, S]; padding has 0."""
        found = [self.base.stream_positions(place) for place in places]
        if found[0] is None:
            return (mask_bs.cumsum(-1) - 1).clamp(min=0)
        positions = torch.zeros(3, *mask_bs.shape, dtype=torch.long)
        for sample, (own, keep) in enumerate(zip(found, mask_bs.bool(), strict=True)):
            positions[:, sample, keep] = own
        return positions

    # ---- where visual tokens lie --------------------------------------------------------------

    def segments(self, inputs: dict[str, Tensor], clips: Sequence[Any]) -> list[list[tuple[Segment, Tensor]]]:
        """Each sample's segments [B][n] with the sequence positions of their tokens, in the order of their grids."""
        pixels = {name: inputs[name] for name in (*self.base.PIXELS, COUNTS)}
        shapes = self.base.frame_shapes(pixels, inputs[COUNTS].tolist())
        found = []
        for clip, shape, ids in zip(clips, shapes, inputs["input_ids"].cpu(), strict=True):
            plan = self._plan(clip, shape)
            positions = torch.isin(ids, self._stream_ids()).nonzero()[:, 0]
            runs = positions[: sum(s.num_tokens for s in plan)].split([s.num_tokens for s in plan])
            found.append(list(zip(plan, runs, strict=True)))
        return found

    def grids(
        self, inputs: dict[str, Tensor], clips: Sequence[Any], which: Sequence[int] | None = None
    ) -> tuple[list[TokenGrid], list[Tensor]]:
        """As Student.grids, of the frames' tokens. Motion tokens, whose cells are others, are in `segments`."""
        grids, columns = [], []
        for sample in self.segments(inputs, clips):
            frames = [(segment.grid, positions) for segment, positions in sample if not segment.moving]
            first = frames[0][0]
            grids.append(
                TokenGrid(
                    torch.cat([grid.spans for grid, _ in frames]),
                    first.row_edges,
                    first.column_edges,
                    torch.cat([grid.valid for grid, _ in frames]),
                )
            )
            columns.append(torch.cat([positions for _, positions in frames]))
        return grids, columns

    def videos(self, inputs: dict[str, Tensor]) -> list[list[Video]]:
        raise ModelError("An adapter's stream is no stock video: use segments(inputs, clips) or grids(inputs, clips).")
