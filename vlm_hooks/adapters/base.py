"""Adapter: what a codec system adds to a host, and how it lays its tokens out.

An adapter is one file of this folder with a NAME and a class `Adapter`, found by its name. It says, clip by clip, which
visual tokens stand in the sequence (`plan`), what it needs of the clips as tensors (`inputs`), and what the tokens are
(`forward`). AdapterModel (model.py) puts them into the host; AdaptedStudent (student.py) writes the sequences.

    class Adapter(base.Adapter):
        def plan(self, clip, shape): ...            # [Segment.frames(...), Segment.motion(...), ...]
        def inputs(self, clips): ...                # {"ema_vectors": ...}: names of INPUTS
        def forward(self, frames, **inputs): ...    # AdapterOutput

Legend: B clips, N frames given to the tower, T rows in time, H×W tokens of a frame, D the host's hidden size.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vdm_priors.errors import UserError
from vdm_priors.grid import TokenGrid
from vlm_hooks.streams import FrameTokens

MOTION_TOKEN = "<|motion_pad|>"  # the placeholder of all tokens that do not come out of the vision tower


@dataclass(frozen=True)
class Segment:
    """One run of visual tokens in a stream.

    grid: its cells, F×H×W, in the sequence's order. times [F]: seconds at which its rows lie on the host's temporal
    axis. moving: its tokens are motion tokens (at `<|motion_pad|>`), else frames' (at the host's own placeholder).
    label: text written before it; None writes the host's own label for frames, and none for motion.
    """

    grid: TokenGrid
    times: tuple[float, ...]
    moving: bool = False
    label: str | None = None

    def __post_init__(self) -> None:
        if len(self.times) != self.grid.frames:
            raise ValueError(f"Segment: {len(self.times)} times for {self.grid.frames} rows of cells.")

    @classmethod
    def of_motion(
        cls,
        span: tuple[float, float],
        tokens: int,
        time: float | None = None,
        box: Sequence[float] = (0.0, 0.0, 1.0, 1.0),
        label: str | None = None,
    ) -> Segment:
        """Tokens of the whole box over a span of seconds, as learnt queries give them.

        Each gets an equal part of the span in turn, so that what is regridded onto them is counted once, as with
        frames that are shown at one time; on the temporal axis all lie at `time` (None: the middle of the span).
        """
        edges = torch.linspace(span[0], span[1], tokens + 1, dtype=torch.float64)
        grid = TokenGrid.regular(torch.stack([edges[:-1], edges[1:]], dim=1), 1, 1, box)
        return cls(grid, (sum(span) / 2 if time is None else time,) * tokens, moving=True, label=label)

    @property
    def num_tokens(self) -> int:
        return self.grid.num_tokens


class AdapterOutput(NamedTuple):
    """The tokens of a batch: frames [B] as `plan` has them, in order (the T rows of all its frame segments), and motion
    [B] of [n, D], the tokens of its motion segments; None without any."""

    frames: Sequence[FrameTokens]
    motion: Sequence[Tensor] | None = None


@dataclass(frozen=True)
class HostShape:
    """What of a host an adapter depends on. hidden: D; name: class of its model; vision: width of its tower; depth: how
    many frames the tower joins to a row in time."""

    hidden: int
    name: str
    vision: int = 0
    depth: int = 1


@dataclass
class AdapterConfig:
    """Settings of an adapter; each has a subclass of its own. Fields are made with `setting`."""

    def __post_init__(self) -> None:
        faults = [fault for f in dataclasses.fields(self) for fault in _faults(f, getattr(self, f.name))]
        if faults:
            raise UserError("; ".join(faults))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """Raises UserError, with the known names, for a name that is not a setting."""
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise UserError(f"{', '.join(unknown)}: no setting of this adapter; known: {', '.join(known)}.")
        return cls(**values)


def setting(
    default: Any, help: str, *, choices: tuple | None = None, min: float | None = None, max: float | None = None
) -> Any:
    """A field of an AdapterConfig: its default, what it does (and what of it the paper leaves open), its limits."""
    metadata = {"help": help, "choices": choices, "min": min, "max": max}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _faults(f: dataclasses.Field, value: Any) -> list[str]:
    limits = f.metadata
    if limits.get("choices") and value not in limits["choices"]:
        return [f"{f.name} must be one of {', '.join(map(str, limits['choices']))}, not {value!r}"]
    for bound, wrong in (("min", lambda limit: value < limit), ("max", lambda limit: value > limit)):
        limit = limits.get(bound)
        if value is not None and limit is not None and not isinstance(value, str) and wrong(limit):
            return [f"{f.name} must be at {'least' if bound == 'min' else 'most'} {limit:g}, not {value}"]
    return []


class Objective(nn.Module):
    """What an adapter learns apart from answering; its own weights (the head) are thrown away afterwards.

    Called with what `batch` makes of clips and samples; gives {"loss": scalar, ...}, all of it logged. `model` is the
    AdapterModel, whose parts are trained at the stage's rates. labels: texts of each sample, by its id (of captions, or
    the answer), for objectives that need any.
    """

    def __init__(self, model: nn.Module, labels: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.model = model

    def check(self, clip: Any) -> None:
        """Raises SampleError for a clip that there is nothing to learn from; it is left out."""

    @abstractmethod
    def batch(self, clips: Sequence[Any], samples: Sequence[Any]) -> dict[str, Tensor]:
        """Tensors for B clips; samples [B] have an `id`. Runs beside the training: nothing of the model is computed."""


class Adapter(nn.Module):
    """A codec system over a host's visual tokens. Subclasses are called with (config, host: HostShape)."""

    NAME: ClassVar[str]
    Config: ClassVar[type[AdapterConfig]]
    INPUTS: ClassVar[tuple[str, ...]] = ()  # names of the tensors that `inputs` gives and `forward` takes
    OBJECTIVES: ClassVar[Mapping[str, type[Objective]]] = {}  # objectives of its own, by the names that recipes use

    def __init__(self, config: AdapterConfig, host: HostShape) -> None:
        super().__init__()
        self.config, self.host = config, host

    @property
    def group(self) -> int:
        """How many adjacent rows in time see each other inside the host's vision tower."""
        return 1

    @property
    def group_places(self) -> Tensor | None:
        """[group, width of the tower], added to the patches of each place in a group before the tower's first block."""
        return None

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Placeholders that the host's tokenizer must have."""
        return (MOTION_TOKEN,)

    def shown(self, clip: Any) -> Any:
        """The clip whose frames the tower is given.

        Here each key frame as often as the tower joins frames: a row in time of its own, as with pictures.
        """
        if self.host.depth == 1:
            return clip
        shown = copy.copy(clip)
        shown.frames = np.repeat(clip.frames, self.host.depth, axis=0)
        shown.times = [time for time in clip.times for _ in range(self.host.depth)]
        return shown

    @abstractmethod
    def plan(self, clip: Any, shape: tuple[int, int, int]) -> list[Segment]:
        """The clip's stream. shape: T, H, W of what the tower makes of its frames. Raises SampleError."""

    def inputs(self, clips: Sequence[Any]) -> dict[str, Tensor]:
        """The clips' motion as tensors for `forward`, by the names of INPUTS; padded where clips differ in length."""
        return {}

    @abstractmethod
    def forward(self, frames: list[FrameTokens], **inputs: Tensor) -> AdapterOutput:
        """frames [B]: what the tower makes of the clips' frames."""

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the names that stages give learning rates to; each exactly once."""
        return {"adapter": list(self.parameters())}

    def without_motion(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`inputs` of the same clips as if nothing moved: a control. Motion tokens stay where they are."""
        return {
            name: torch.zeros_like(tensor) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()
        }

    def still(self, clip: Any) -> Any:
        """The clip with frames in which nothing moves, for adapters whose motion is in the frames alone; a control."""
        return clip

    def exchanged(self, clip: Any, other: Any) -> Any:
        """The clip with the motion of another one, which has as many key frames and steps; a control."""
        motion = [
            dataclasses.replace(theirs, times=ours.times, end=ours.end)
            for ours, theirs in zip(clip.motion, other.motion, strict=True)
        ]
        return dataclasses.replace(clip, motion=motion)
