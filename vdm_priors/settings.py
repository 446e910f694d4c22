"""ExtractionSettings: every choice of how a prior is taken from the teacher.

Fields carry `help`, `min`, `max`, `choices` or `pattern` as metadata, which the recipe engine shows and checks;
`validate` checks the same where there is no recipe.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vdm_priors.confidence import CONFIDENCES
from vdm_priors.errors import RecipeError
from vdm_priors.harvest import DIRECTIONS, HEAD_SCOPES, MEMORY_COLUMNS
from vdm_priors.masks import BAND_ORDERS, BAND_UNITS, MASKS


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
MEMORY_FROM = ("forward", "inversion")
WORDS = ("all", "content")
MODES: dict[str, dict[str, Any]] = {  # names for what is asked most; docs/teachers.md says what each costs and gives
    "paper": {"harvest_at": "denoise", "memory": True, "memory_from": "forward"},
    "no_guidance": {"harvest_at": "denoise", "guidance": 1.0, "memory": True, "memory_from": "forward"},
    "kept_keys": {"harvest_at": "denoise", "guidance": 1.0, "memory": True, "memory_from": "inversion"},
    "no_memory": {"harvest_at": "denoise", "memory": False},
    "plain": {"harvest_at": "denoise", "guidance": 1.0, "memory": False},
    "inversion": {"harvest_at": "inversion", "reconstruction": False},
    "noise": {"harvest_at": "noise", "reconstruction": False},
}
# at these, keys are those of before they existed
LATER = {"mask": "place", "layers": None, "confidence": "none", "refinements": 0, "words": "all",
         "memory_from": "forward"}


@dataclass
class ExtractionSettings:
    """Defaults are the paper's where it says (METHOD.md, table of open points).

    `mode` is a name for a few of the other keys (MODES): those that stand at their defaults are set, and it is None
    then, so that settings which do the same are equal. Raises RecipeError if a key beside it says something else.
    In a recipe's overrides the later word counts (`set_key`).

    Some keys decide nothing beside others. `effective` leaves them out of a prior's key and of its provenance:
    guidance, memory             with harvest_at inversion or noise, and reconstruction off: nothing is denoised
    memory_columns               with harvest_at inversion or noise, or memory off: no reference is looked at
    memory_from                  with memory off, or where nothing is denoised
    guidance of 1 and less       all the same: no guidance pass
    rows, head_ratio, mask*, band_*   with head_selection off
    mask_radius                  with mask band, and band_* with mask place
    noise_ceiling                without harvest_at noise
    refinements                  with harvest_at noise, and reconstruction off: nothing is inverted
    seed                         with head_selection off, or rows all, and no harvest_at noise: nothing is drawn
    token_ratio                  with token_selection off
    LATER's keys stay out at their defaults, so that stores filled before these options existed remain in use.
    reconstruction never changes maps, but whether the prior's provenance has its PSNR. So it is
    part of the key: a prior without the figure is not reused where the figure is asked for.
    """

    mode: str | None = _option(
        None, "a name for several keys below. paper: denoising with guidance and the reference stream; no_guidance; "
        "kept_keys: no guidance, the reference's keys are the inversion's; no_memory: no reference; plain: neither; "
        "inversion and noise: harvested there, nothing is denoised. null: the keys as they stand",
        choices=tuple(MODES),
    )
    steps: int = _option(
        5, "steps up to noise and down again: more reconstruct the clip better and take proportionally longer (the "
        "paper found 5 nearly as good as 10, and 2 clearly worse)", min=1, max=1000,
    )
    refinements: int = _option(
        0, "fixed-point iterations of every inversion step, each one forward more: they bring a reconstruction without "
        "guidance near the clip, if steps are many enough (10 rather than 5)", min=0, max=100,
    )
    guidance: float = _option(
        6.0, "strength of the text while denoising; 1 or less saves that pass, about a third of the time",
        min=0, max=100,
    )
    memory: bool = _option(
        True, "denoising sees the inverted clip's path (reference stream) and so stays with the clip; false is faster, "
        "and what is drawn may have little to do with the clip",
    )
    memory_from: str = _option(
        "forward", "where the path's keys and values come from: forward runs the path as a stream of its own again; "
        "inversion keeps those of the inversion, a forward fewer a step, but takes memory for steps × layers × two "
        "states of a batch (main memory where a GPU has no room)",
        choices=MEMORY_FROM,
    )
    memory_columns: str = _option(
        "sum", "attention to the reference's cells: sum adds it to the same cells, own leaves it out",
        choices=MEMORY_COLUMNS,
    )
    harvest_at: str = _option(
        "denoise", "harvest while denoising (the paper's), already while inverting (a quarter of the cost), or on the "
        "clip with fresh noise (noise: as cheap, and where a small teacher localises best)",
        choices=("denoise", "inversion", "noise"),
    )
    noise_ceiling: float = _option(
        0.5, "with harvest_at noise: the `steps` probes lie evenly below this share of the noise schedule",
        min=0.001, max=1,
    )
    direction: str = _option(
        "t2v", "t2v: where a word's own attention goes in the video (the paper's); v2t: how much each cell of the "
        "video attends to the word, in trials the better localiser; both: their mean",
        choices=DIRECTIONS,
    )
    rows: int | str = _option(
        "auto", "vision query rows that heads are judged by: a number (drawn evenly from all frames; the prior "
        "records how far the scores may be off), all, or auto (all below 4096 tokens, else 512, or as many as 1 GiB "
        "holds). 4096 and more, and rows beyond 1 GiB, take little memory, and all of them about half of a forward's "
        "time; with head_scope head, DFC is then of the layers' and steps' mean energies, not of the mean map's",
        min=1, pattern="auto|all",
    )
    layers: list[int] | None = _option(
        None, "attention layers that are harvested, numbered from 0, negative ones from the last; null is all. Heads "
        "are averaged (or, with head_scope layer_head, judged) over these alone, and harvesting fewer is faster",
    )
    head_selection: bool = _option(True, "keep motion-sensitive heads only (MHS); false keeps all")
    head_ratio: float = _option(0.5, "share of heads that is kept", min=0.001, max=1)
    head_scope: str = _option(
        "head", "head averages a head over layers (Algorithm 1); layer_head judges each layer's for itself, since "
        "heads of different layers share only their number, but takes as many times the memory as there are layers",
        choices=HEAD_SCOPES,
    )
    words: str = _option(
        "all", "which words may be kept: all are candidates (the paper's), or content leaves out function words "
        "(which, does, the), which small teachers score high and see nowhere",
        choices=WORDS,
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
    mask: str = _option(
        "place", "which cells count as a query's place at other moments, when heads are judged: place is a square in "
        "the picture (mask_radius); band is SparseVideoGen's, places near in reading order, across row ends (band_*)",
        choices=MASKS,
    )
    mask_radius: int = _option(
        1, "with mask place: cells to each side of a place that count as the same place", min=0, max=1000,
    )
    mask_own_frame: bool = _option(True, "the motion mask includes the query's own frame")
    band_width: float = _option(2.0, "with mask band: how wide the band is, in band_unit", min=0.001, max=100000)
    band_unit: str = _option(
        "frames", "with mask band: frames counts the band in whole frames' tokens, as SparseVideoGen's and "
        "attention-gym's `width` do (2 of 13 frames: places less than 2/13 of a frame apart); places counts the "
        "places themselves",
        choices=BAND_UNITS,
    )
    band_order: str = _option(
        "frame", "with mask band: frame bounds the distance of places alike in all pairs of frames (attention-gym); "
        "place cuts the band from tokens sorted by place, then frame (SparseVideoGen's own layout; its edges slant "
        "with time)",
        choices=BAND_ORDERS,
    )
    confidence: str = _option(
        "none", "confidence gating: how much a word's prior counts in the student's alignment. none: all words alike; "
        "concentration: by how far its map is from uniform; mobility: by how much it changes from frame to frame; "
        "both: their product. Each is in 0..1 and for most words well below 1: a larger training.alignment.weight "
        "makes up",
        choices=CONFIDENCES,
    )
    reconstruction: bool = _option(True, "decode the reconstruction and measure its PSNR; false is faster")
    seed: int = _option(0, "seed of the sampled query rows, and of the noise with harvest_at noise", min=0)

    def __post_init__(self) -> None:
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        for name, value in self.of_mode(given).items():
            setattr(self, name, value)
        self.mode = None

    @staticmethod
    def of_mode(keys: dict[str, Any]) -> dict[str, Any]:
        """These keys, and in place of `mode` those that it stands for; RecipeError if one says something else."""
        keys = dict(keys)
        mode = keys.pop("mode", None)
        if mode is None:
            return keys
        if mode not in tuple(MODES):
            raise RecipeError(f"mode must be one of {', '.join(MODES)}, not {mode!r}.")
        stands = MODES[mode]
        for name, value in stands.items():
            if keys.get(name, value) != value:
                raise RecipeError(
                    f"mode: {mode} stands for {name}: {_yaml(value)}, but beside it is {name}: {_yaml(keys[name])}. "
                    "Leave one of the two out (mode: null)."
                )
        return {**keys, **stands}

    @staticmethod
    def set_key(keys: dict[str, Any], name: str, value: Any) -> None:
        """Sets one of these keys after the others: it counts more than a mode before it, and a mode more than its keys."""
        before = keys.get("mode")
        if name == "mode":
            for key in MODES.get(value, {}) if isinstance(value, str) else ():
                keys.pop(key, None)
        elif isinstance(before, str) and name in MODES.get(before, {}):
            del keys["mode"]
            keys.update(MODES[before])
        keys[name] = value

    def layers_of(self, count: int) -> list[int]:
        """The layers that are harvested of a teacher that has `count`, rising.

        Raises RecipeError for none, and for some that it does not have.
        """
        if self.layers is None:
            return list(range(count))
        strange = [layer for layer in self.layers if not -count <= layer < count]
        if strange:
            raise RecipeError(
                f"teacher.extraction.layers names {strange}, but the teacher has attention layers 0 to {count - 1} "
                f"(-{count} to -1 from the last). Name some of these; null takes all."
            )
        if not self.layers:
            raise RecipeError("teacher.extraction.layers names no layer. Name some; null takes all.")
        return sorted({layer % count for layer in self.layers})

    @property
    def denoises(self) -> bool:
        """Whether the clip is denoised, for the harvest or for the figure of its reconstruction."""
        return self.harvest_at == "denoise" or self.reconstruction

    @property
    def keeps_path(self) -> bool:
        """Whether the inversion's keys and values are kept, to be looked at while denoising."""
        return self.memory and self.memory_from == "inversion" and self.denoises

    def effective(self) -> dict[str, Any]:
        """The settings that decide something beside the others (see above), in JSON types: keys and provenance."""
        used = asdict(self)
        del used["mode"]  # its keys are there
        used["guidance"] = max(float(self.guidance), 1.0)
        used["layers"] = None if self.layers is None else sorted(set(self.layers))
        inert = [name for name, default in LATER.items() if used[name] == default]
        if self.harvest_at != "noise":
            inert += ["noise_ceiling"]
        elif not self.reconstruction:
            inert += ["refinements"]
        if self.harvest_at != "denoise":
            inert += ["memory_columns"] if self.reconstruction else ["memory_columns", "memory", "guidance"]
        elif not self.memory:
            inert += ["memory_columns"]
        if not self.keeps_path:
            inert += ["memory_from"]
        if not self.head_selection:
            inert += ["rows", "head_ratio", "mask", "mask_radius", "mask_own_frame"]
        if not self.head_selection or self.mask != "band":
            inert += ["band_width", "band_unit", "band_order"]
        else:
            inert += ["mask_radius"]
        if self.harvest_at != "noise" and (not self.head_selection or self.rows == "all"):
            inert += ["seed"]
        if not self.token_selection:
            inert += ["token_ratio"]
        return {name: value for name, value in used.items() if name not in inert}

    def validate(self) -> None:
        """Raises RecipeError naming every field that is out of its limits."""
        faults = [
            fault for f in fields(self)
            if (value := getattr(self, f.name)) is not f.default and (fault := _fault(f.name, value, f.metadata))
        ]
        if faults:
            raise RecipeError(f"Extraction settings: {'; '.join(faults)}. Correct them.")


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


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
