"""A teacher without its weights: the family's own class over networks on the meta device, from JSON files alone.

It knows its geometry (clips and sizes it takes, tokens, layers, how it is guided) and its parameters' shapes, so that a
run can be checked and counted before anything is downloaded or loaded.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from vdm_priors.errors import ModelError
from vdm_priors.fingerprint import configuration_folder

INDEX_FILE = "model_index.json"
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
SCHEDULER = "scheduler_config.json"


class _NoTokenizer:
    """Stands for a tokenizer: its vocabulary is megabytes, and no size depends on it."""

    is_fast, padding_side = True, "right"  # as every family wants it
    model_max_length = None


def skeleton_pipeline(family: str, kind: type, path_or_hub: str | Path) -> tuple[Any, Path]:
    """A diffusers pipeline of class `kind` with every network on the meta device, and the folder of its configurations.

    Takes megabytes and seconds, however large the model. Raises ModelError for a configuration that is missing,
    cannot be read or makes no network, and for a hub name that cannot be reached.
    """
    folder = configuration_folder(path_or_hub)
    index = _read(folder / INDEX_FILE)
    accepted = inspect.signature(kind.__init__).parameters
    parts = {}
    for name, value in index.items():
        if name not in accepted:  # records of diffusers' own, and parts that only other versions know
            continue
        parts[name] = _part(family, folder / name, *value) if isinstance(value, list) else value
    try:
        return kind(**parts), folder
    except Exception as error:  # diffusers raises kinds of its own
        raise _unusable(family, folder, error) from error


def _part(family: str, folder: Path, library: str | None, name: str | None) -> Any:
    """One part that model_index.json names; None where it says that there is none."""
    if name is None:
        return None
    kind = getattr(LIBRARIES.get(library), name, None)
    if kind is None:
        raise ModelError(
            f"The {family} teacher's {folder.name} is a {library}.{name}, which the installed libraries do not have. "
            f"Update diffusers and transformers, or give a folder that save_pretrained wrote with them."
        )
    is_network = issubclass(kind, torch.nn.Module)
    if not is_network and not (folder / SCHEDULER).is_file():
        return _NoTokenizer()
    config = _read(folder / ("config.json" if is_network else SCHEDULER))
    try:
        if not is_network:
            return kind.from_config(config)
        with torch.device("meta"):
            if issubclass(kind, transformers.PreTrainedModel):
                return kind(kind.config_class.from_dict(config))
            return kind.from_config(config)
    except Exception as error:  # whatever a network's code raises at a wrong value
        raise _unusable(family, folder, error) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"The teacher's {path} cannot be read ({error}): copy the folder whole.") from error


def _unusable(family: str, folder: Path, error: Exception) -> ModelError:
    return ModelError(
        f"The configurations in {folder} make no {family} teacher ({type(error).__name__}: "
        f"{' '.join(str(error).split())[:300]}). Copy the folder whole, from one model."
    )
