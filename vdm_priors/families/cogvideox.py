"""CogVideoX 1.0 as a teacher: joint attention over [text, vision], text first, v-prediction.

What an adapter must know: text is padded to a fixed length and the padding is not masked, so
pads receive attention; a causal VAE gives the first frame its own latent; 2B has sin-cos
positions added in the patch embedding, 5B has rotary positions on vision.

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
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from torch.nn.functional import interpolate
from transformers.utils import logging as transformers_logging

from vdm_priors.errors import ClipError, ModelError
from vdm_priors.families._cogvideox_attention import CogVideoXAttention, attention_processor
from vdm_priors.fingerprint import fingerprint, hub_commit
from vdm_priors.grid import WHOLE_FRAME, TokenGrid, frame_spans, merge_spans
from vdm_priors.memory import Streams


def accepts(model_index: dict[str, Any]) -> bool:
    """Whether a diffusers folder is of this family."""
    return model_index.get("_class_name") == "CogVideoXPipeline"


def load(path_or_hub: str | Path, dtype: torch.dtype, device: str | torch.device) -> CogVideoX:
    """The teacher of a pipeline folder or hub name. Raises ModelError if it cannot be used."""
    source = str(path_or_hub)
    bars = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    try:
        for log in bars:
            log.disable_progress_bar()
        folder = Path(source)
        if not folder.exists():
            commit = hub_commit(source)  # of which the keys of priors speak
            folder = Path(CogVideoXPipeline.download(source, revision=commit, use_safetensors=True))
        pipeline = CogVideoXPipeline.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # diffusers, transformers and safetensors raise kinds of their own
        raise ModelError(
            f"The CogVideoX teacher {source} could not be loaded ({type(error).__name__}: {error}). "
            f"Check that all parts that its model_index.json names are there, as safetensors."
        ) from error
    finally:
        for log in bars:
            log.enable_progress_bar()
    return CogVideoX(pipeline.to(device), folder)


def trained_frames(path_or_hub: str | Path) -> int:
    """Frames (pixel frames, not latents) of the clips it was trained on. Raises ModelError if that is not to be read."""
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


class CogVideoX:
    """A frozen CogVideoX pipeline; implements vdm_priors.families.Teacher."""

    def __init__(self, pipeline: CogVideoXPipeline, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = pipeline.tokenizer
        self.text_encoder = pipeline.text_encoder.eval().requires_grad_(False)
        self.vae = pipeline.vae.eval().requires_grad_(False)
        self.transformer = pipeline.transformer.eval().requires_grad_(False)
        self.scheduler = pipeline.scheduler
        self.max_text_tokens: int = self.transformer.config.max_text_seq_length
        self.trained_frames = int(self.transformer.config.sample_frames)
        self.alphas_cumprod: Tensor = self.scheduler.alphas_cumprod.double().cpu()
        self.final_alpha_cumprod = float(self.scheduler.final_alpha_cumprod)
        self._check_supported()
        config = self.transformer.config
        self._reduction = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self._cell = self._reduction * config.patch_size  # pixels a side of a token
        self._frames_per_latent = int(self.vae.config.temporal_compression_ratio)
        self._rotary: dict[tuple[int, int, int], tuple[Tensor, Tensor] | None] = {}

    @classmethod
    def load(
        cls,
        path_or_hub: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> CogVideoX:
        """See the module's `load`."""
        return load(path_or_hub, dtype, device)

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def fingerprint(self) -> str:
        """What tells this teacher from others: vdm_priors.fingerprint of its folder."""
        return fingerprint(self.folder)

    # ---- scheduler ----------------------------------------------------------------------------

    def timesteps(self, steps: int) -> list[int]:
        """The forward scheduler's falling timesteps. Raises ModelError for too few or too many."""
        limit = len(self.alphas_cumprod)
        if not 1 <= steps <= limit:
            raise ModelError(
                f"The teacher's scheduler takes 1 to {limit} steps, not {steps}. Set steps."
            )
        self.scheduler.set_timesteps(steps)
        return self.scheduler.timesteps.tolist()

    # ---- video --------------------------------------------------------------------------------

    def check_frames(self, frames: int) -> None:
        """Raises ClipError naming the nearest counts the causal VAE takes (4k+1 for CogVideoX)."""
        r = self._frames_per_latent
        if frames < 1 or (frames - 1) % r:
            lower = max(0, frames - 1) // r * r + 1
            raise ClipError(
                f"The teacher {self.folder.name} takes clips of {r}k+1 frames, not {frames}. Sample "
                f"{lower} or {lower + r} frames."
            )

    def frame_size(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """(height, width) in pixels that frames are resized to; None: the trained size."""
        config = self.transformer.config
        trained = (config.sample_height * self._reduction, config.sample_width * self._reduction)
        if size is None:
            return trained
        if any(side < self._cell or side % self._cell for side in size):
            raise ModelError(
                f"The teacher {self.folder.name} takes frames whose height and width are multiples "
                f"of {self._cell} pixels, not {size[0]}×{size[1]}. It was trained on "
                f"{trained[0]}×{trained[1]}."
            )
        if config.use_learned_positional_embeddings and tuple(size) != trained:
            raise ModelError(
                f"The teacher {self.folder.name} has learned positions and takes frames of "
                f"{trained[0]}×{trained[1]} pixels only, not {size[0]}×{size[1]}."
            )
        return int(size[0]), int(size[1])

    def prepare_frames(self, frames: Any, size: tuple[int, int] | None = None) -> Tensor:
        """uint8 [N, H, W, 3] -> [1, 3, N, h, w] in [-1, 1]; the whole frame is resized, not cropped.

        So the box of the clip stays what it was. Raises ClipError for a wrong number of frames.
        """
        # a copy, since a cache of clips may hand out read-only arrays
        frames_nhwc = frames if isinstance(frames, Tensor) else torch.tensor(frames)
        if frames_nhwc.ndim != 4 or frames_nhwc.shape[-1] != 3 or frames_nhwc.dtype != torch.uint8:
            raise ValueError(
                f"prepare_frames: frames must be uint8 [N, H, W, 3], got {frames_nhwc.dtype} "
                f"{list(frames_nhwc.shape)}."
            )
        self.check_frames(len(frames_nhwc))
        target = self.frame_size(size)
        pixels_nchw = frames_nhwc.permute(0, 3, 1, 2).to(self.device).float()
        if tuple(pixels_nchw.shape[2:]) != target:
            pixels_nchw = interpolate(pixels_nchw, target, mode="bilinear", antialias=True)
        pixels = pixels_nchw.transpose(0, 1)[None] / 127.5 - 1
        return pixels.clamp(-1, 1).contiguous()

    @torch.no_grad()
    def encode_video(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, N, h·r, w·r] -> latents [B, F, C, h, w] float32, scaled for the transformer.

        Takes the posterior's mode: no random draw.
        """
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        return posterior.mode().float().transpose(1, 2) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, F, C, h, w] -> pixels [B, 3, N, h·r, w·r] float32, about [-1, 1].

        diffusers' decoder gives the first latent one frame only where their number is odd; an even
        number is decoded with its last one again, whose frames are cut off.
        """
        z = latents.transpose(1, 2) / self.vae.config.scaling_factor
        frames = (z.shape[2] - 1) * self._frames_per_latent + 1
        if z.shape[2] % 2 == 0:
            z = torch.cat([z, z[:, :, -1:]], dim=2)
        return self.vae.decode(z.to(self.device, self.vae.dtype)).sample.float()[:, :, :frames]

    def token_grid(
        self,
        frame_times: Sequence[float],
        duration: float | None = None,
        box: Sequence[float] = WHOLE_FRAME,
        size: tuple[int, int] | None = None,
    ) -> TokenGrid:
        """Where the vision tokens lie: frame_times [N] in seconds, box of the frames in the source."""
        self.check_frames(len(frame_times))
        height, width = self.frame_size(size)
        r = self._frames_per_latent
        groups = [[0]] + [list(range(i, i + r)) for i in range(1, len(frame_times), r)]
        spans = merge_spans(frame_spans(frame_times, duration), groups)
        return TokenGrid.regular(spans, height // self._cell, width // self._cell, tuple(box))

    # ---- text and prediction ------------------------------------------------------------------

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> tuple[Tensor, list[list[tuple[int, int]]]]:
        """Embeddings [B, L, D] and, per text, the character span of each of its L tokens.

        As the pipeline does it: padded to L, pads not masked. Special and padding tokens have
        empty spans; text beyond L tokens is cut, and its words have no token.
        """
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.max_text_tokens,
            truncation=True,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        embeds = self.text_encoder(tokens.input_ids.to(self.device))[0]
        offsets = [[(start, end) for start, end in row] for row in tokens.offset_mapping.tolist()]
        return embeds, offsets

    @torch.no_grad()
    def predict(self, latents: Tensor, timestep: int, embeds: Tensor) -> Tensor:
        """v-prediction [B, F, C, h, w] float32 at an integer timestep."""
        dtype = self.transformer.dtype
        prediction = self.transformer(
            hidden_states=latents.to(self.device, dtype),
            encoder_hidden_states=embeds.to(self.device, dtype),
            timestep=torch.full((len(latents),), timestep, device=self.device),
            image_rotary_emb=self._rotary_positions(latents.shape),
            return_dict=False,
        )[0]
        return prediction.float()

    def attention_processor(
        self,
        layer: str,
        previous: Any,
        recorder: tuple[int, Any] | None = None,
        streams: Streams | None = None,
    ) -> CogVideoXAttention:
        """A processor like `previous` that also records, or also attends to a reference stream."""
        return attention_processor(layer, previous, recorder, streams)

    def _rotary_positions(self, shape: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """cos, sin [S_v, d] of CogVideoX 1.0 for latents [B, F, C, h, w]; None where not used."""
        config = self.transformer.config
        if not config.use_rotary_positional_embeddings:
            return None
        _, frames, _, height, width = shape
        key = (frames, height, width)
        if key not in self._rotary:
            p = config.patch_size
            grid = (height // p, width // p)
            trained = (config.sample_width // p, config.sample_height // p)
            self._rotary[key] = get_3d_rotary_pos_embed(
                embed_dim=config.attention_head_dim,
                crops_coords=get_resize_crop_region_for_grid(grid, *trained),
                grid_size=grid,
                temporal_size=frames,
                device=self.device,
            )
        return self._rotary[key]

    def _check_supported(self) -> None:
        config, name = self.transformer.config, self.folder.name
        if config.patch_size_t is not None or config.ofs_embed_dim:
            raise ModelError(
                f"The teacher {name} is a CogVideoX 1.5 model (temporal patches), which is not "
                f"supported yet. Use a CogVideoX 1.0 model such as CogVideoX-2b or CogVideoX-5b."
            )
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
        if not self.tokenizer.is_fast:
            raise ModelError(
                f"The tokenizer of the teacher {name} does not say which characters a token came "
                f"from. Put a tokenizer.json (fast tokenizer) into its tokenizer folder."
            )
