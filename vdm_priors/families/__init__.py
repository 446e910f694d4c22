"""Teachers: one file per family of video diffusion models, found by its name.

A family file has `accepts(model_index) -> bool`, asked with the content of a diffusers folder's
model_index.json, `load(path_or_hub, dtype, device) -> Teacher`, and, which load no weights,
`skeleton(path_or_hub) -> Teacher` and `trained_frames(path_or_hub) -> int`. Nothing outside it knows the family.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from vdm_priors.attention import AttentionLayer
from vdm_priors.conditioning import TextInput
from vdm_priors.errors import ModelError
from vdm_priors.fingerprint import hub_commit
from vdm_priors.grid import TokenGrid
from vdm_priors.schedules import Schedule

INDEX_FILE = "model_index.json"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Teacher(Protocol):
    """What extraction asks of a family. Legend: B clips, N frames, F latent frames, L text tokens.

    networks: the transformers, of which a model in stages has several; attention_models: the same, with diffusers'
        attn_processors interface.
    attention_layers: their attention layers over vision, as heads are counted.
    attention_processor: one that computes bit for bit what `previous` does and also tells a recorder
        (layer index, Harvest) of it, attends to a reference as well (`streams`: vdm_priors.memory.Memory), or gives a
        `keeper` its keys, values and mask.
    scheduler: diffusers' scheduler of the model, for records.
    schedule: the model's own levels of noise for latents [B, F, C, h, w] (vdm_priors.schedules).
    guidance_kind: "batched" text and negative text share a forward, "separate" each has its own,
        "embedded" the network is told the guidance: `predict` then takes `guidance`.
    encode_text: what `predict` takes for a text, and the characters of each of its L tokens; special and padding
        tokens have empty spans, whatever attention they get, so that they are never part of a word.
    predict: v of the schedule's kind, float32 [B, F, C, h, w]; latents are float32 between steps, the networks
        run in the number format they were loaded in.
    offload: brings the transformers to a device, and the other networks only while they work; offloaded: that it has.
    max_text_tokens is L; trained_frames is N of the clips that it was trained on, or that its pipeline makes.
    """

    folder: Path
    max_text_tokens: int
    trained_frames: int
    guidance_kind: str
    offloaded: bool
    scheduler: Any
    networks: Sequence[Any]
    attention_models: Sequence[Any]
    attention_layers: Sequence[AttentionLayer]

    def fingerprint(self) -> str: ...
    def offload(self, device: str | torch.device) -> None: ...
    def schedule(self, shape: Sequence[int]) -> Schedule: ...
    def check_frames(self, frames: int) -> None: ...
    def frame_size(self, size: tuple[int, int] | None = None) -> tuple[int, int]: ...
    def prepare_frames(self, frames: Any, size: tuple[int, int] | None = None) -> Tensor: ...
    def encode_video(self, pixels: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor, frames: int | None = None) -> Tensor: ...
    def encode_text(self, texts: Sequence[str]) -> tuple[TextInput, list[list[tuple[int, int]]]]: ...
    def predict(self, latents: Tensor, timestep: float, embeds: TextInput) -> Tensor: ...
    def token_grid(
        self,
        frame_times: Sequence[float],
        duration: float | None,
        box: Sequence[float],
        size: tuple[int, int] | None = None,
    ) -> TokenGrid: ...
    def attention_processor(
        self, layer: str, previous: Any, recorder: Any = None, streams: Any = None, keeper: Any = None
    ) -> Any: ...


def load_teacher(
    path_or_hub: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
    offload: bool = False,
) -> Teacher:
    """Load a diffusers folder, or a hub name like "THUDM/CogVideoX-2b", by its family.

    offload: text encoders and VAE wait in main memory and come to the device only while they work.
    Reads safetensors and JSON only; never runs code of the folder. Raises ModelError for a
    missing or incomplete folder and for an unknown family, listing the known ones.
    """
    family = family_of(path_or_hub)
    if not offload:
        return family.load(path_or_hub, dtype=dtype, device=device)
    teacher = family.load(path_or_hub, dtype=dtype, device="cpu")
    teacher.offload(device)
    return teacher


def load_skeleton(path_or_hub: str | Path) -> Teacher:
    """A teacher without weights or tokenizer, its networks on the meta device, from its configurations alone.

    For its geometry and for counting (vdm_priors.estimate). Raises ModelError as `load_teacher`.
    """
    return family_of(path_or_hub).skeleton(path_or_hub)


def family_of(path_or_hub: str | Path) -> ModuleType:
    """The family file of a teacher, from its model_index.json alone. Raises ModelError as `load_teacher`."""
    index = _model_index(path_or_hub)
    if "_class_name" not in index:
        raise ModelError(
            f"The {INDEX_FILE} of the teacher {path_or_hub} names no _class_name. Give a diffusers pipeline folder, as "
            f"save_pretrained writes it."
        )
    known = []
    for family in _families():
        if family.accepts(index):
            return family
        known.append(family.__name__.rpartition(".")[2])
    raise ModelError(
        f"The teacher {path_or_hub} is a {index['_class_name']!r}, which no family file knows. "
        f"Known families: {', '.join(known)}. Choose a model of one of them, or add a file to "
        f"vdm_priors/families."
    )


def trained_frames(path_or_hub: str | Path) -> int:
    """How many frames a clip had that a teacher was trained on, from its configurations alone.

    Raises ModelError as `load_teacher`, and where they do not say it.
    """
    return family_of(path_or_hub).trained_frames(path_or_hub)


def _families() -> Iterator[ModuleType]:
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):  # a family's own helper
            yield importlib.import_module(f"{__name__}.{module.name}")


def _model_index(path_or_hub: str | Path) -> dict[str, Any]:
    """Content of model_index.json of a local folder, else of a hub model."""
    folder = Path(path_or_hub)
    if folder.exists():
        try:
            index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(
                f"The teacher folder {folder} has no readable {INDEX_FILE} ({error}). Give a "
                f"diffusers pipeline folder, as save_pretrained writes it."
            ) from error
        return index if isinstance(index, dict) else {}
    if not HUB_NAME.fullmatch(str(path_or_hub)):
        raise ModelError(
            f"There is no teacher folder {path_or_hub}, and that is no hub name like owner/model. "
            f"Check the path."
        )
    from diffusers import DiffusionPipeline

    commit = hub_commit(str(path_or_hub))
    try:
        return dict(DiffusionPipeline.load_config(str(path_or_hub), revision=commit))
    except Exception as error:  # the hub client raises many kinds; all mean: not to be had
        raise ModelError(
            f"The teacher {path_or_hub} is no local folder and could not be found on the hub "
            f"({type(error).__name__}: {error}). Check the name, the network and your access, or set teacher.model "
            f"to the folder of a copy: `hf download {path_or_hub} --local-dir FOLDER` where there is a network."
        ) from error
