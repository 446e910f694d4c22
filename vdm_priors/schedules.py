"""Noise schedules: how a clip and noise are mixed at a level, and one step up to noise or down to the clip.

Two kinds cover the families. Both say of every level what the network is told (its timestep), both are made by a
family from its model's own scheduler, and neither draws anything at random.

Legend: x latents, x0 the clip, ε noise, v the network's prediction; ᾱ the clip's share of variance (1 clean, 0 noise);
σ the noise's share of amplitude (0 clean, 1 noise). "below" is nearer to the clip, "above" nearer to noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Protocol

from torch import Tensor

from vdm_priors.errors import ModelError


@dataclass(frozen=True)
class Level:
    """timestep: what the network is told, in its own counting (unused at the clean end); noise: ᾱ or σ."""

    timestep: float
    noise: float


class Schedule(Protocol):
    """What inversion, reconstruction and probing ask of a schedule."""

    def levels(self, steps: int) -> list[Level]:
        """`steps` + 1 levels from the clip to noise. Raises ModelError for too few or too many steps."""

    def probes(self, steps: int, ceiling: float) -> list[Level]:
        """Levels at the middles of `steps` equal parts of the lowest `ceiling` (0..1) of the schedule, rising."""

    def mix(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        """The clip with noise, at a level."""

    def up(self, x: Tensor, v: Tensor, below: Level, above: Level) -> Tensor:
        """From `below` to `above`, with v as if it were that of x at `below`."""

    def refined(self, x: Tensor, guess: Tensor, v: Tensor, below: Level, above: Level) -> Tensor:
        """`up` with v of a `guess` of the result: where it equals its guess, `down` leads back to x exactly."""

    def down(self, x: Tensor, v: Tensor, above: Level, below: Level) -> Tensor:
        """From `above` to `below`: the model's own denoising step."""


@dataclass(frozen=True)
class DdimSchedule:
    """v-prediction, x = √ᾱ·x0 + √(1−ᾱ)·ε, v = √ᾱ·ε − √(1−ᾱ)·x0 (DDIM, arXiv 2010.02502, eq. 12; TEACHER.md).

    alphas_cumprod [T]: ᾱ of every timestep; clean: ᾱ below the lowest one; spacing: timesteps of a number of steps.
    All three are the forward scheduler's own: diffusers' DDIMInverseScheduler drops `snr_shift_scale`.
    """

    alphas_cumprod: Tensor
    clean: float
    spacing: Callable[[int], Sequence[int]]

    def levels(self, steps: int) -> list[Level]:
        require_steps(steps, len(self.alphas_cumprod))
        # The level below a step is the next timestep of this list, never t − 1000 // steps: so any number of steps
        # meets the same levels up and down.
        return [Level(-1, self.clean), *(self._level(t) for t in sorted(int(t) for t in self.spacing(steps)))]

    def probes(self, steps: int, ceiling: float) -> list[Level]:
        total = len(self.alphas_cumprod)
        return [self._level(min(int(total * ceiling * (step + 0.5) / steps), total - 1)) for step in range(steps)]

    def _level(self, timestep: int) -> Level:
        return Level(timestep, float(self.alphas_cumprod[timestep]))

    def mix(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        return sqrt(level.noise) * x0 + sqrt(1 - level.noise) * noise

    def up(self, x: Tensor, v: Tensor, below: Level, above: Level) -> Tensor:
        """x0 = √a·x − √(1−a)·v; ε = √a·v + √(1−a)·x; x' = √b·x0 + √(1−b)·ε, with a = ᾱ below, b = ᾱ above."""
        a, b = below.noise, above.noise
        x0 = sqrt(a) * x - sqrt(1 - a) * v
        noise = sqrt(a) * v + sqrt(1 - a) * x
        return sqrt(b) * x0 + sqrt(1 - b) * noise

    def refined(self, x: Tensor, guess: Tensor, v: Tensor, below: Level, above: Level) -> Tensor:
        """x' = (x + sin δ·v) / cos δ, the inverse of `down`, which turns by δ: x = cos δ·x' − sin δ·v.

        sin δ = √a·√(1−b) − √b·√(1−a), cos δ = √a·√b + √(1−a)·√(1−b), with a = ᾱ below, b = ᾱ above. From the clip
        itself to pure noise (one step for all) cos δ = 0, and nothing of x is left to be found: the guess stays.
        """
        a, b = below.noise, above.noise
        sine, cosine = sqrt(a * (1 - b)) - sqrt(b * (1 - a)), sqrt(a * b) + sqrt((1 - a) * (1 - b))
        return (x + sine * v) / cosine if cosine > 1e-6 else guess

    def down(self, x: Tensor, v: Tensor, above: Level, below: Level) -> Tensor:
        """x0 = √b·x − √(1−b)·v; A = √((1−a)/(1−b)); x' = A·x + (√a − √b·A)·x0, with b = ᾱ above, a = ᾱ below."""
        b, a = above.noise, below.noise
        x0 = sqrt(b) * x - sqrt(1 - b) * v
        keep = sqrt((1 - a) / (1 - b))
        return keep * x + (sqrt(a) - sqrt(b) * keep) * x0


@dataclass(frozen=True)
class FlowSchedule:
    """Flow matching, x = (1−σ)·x0 + σ·ε, v = dx/dσ = ε − x0, solved by Euler's method on the model's own σ grid.

    grid: for a number of steps the falling timesteps [N] and falling σ [N+1], shifted as the model's pipeline shifts
    them, the last one clean; timestep_of: what the network is told at a σ; most_steps: how many there may be.
    """

    grid: Callable[[int], tuple[Sequence[float], Sequence[float]]]
    timestep_of: Callable[[float], float]
    most_steps: int
    fewest_steps: int = 1

    def levels(self, steps: int) -> list[Level]:
        require_steps(steps, self.most_steps, self.fewest_steps)
        timesteps, sigmas = self.grid(steps)
        pairs = zip([*timesteps, -1], sigmas, strict=True)
        return [Level(float(t), float(sigma)) for t, sigma in pairs][::-1]

    def probes(self, steps: int, ceiling: float) -> list[Level]:
        """σ itself is evenly spaced: shifted as for denoising, half of the grid would be nearly pure noise."""
        sigmas = [ceiling * (step + 0.5) / steps for step in range(steps)]
        return [Level(self.timestep_of(sigma), sigma) for sigma in sigmas]

    def mix(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        return (1 - level.noise) * x0 + level.noise * noise

    def up(self, x: Tensor, v: Tensor, below: Level, above: Level) -> Tensor:
        """x' = x + (σ_above − σ_below)·v."""
        return x + (above.noise - below.noise) * v

    def refined(self, x: Tensor, guess: Tensor, v: Tensor, below: Level, above: Level) -> Tensor:
        """The same step with v of the guess: the fixed point is the exact inverse of `down` (implicit Euler)."""
        return self.up(x, v, below, above)

    def down(self, x: Tensor, v: Tensor, above: Level, below: Level) -> Tensor:
        """x' = x + (σ_below − σ_above)·v."""
        return x + (below.noise - above.noise) * v


def require_steps(steps: int, most: int, fewest: int = 1) -> None:
    """Raises ModelError for a number of steps that a schedule does not have."""
    if not fewest <= steps <= most:
        raise ModelError(f"The teacher's scheduler takes {fewest} to {most} steps, not {steps}. Set steps.")
