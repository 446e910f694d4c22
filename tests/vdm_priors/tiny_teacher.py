"""A small random CogVideoX pipeline of the real classes, written as a diffusers folder.

Used by the tests and by hand: `python tests/vdm_priors/tiny_teacher.py FOLDER`.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.tokenizers import T5 as TOKENIZER


def build_tiny_teacher(
    folder: str | Path,
    *,
    layers: int = 2,
    heads: int = 2,
    head_dim: int = 16,
    text_tokens: int = 16,
    latent_side: int = 8,
    latent_channels: int = 4,
    rotary: bool = True,
    snr_shift_scale: float = 1.0,
    patch_frames: int | None = None,
    ofs: bool = False,
    seed: int = 0,
) -> Path:
    """Save a pipeline whose frames are 4·latent_side pixels square, 9 of them at training size.

    The VAE halves each side twice and joins four frames; patches are 2×2 latents, of CogVideoX 1.5
    (`patch_frames`) also of several latent frames. Random weights are scaled up so that attention
    differs visibly from uniform.
    """
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    state = torch.get_rng_state()
    torch.manual_seed(seed)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        sample_height=4 * latent_side,
        sample_width=4 * latent_side,
        scaling_factor=0.7,
    )
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=latent_channels,
        out_channels=latent_channels,
        time_embed_dim=32,
        text_embed_dim=32,
        num_layers=layers,
        sample_width=latent_side,
        sample_height=latent_side,
        sample_frames=9,
        patch_size=2,
        patch_size_t=patch_frames,
        patch_bias=patch_frames is None,
        ofs_embed_dim=32 if ofs else None,
        max_text_seq_length=text_tokens,
        use_rotary_positional_embeddings=rotary,
    )
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if "norm_q" in name or "norm_k" in name:
                weight.add_(0.5 * torch.randn_like(weight))
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=32128, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    )
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        snr_shift_scale=snr_shift_scale,
    )
    torch.set_rng_state(state)
    pipeline = CogVideoXPipeline(
        tokenizer=AutoTokenizer.from_pretrained(TOKENIZER),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
    )
    pipeline.save_pretrained(folder)
    return Path(folder)


@functools.cache
def tiny_teacher(**options):
    """The loaded tiny teacher, one per set of options and process."""
    from vdm_priors.families import load_teacher

    folder = tempfile.TemporaryDirectory(prefix="tiny-teacher-")
    teacher = load_teacher(build_tiny_teacher(folder.name, **options))
    teacher.kept_folder = folder  # deleted with the teacher, at the end of the process
    return teacher


def random_clip(frames: int = 9, height: int = 40, width: int = 48, seed: int = 0) -> SimpleNamespace:
    """A clip as read_clip gives it, of random pixels, 8 frames a second."""
    pixels = torch.randint(
        0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=generator(seed)
    )
    times = [i / 8 for i in range(frames)]
    return SimpleNamespace(
        frames=pixels.numpy(), times=times, duration=frames / 8, box=(0.0, 0.0, 1.0, 1.0)
    )


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


if __name__ == "__main__":
    print(build_tiny_teacher(sys.argv[1]))
