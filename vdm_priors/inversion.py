"""Inversion of a clip to noise, its reconstruction from that noise, and probing with fresh noise.

The same for every family: which levels of noise there are and how one is left for the next says the teacher's own
schedule (schedules.py: DDIM or flow matching), how guidance is computed its `guidance_kind`. Latents stay float32
between steps.

Legend: B clips, F latent frames, C channels, h×w latent pixels; L, D of text embeddings;
x latents, v the network's prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdm_priors.conditioning import TextInput, join_texts, repeat_text
from vdm_priors.errors import ModelError
from vdm_priors.finite import all_finite, broken_part, require_finite
from vdm_priors.harvest import unrecorded
from vdm_priors.kept_memory import KeptPath
from vdm_priors.memory import Streams, reference_memory

REMEDY = "Load the teacher in float32 or bfloat16, lower the guidance, and check the teacher's weights."
OnStep = Callable[[int, float, Tensor], None]  # step (from 0), timestep, latents after the step


@dataclass(frozen=True, eq=False)
class InversionTrajectory:
    """A clip's way to noise.

    latents: N+1 float32 [B, F, C, h, w], index 0 clean, index N noise; timesteps: N, in the order of rising noise,
    latents[k] lies at the noise level of timesteps[k-1]; embeds: the text that it was inverted under, which the
    reference stream reads again.
    """

    latents: list[Tensor]
    timesteps: list[float]
    embeds: TextInput

    @property
    def noise(self) -> Tensor:
        return self.latents[-1]


@torch.no_grad()
def invert(
    teacher: Any, latents: Tensor, embeds: TextInput, steps: int = 5, on_step: OnStep | None = None,
    refinements: int = 0, kept: KeptPath | None = None,
) -> InversionTrajectory:
    """Run latents [B, F, C, h, w] up to noise in `steps` steps under a text, the network called at the level above.

    Each step first takes the prediction at x for that of its result, which is not yet known; each of `refinements`
    calls the network again, at the result so far (fixed-point iteration, as ReNoise, arXiv 2403.14602): a smaller
    round-trip error for as many forwards more, if the steps are small enough for the iteration to contract. Of a
    step's forwards a harvest records the last, whose input is best. `kept`, if given, keeps that one's keys and values.
    Raises ModelError naming the step, and the layer, if a prediction or a latent becomes NaN or infinite.
    """
    schedule = teacher.schedule(latents.shape)
    levels = schedule.levels(steps)
    x = latents.float()
    _check_batch(x, embeds)
    trajectory = [x]
    for step, (below, above) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        where = f"Inversion step {step + 1} of {steps} (t={above.timestep:.4g})"
        result = x
        for iteration in range(refinements + 1):
            with _last_of_its_step(teacher, step, kept) if iteration == refinements else unrecorded():
                v = _predict(teacher, result, above.timestep, embeds, where)
            if iteration == 0:
                result = schedule.up(x, v, below, above)
            else:
                result = schedule.refined(x, result, v, below, above)
        x = result
        _check_latents(x, where)
        trajectory.append(x)
        if on_step is not None:
            on_step(step, above.timestep, x)
    return InversionTrajectory(trajectory, [level.timestep for level in levels[1:]], embeds)


@contextmanager
def _last_of_its_step(teacher: Any, step: int, kept: KeptPath | None) -> Iterator[None]:
    """The forward of an inversion step that may be recorded, and whose keys are kept."""
    if kept is None:
        yield
        return
    kept.step = step
    with kept.keeping(teacher):
        yield


@torch.no_grad()
def probe(
    teacher: Any, latents: Tensor, embeds: TextInput, steps: int = 5, ceiling: float = 0.5, seed: int = 0,
    on_step: OnStep | None = None,
) -> None:
    """Call the network on the clip with fresh noise, for its attention alone: no inversion, nothing is denoised.

    The clip is mixed with ε at `steps` levels, evenly spaced below `ceiling` of the schedule (the middles of equal
    parts). ε depends on `seed` and the step, not on the clip or its batch. A trial found low noise to localise best.
    """
    _check_batch(latents, embeds)
    schedule = teacher.schedule(latents.shape)
    for step, level in enumerate(schedule.probes(steps, ceiling)):
        generator = torch.Generator().manual_seed(seed * 1000 + step)
        noise = torch.randn(latents.shape[1:], generator=generator).to(latents.device)
        x = schedule.mix(latents.float(), noise, level)
        where = f"Noise probe {step + 1} of {steps} (t={level.timestep:.4g})"
        _predict(teacher, x, level.timestep, embeds, where)
        if on_step is not None:
            on_step(step, level.timestep, x)


@torch.no_grad()
def reconstruct(
    teacher: Any,
    trajectory: InversionTrajectory,
    embeds: TextInput,
    negative_embeds: TextInput | None = None,
    guidance: float = 6.0,
    memory: bool = True,
    on_step: OnStep | None = None,
    kept: KeptPath | None = None,
) -> Tensor:
    """Denoise the trajectory's noise under a text; latents [B, F, C, h, w].

    guidance ≤ 1 makes no guidance pass; otherwise v = v_neg + guidance·(v_text − v_neg), with the empty text where
    `negative_embeds` is None. A teacher that was distilled to be told the guidance is told it, and makes no pass.
    `memory` adds the reference stream, which replays the trajectory: its latent at exactly t, under the text it was
    inverted with; its prediction is thrown away. One forward a step in batch order [text, negative, reference], or two
    ([text, reference], then [negative, reference]) where the family calls its network for each: harvest entries
    0..B-1, the text's. With `kept`, what `invert` kept of the same clips, memory is of that, and no reference runs.
    Raises ModelError naming the step, and the layer, if a prediction or a latent becomes NaN or infinite.
    """
    schedule = teacher.schedule(trajectory.noise.shape)
    steps = len(trajectory.timesteps)
    levels = schedule.levels(steps)
    timesteps = [level.timestep for level in levels[1:]]
    if timesteps != trajectory.timesteps:
        raise ModelError(
            f"The trajectory's timesteps {trajectory.timesteps} are not this teacher's "
            f"{timesteps}. Reconstruct with the teacher that inverted the clip."
        )
    x = trajectory.noise
    _check_batch(x, embeds)
    told = {"guidance": max(guidance, 1.0)} if teacher.guidance_kind == "embedded" else {}
    guided = guidance > 1 and not told
    if guided and negative_embeds is None:
        negative_embeds = repeat_text(teacher.encode_text([""])[0], len(x))
    apart = guided and teacher.guidance_kind == "separate"
    streamed = memory and kept is None
    reference_text = [trajectory.embeds] if streamed else []
    remembering = nullcontext()
    if streamed:
        remembering = reference_memory(teacher, Streams.of_clips(len(x), guided and not apart))
    elif memory:
        remembering = kept.seen(teacher, generated=len(x) * (2 if guided and not apart else 1))
    with remembering:
        for step in reversed(range(steps)):
            below, above = levels[step], levels[step + 1]
            done = steps - 1 - step
            where = f"Denoising step {done + 1} of {steps} (t={above.timestep:.4g})"
            reference = [trajectory.latents[step + 1]] if streamed else []
            if kept is not None:
                kept.step = step

            def forward(texts: list[TextInput]) -> Tensor:
                batch = torch.cat([x] * len(texts) + reference)
                return _predict(teacher, batch, above.timestep, join_texts(texts + reference_text), where, **told)

            v = forward([embeds, negative_embeds] if guided and not apart else [embeds])
            v_text = v[: len(x)]
            if guided:
                if apart:
                    with unrecorded():
                        v_negative = forward([negative_embeds])[: len(x)]
                else:
                    v_negative = v[len(x) : 2 * len(x)]
                v_text = v_negative + guidance * (v_text - v_negative)
            x = schedule.down(x, v_text, above, below)
            _check_latents(x, where)
            if on_step is not None:
                on_step(done, above.timestep, x)
    return x


def _predict(
    teacher: Any, latents: Tensor, t: float, embeds: TextInput, where: str, **told: float
) -> Tensor:
    def forward() -> Tensor:
        return teacher.predict(latents, t, embeds, **told).float()

    try:
        v = forward()
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    if not all_finite(v):
        with unrecorded():
            part = broken_part(teacher.networks, forward)
        require_finite(v, f"{where}: the prediction" + f", from {part} on" * (part is not None), REMEDY)
    return v


def _check_batch(latents: Tensor, embeds: TextInput) -> None:
    if latents.ndim != 5 or len(latents) != len(embeds):
        raise ValueError(
            f"Latents must be [B, F, C, h, w] with one text each, got {list(latents.shape)} and "
            f"{len(embeds)} texts."
        )


def _check_latents(latents: Tensor, where: str) -> None:
    require_finite(latents, f"{where}: the latents", REMEDY)
