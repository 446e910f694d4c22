"""Export of a trained student: a plain folder that stock transformers loads.

Nothing of the training remains: no capture, no aligner, no name of ours in the config.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForImageTextToText

from vdm_priors.errors import ModelError
from vlm_hooks.capture import ATTENTION_NAME


def export(student: Any, folder: str | Path) -> Path:
    """Save the student's model and processor by their own save_pretrained; the folder's path.

    Raises ModelError if the folder cannot be written or its config names the capture.
    """
    folder = Path(folder)
    try:
        student.model.save_pretrained(folder)
        student.processor.save_pretrained(folder)
    except (OSError, AssertionError) as error:
        raise ModelError(
            f"The trained model cannot be written to {str(folder)!r}: {error}. Free some space or "
            "choose another output folder."
        ) from error
    found = [path.name for path in folder.glob("*.json") if _names_capture(path)]
    if found:
        raise ModelError(
            f"The exported {', '.join(found)} in {str(folder)!r} names our attention "
            f"{ATTENTION_NAME!r}, which stock transformers does not know: export outside "
            "`with capture(model)`."
        )
    return folder


def prove_export(student: Any, folder: str | Path, clips: Sequence[Any], prompts: Sequence[str]) -> float:
    """Largest difference of the exported folder's logits from the student's, for B clips and prompts.

    Raises ModelError as `verify_export`, SampleError for a prompt that the student cannot take.
    """
    inputs = student.encode(clips, prompts).inputs
    training = student.model.training
    student.model.eval()
    try:
        with torch.no_grad():
            logits = student.model(**inputs).logits
    finally:
        student.model.train(training)
    return verify_export(folder, inputs, logits)


def verify_export(folder: str | Path, inputs: dict[str, Tensor], logits: Tensor) -> float:
    """Largest difference of the exported model's logits [B, S, V] from the trained model's.

    Loads the folder with stock classes, in the dtype and on the device of `logits`. Raises
    ModelError if the folder cannot be loaded, and unless the difference is 0 (float32 on the
    CPU), at most 1e-5 of the largest logit (float32 elsewhere, where the order of sums is not
    promised), or at most 1e-2 of it (half types).
    """
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            str(folder), dtype=logits.dtype, attn_implementation="sdpa"
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"The model exported to {str(folder)!r} cannot be loaded with stock transformers: "
            f"{' '.join(str(error).split())[:300]} Free disk space and export it again."
        ) from error
    model = model.to(logits.device).eval()
    with torch.no_grad():
        again = model(**inputs).logits
    difference = float((again.float() - logits.float()).abs().max())
    allowed = 1e-2
    if logits.dtype == torch.float32:
        allowed = 0.0 if logits.device.type == "cpu" else 1e-5
    if not difference <= allowed * float(logits.float().abs().max()):
        raise ModelError(
            f"The model exported to {str(folder)!r} gives logits that differ by {difference:.3g} "
            f"from the trained model's, where at most {allowed:g} of the largest logit is rounding: the "
            "export is not usable; compare dtype and versions."
        )
    return difference


def _names_capture(path: Path) -> bool:
    return path.name.endswith("config.json") and ATTENTION_NAME in json.dumps(
        json.loads(path.read_text(encoding="utf-8"))
    )
