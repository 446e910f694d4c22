"""Where memory runs out: how that is recognised, and which setting needs less, by how much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from enhancer.runfolder import machine_memory
from vdm_priors.errors import UserError

MB = 2**20
SIGNS = ("can't allocate memory", "not enough memory", "out of memory")  # PyTorch's CPU allocator, and older CUDA's


class OutOfMemory(UserError):
    """The teacher needs more memory than there is; the message names the settings that need less."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in PyTorch's CPU allocator."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def device_memory() -> int | None:
    """Bytes of the first GPU, or of the machine where there is none; None if unknown."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return machine_memory()


def out_of_memory(error: BaseException, teacher: Any, settings: Any, frames: int, size: Sequence[int] | None,
                  batch_size: int, dtype: str) -> OutOfMemory:
    """What to tell of an extraction that ran out of memory: the estimate, and each setting that lowers it."""
    from vdm_priors.estimate import estimate, smaller_choices

    cost = estimate(teacher, settings, frames, size, batch_size, dtype, count_vae=False)
    have = device_memory()
    there = f" of {have / MB:,.0f} MB that there are" if have else ""
    clips = "one clip" if batch_size == 1 else f"{batch_size} clips"
    return OutOfMemory(
        f"Out of memory while the teacher extracted {clips} of {frames} frames {cost.size[0]}×{cost.size[1]} in "
        f"{dtype}: it needs about {cost.memory / MB:,.0f} MB{there} (weights {cost.weights / MB:,.0f}, activations "
        f"{cost.activations / MB:,.0f}, harvest {cost.harvest / MB:,.0f}, keys that are kept {cost.kept / MB:,.0f} MB; "
        f"an estimate). To need less, {saying(smaller_choices(teacher, settings, cost))}. What is finished is kept. "
        f"PyTorch said: {' '.join(str(error).split())[:200].rstrip('.')}."
    )


def saying(choices: Sequence[tuple[str, Any]]) -> str:
    """Each setting with what would be needed then."""
    if not choices:
        return "take a smaller teacher"
    return "set " + ", or ".join(f"{key} (about {cost.memory / MB:,.0f} MB)" for key, cost in choices)
