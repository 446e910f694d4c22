"""Names of models: `world` is the small one shipped with the package, the rest are folders or hub names."""

from __future__ import annotations

import re
from pathlib import Path

from vdm_priors.errors import ModelError

SHIPPED = Path(__file__).resolve().parent / "models"
WORLD = "world"
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def teacher_path(name: str) -> str:
    """Folder or hub name of the teacher. ModelError where the shipped one is not there."""
    return _path(name, "world-teacher")


def student_path(name: str) -> str:
    """Folder or hub name of the student. ModelError where the shipped one is not there."""
    return _path(name, "world-student")


def _path(name: str, shipped: str) -> str:
    if name != WORLD:
        if not HUB_NAME.fullmatch(name) and not Path(name).is_dir():
            raise ModelError(f"There is no model folder {name}, and that is no hub name like owner/model. Check the path.")
        return name
    folder = SHIPPED / shipped
    if not folder.is_dir():
        raise ModelError(f"The shipped model {shipped} is not in {SHIPPED}: this copy of the package is incomplete. "
                         f"Install it again, or train it with the recipes of `enhancer ls world`.")
    return str(folder)


def weights_bytes(path: str) -> int | None:
    """Size of the folder's weight files; None for a hub name, whose size is not known before the download."""
    folder = Path(path)
    if not folder.is_dir():
        return None
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def torch_device(name: str) -> str:
    """The device to compute on; `auto` is the first GPU, or the CPU where there is none."""
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def quiet_libraries() -> None:
    """Turns off transformers' own progress bars, which would break ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
