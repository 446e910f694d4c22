"""Loading a frozen diffusers pipeline, whole or not at all: safetensors and JSON only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from vdm_priors.errors import ModelError
from vdm_priors.fingerprint import hub_commit


def load_pipeline(
    family: str, kind: type, path_or_hub: str | Path, dtype: torch.dtype, device: str | torch.device
) -> tuple[Any, Path]:
    """A diffusers pipeline of class `kind` and its folder. Raises ModelError if it cannot be used."""
    source = str(path_or_hub)
    bars = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    try:
        for log in bars:
            log.disable_progress_bar()
        folder = Path(source)
        if not folder.exists():
            commit = hub_commit(source)  # of which the keys of priors speak
            folder = Path(kind.download(source, revision=commit, use_safetensors=True))
        options = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
        pipeline = kind.from_pretrained(folder, **_text_encoders(folder, options), **options)
        for part, module in pipeline.components.items():
            empty = [name for name, weight in module.named_parameters() if weight.is_meta] if _is_module(module) else []
            _require_whole(part, empty)
            _require_vocabulary(folder / part, module)
    except Exception as error:  # diffusers, transformers and safetensors raise kinds of their own
        raise ModelError(
            f"The {family} teacher {source} could not be loaded ({_reason(error)}). Check that all parts that its "
            f"model_index.json names are there, as safetensors, and of one model."
        ) from error
    finally:
        for log in bars:
            log.enable_progress_bar()
    return pipeline.to(device), folder


def _text_encoders(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The pipeline's transformers models, loaded here because weights that are not there would be drawn at random."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    loaded = {}
    for part, entry in index.items():
        kind = getattr(transformers, entry[1], None) if isinstance(entry, list) and entry[0] == "transformers" else None
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            try:
                loaded[part], info = kind.from_pretrained(folder / part, output_loading_info=True, **options)
            except Exception as error:  # whose message may name neither part nor file
                raise ModelError(f"its {part}: {_reason(error)}") from error
            _require_whole(part, sorted(info["missing_keys"]))
    return loaded


def _reason(error: Exception) -> str:
    kind = "" if isinstance(error, ModelError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:400]


def _is_module(part: Any) -> bool:
    return isinstance(part, torch.nn.Module)


def _require_whole(part: str, missing: Sequence[str]) -> None:
    if missing:
        raise ModelError(f"the files of its {part} lack {len(missing)} weights, of them {missing[0]}")


def _require_vocabulary(folder: Path, part: Any) -> None:
    """transformers makes a tokenizer without a vocabulary where there is no file of it: every word is unknown then."""
    files = getattr(part, "vocab_files_names", {}).values()
    if files and not any((folder / name).is_file() for name in files):
        raise ModelError(f"its {folder.name} has no vocabulary: none of {', '.join(files)}")
