"""LTX-Video as a teacher: a flow model with self-attention over vision and cross-attention to text.

What an adapter must know: the transformer takes latents packed to tokens; padding of the text is hidden by a bias;
positions count seconds, at the pipeline's usual frame rate; the σ grid is shifted by the number of tokens; latents are
normalised by the VAE's own statistics; guidance shares a forward.

Legend: B clips, F latent frames, C channels, h×w latent pixels, L text tokens, D text width; b batch, s tokens, d head
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import LTXPipeline
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor, apply_rotary_emb
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from torch import Tensor

from vdm_priors.attention import AttentionLayer, Layout
from vdm_priors.conditioning import MaskedText
from vdm_priors.errors import ModelError
from vdm_priors.families._base import PipelineTeacher, Span, default_of, separate_layers
from vdm_priors.families._flow import flow_schedule, require_flow
from vdm_priors.families._loading import load_pipeline
from vdm_priors.families._processors import Keeper, RecordingProcessor, split_heads
from vdm_priors.families._skeleton import skeleton_pipeline
from vdm_priors.memory import Memory
from vdm_priors.schedules import FlowSchedule


def accepts(model_index: dict[str, Any]) -> bool:
    """Whether a diffusers folder is of this family."""
    return model_index.get("_class_name") == "LTXPipeline"


def load(path_or_hub: str | Path, dtype: torch.dtype, device: str | torch.device) -> LtxVideo:
    """The teacher of a pipeline folder or hub name. Raises ModelError if it cannot be used."""
    return LtxVideo(*load_pipeline("LTX-Video", LTXPipeline, path_or_hub, dtype, device))


def skeleton(path_or_hub: str | Path) -> LtxVideo:
    """The teacher without weights, from its configurations alone (_skeleton.py). Raises ModelError as `load`."""
    return LtxVideo(*skeleton_pipeline("LTX-Video", LTXPipeline, path_or_hub))


def trained_frames(path_or_hub: str | Path) -> int:
    """Frames of the clips that its pipeline makes: the configurations do not say the trained number."""
    return default_of(LTXPipeline, "num_frames")


class LtxVideo(PipelineTeacher):
    """A frozen LTX-Video pipeline; implements vdm_priors.families.Teacher."""

    def __init__(self, pipeline: LTXPipeline, folder: Path) -> None:
        super().__init__(pipeline, folder, int(pipeline.vae.temporal_compression_ratio))
        self._reduction = int(self.vae.spatial_compression_ratio)
        self.cell = (self._reduction, self._reduction)
        self.max_text_tokens = default_of(LTXPipeline, "max_sequence_length")
        self.trained_frames = default_of(LTXPipeline, "num_frames")
        self.trained_size = (default_of(LTXPipeline, "height"), default_of(LTXPipeline, "width"))
        seconds = self._frames_per_latent / default_of(LTXPipeline, "frame_rate")
        self._position_scale = (seconds, self._reduction, self._reduction)
        self._check_supported()

    @property
    def attention_layers(self) -> list[AttentionLayer]:
        """Blocks, each with its self- and cross-attention."""
        return separate_layers(self.attention_models, "transformer_blocks")

    def schedule(self, shape: Sequence[int]) -> FlowSchedule:
        """Shifted by the number of tokens of latents [B, F, C, h, w], as the pipeline shifts it."""
        _, frames, _, height, width = shape
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(frames * height * width, *(self.scheduler.config[name] for name in names))
        return flow_schedule(
            self.scheduler,
            lambda steps: {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": mu},
            fewest_steps=2 if self.scheduler.config.shift_terminal else 1,  # it stretches what lies between two
        )

    def _scaled(self, z: Tensor) -> Tensor:
        mean, deviation = self._statistics()
        return (z - mean) * self.vae.config.scaling_factor / deviation

    def _unscaled(self, z: Tensor) -> Tensor:
        mean, deviation = self._statistics()
        return z * deviation / self.vae.config.scaling_factor + mean

    def _statistics(self) -> tuple[Tensor, Tensor]:
        statistics = self.vae.latents_mean, self.vae.latents_std
        return tuple(values.to(self.device, torch.float32)[:, None, None, None] for values in statistics)

    def _decoded(self, z: Tensor) -> Tensor:
        """A VAE that is told a noise level is told none: latents of a clip have none left."""
        told = z.new_zeros(len(z)) if self.vae.config.timestep_conditioning else None
        return self.vae.decode(z, told).sample

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> tuple[MaskedText, list[list[Span]]]:
        """Embeddings [B, L, D] with their mask and, per text, the character span of each of its L tokens."""
        ids, mask, offsets = self._tokens(texts)
        return MaskedText(self.text_encoder(ids)[0], mask.bool()), offsets

    @torch.no_grad()
    def predict(self, latents: Tensor, timestep: float, embeds: MaskedText) -> Tensor:
        """v [B, F, C, h, w] float32."""
        dtype = self.transformer.dtype
        _, frames, _, height, width = latents.shape
        packed_bsc = latents.to(self.device, dtype).transpose(1, 2).flatten(2).transpose(1, 2)
        prediction_bsc = self.transformer(
            hidden_states=packed_bsc,
            encoder_hidden_states=embeds.embeds.to(self.device, dtype),
            timestep=torch.full((len(latents),), float(timestep), device=self.device),
            encoder_attention_mask=embeds.mask.to(self.device),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=self._position_scale,
            return_dict=False,
        )[0]
        return prediction_bsc.float().unflatten(1, (frames, height, width)).permute(0, 1, 4, 2, 3)

    def attention_processor(
        self, layer: str, previous: Any, recorder: tuple[int, Any] | None = None, streams: Memory | None = None,
        keeper: Keeper | None = None,
    ) -> LtxRecording:
        """A processor like `previous` that also records, attends to a reference as well, or lets its keys be kept."""
        return LtxRecording.extending(layer, previous, recorder, streams, keeper)

    def _check_supported(self) -> None:
        config, name = self.transformer.config, self.folder.name
        if (config.patch_size, config.patch_size_t) != (1, 1) or config.in_channels != self.vae.config.latent_channels:
            raise ModelError(
                f"The teacher {name} takes {config.in_channels} channels in patches of {config.patch_size_t}×"
                f"{config.patch_size}×{config.patch_size} where its VAE gives {self.vae.config.latent_channels}; "
                f"supported are LTX-Video's 1×1×1 patches of all channels. Use a text-to-video model."
            )
        require_flow(self.scheduler, name)


@dataclass(frozen=True, eq=False)
class LtxRecording(RecordingProcessor):
    """diffusers' LTX processor: rotary positions in self-attention; a bias hides padding in cross-attention."""

    STANDS_FOR = (LTXVideoAttnProcessor,)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, tokens, _ = seen.shape
        if attention_mask is not None:
            if encoder_hidden_states is None:
                raise ModelError("LTX-Video attention: a mask of vision cannot be harvested.")
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(seen))
        if image_rotary_emb is not None:
            q, k = apply_rotary_emb(q, image_rotary_emb), apply_rotary_emb(k, image_rotary_emb)
        q, k, v = (split_heads(x, attn.heads) for x in (q, k, attn.to_v(seen)))
        if encoder_hidden_states is None:
            out = self.attend(q, k, v, Layout.vision_only(tokens))
        else:
            out = self.attend_cross(q, k, v, attention_mask)
        return attn.to_out[1](attn.to_out[0](out.to(q.dtype)))
