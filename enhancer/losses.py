"""The answer loss of a batch.

Legend: B samples of a batch, S sequence positions, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn

from vlm_hooks.encoding import IGNORED


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross entropy (nats) of the answers' tokens; logits [B, S, V], labels [B, S] unshifted."""
    target = labels[:, 1:]
    learnt = target != IGNORED
    # only the learnt positions in float32: all of them are large with a real vocabulary
    return nn.functional.cross_entropy(logits[:, :-1][learnt].float(), target[learnt], reduction="sum")
