"""Attention layers of a model, where text and vision lie in them, and processors that are put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AttentionLayer:
    """One layer as heads are counted: its name, its model's place in `attention_models`, its processors' keys.

    A joint layer has one processor; where text is attended to separately, self- and cross-attention are one layer.
    """

    name: str
    model: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Where text and vision tokens lie in an attention's sequence; `text` is empty where vision attends to itself."""

    text: slice
    vision: slice

    @classmethod
    def text_first(cls, text: int, tokens: int) -> Layout:
        return cls(slice(0, text), slice(text, tokens))

    @classmethod
    def text_last(cls, text: int, tokens: int) -> Layout:
        return cls(slice(tokens - text, tokens), slice(0, tokens - text))

    @classmethod
    def vision_only(cls, tokens: int) -> Layout:
        return cls(slice(0, 0), slice(0, tokens))

    @property
    def text_tokens(self) -> int:
        return self.text.stop - self.text.start

    @property
    def vision_tokens(self) -> int:
        return self.vision.stop - self.vision.start

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.vision_tokens

    def in_streams(self, part: slice, keys: int) -> list[slice]:
        """Where `part`, text or vision, lies among the keys of one stream, or of several one after the other."""
        return [slice(first + part.start, first + part.stop) for first in range(0, keys, self.tokens)]


@contextmanager
def swapped_processors(model: Any, build: Callable[[str, Any], Any]) -> Iterator[None]:
    """Set `build(key, processor)` on every attention layer of a diffusers model.

    Uses the public `attn_processors` and `set_attn_processor`; on exit the very same objects
    are back, whatever happened inside.
    """
    before = dict(model.attn_processors)
    try:
        model.set_attn_processor({key: build(key, processor) for key, processor in before.items()})
        yield
    finally:
        model.set_attn_processor(dict(before))  # diffusers empties the dict that it is given
