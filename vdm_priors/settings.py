"""ExtractionSettings: every choice of how a prior is taken from the teacher.

Fields carry `help`, `min`, `max`, `choices` or `pattern` as metadata, which the recipe engine
shows and checks; `validate` checks the same where there is no recipe.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vdm_priors.errors import RecipeError
from vdm_priors.harvest import DIRECTIONS, HEAD_SCOPES, MEMORY_COLUMNS


def _option(
    default: Any,
    help: str,
    *,
    min: float | None = None,
    max: float | None = None,
    choices: tuple[str, ...] | None = None,
    pattern: str | None = None,
) -> Any:
    limits = {"help": help, "min": min, "max": max, "choices": choices, "pattern": pattern}
    return field(default=default, metadata=limits)


FRAME_WEIGHTS = ("span", "token")


@dataclass
class ExtractionSettings:
    """Defaults are the paper's where it says (METHOD.md, table of open points).

    Some keys decide nothing beside others. `effective` leaves those out, so that they neither
    change a prior's key in a store nor stand in its provenance:
    guidance, memory             with harvest_at inversion or noise, and reconstruction off: nothing is denoised
    memory_columns               with harvest_at inversion or noise, or memory off: no reference is looked at
    guidance of 1 and less       all the same: no guidance pass
    rows, head_ratio, mask_*     with head_selection off
    noise_ceiling                without harvest_at noise
    seed                         with head_selection off, or rows all, and no harvest_at noise: nothing is drawn
    token_ratio                  with token_selection off
    reconstruction never changes maps, but whether the prior's provenance has its PSNR. So it is
    part of the key: a prior without the figure is not reused where the figure is asked for.
    """

    steps: int = _option(5, "DDIM steps up to noise and down again", min=1, max=1000)
    guidance: float = _option(6.0, "strength of the text while denoising; 1 or less saves a pass", min=0, max=100)
    memory: bool = _option(True, "denoising sees the inverted clip's path (reference stream)")
    memory_columns: str = _option(
        "sum", "attention to the reference's cells: sum adds it to the same cells, own leaves it out",
        choices=MEMORY_COLUMNS,
    )
    harvest_at: str = _option(
        "denoise", "harvest while denoising (the paper's), already while inverting (a quarter of the cost), or on the clip "
        "with fresh noise (noise: as cheap, and where a small teacher localises best)",
        choices=("denoise", "inversion", "noise"),
    )
    noise_ceiling: float = _option(
        0.5, "with harvest_at noise: the `steps` probes lie evenly below this share of the noise schedule", min=0.001, max=1)
    direction: str = _option(
        "t2v", "text rows over vision (the paper's), vision rows over text, or both",
        choices=DIRECTIONS,
    )
    rows: int | str = _option(
        "auto", "vision query rows that heads are judged by: a number, all, or auto (all below "
        "4096 tokens, else 512)", min=1, pattern="auto|all",
    )
    head_selection: bool = _option(True, "keep motion-sensitive heads only (MHS); false keeps all")
    head_ratio: float = _option(0.5, "share of heads that is kept", min=0.001, max=1)
    head_scope: str = _option(
        "head", "head averages a head over layers (Algorithm 1), layer_head judges each layer's",
        choices=HEAD_SCOPES,
    )
    token_selection: bool = _option(True, "keep motion-salient words only (MTTI); false keeps all")
    token_ratio: float = _option(0.5, "share of tokens (or words) that is kept", min=0.001, max=1)
    token_unit: str = _option(
        "token", "score tokens and keep the words of the best (the paper's), or score words",
        choices=("token", "word"),
    )
    frame_weight: str = _option(
        "span", "what attention to a latent frame is worth: span counts it for the seconds the frame stands for "
        "(a causal VAE's first one stands for one frame, the others for four), token counts all latent frames alike",
        choices=FRAME_WEIGHTS,
    )
    mask_radius: int = _option(1, "cells around a place that count as the same place", min=0, max=1000)
    mask_own_frame: bool = _option(True, "the motion mask includes the query's own frame")
    reconstruction: bool = _option(True, "decode the reconstruction and measure its PSNR; false is faster")
    seed: int = _option(0, "seed of the sampled query rows", min=0)

    def effective(self) -> dict[str, Any]:
        """The settings that decide something beside the others (see above), in JSON types: keys and provenance."""
        used = asdict(self)
        used["guidance"] = max(float(self.guidance), 1.0)
        inert = []
        if self.harvest_at != "noise":
            inert += ["noise_ceiling"]
        if self.harvest_at != "denoise":
            inert += ["memory_columns"] if self.reconstruction else ["memory_columns", "memory", "guidance"]
        elif not self.memory:
            inert += ["memory_columns"]
        if not self.head_selection:
            inert += ["rows", "head_ratio", "mask_radius", "mask_own_frame"]
        if self.harvest_at != "noise" and (not self.head_selection or self.rows == "all"):
            inert += ["seed"]
        if not self.token_selection:
            inert += ["token_ratio"]
        return {name: value for name, value in used.items() if name not in inert}

    def validate(self) -> None:
        """Raises RecipeError naming every field that is out of its limits."""
        faults = [fault for f in fields(self) if (fault := _fault(f.name, getattr(self, f.name), f.metadata))]
        if faults:
            raise RecipeError(f"Extraction settings: {'; '.join(faults)}. Correct them.")


def _fault(name: str, value: Any, limits: Any) -> str | None:
    if limits["choices"] and value not in limits["choices"]:
        return f"{name} must be one of {', '.join(limits['choices'])}, not {value!r}"
    if limits["pattern"] and isinstance(value, str) and not re.fullmatch(limits["pattern"], value):
        return f"{name} must match {limits['pattern']}, not {value!r}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = limits["min"], limits["max"]
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            return f"{name} must lie in {low}..{'' if high is None else high}, not {value!r}"
    return None
