"""The teacher's forwards for one batch of clips: up to noise and down again, with the harvest where settings have it,
and how near the clip what was drawn comes.

Legend: B clips, F latent frames, C channels, h×w latent pixels, N frames, L text tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vdm_priors.conditioning import TextInput, repeat_text
from vdm_priors.finite import require_finite
from vdm_priors.harvest import Harvest, HarvestRequest, harvest
from vdm_priors.inversion import InversionTrajectory, invert, probe, reconstruct
from vdm_priors.kept_memory import KeptPath
from vdm_priors.settings import ExtractionSettings

VAE_REMEDY = "Load the teacher in float32 or bfloat16, and check the weights of its VAE."
HIGHEST_PSNR = 100.0  # dB; an exact reconstruction has no finite one


def run_teacher(
    teacher: Any,
    latents: Tensor,
    embeds: TextInput,
    request: HarvestRequest,
    settings: ExtractionSettings,
    on_step: Callable[[str, int, int], None] | None = None,
) -> tuple[Harvest, InversionTrajectory | None, Tensor | None]:
    """Invert latents [B, F, C, h, w] and denoise them under texts [B, L, D]; harvest in one of the two, or with noise.

    Returns the harvest, the way to noise (None if nothing was inverted), and the denoised latents (None if none were).
    """

    def told(phase: str) -> Callable[[int, int, Tensor], None] | None:
        if on_step is None:
            return None
        return lambda step, t, x: on_step(phase, step, settings.steps)

    empty = repeat_text(teacher.encode_text([""])[0], len(latents))
    kept = KeptPath() if settings.keeps_path else None

    def inverted(text: TextInput) -> InversionTrajectory:
        return invert(teacher, latents, text, settings.steps, told("inversion"), settings.refinements, kept)

    def denoise(trajectory: InversionTrajectory) -> Tensor:
        return reconstruct(
            teacher, trajectory, embeds, empty, settings.guidance, settings.memory,
            on_step=told("denoise"), kept=kept,
        )

    if settings.harvest_at == "denoise":
        # the empty prompt leaves the clip's content to the latents, and needs no guidance pass
        trajectory = inverted(empty)
        with harvest(teacher, request) as harvested:
            rebuilt = denoise(trajectory)
        return harvested, trajectory, rebuilt
    if settings.harvest_at == "noise":
        with harvest(teacher, request) as harvested:
            probe(teacher, latents, embeds, settings.steps, settings.noise_ceiling, settings.seed, told("noise"))
        if not settings.reconstruction:
            return harvested, None, None
        trajectory = inverted(empty)
        return harvested, trajectory, denoise(trajectory)
    # the rows of a text exist only where the network reads it
    with harvest(teacher, request) as harvested:
        trajectory = inverted(embeds)
    return harvested, trajectory, denoise(trajectory) if settings.reconstruction else None


def reconstruction_quality(
    teacher: Any,
    pixels: Tensor,
    latents: Tensor,
    rebuilt: Tensor | None,
    settings: ExtractionSettings,
) -> tuple[list[dict[str, float | None]], Tensor | None]:
    """Per clip latent relative L2 and PSNR in dB, None where not measured; frames if decoded.

    Frames are uint8 [B, N, H, W, 3]. Raises ModelError for NaN or infinite ones.
    """
    quality: list[dict[str, float | None]]
    quality = [{"psnr_db": None, "latent_relative_l2": None} for _ in latents]
    if rebuilt is None:
        return quality, None
    for index, (x, x0) in enumerate(zip(rebuilt, latents, strict=True)):
        size = x0.norm().clamp(min=torch.finfo(torch.float32).tiny)
        quality[index]["latent_relative_l2"] = float((x - x0).norm() / size)
    if not settings.reconstruction:
        return quality, None
    decoded = teacher.decode(rebuilt, pixels.shape[2])
    require_finite(decoded, "The reconstruction that the teacher's VAE decoded", VAE_REMEDY)
    decoded = decoded.clamp(-1, 1)
    for index, (y, original) in enumerate(zip(decoded, pixels, strict=True)):
        error = float(((y - original) / 2).square().mean())  # of a signal of peak 1
        psnr = -10 * torch.tensor(max(error, 1e-10)).log10()
        quality[index]["psnr_db"] = min(float(psnr), HIGHEST_PSNR)
    return quality, torch.stack([to_frames(y) for y in decoded])


def to_frames(pixels: Tensor) -> Tensor:
    """[3, N, h, w] in [-1, 1] -> uint8 [N, h, w, 3] on the CPU."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).cpu()
