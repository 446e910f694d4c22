"""Cross-stream memory: a generated clip may look at the clip that it shall reproduce.

Two kinds of stream share a batch. A generated stream's queries attend to the keys and values of
[text_gen, vision_gen, text_ref, vision_ref]; a reference stream attends to itself only, so its
activations are those of running it alone. Both have the same rotary positions on vision, none
on text (TEACHER.md, "Cross-stream memory").

Legend: b batch, g generated entries, h heads, s tokens of one stream, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vdm_priors.attention import swapped_processors
from vdm_priors.errors import ModelError


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

    def with_reference(self, values_bhsd: Tensor, entries: list[int] | None = None) -> Tensor:
        """Keys or values [n, h, 2s, d] that the generated `entries` (default: all) attend to."""
        entries = list(range(self.generated)) if entries is None else entries
        own = torch.tensor(entries, device=values_bhsd.device)
        reference = torch.tensor(
            [self.reference_of[i] for i in entries], device=values_bhsd.device
        )
        return torch.cat([values_bhsd[own], values_bhsd[reference]], dim=2)


def attend(q_bhsd: Tensor, k_bhsd: Tensor, v_bhsd: Tensor, streams: Streams | None) -> Tensor:
    """Attention output [b, h, s, d]; without streams exactly what diffusers computes."""
    if streams is None:
        return scaled_dot_product_attention(q_bhsd, k_bhsd, v_bhsd)
    streams.check(len(q_bhsd))
    g = streams.generated
    generated = scaled_dot_product_attention(
        q_bhsd[:g], streams.with_reference(k_bhsd), streams.with_reference(v_bhsd)
    )
    reference = scaled_dot_product_attention(q_bhsd[g:], k_bhsd[g:], v_bhsd[g:])
    return torch.cat([generated, reference])


@contextmanager
def reference_memory(teacher: Any, streams: Streams) -> Iterator[None]:
    """Inside, every forward of the teacher's transformer is a batch of these streams."""

    def build(index: int, layer: str, processor: Any) -> Any:
        return teacher.attention_processor(layer, processor, streams=streams)

    with swapped_processors(teacher.transformer, build):
        yield
