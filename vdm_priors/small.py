"""A small CogVideoX pipeline of the real classes: the embedded world's teacher before training, and its two losses.

Geometry for 9 frames of 64 x 64: latents 3 x 8 x 16 x 16 (frames, channels, rows, columns), tokens 3 x 8 x 8.
Shape legend: B batch, C channels, N frames, F latent frames, L text tokens, D text width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel


@dataclass
class SmallTeacherSize:
    """Geometry of the small teacher; the defaults are those of the shipped one."""

    frames: int = 9
    side: int = 64
    latent_channels: int = 8
    layers: int = 6
    heads: int = 4
    head_dim: int = 32
    text_width: int = 64
    text_tokens: int = 40


def scheduler() -> CogVideoXDDIMScheduler:
    """CogVideoX's own noise settings (scheduler/scheduler_config.json of CogVideoX-5b)."""
    return CogVideoXDDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=True, steps_offset=0, prediction_type="v_prediction", rescale_betas_zero_snr=True,
        snr_shift_scale=1.0, timestep_spacing="trailing")


def build_vae(size: SmallTeacherSize) -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        block_out_channels=(16, 32, 32), down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3, latent_channels=size.latent_channels, layers_per_block=1,
        norm_num_groups=4, temporal_compression_ratio=4, sample_height=size.side, sample_width=size.side,
        scaling_factor=1.0)


def build_text_encoder(size: SmallTeacherSize, vocabulary: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=vocabulary, d_model=size.text_width, d_kv=32, d_ff=4 * size.text_width,
                                   num_layers=2, num_heads=2, feed_forward_proj="gated-gelu", dropout_rate=0.0))


def build_transformer(size: SmallTeacherSize) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel(
        num_attention_heads=size.heads, attention_head_dim=size.head_dim, in_channels=size.latent_channels,
        out_channels=size.latent_channels, time_embed_dim=128, text_embed_dim=size.text_width, num_layers=size.layers,
        patch_size=2, sample_width=size.side // 4, sample_height=size.side // 4, sample_frames=size.frames,
        temporal_compression_ratio=4, max_text_seq_length=size.text_tokens, use_rotary_positional_embeddings=True)


def save_pipeline(folder: Path | str, tokenizer: Path | str, vae, transformer, text_encoder) -> None:
    """Write a stock CogVideoXPipeline folder (float16 weights)."""
    pipeline = CogVideoXPipeline(
        tokenizer=AutoTokenizer.from_pretrained(tokenizer), text_encoder=text_encoder, vae=vae, transformer=transformer,
        scheduler=scheduler())
    pipeline.to(dtype=torch.float16).save_pretrained(folder)


class VaeLoss(nn.Module):
    """Reconstruction (L1 + L2) and a light KL pull; the Trainer calls it with pixels_bcnhw in [-1, 1]."""

    def __init__(self, vae: AutoencoderKLCogVideoX, kl_weight: float = 1e-4):
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        posterior = self.vae.encode(pixels).latent_dist
        error = self.vae.decode(posterior.sample()).sample.float() - pixels
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1.0 - posterior.logvar.float()).mean()
        return {"loss": error.abs().mean() + error.square().mean() + self.kl_weight * kl}


class DenoisingLoss(nn.Module):
    """v-prediction loss of the transformer, the text encoder learning with it (Salimans & Ho 2022, CogVideoX sec. 2).

    Called with latents_bfchw (scaled), token ids [B, L] and optionally weights_bfhw of the latent cells; timesteps are
    uniform over the schedule.
    """

    _keys_to_ignore_on_save = None  # transformers' Trainer asks for it when it resumes a checkpoint without the alias

    def __init__(self, transformer: CogVideoXTransformer3DModel, text_encoder: T5EncoderModel):
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder
        self.register_buffer("alphas", scheduler().alphas_cumprod, persistent=False)
        self.register_state_dict_post_hook(_without_alias)

    def forward(self, latents: torch.Tensor, input_ids: torch.Tensor,
                weights: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        batch, frames, _, rows, columns = latents.shape
        steps = torch.randint(0, len(self.alphas), (batch,), device=latents.device)
        alpha = self.alphas[steps].to(latents)[:, None, None, None, None]
        noise = torch.randn_like(latents)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        text = self.text_encoder(input_ids)[0]
        predicted = self.transformer(hidden_states=noisy, encoder_hidden_states=text, timestep=steps,
                                     image_rotary_emb=rotary(self.transformer, frames, rows, columns)).sample
        error = (predicted.float() - velocity).square().mean(dim=2)
        if weights is None:
            return {"loss": error.mean()}
        return {"loss": (error * weights).mean() / weights.mean()}


def _without_alias(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    """T5 names its embedding twice; safetensors takes each tensor once."""
    state.pop(f"{prefix}text_encoder.encoder.embed_tokens.weight", None)


def rotary(transformer: CogVideoXTransformer3DModel, frames: int, rows: int, columns: int):
    """Rotary tables of CogVideoXPipeline for latents of this size: ([F*h*w, head_dim], [F*h*w, head_dim])."""
    config = transformer.config
    height, width = rows // config.patch_size, columns // config.patch_size
    base = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
    top, left = (base[0] - height) // 2, (base[1] - width) // 2
    return get_3d_rotary_pos_embed(embed_dim=config.attention_head_dim,
                                   crops_coords=((top, left), (top + height, left + width)), grid_size=(height, width),
                                   temporal_size=frames)
