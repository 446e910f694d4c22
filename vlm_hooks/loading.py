"""From a folder or a hub name to a student: its model and processor, or its processor alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vdm_priors.errors import ModelError


class Loading:
    """The part of a student that loads it and checks that model and processor belong together."""

    folder: str

    def same_in_both(self) -> list[tuple[str, Any, Any]]:
        """(name, the model's value, the processor's value) of what both must agree on."""
        return []

    @classmethod
    def load(
        cls,
        path_or_hub: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        attn: str = "sdpa",
    ) -> Self:
        """Model and processor of a folder or hub name. Raises ModelError if it is incomplete or damaged."""
        name = str(path_or_hub)
        try:
            processor = AutoProcessor.from_pretrained(name)
            model, found = AutoModelForImageTextToText.from_pretrained(
                name, dtype=dtype, attn_implementation=attn, output_loading_info=True
            )
        except Exception as error:  # transformers, safetensors and tokenizers raise kinds of their own
            raise ModelError(
                f"The student model {name!r} cannot be loaded ({_reason(error)}). A complete folder holds config.json, "
                "model.safetensors, the tokenizer and the processor's files."
            ) from error
        if missing := sorted(found["missing_keys"]):  # they would be random numbers
            raise ModelError(
                f"The student model {name!r} cannot be loaded: its files lack {len(missing)} weights, of them "
                f"{missing[0]}. Copy or export the model again."
            )
        student = cls(model.to(device), processor, name)
        student._check_processor()
        return student

    @classmethod
    def without_weights(cls, path_or_hub: str | Path) -> Self:
        """A student for prompts, batches, token counts and grids: its model has a `config` and nothing to run.

        Raises ModelError.
        """
        name = str(path_or_hub)
        try:
            processor, config = AutoProcessor.from_pretrained(name), AutoConfig.from_pretrained(name)
        except Exception as error:  # as above
            raise ModelError(f"The student model {name!r} cannot be read: {_reason(error)}") from error
        student = cls(SimpleNamespace(config=config, device="cpu"), processor, name)
        student._check_processor()
        return student

    def _check_processor(self) -> None:
        """Raises ModelError where processor and model disagree on the patches or the tokens."""
        for name, ours, theirs in self.same_in_both():
            if ours != theirs:
                raise ModelError(
                    f"The student model {self.folder!r} has {name} {ours}, but its processor {theirs}: the processor's "
                    "files belong to another model."
                )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
