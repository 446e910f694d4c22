"""Export of a trained student: a plain folder that stock transformers loads.

Nothing of the training remains: no capture, no aligner, no name of ours in the config.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
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


def verify_export(folder: str | Path, inputs: dict[str, Tensor], logits: Tensor) -> float:
    """Largest difference of the exported model's logits [B, S, V] from the trained model's.

    Loads the folder with stock classes, in the dtype and on the device of `logits`. Raises
    ModelError unless the difference is at most 1e-5 of the largest logit (float32) or 1e-2
    (half types).
    """
    model = AutoModelForImageTextToText.from_pretrained(
        str(folder), dtype=logits.dtype, attn_implementation="sdpa"
    )
    model = model.to(logits.device).eval()
    with torch.no_grad():
        again = model(**inputs).logits
    difference = float((again.float() - logits.float()).abs().max())
    allowed = 1e-5 if logits.dtype == torch.float32 else 1e-2
    if not difference <= allowed * float(logits.float().abs().max()):
        raise ModelError(
            f"The model exported to {str(folder)!r} gives logits that differ by {difference:.3g} "
            "from the trained model's: the export is not usable; compare dtype and versions."
        )
    return difference


def _names_capture(path: Path) -> bool:
    return path.name.endswith("config.json") and ATTENTION_NAME in json.dumps(
        json.loads(path.read_text(encoding="utf-8"))
    )
