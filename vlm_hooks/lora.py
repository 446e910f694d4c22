"""Low-rank adapters (LoRA, by peft) inside a student, and the way back to a plain model.

The student's model stays the transformers model that it is: the adapters are put into it, trained beside its own frozen
weights, and merged into them at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vdm_priors.errors import UserError

MARK = "lora_"  # in the name of every parameter of an adapter
TRAINED_FILE = "trained.safetensors"


def add_lora(
    student: Any, rank: int, alpha: float, dropout: float, targets: Sequence[str], parts: Sequence[str]
) -> PeftModel:
    """Adapters in every linear layer of the student's `parts` whose name ends with one of `targets`.

    student.model is changed in place; the handle that comes back is for `merge_lora`. Adapters begin as zero: the
    model's outputs do not change. Raises UserError for a target that no layer has.
    """
    # a codec adapter wraps the transformers model, which is what peft knows how to handle
    model = student.model.get_base_model() if hasattr(student.model, "get_base_model") else student.model
    inside = {id(parameter) for part in parts for _, parameter in student.parts()[part]}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module.weight) in inside]
    chosen = [name for name in linear if name.rsplit(".", 1)[-1] in targets]
    missing = [target for target in targets if not any(name.endswith(f".{target}") for name in chosen)]
    if missing:
        there = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
        raise UserError(f"training.lora.targets: no linear layer of {', '.join(parts)} is called {', '.join(missing)}; "
                        f"there are {there}.")
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen)
    return get_peft_model(model, config)


def merge_lora(handle: PeftModel) -> None:
    """Adds the adapters to the weights they belong to and takes them out: student.model is plain again."""
    handle.merge_and_unload()


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return MARK in name


def save_trained(model: nn.Module, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """The trained parameters and the saved buffers (batch norms' means) alone, by name; all others are those that the
    training began with.

    state: the gathered state dict where the parameters are sharded.
    """
    state = dict(model.named_parameters()) if state is None else state
    trained = {name: state[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = model.state_dict().keys()
    trained |= {name: buffer for name, buffer in model.named_buffers() if name in kept}
    save_file({name: trained[name].detach().contiguous().cpu() for name in sorted(trained)}, folder / TRAINED_FILE)


def load_trained(model: nn.Module, folder: Path) -> None:
    """What `save_trained` wrote, into a model with the same adapters and starting weights."""
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in load_file(folder / TRAINED_FILE).items():
            own[name].copy_(tensor)
