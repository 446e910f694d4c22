"""Student families: one file each, found by the model types it names.

A family file has MODEL_TYPES (transformers' `config.model_type` values) and a class Student
with `load`, `prompt`, `encode`, `grids`, `parts` and the attributes `model`, `processor`,
`tokenizer`, `folder` (see qwen2_5_vl.py).
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoConfig

from vdm_priors.errors import ModelError


def known_families() -> dict[str, ModuleType]:
    """Model type -> family module, for every file of this folder."""
    families = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        families.update(dict.fromkeys(module.MODEL_TYPES, module))
    return families


def load_student(
    path_or_hub: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attn: str = "sdpa",
) -> Any:
    """Load a vision-language model and its processor: a Student of the family it belongs to.

    Raises ModelError if the folder or hub name cannot be read, or for an unknown family.
    """
    name = str(path_or_hub)
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The student model {name!r} cannot be read: {error} Give a folder written by "
            "save_pretrained or a hub name that this machine can reach."
        ) from error
    families = known_families()
    if config.model_type not in families:
        raise ModelError(
            f"The student model {name!r} is of the family {config.model_type!r}, which has no file "
            f"in vlm_hooks/families; known: {', '.join(sorted(families))}."
        )
    return families[config.model_type].Student.load(name, dtype, device, attn)
