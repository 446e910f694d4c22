"""SkyReels-V2 as a teacher: Wan's networks trained anew, with diffusers classes of their own.

What is not Wan's: the transformer is told the time by the clip only, and a video may be made in causal blocks of frames,
whose mask cannot be harvested. Everything else is inherited.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import SkyReelsV2Pipeline
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2AttnProcessor
from torch import Tensor

from vdm_priors.errors import ModelError
from vdm_priors.families import wan
from vdm_priors.families._base import PipelineTeacher, default_of
from vdm_priors.families._flow import require_flow
from vdm_priors.families._loading import load_pipeline
from vdm_priors.families._skeleton import skeleton_pipeline


def accepts(model_index: dict[str, Any]) -> bool:
    """Whether a diffusers folder is of this family."""
    return model_index.get("_class_name") == "SkyReelsV2Pipeline"


def load(path_or_hub: str | Path, dtype: torch.dtype, device: str | torch.device) -> SkyReels:
    """The teacher of a pipeline folder or hub name. Raises ModelError if it cannot be used."""
    return SkyReels(*load_pipeline("SkyReels-V2", SkyReelsV2Pipeline, path_or_hub, dtype, device))


def skeleton(path_or_hub: str | Path) -> SkyReels:
    """The teacher without weights, from its configurations alone. Raises ModelError as `load`."""
    return SkyReels(*skeleton_pipeline("SkyReels-V2", SkyReelsV2Pipeline, path_or_hub))


def trained_frames(path_or_hub: str | Path) -> int:
    """Frames of the clips that its pipeline makes."""
    return default_of(SkyReelsV2Pipeline, "num_frames")


class SkyReels(wan.Wan):
    """A frozen SkyReels-V2 text-to-video pipeline; implements vdm_priors.families.Teacher."""

    def __init__(self, pipeline: SkyReelsV2Pipeline, folder: Path) -> None:
        config = pipeline.transformer.config
        if config.num_frame_per_block > 1 or config.image_dim is not None or config.inject_sample_info:
            raise ModelError(
                f"The teacher {folder.name} works in causal blocks, takes an image or is told the frame rate, which is "
                "not followed here. Use a text-to-video checkpoint (SkyReels-V2-T2V)."
            )
        require_flow(pipeline.scheduler, folder.name)
        PipelineTeacher.__init__(self, pipeline, folder, pipeline.vae_scale_factor_temporal)
        frames, *sides = config.patch_size
        self.patch_frames = frames
        self.cell = tuple(pipeline.vae_scale_factor_spatial * side for side in sides)
        self.max_text_tokens = default_of(SkyReelsV2Pipeline, "max_sequence_length")
        self.trained_frames = default_of(SkyReelsV2Pipeline, "num_frames")
        self.trained_size = (default_of(SkyReelsV2Pipeline, "height"), default_of(SkyReelsV2Pipeline, "width"))

    @torch.no_grad()
    def predict(self, latents: Tensor, timestep: float, embeds: Tensor) -> Tensor:
        """v [B, F, C, h, w] float32."""
        dtype = self.transformer.dtype
        prediction = self.transformer(
            hidden_states=latents.transpose(1, 2).to(self.device, dtype),
            timestep=torch.full((len(latents),), float(timestep), device=self.device),
            encoder_hidden_states=embeds.to(self.device, dtype),
            return_dict=False,
        )[0]
        return prediction.float().transpose(1, 2)

    def attention_processor(self, layer: str, previous: Any, recorder=None, streams=None, keeper=None) -> Recording:
        """A processor like `previous` that also records, attends to a reference as well, or lets its keys be kept."""
        return Recording.extending(layer, previous, recorder, streams, keeper)


class Recording(wan.WanRecording):
    """diffusers' SkyReels-V2 processor computes what Wan's does."""

    STANDS_FOR = (SkyReelsV2AttnProcessor,)
