"""A text as a teacher reads it: its embeddings alone, or with the mask and the summary that some families need.

Legend: B texts, L text tokens, D text width, P width of the summary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MaskedText:
    """embeds [B, L, D]; mask bool [B, L], False for padding; pooled [B, P], a summary of the whole text, or None."""

    embeds: Tensor
    mask: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, entries: slice | Sequence[int]) -> MaskedText:
        pooled = None if self.pooled is None else self.pooled[entries]
        return MaskedText(self.embeds[entries], self.mask[entries], pooled)


TextInput = Tensor | MaskedText  # what a family's encode_text gives and its predict takes


def said_by(text: TextInput) -> Tensor:
    """The embeddings of what is no masked padding, [..., D]."""
    return text if isinstance(text, Tensor) else text.embeds[text.mask]


def repeat_text(text: TextInput, batch: int) -> TextInput:
    """A single text, for each of `batch` clips."""
    if isinstance(text, Tensor):
        return text.expand(batch, -1, -1)
    return text[[0] * batch]


def join_texts(texts: Sequence[TextInput]) -> TextInput:
    """Texts of one teacher, one after the other in one batch."""
    if isinstance(texts[0], Tensor):
        return torch.cat(list(texts))
    pooled = None if texts[0].pooled is None else torch.cat([text.pooled for text in texts])
    return MaskedText(
        torch.cat([text.embeds for text in texts]), torch.cat([text.mask for text in texts]), pooled
    )
