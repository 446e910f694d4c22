"""Numbers that must be finite: how many are not, and which part of a network made the first of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from vdm_priors.errors import ModelError


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # a sum is finite only if all are, or if finite values overflow: then look at each
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def require_finite(values: Tensor, what: str, remedy: str) -> None:
    """Raises ModelError, beginning with `what`, if a value is NaN or infinite."""
    if not all_finite(values):
        count = int((~values.isfinite()).sum())
        raise ModelError(f"{what}: {count} of {values.numel()} values are NaN or infinite. {remedy}")


def broken_part(networks: Iterable[torch.nn.Module], forward: Callable[[], Any]) -> str | None:
    """The innermost part of the networks whose output is the first with a NaN or infinite value while `forward` runs.

    None if there is none. For the message of an error: looks at every number, and so takes its time.
    """
    found: list[str] = []

    def looking(name: str) -> Callable[..., None]:
        def look(module: Any, inputs: Any, output: Any) -> None:
            if not found and not all(map(all_finite, _tensors(output))):
                found.append(name)

        return look

    hooks = [part.register_forward_hook(looking(name or type(part).__name__))
             for network in networks for name, part in network.named_modules()]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _tensors(output: Any) -> Iterator[Tensor]:
    for value in output if isinstance(output, (tuple, list)) else [output]:
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value
