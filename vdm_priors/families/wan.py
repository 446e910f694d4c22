"""Wan 2.1 and 2.2 as teachers: a flow model with self-attention over vision and cross-attention to text.

What an adapter must know: `attn1` is vision over vision, `attn2` vision over text, so only vision asks (Harvest.t2v);
text is padded with zero embeddings that are not masked and so receive attention; guidance is a second call; latents
are normalised by the VAE's mean and deviation per channel; the usual sampler (UniPC) has several steps of memory, so
Euler's method on its σ grid inverts. Wan 2.2 14B hands over to a second transformer below `boundary_ratio`; Wan 2.2
5B tells the time of every token (`expand_timesteps`).

Legend: B clips, F latent frames, C channels, h×w latent pixels, L text tokens, D text width; b batch, s tokens, d head
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from vdm_priors.attention import AttentionLayer, Layout
from vdm_priors.errors import ModelError
from vdm_priors.families._base import PipelineTeacher, Span, default_of, separate_layers
from vdm_priors.families._flow import flow_schedule, require_flow
from vdm_priors.families._loading import load_pipeline
from vdm_priors.families._processors import Keeper, RecordingProcessor
from vdm_priors.families._skeleton import skeleton_pipeline
from vdm_priors.memory import Memory
from vdm_priors.schedules import FlowSchedule


def accepts(model_index: dict[str, Any]) -> bool:
    """Whether a diffusers folder is of this family."""
    return model_index.get("_class_name") == "WanPipeline"


def load(path_or_hub: str | Path, dtype: torch.dtype, device: str | torch.device) -> Wan:
    """The teacher of a pipeline folder or hub name. Raises ModelError if it cannot be used."""
    return Wan(*load_pipeline("Wan", WanPipeline, path_or_hub, dtype, device))


def skeleton(path_or_hub: str | Path) -> Wan:
    """The teacher without weights, from its configurations alone (_skeleton.py). Raises ModelError as `load`."""
    return Wan(*skeleton_pipeline("Wan", WanPipeline, path_or_hub))


def trained_frames(path_or_hub: str | Path) -> int:
    """Frames of the clips that its pipeline makes: the configurations do not say the trained number."""
    return default_of(WanPipeline, "num_frames")


class Wan(PipelineTeacher):
    """A frozen Wan pipeline; implements vdm_priors.families.Teacher."""

    guidance_kind = "separate"

    def __init__(self, pipeline: WanPipeline, folder: Path) -> None:
        self._check_supported(pipeline, folder.name)
        super().__init__(pipeline, folder, int(pipeline.vae.config.scale_factor_temporal))
        self.transformer_2 = pipeline.transformer_2
        if self.transformer_2 is not None:
            self.transformer_2.eval().requires_grad_(False)
            self.attention_models.append(self.transformer_2)
        ratio = pipeline.config.boundary_ratio
        self._boundary = None if ratio is None else ratio * self.scheduler.config.num_train_timesteps
        self._time_of_tokens = bool(pipeline.config.expand_timesteps)
        frames, *sides = self.transformer.config.patch_size
        self.patch_frames = frames
        self.cell = tuple(self.vae.config.scale_factor_spatial * side for side in sides)
        self.max_text_tokens = default_of(WanPipeline, "max_sequence_length")
        self.trained_frames = default_of(WanPipeline, "num_frames")
        self.trained_size = (default_of(WanPipeline, "height"), default_of(WanPipeline, "width"))

    @property
    def attention_layers(self) -> list[AttentionLayer]:
        """Blocks, each with its self- and cross-attention; those of the second transformer after the first's."""
        return separate_layers(self.attention_models, "blocks")

    def schedule(self, shape: Sequence[int]) -> FlowSchedule:
        """The same for latents of every shape."""
        return flow_schedule(self.scheduler)

    def _scaled(self, z: Tensor) -> Tensor:
        mean, deviation = self._statistics(z)
        return (z - mean) / deviation

    def _unscaled(self, z: Tensor) -> Tensor:
        mean, deviation = self._statistics(z)
        return z * deviation + mean

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        return tuple(z.new_tensor(values)[:, None, None, None] for values in (config.latents_mean, config.latents_std))

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> tuple[Tensor, list[list[Span]]]:
        """Embeddings [B, L, D], 0 for padding, and, per text, the character span of each of its L tokens.

        As the pipeline does it, but for the cleaning of HTML and of wide spaces, which would move the characters.
        """
        ids, mask, offsets = self._tokens(texts)
        embeds = self.text_encoder(ids, mask).last_hidden_state
        return torch.where(mask[..., None] > 0, embeds, 0.0), offsets

    @torch.no_grad()
    def predict(self, latents: Tensor, timestep: float, embeds: Tensor) -> Tensor:
        """v [B, F, C, h, w] float32 of the transformer that the timestep is for."""
        low_noise = self._boundary is not None and timestep < self._boundary
        network = self.transformer_2 if low_noise else self.transformer
        hidden = latents.transpose(1, 2).to(self.device, network.dtype)
        times = torch.full((len(latents),), float(timestep), device=self.device)
        if self._time_of_tokens:
            tokens = prod(n // p for n, p in zip(hidden.shape[2:], network.config.patch_size, strict=True))
            times = times[:, None].expand(-1, tokens)
        prediction = network(
            hidden_states=hidden,
            timestep=times,
            encoder_hidden_states=embeds.to(self.device, network.dtype),
            return_dict=False,
        )[0]
        return prediction.float().transpose(1, 2)

    def attention_processor(
        self, layer: str, previous: Any, recorder: tuple[int, Any] | None = None, streams: Memory | None = None,
        keeper: Keeper | None = None,
    ) -> WanRecording:
        """A processor like `previous` that also records, attends to a reference as well, or lets its keys be kept."""
        return WanRecording.extending(layer, previous, recorder, streams, keeper)

    @staticmethod
    def _check_supported(pipeline: WanPipeline, name: str) -> None:
        if pipeline.transformer is None or (pipeline.config.boundary_ratio is None) != (pipeline.transformer_2 is None):
            raise ModelError(
                f"The teacher {name} has not the transformers that its boundary_ratio "
                f"{pipeline.config.boundary_ratio} asks for: a transformer, and with a boundary a transformer_2. "
                f"Load the folder whole."
            )
        config = pipeline.transformer.config
        if config.image_dim is not None or config.in_channels != pipeline.vae.config.z_dim:
            raise ModelError(
                f"The teacher {name} takes {config.in_channels} latent channels where its VAE gives "
                f"{pipeline.vae.config.z_dim}, or an image. Use a text-to-video model."
            )
        require_flow(pipeline.scheduler, name)


@dataclass(frozen=True, eq=False)
class WanRecording(RecordingProcessor):
    """diffusers' Wan processor: rotary positions in self-attention, none in cross-attention, nothing masked."""

    STANDS_FOR = (WanAttnProcessor,)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            raise ModelError("Wan attention: an attention mask cannot be harvested.")
        q, k, v = _project(attn, hidden_states, encoder_hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        if rotary_emb is not None:
            q, k = _rotated(q, *rotary_emb), _rotated(k, *rotary_emb)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if encoder_hidden_states is None:
            out = self.attend(q, k, v, Layout.vision_only(k.shape[2]))
        else:
            out = self.attend_cross(q, k, v)
        return attn.to_out[1](attn.to_out[0](out.type_as(q)))


def _project(attn: Any, vision: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    seen = vision if text is None else text
    if not attn.fused_projections:
        return attn.to_q(vision), attn.to_k(seen), attn.to_v(seen)
    if text is None:
        return attn.to_qkv(vision).chunk(3, dim=-1)
    return attn.to_q(vision), *attn.to_kv(text).chunk(2, dim=-1)


def _rotated(x_bshd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbouring channels turned by their position's angle."""
    even, odd = x_bshd.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x_bshd)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out
