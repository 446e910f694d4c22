"""Mochi 1 as a teacher: a flow model with joint attention over [vision, text], text last.

What an adapter must know: every clip's padding is dropped before attention; time runs the other way, from 0 (noise) to
1 (the clip), and the network predicts towards the clip; the σ grid is linear at first and quadratic then; an empty
text may be told as no text at all; guidance shares a forward.

Legend: B clips, F latent frames, C channels, h×w latent pixels, L text tokens, D text width; b batch, s tokens, h
heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import MochiPipeline
from diffusers.models.attention_processor import MochiAttnProcessor2_0
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from torch import Tensor
from torch.nn.functional import pad

from vdm_priors.attention import Layout
from vdm_priors.conditioning import MaskedText
from vdm_priors.errors import ModelError
from vdm_priors.families._base import PipelineTeacher, Span, default_of
from vdm_priors.families._flow import flow_schedule, require_flow
from vdm_priors.families._loading import load_pipeline
from vdm_priors.families._processors import Keeper, RecordingProcessor, split_heads
from vdm_priors.families._skeleton import skeleton_pipeline
from vdm_priors.kernels import as_bias, attention
from vdm_priors.memory import Memory
from vdm_priors.schedules import FlowSchedule

LINEAR_NOISE = 0.025  # how much of the way the grid's linear half goes, as in the pipeline


def accepts(model_index: dict[str, Any]) -> bool:
    """Whether a diffusers folder is of this family."""
    return model_index.get("_class_name") == "MochiPipeline"


def load(path_or_hub: str | Path, dtype: torch.dtype, device: str | torch.device) -> Mochi:
    """The teacher of a pipeline folder or hub name. Raises ModelError if it cannot be used."""
    return Mochi(*load_pipeline("Mochi", MochiPipeline, path_or_hub, dtype, device))


def skeleton(path_or_hub: str | Path) -> Mochi:
    """The teacher without weights, from its configurations alone (_skeleton.py). Raises ModelError as `load`."""
    return Mochi(*skeleton_pipeline("Mochi", MochiPipeline, path_or_hub))


def trained_frames(path_or_hub: str | Path) -> int:
    """Frames of the clips that its pipeline makes: the configurations do not say the trained number."""
    return default_of(MochiPipeline, "num_frames")


class Mochi(PipelineTeacher):
    """A frozen Mochi pipeline; implements vdm_priors.families.Teacher."""

    def __init__(self, pipeline: MochiPipeline, folder: Path) -> None:
        super().__init__(pipeline, folder, int(pipeline.vae.temporal_compression_ratio))
        self.attention_models = [MochiProcessors(self.transformer)]
        self.cell = (int(self.vae.spatial_compression_ratio) * self.transformer.config.patch_size,) * 2
        self.max_text_tokens = default_of(MochiPipeline, "max_sequence_length")
        self.trained_frames = default_of(MochiPipeline, "num_frames")
        self.trained_size = (pipeline.default_height, pipeline.default_width)
        self._empty_is_nothing = bool(pipeline.config.force_zeros_for_empty_prompt)
        self._check_supported()

    def schedule(self, shape: Sequence[int]) -> FlowSchedule:
        """The same for latents of every shape."""
        return flow_schedule(
            self.scheduler,
            lambda steps: {"sigmas": np.array(linear_quadratic_schedule(steps, LINEAR_NOISE))},
            fewest_steps=2,  # the grid's two halves
        )

    def _scaled(self, z: Tensor) -> Tensor:
        mean, deviation = self._statistics(z)
        return (z - mean) * self.vae.config.scaling_factor / deviation

    def _unscaled(self, z: Tensor) -> Tensor:
        mean, deviation = self._statistics(z)
        return z * deviation / self.vae.config.scaling_factor + mean

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        mean = config.latents_mean or [0.0] * config.latent_channels
        deviation = config.latents_std or [1.0] * config.latent_channels
        return tuple(z.new_tensor(values)[:, None, None, None] for values in (mean, deviation))

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> tuple[MaskedText, list[list[Span]]]:
        """Embeddings [B, L, D] with their mask and, per text, the character span of each of its L tokens."""
        ids, mask, offsets = self._tokens(texts)
        if self._empty_is_nothing:
            said = torch.tensor([[text != ""] for text in texts], device=ids.device)
            ids, mask = ids * said, mask * said
        return MaskedText(self.text_encoder(ids, attention_mask=mask.bool())[0], mask.bool()), offsets

    @torch.no_grad()
    def predict(self, latents: Tensor, timestep: float, embeds: MaskedText) -> Tensor:
        """v = dx/dσ [B, F, C, h, w] float32: the network's own, of time that runs towards the clip, turned round."""
        dtype = self.transformer.dtype
        prediction = self.transformer(
            hidden_states=latents.transpose(1, 2).to(self.device, dtype),
            encoder_hidden_states=embeds.embeds.to(self.device, dtype),
            timestep=torch.full((len(latents),), float(timestep), device=self.device),
            encoder_attention_mask=embeds.mask.to(self.device),
            return_dict=False,
        )[0]
        return -prediction.float().transpose(1, 2)

    def attention_processor(
        self, layer: str, previous: Any, recorder: tuple[int, Any] | None = None, streams: Memory | None = None,
        keeper: Keeper | None = None,
    ) -> MochiRecording:
        """A processor like `previous` that also records, attends to a reference as well, or lets its keys be kept."""
        return MochiRecording.extending(layer, previous, recorder, streams, keeper)

    def _check_supported(self) -> None:
        config, name = self.transformer.config, self.folder.name
        if config.in_channels != self.vae.config.latent_channels:
            raise ModelError(
                f"The teacher {name} takes {config.in_channels} latent channels and its VAE gives "
                f"{self.vae.config.latent_channels}. Use a text-to-video model."
            )
        require_flow(self.scheduler, name)
        if not self.scheduler.config.get("invert_sigmas", False):
            raise ModelError(
                f"The teacher {name} has a scheduler whose time does not run from noise to the clip, as Mochi's does. "
                f"Set invert_sigmas to true in its scheduler_config.json."
            )


class MochiProcessors:
    """diffusers' attn_processors interface, which its Mochi transformer lacks."""

    def __init__(self, transformer: Any) -> None:
        self._modules = {
            f"transformer_blocks.{i}.attn1.processor": block.attn1
            for i, block in enumerate(transformer.transformer_blocks)
        }

    @property
    def attn_processors(self) -> dict[str, Any]:
        return {key: module.processor for key, module in self._modules.items()}

    def set_attn_processor(self, processors: dict[str, Any]) -> None:
        for key, module in self._modules.items():
            module.processor = processors[key]


@dataclass(frozen=True, eq=False)
class MochiRecording(RecordingProcessor):
    """diffusers' Mochi processor: rotary positions on vision; of the text only what is no padding is there."""

    STANDS_FOR = (MochiAttnProcessor2_0,)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (
            torch.cat([split_heads(of_vision, attn.heads), split_heads(of_text, attn.heads)], dim=2)
            for of_vision, of_text in self._projected(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        )
        vision, text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        visible_b11s = pad(attention_mask.bool(), (vision, 0), value=True)[:, None, None]
        if self.keeper is not None:
            self.keeper(k, v, visible_b11s)
        layout = Layout.text_last(text, vision + text)
        out, lse = self._attended(q, k, v, visible_b11s, self.wants_lse(layout))
        self.record(q, k, layout, as_bias(visible_b11s), lse)
        seen, said = out.transpose(1, 2).flatten(2).split_with_sizes((vision, text), dim=1)
        seen = attn.to_out[1](attn.to_out[0](seen))
        return seen, attn.to_add_out(said) if hasattr(attn, "to_add_out") else said

    def _projected(
        self, attn: Any, vision: Tensor, text: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> list[tuple[Tensor, Tensor]]:
        """q, k, v of vision and of text, [b, s, h·d] each."""

        def normed(x_bsc: Tensor, norm: Any, angles: tuple[Tensor, Tensor] | None = None) -> Tensor:
            x_bshd = x_bsc.unflatten(2, (attn.heads, -1))
            x_bshd = x_bshd if norm is None else norm(x_bshd)
            return (x_bshd if angles is None else _rotated(x_bshd, *angles)).flatten(2)

        return [
            (normed(attn.to_q(vision), attn.norm_q, rotary), normed(attn.add_q_proj(text), attn.norm_added_q)),
            (normed(attn.to_k(vision), attn.norm_k, rotary), normed(attn.add_k_proj(text), attn.norm_added_k)),
            (attn.to_v(vision), attn.add_v_proj(text)),
        ]

    def _attended(
        self, q_bhsd: Tensor, k_bhsd: Tensor, v_bhsd: Tensor, visible_b11s: Tensor, wants_lse: bool | None
    ) -> tuple[Tensor, Tensor | None]:
        """Output [b, h, s, d] and log-sum-exp; a clip at a time, for each has a text of its own length.

        Of padding, which sees nothing, the output is 0 and the log-sum-exp so large that all probabilities are 0.

        The log-sum-exp [g, h, s] is of the generated clips, or of all without reference streams.
        """
        generated = 0
        if self.streams is not None:
            self.streams.check(len(q_bhsd))
            generated = self.streams.generated
            keys, values, seen = (
                self.streams.keys(k_bhsd), self.streams.values(v_bhsd), self.streams.mask(visible_b11s)
            )
        rows, lses = [], []
        for i, visible_s in enumerate(visible_b11s[:, 0, 0]):
            own = visible_s.nonzero().flatten()
            if i < generated:
                shown = seen[i, 0, 0].nonzero().flatten()
                k, v = keys[i : i + 1, :, shown], values[i : i + 1, :, shown]
            else:
                k, v = k_bhsd[i : i + 1, :, own], v_bhsd[i : i + 1, :, own]
            out = q_bhsd.new_zeros(1, *q_bhsd.shape[1:])
            # None would be of use for some of the clips only
            wanted = bool(wants_lse) and (self.streams is None or i < generated)
            out[:, :, own], of_own = attention(q_bhsd[i : i + 1, :, own], k, v, lse=wanted)
            rows.append(out)
            if wanted:
                lse = out.new_full(out.shape[:3], torch.finfo(torch.float32).max, dtype=torch.float32)
                lse[:, :, own] = of_own
                lses.append(lse)
        return torch.cat(rows), torch.cat(lses) if wants_lse else None


def _rotated(x_bshd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbouring channels turned by their position's angle."""
    even, odd = x_bshd[..., 0::2].float(), x_bshd[..., 1::2].float()
    turned = (even * cos - odd * sin).to(x_bshd.dtype), (even * sin + odd * cos).to(x_bshd.dtype)
    return torch.stack(turned, dim=-1).flatten(-2)
