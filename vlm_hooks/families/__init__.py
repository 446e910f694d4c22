"""Student families: one file each, found by the model types it names.

A family file has MODEL_TYPES (transformers' `config.model_type` values) and a class Student (vlm_hooks/student.py).
Where the same weights also exist as a checkpoint with code of its own, ORIGINALS names that checkpoint's model type or
architecture, and `stock_checkpoint(name)` the one that transformers' own classes load.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

import torch
from transformers import PreTrainedConfig

from vdm_priors.errors import ModelError
from vlm_hooks.student import Student


def known_families() -> dict[str, ModuleType]:
    """Model type -> family module, for every file of this folder."""
    families = {}
    for module in _modules():
        families.update(dict.fromkeys(module.MODEL_TYPES, module))
    return families


def find_family(path_or_hub: str | Path) -> ModuleType:
    """The family module of a folder or hub name, from its config.json alone; no code of the checkpoint is run.

    Raises ModelError if the config cannot be read, for an unknown family, and for a checkpoint that needs code of its
    own, with the name of the one to use instead.
    """
    name = str(path_or_hub)
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
        if "model_type" not in config:
            raise ValueError("there is no config.json that names a model_type.")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The student model {name!r} cannot be read: {error} Give a folder written by save_pretrained or a hub "
            "name that this machine can reach."
        ) from error
    kinds = [config["model_type"], *(config.get("architectures") or [])]
    for module in _modules():
        if set(kinds) & set(getattr(module, "ORIGINALS", ())):
            raise ModelError(
                f"The student model {name!r} is an original checkpoint that runs code of its own, which is never done "
                f"here. Use {module.stock_checkpoint(name)}, made for transformers' own classes."
            )
    families = known_families()
    if kinds[0] not in families:
        raise ModelError(
            f"The student model {name!r} is of the family {kinds[0]!r}, which has no file in vlm_hooks/families; "
            f"known: {', '.join(sorted(families))}."
        )
    return families[kinds[0]]


def load_student(
    path_or_hub: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attn: str = "sdpa",
) -> Student:
    """Load a vision-language model and its processor: a Student of the family it belongs to.

    Raises ModelError as `find_family`, and if the folder is incomplete.
    """
    return find_family(path_or_hub).Student.load(path_or_hub, dtype, device, attn)


def _modules() -> list[ModuleType]:
    return [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
