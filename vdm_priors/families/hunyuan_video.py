"""HunyuanVideo as a teacher: a flow model with joint attention over [vision, text], text last.

What an adapter must know: the text stands inside a template, whose tokens are cut off again; padding is hidden by a
mask; dual-stream blocks (own weights for text) come before single-stream ones; a second encoder (CLIP) sums the text
up; the network is told the guidance it was distilled for, and needs no second pass.

Legend: B clips, F latent frames, C channels, h×w latent pixels, L text tokens, D text width; b batch, s tokens, h
heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import HunyuanVideoPipeline
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor

from vdm_priors.attention import AttentionLayer, Layout
from vdm_priors.conditioning import MaskedText
from vdm_priors.errors import ModelError
from vdm_priors.families._base import PipelineTeacher, Span, default_of
from vdm_priors.families._flow import flow_schedule, require_flow
from vdm_priors.families._loading import load_pipeline
from vdm_priors.families._processors import Keeper, RecordingProcessor, split_heads
from vdm_priors.families._skeleton import skeleton_pipeline
from vdm_priors.memory import Memory
from vdm_priors.schedules import FlowSchedule

BEFORE, AFTER = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")
SUMMARY_TOKENS = 77  # of the CLIP encoder, as in the pipeline
SKIPPED_LAYERS = 2  # of the text encoder, from its end, as in the pipeline


def accepts(model_index: dict[str, Any]) -> bool:
    """Whether a diffusers folder is of this family."""
    return model_index.get("_class_name") == "HunyuanVideoPipeline"


def load(path_or_hub: str | Path, dtype: torch.dtype, device: str | torch.device) -> HunyuanVideo:
    """The teacher of a pipeline folder or hub name. Raises ModelError if it cannot be used."""
    return HunyuanVideo(*load_pipeline("HunyuanVideo", HunyuanVideoPipeline, path_or_hub, dtype, device))


def skeleton(path_or_hub: str | Path) -> HunyuanVideo:
    """The teacher without weights, from its configurations alone (_skeleton.py). Raises ModelError as `load`."""
    return HunyuanVideo(*skeleton_pipeline("HunyuanVideo", HunyuanVideoPipeline, path_or_hub))


def trained_frames(path_or_hub: str | Path) -> int:
    """Frames of the clips that its pipeline makes: the configurations do not say the trained number."""
    return default_of(HunyuanVideoPipeline, "num_frames")


class HunyuanVideo(PipelineTeacher):
    """A frozen HunyuanVideo pipeline; implements vdm_priors.families.Teacher."""

    def __init__(self, pipeline: HunyuanVideoPipeline, folder: Path) -> None:
        super().__init__(pipeline, folder, int(pipeline.vae.temporal_compression_ratio))
        self.tokenizer_2 = pipeline.tokenizer_2
        self.text_encoder_2 = pipeline.text_encoder_2.eval().requires_grad_(False)
        config = self.transformer.config
        self.patch_frames = config.patch_size_t
        self.cell = (int(self.vae.spatial_compression_ratio) * config.patch_size,) * 2
        self.guidance_kind = "embedded" if config.guidance_embeds else "separate"
        self.max_text_tokens = default_of(HunyuanVideoPipeline, "max_sequence_length")
        self.trained_frames = default_of(HunyuanVideoPipeline, "num_frames")
        self.trained_size = (default_of(HunyuanVideoPipeline, "height"), default_of(HunyuanVideoPipeline, "width"))
        self._check_supported()

    @cached_property
    def _template_tokens(self) -> int:
        """Tokens of the template before the text, which are cut off."""
        spans = self.tokenizer(BEFORE + AFTER, return_offsets_mapping=True).offset_mapping
        return next(i for i, (start, end) in enumerate(spans) if end > len(BEFORE))

    @property
    def attention_layers(self) -> list[AttentionLayer]:
        """Dual- then single-stream blocks; the attention that refines the text beforehand sees no vision."""
        blocks = ("transformer_blocks.", "single_transformer_blocks.")
        return [layer for layer in super().attention_layers if layer.name.startswith(blocks)]

    def schedule(self, shape: Sequence[int]) -> FlowSchedule:
        """The same for latents of every shape."""
        return flow_schedule(self.scheduler, lambda steps: {"sigmas": np.linspace(1.0, 0.0, steps + 1)[:-1]})

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> tuple[MaskedText, list[list[Span]]]:
        """Embeddings [B, L, D] with mask and CLIP's summary; per text, the character span of each of its L tokens.

        Tokens of the template that follow the text have empty spans, like special and padding ones.
        """
        cut = self._template_tokens
        ids, mask, spans = self._tokens([BEFORE + text + AFTER for text in texts], cut + self.max_text_tokens)
        layers = self.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        embeds = layers[-(SKIPPED_LAYERS + 1)][:, cut:]
        offsets = [
            [_inside(span, len(BEFORE), len(text)) for span in row[cut:]]
            for row, text in zip(spans, texts, strict=True)
        ]
        summary_ids = self.tokenizer_2(
            list(texts), padding="max_length", max_length=SUMMARY_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        pooled = self.text_encoder_2(summary_ids.to(self.device)).pooler_output
        return MaskedText(embeds, mask[:, cut:].bool(), pooled), offsets

    @torch.no_grad()
    def predict(self, latents: Tensor, timestep: float, embeds: MaskedText, guidance: float = 1.0) -> Tensor:
        """v [B, F, C, h, w] float32 of a network that is told `guidance`, where it was distilled for it."""
        dtype = self.transformer.dtype
        told = torch.full((len(latents),), guidance * 1000.0, dtype=dtype, device=self.device)
        prediction = self.transformer(
            hidden_states=latents.transpose(1, 2).to(self.device, dtype),
            timestep=torch.full((len(latents),), float(timestep), device=self.device),
            encoder_hidden_states=embeds.embeds.to(self.device, dtype),
            encoder_attention_mask=embeds.mask.to(self.device, dtype),
            pooled_projections=embeds.pooled.to(self.device, dtype),
            guidance=told if self.transformer.config.guidance_embeds else None,
            return_dict=False,
        )[0]
        return prediction.float().transpose(1, 2)

    def attention_processor(
        self, layer: str, previous: Any, recorder: tuple[int, Any] | None = None, streams: Memory | None = None,
        keeper: Keeper | None = None,
    ) -> HunyuanRecording:
        """A processor like `previous` that also records, attends to a reference as well, or lets its keys be kept."""
        return HunyuanRecording.extending(layer, previous, recorder, streams, keeper)

    def _check_supported(self) -> None:
        config, name = self.transformer.config, self.folder.name
        if config.image_condition_type is not None or config.in_channels != self.vae.config.latent_channels:
            raise ModelError(
                f"The teacher {name} takes {config.in_channels} latent channels where its VAE gives "
                f"{self.vae.config.latent_channels}, or an image ({config.image_condition_type}). Use a "
                f"text-to-video model."
            )
        if self.tokenizer.padding_side != "right":
            raise ModelError(
                f"The tokenizer of the teacher {name} pads on the {self.tokenizer.padding_side}; HunyuanVideo hides "
                f"padding on the right. Set padding_side to right in its tokenizer_config.json."
            )
        require_flow(self.scheduler, name)


def _inside(span: Span, before: int, length: int) -> Span:
    """A span of the filled template in the text's own characters; (0, 0) if it shares none with the text."""
    start, end = max(span[0] - before, 0), min(span[1] - before, length)
    return (start, end) if end > start else (0, 0)


@dataclass(frozen=True, eq=False)
class HunyuanRecording(RecordingProcessor):
    """diffusers' HunyuanVideo processor, of both kinds of blocks: rotary positions on vision, padding masked."""

    STANDS_FOR = (HunyuanVideoAttnProcessor2_0,)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text = encoder_hidden_states.shape[1]
        if attn.add_q_proj is None:  # a single-stream block: the same weights for both
            joint = torch.cat([hidden_states, encoder_hidden_states], dim=1)
            q, k, v = _normed(attn, joint, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
            vision = q.shape[2] - text
            q, k = (
                torch.cat([apply_rotary_emb(x[:, :, :vision], image_rotary_emb), x[:, :, vision:]], dim=2)
                for x in (q, k)
            )
        else:
            q, k, v = _normed(attn, hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
            q, k = apply_rotary_emb(q, image_rotary_emb), apply_rotary_emb(k, image_rotary_emb)
            of_text = _normed(
                attn, encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj,
                attn.norm_added_q, attn.norm_added_k,
            )
            q, k, v = (torch.cat(pair, dim=2) for pair in zip((q, k, v), of_text, strict=True))
        out = self.attend(q, k, v, Layout.text_last(text, q.shape[2]), attention_mask).to(q.dtype)
        seen, said = out[:, :-text], out[:, -text:]
        if getattr(attn, "to_out", None) is not None:
            seen = attn.to_out[1](attn.to_out[0](seen))
        if getattr(attn, "to_add_out", None) is not None:
            said = attn.to_add_out(said)
        return seen, said


def _normed(
    attn: Any, x_bsc: Tensor, to_q: Any, to_k: Any, to_v: Any, norm_q: Any, norm_k: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [b, h, s, d] of one stream."""
    q, k, v = (split_heads(project(x_bsc), attn.heads) for project in (to_q, to_k, to_v))
    return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v
