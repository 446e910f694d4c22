"""From a processor's batch back to the text: which characters every token came from, and what is learnt.

A processor replaces the placeholder of a video by visual tokens, and by what it writes between them (frame numbers,
times). Words are matched in the text before that, so spans of the longer text are carried back to it.

Legend: B samples, S sequence positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vdm_priors.errors import SampleError

IGNORED = -100  # label of positions that are not learnt
Spans = list[tuple[int, int]]


class Prompt(NamedTuple):
    """A prompt's text, with one unexpanded video, and where its question begins."""

    text: str
    question_start: int


@dataclass(frozen=True)
class Encoding:
    """A batch for the model and where its tokens come from.

    inputs: keyword arguments of the model; texts [B]: prompt + answer + end token, with the video placeholder
    unexpanded; offsets [B][S]: each position's characters in that text, (0, 0) for special, visual and padding tokens
    and for what the processor writes between visual ones; answer_starts [B]: character at which the answer begins
    (the text's length without answers).
    """

    inputs: dict[str, Tensor]
    texts: list[str]
    offsets: list[Spans]
    answer_starts: list[int]


def original_offsets(
    spans_bs2: Tensor, replaced: Sequence[Sequence[Mapping[str, Any]]], blank_bs: Tensor
) -> list[Spans]:
    """Spans [B][S] in the unexpanded texts of tokens whose spans [B, S, 2] lie in the expanded ones.

    replaced [B]: each sample's replacements in order, with "span" before and "new_span" after (transformers'
    `text_replacement_offsets`); blank [B, S]: positions that get (0, 0). So does a token that lies in a replacement;
    of one that reaches into it, the part outside counts.
    """
    offsets = []
    for spans_s2, replacements, blank in zip(spans_bs2, replaced, blank_bs, strict=True):
        starts, ends = spans_s2.unbind(dim=1)
        original_starts, original_ends = starts.clone(), ends.clone()
        for replacement in replacements:
            (start, end), (new_start, new_end) = replacement["span"], replacement["new_span"]
            original_starts = torch.where(starts >= new_start, (starts - new_end).clamp(min=0) + end, original_starts)
            after = torch.where(ends > new_end, ends - new_end + end, start)
            original_ends = torch.where(ends > new_start, after, original_ends)
        nothing = blank | (original_ends <= original_starts)
        pairs = torch.stack([original_starts, original_ends], dim=1).masked_fill(nothing[:, None], 0)
        offsets.append([(start, end) for start, end in pairs.tolist()])
    return offsets


def answer_labels(
    ids_bs: Tensor, attention_mask_bs: Tensor, offsets: Sequence[Spans], starts: Sequence[int], names: Sequence[str]
) -> Tensor:
    """Labels [B, S]: the ids from each answer's first token on, IGNORED before it and in the padding.

    starts [B]: the answers' first characters. Raises SampleError where one does not begin at a token of its own.
    """
    labels = ids_bs.clone()
    for index, (spans, start, name) in enumerate(zip(offsets, starts, names, strict=True)):
        first = next(position for position, span in enumerate(spans) if span[1] > start)
        if spans[first][0] != start:
            raise SampleError(
                f"The answer of sample {name} does not begin at a token of its own after the prompt: end the prompt as "
                "the processor's chat template does."
            )
        labels[index, :first] = IGNORED
    return labels.masked_fill(attention_mask_bs == 0, IGNORED)
