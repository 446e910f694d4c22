"""DDIM inversion of a clip to noise, its reconstruction from that noise (v-prediction), and probing with fresh noise.

Equations: TEACHER.md, "DDIM inversion on CogVideoX"; DDIM (arXiv 2010.02502), eq. 12. Every ᾱ
is the forward scheduler's own: diffusers' DDIMInverseScheduler drops `snr_shift_scale`. The
level below a step is the next timestep of the list, never t − 1000 // steps, so that any number
of steps meets the same levels up and down. Latents stay float32 between steps.

Legend: B clips, F latent frames, C channels, h×w latent pixels; L, D of text embeddings;
x latents, v prediction, ᾱ the signal's share of variance (1 clean, 0 pure noise).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from vdm_priors.attention import require_finite
from vdm_priors.errors import ModelError
from vdm_priors.memory import Streams, reference_memory

OnStep = Callable[[int, int, Tensor], None]  # step (from 0), timestep, latents after the step


@dataclass(frozen=True, eq=False)
class InversionTrajectory:
    """A clip's way to noise.

    latents: N+1 float32 [B, F, C, h, w], index 0 clean, index N noise; timesteps: N rising ones,
    latents[k] lies at the noise level of timesteps[k-1]; embeds [B, L, D]: the text that it was
    inverted under, which the reference stream reads again.
    """

    latents: list[Tensor]
    timesteps: list[int]
    embeds: Tensor

    @property
    def noise(self) -> Tensor:
        return self.latents[-1]


@torch.no_grad()
def invert(
    teacher: Any, latents: Tensor, embeds: Tensor, steps: int = 5, on_step: OnStep | None = None
) -> InversionTrajectory:
    """Run latents [B, F, C, h, w] up to noise in `steps` DDIM steps under text `embeds` [B, L, D].

    From level a = ᾱ below to b = ᾱ_t, the network called at t:
    x0 = √a·x − √(1−a)·v;  ε = √a·v + √(1−a)·x;  x' = √b·x0 + √(1−b)·ε.
    Raises ModelError naming the step if a latent becomes NaN or infinite.
    """
    timesteps, levels = _levels(teacher, steps)
    x = latents.float()
    _check_batch(x, embeds)
    trajectory = [x]
    for step, t in enumerate(timesteps):
        where = f"Inversion step {step + 1} of {steps} (t={t})"
        a, b = levels[step], levels[step + 1]
        v = _predict(teacher, x, t, embeds, where)
        x0 = sqrt(a) * x - sqrt(1 - a) * v
        noise = sqrt(a) * v + sqrt(1 - a) * x
        x = sqrt(b) * x0 + sqrt(1 - b) * noise
        _check_latents(x, where)
        trajectory.append(x)
        if on_step is not None:
            on_step(step, t, x)
    return InversionTrajectory(trajectory, timesteps, embeds)


@torch.no_grad()
def probe(
    teacher: Any, latents: Tensor, embeds: Tensor, steps: int = 5, ceiling: float = 0.5, seed: int = 0,
    on_step: OnStep | None = None,
) -> None:
    """Call the network on the clip with fresh noise, for its attention alone: no inversion, nothing is denoised.

    x = √ᾱ_t·x0 + √(1−ᾱ_t)·ε at `steps` timesteps, evenly spaced below `ceiling` of the schedule (the middles of equal
    parts). ε depends on `seed` and the step, not on the clip or its batch. A trial found low noise to localise best.
    """
    _check_batch(latents, embeds)
    total = len(teacher.alphas_cumprod)
    for step in range(steps):
        t = min(int(total * ceiling * (step + 0.5) / steps), total - 1)
        generator = torch.Generator().manual_seed(seed * 1000 + step)
        noise = torch.randn(latents.shape[1:], generator=generator).to(latents.device)
        level = float(teacher.alphas_cumprod[t])
        x = sqrt(level) * latents.float() + sqrt(1 - level) * noise
        _predict(teacher, x, t, embeds, f"Noise probe {step + 1} of {steps} (t={t})")
        if on_step is not None:
            on_step(step, t, x)


@torch.no_grad()
def reconstruct(
    teacher: Any,
    trajectory: InversionTrajectory,
    embeds: Tensor,
    negative_embeds: Tensor | None = None,
    guidance: float = 6.0,
    memory: bool = True,
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoise the trajectory's noise under text `embeds` [B, L, D]; latents [B, F, C, h, w].

    guidance ≤ 1 makes no guidance pass; otherwise v = v_neg + guidance·(v_text − v_neg), with
    the empty text where `negative_embeds` is None. `memory` adds the reference stream, which
    replays the trajectory: its latent at exactly t, under the text it was inverted with; one
    reference serves both guidance passes, and its prediction is thrown away. One forward a step,
    in batch order [text, negative, reference]: harvest entries 0..B-1.

    From ᾱ_t to ᾱ below: x0 = √ᾱ_t·x − √(1−ᾱ_t)·v; A = √((1−ᾱ_prev)/(1−ᾱ_t));
    B = √ᾱ_prev − √ᾱ_t·A; x' = A·x + B·x0.
    Raises ModelError naming the step if a latent becomes NaN or infinite.
    """
    timesteps, levels = _levels(teacher, len(trajectory.timesteps))
    if timesteps != trajectory.timesteps:
        raise ModelError(
            f"The trajectory's timesteps {trajectory.timesteps} are not this teacher's "
            f"{timesteps}. Reconstruct with the teacher that inverted the clip."
        )
    x = trajectory.noise
    _check_batch(x, embeds)
    guided = guidance > 1
    texts = [embeds]
    if guided:
        if negative_embeds is None:
            negative_embeds = teacher.encode_text([""])[0].expand(len(x), -1, -1)
        texts.append(negative_embeds)
    if memory:
        texts.append(trajectory.embeds)
    all_embeds = torch.cat(texts)
    passes = 2 if guided else 1
    streams = Streams.of_clips(len(x), guided)
    with reference_memory(teacher, streams) if memory else nullcontext():
        for step in reversed(range(len(timesteps))):
            t = timesteps[step]
            done = len(timesteps) - 1 - step
            where = f"Denoising step {done + 1} of {len(timesteps)} (t={t})"
            batch = [x] * passes + ([trajectory.latents[step + 1]] if memory else [])
            v = _predict(teacher, torch.cat(batch), t, all_embeds, where)
            v_text = v[: len(x)]
            if guided:
                v_negative = v[len(x) : 2 * len(x)]
                v_text = v_negative + guidance * (v_text - v_negative)
            now, below = levels[step + 1], levels[step]
            x0 = sqrt(now) * x - sqrt(1 - now) * v_text
            keep = sqrt((1 - below) / (1 - now))
            x = keep * x + (sqrt(below) - sqrt(now) * keep) * x0
            _check_latents(x, where)
            if on_step is not None:
                on_step(done, t, x)
    return x


def _levels(teacher: Any, steps: int) -> tuple[list[int], list[float]]:
    """Rising timesteps [N] and ᾱ [N+1]: the clean level, then that of every timestep."""
    timesteps = sorted(int(t) for t in teacher.timesteps(steps))
    alphas = [float(teacher.alphas_cumprod[t]) for t in timesteps]
    return timesteps, [float(teacher.final_alpha_cumprod), *alphas]


def _predict(teacher: Any, latents: Tensor, t: int, embeds: Tensor, where: str) -> Tensor:
    try:
        return teacher.predict(latents, t, embeds).float()
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error


def _check_batch(latents: Tensor, embeds: Tensor) -> None:
    if latents.ndim != 5 or len(latents) != len(embeds):
        raise ValueError(
            f"Latents must be [B, F, C, h, w] with one text each, got {list(latents.shape)} and "
            f"texts {list(embeds.shape)}."
        )


def _check_latents(latents: Tensor, where: str) -> None:
    require_finite(
        latents,
        f"{where}: the latents",
        "Load the teacher in float32 or bfloat16, lower the guidance, and check the clip and the "
        "teacher's weights.",
    )
