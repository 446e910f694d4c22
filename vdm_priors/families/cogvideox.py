"""CogVideoX 1.0 and 1.5 as teachers: joint attention over [text, vision], text first, v-prediction.

What an adapter must know: text is padded to a fixed length and the padding is not masked, so
pads receive attention; a causal VAE gives the first frame its own latent; 2B has sin-cos
positions added in the patch embedding, 5B has rotary positions on vision. 1.5 joins two latent
frames in a token, after padding in *front* where their number is odd.

Legend: B clips, N frames, F latent frames, C channels, h×w latent pixels, L text tokens,
D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor

from vdm_priors.errors import ModelError
from vdm_priors.families._base import PipelineTeacher, Span
from vdm_priors.families._cogvideox_attention import CogVideoXAttention
from vdm_priors.families._loading import load_pipeline
from vdm_priors.families._processors import Keeper
from vdm_priors.families._skeleton import skeleton_pipeline
from vdm_priors.fingerprint import hub_commit
from vdm_priors.memory import Memory
from vdm_priors.schedules import DdimSchedule, require_steps

OFS = 2.0  # the constant that diffusers' image-to-video pipeline feeds the models that take an `ofs`


def accepts(model_index: dict[str, Any]) -> bool:
    """Whether a diffusers folder is of this family."""
    return model_index.get("_class_name") == "CogVideoXPipeline"


def load(path_or_hub: str | Path, dtype: torch.dtype, device: str | torch.device) -> CogVideoX:
    """The teacher of a pipeline folder or hub name. Raises ModelError if it cannot be used."""
    return CogVideoX(*load_pipeline("CogVideoX", CogVideoXPipeline, path_or_hub, dtype, device))


def skeleton(path_or_hub: str | Path) -> CogVideoX:
    """The teacher without weights, from its configurations alone (_skeleton.py). Raises ModelError as `load`."""
    return CogVideoX(*skeleton_pipeline("CogVideoX", CogVideoXPipeline, path_or_hub))


def trained_frames(path_or_hub: str | Path) -> int:
    """Frames (of pixels, not latents) of the clips it was trained on. Raises ModelError if that is not to be read."""
    source = str(path_or_hub)
    revision = None if Path(source).exists() else hub_commit(source)
    try:
        config = CogVideoXTransformer3DModel.load_config(source, subfolder="transformer", revision=revision)
        return int(config["sample_frames"])
    except Exception as error:  # a missing file or key, broken JSON, or one of the hub client's kinds
        raise ModelError(
            f"The teacher {source} does not say how many frames it was trained on: sample_frames in its "
            f"transformer/config.json ({type(error).__name__}: {error}). Set teacher.sampling.frames."
        ) from error


class CogVideoX(PipelineTeacher):
    """A frozen CogVideoX pipeline; implements vdm_priors.families.Teacher."""

    def __init__(self, pipeline: CogVideoXPipeline, folder: Path) -> None:
        super().__init__(pipeline, folder, int(pipeline.vae.config.temporal_compression_ratio))
        config = self.transformer.config
        reduction = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.cell = (reduction * config.patch_size,) * 2
        self.patch_frames = config.patch_size_t or 1
        self.max_text_tokens = config.max_text_seq_length
        self.trained_frames = int(config.sample_frames)
        self.trained_size = (config.sample_height * reduction, config.sample_width * reduction)
        self.alphas_cumprod: Tensor = self.scheduler.alphas_cumprod.double().cpu()
        self.final_alpha_cumprod = float(self.scheduler.final_alpha_cumprod)
        self._rotary: dict[tuple[int, int, int], tuple[Tensor, Tensor] | None] = {}
        self._check_supported()

    # ---- schedule -----------------------------------------------------------------------------

    def timesteps(self, steps: int) -> list[int]:
        """The forward scheduler's falling timesteps. Raises ModelError for too few or too many."""
        require_steps(steps, len(self.alphas_cumprod))
        self.scheduler.set_timesteps(steps)
        # diffusers counts some steps that do not divide its 1000 (61, 103, …) one too many, the last being t = −1
        return [t for t in self.scheduler.timesteps.tolist() if t >= 0]

    def schedule(self, shape: Sequence[int]) -> DdimSchedule:
        """The same for latents of every shape."""
        return DdimSchedule(self.alphas_cumprod, self.final_alpha_cumprod, self.timesteps)

    # ---- video --------------------------------------------------------------------------------

    def frame_size(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """(height, width) in pixels that frames are resized to; None: the trained size."""
        height, width = super().frame_size(size)
        config, (most_high, most_wide) = self.transformer.config, self.trained_size
        if config.use_learned_positional_embeddings and (height, width) != self.trained_size:
            raise ModelError(
                f"The teacher {self.folder.name} has learned positions and takes frames of "
                f"{most_high}×{most_wide} pixels only, not {height}×{width}."
            )
        # the positions of 1.5 are cut from those of the largest frame, those of 1.0 are stretched
        if config.patch_size_t is not None and (height > most_high or width > most_wide):
            raise ModelError(
                f"The teacher {self.folder.name} takes frames of at most {most_high}×{most_wide} pixels, "
                f"not {height}×{width}."
            )
        return height, width

    def _decoded(self, z: Tensor) -> Tensor:
        """diffusers' decoder gives the first latent one frame only where their number is odd.

        An even number is decoded with its last one again, whose frames are cut off.
        """
        frames = (z.shape[2] - 1) * self._frames_per_latent + 1
        if z.shape[2] % 2 == 0:
            z = torch.cat([z, z[:, :, -1:]], dim=2)
        return self.vae.decode(z).sample[:, :, :frames]

    # ---- text and prediction ------------------------------------------------------------------

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> tuple[Tensor, list[list[Span]]]:
        """Embeddings [B, L, D] and, per text, the character span of each of its L tokens.

        As the pipeline does it: padded to L, pads not masked. Special and padding tokens have
        empty spans; text beyond L tokens is cut, and its words have no token.
        """
        ids, _, offsets = self._tokens(texts)
        return self.text_encoder(ids)[0], offsets

    @torch.no_grad()
    def predict(self, latents: Tensor, timestep: int, embeds: Tensor) -> Tensor:
        """v-prediction [B, F, C, h, w] float32 at an integer timestep."""
        dtype = self.transformer.dtype
        latents = latents.to(self.device, dtype)
        prediction = self.transformer(
            hidden_states=latents,
            encoder_hidden_states=embeds.to(self.device, dtype),
            timestep=torch.full((len(latents),), timestep, device=self.device),
            ofs=latents.new_full((1,), OFS) if self.transformer.config.ofs_embed_dim else None,
            image_rotary_emb=self._rotary_positions(latents.shape),
            return_dict=False,
        )[0]
        return prediction.float()

    def attention_processor(
        self,
        layer: str,
        previous: Any,
        recorder: tuple[int, Any] | None = None,
        streams: Memory | None = None,
        keeper: Keeper | None = None,
    ) -> CogVideoXAttention:
        """A processor like `previous` that also records, attends to a reference as well, or lets its keys be kept."""
        return CogVideoXAttention.extending(layer, previous, recorder, streams, keeper)

    def _rotary_positions(self, shape: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """cos, sin [S_v, d] for latents [B, F, C, h, w], as the pipeline's; None where not used."""
        config = self.transformer.config
        if not config.use_rotary_positional_embeddings:
            return None
        _, frames, _, height, width = shape
        key = (frames, height, width)
        if key not in self._rotary:
            p = config.patch_size
            grid = (height // p, width // p)
            rows, columns = config.sample_height // p, config.sample_width // p
            if config.patch_size_t is None:
                of_version = {"crops_coords": get_resize_crop_region_for_grid(grid, columns, rows)}
            else:
                of_version = {"crops_coords": None, "grid_type": "slice", "max_size": (rows, columns)}
            self._rotary[key] = get_3d_rotary_pos_embed(
                embed_dim=config.attention_head_dim,
                grid_size=grid,
                temporal_size=frames // self.patch_frames,
                device=self.device,
                **of_version,
            )
        return self._rotary[key]

    def _check_supported(self) -> None:
        config, name = self.transformer.config, self.folder.name
        if config.in_channels != self.vae.config.latent_channels:
            raise ModelError(
                f"The teacher {name} takes {config.in_channels} latent channels and its VAE gives "
                f"{self.vae.config.latent_channels}. Use a text-to-video model."
            )
        if self.scheduler.config.prediction_type != "v_prediction":
            raise ModelError(
                f"The teacher {name} predicts {self.scheduler.config.prediction_type!r}; inversion "
                f"needs prediction_type 'v_prediction' in its scheduler_config.json."
            )
