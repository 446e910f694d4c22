"""Cross-stream memory: a generated clip may look at the clip that it shall reproduce.

Two kinds of stream share a batch. A generated stream's queries attend to the keys and values of
[text_gen, vision_gen, text_ref, vision_ref]; a reference stream attends to itself only, so its
activations are those of running it alone. Both have the same rotary positions on vision, none
on text (TEACHER.md, "Cross-stream memory"). Where text is attended to separately, the streams
share the keys and values of vision's self-attention, and each reads its own text.

kept_memory.py does without the reference streams, by keys and values that the inversion left.

Legend: b batch, g generated entries, h heads, s tokens of one stream, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vdm_priors.attention import swapped_processors
from vdm_priors.errors import ModelError
from vdm_priors.kernels import attention


class Memory(Protocol):
    """What an attention layer's generated entries see beside themselves: `Streams`, or vdm_priors.kept_memory's."""

    @property
    def generated(self) -> int: ...
    def check(self, batch: int) -> None: ...
    def keys(self, k_bhsd: Tensor, entries: list[int] | None = None) -> Tensor: ...
    def values(self, v_bhsd: Tensor) -> Tensor: ...
    def mask(self, mask_b11s: Tensor, entries: list[int] | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Streams:
    """Which batch entries are generated and which reference each of them sees.

    The first len(reference_of) entries are generated; entry i of them sees batch entry
    reference_of[i]. The other entries are references.
    """

    reference_of: tuple[int, ...]

    @classmethod
    def of_clips(cls, clips: int, guided: bool) -> Streams:
        """The batch order of `reconstruct`: [text, negative text if guided, reference] clips."""
        passes = 2 if guided else 1
        return cls(tuple(passes * clips + i for i in range(clips)) * passes)

    @property
    def generated(self) -> int:
        return len(self.reference_of)

    def check(self, batch: int) -> None:
        """Raises ModelError if a forward's batch is not of this layout."""
        if not all(self.generated <= i < batch for i in self.reference_of):
            raise ModelError(
                f"Memory: a forward of batch {batch} does not fit {self.generated} generated "
                f"entries with references at {list(self.reference_of)}. Run only the batch that "
                f"the layout describes inside reference_memory()."
            )

    def keys(self, k_bhsd: Tensor, entries: list[int] | None = None) -> Tensor:
        """What the generated `entries` (default: all) attend to, [n, h, 2s, d]."""
        return self._with_reference(k_bhsd, entries, dim=2)

    def values(self, v_bhsd: Tensor) -> Tensor:
        """The values of all `keys`."""
        return self._with_reference(v_bhsd, None, dim=2)

    def mask(self, mask_b11s: Tensor, entries: list[int] | None = None) -> Tensor:
        """What hides them, [n, 1, 1, 2s]."""
        return self._with_reference(mask_b11s, entries, dim=3)

    def _with_reference(self, x: Tensor, entries: list[int] | None, dim: int) -> Tensor:
        entries = list(range(self.generated)) if entries is None else entries
        reference = [self.reference_of[i] for i in entries]
        return torch.cat([entries_of(x, entries), entries_of(x, reference)], dim=dim)


def entries_of(values: Tensor, entries: list[int]) -> Tensor:
    """values[entries] along the batch, without a copy where the entries follow one another."""
    first = entries[0]
    if entries == list(range(first, first + len(entries))):
        return values[first : first + len(entries)]
    return values[torch.tensor(entries, device=values.device)]


def attend(
    q_bhsd: Tensor,
    k_bhsd: Tensor,
    v_bhsd: Tensor,
    streams: Memory | None,
    mask_b11s: Tensor | None = None,
    kernel: Callable[..., tuple[Tensor, Tensor | None]] = attention,
    lse: bool | None = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention output [b, h, s, d], without streams exactly what diffusers computes, and its rows' log-sum-exp.

    The latter is float32 [g, h, s], of generated streams over all that they see, or None if `lse` does not ask for it;
    with lse None it is there where it costs nothing.
    `mask` (bool, or a bias that is added) hides keys; `kernel` is called as vdm_priors.kernels.attention is.
    """
    if streams is None:
        return kernel(q_bhsd, k_bhsd, v_bhsd, attn_mask=mask_b11s, lse=lse)
    streams.check(len(q_bhsd))
    g = streams.generated
    seen = None if mask_b11s is None else streams.mask(mask_b11s)
    generated, lse_ghs = kernel(q_bhsd[:g], streams.keys(k_bhsd), streams.values(v_bhsd), attn_mask=seen, lse=lse)
    if len(q_bhsd) == g:
        return generated, lse_ghs
    alone = None if mask_b11s is None else mask_b11s[g:]
    references, _ = kernel(q_bhsd[g:], k_bhsd[g:], v_bhsd[g:], attn_mask=alone)
    return torch.cat([generated, references]), lse_ghs


@contextmanager
def reference_memory(teacher: Any, streams: Streams) -> Iterator[None]:
    """Inside, every forward of the teacher's transformers is a batch of these streams."""
    with extended_attention(teacher, lambda *_: {"streams": streams}):
        yield


@contextmanager
def extended_attention(teacher: Any, extension: Callable[[int, str], dict[str, Any]]) -> Iterator[None]:
    """Inside, the processors of the teacher's attention layers also do what `extension(model, key)` names.

    model: its place in `attention_models`, whose attn_processors have the key.
    """
    layers: dict[int, set[str]] = {}
    for layer in teacher.attention_layers:
        layers.setdefault(layer.model, set()).update(layer.keys)
    with ExitStack() as stack:
        for index, model in enumerate(teacher.attention_models):

            def build(key: str, processor: Any, index: int = index) -> Any:
                if key not in layers.get(index, ()):
                    return processor
                return teacher.attention_processor(key.removesuffix(".processor"), processor, **extension(index, key))

            stack.enter_context(swapped_processors(model, build))
        yield
