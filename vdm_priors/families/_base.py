"""What the families share: frames and latents, where tokens lie, characters of text tokens.

Legend: B clips, N frames, F latent frames, C channels, h×w latent pixels, L text tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vdm_priors.attention import AttentionLayer
from vdm_priors.errors import ClipError, ModelError
from vdm_priors.fingerprint import fingerprint
from vdm_priors.grid import WHOLE_FRAME, TokenGrid, frame_spans, merge_spans

Span = tuple[int, int]
TRANSFORMERS = ("transformer", "transformer_2")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def default_of(pipeline: type, option: str) -> Any:
    """What a diffusers pipeline takes where it is not told: a family's usual clip and text length."""
    return inspect.signature(pipeline.__call__).parameters[option].default


def separate_layers(models: Sequence[Any], blocks: str) -> list[AttentionLayer]:
    """A layer a block, of self-attention `attn1` and cross-attention `attn2`, of every model."""
    layers = []
    for number, model in enumerate(models):
        stage = "" if number == 0 else f"stage {number + 1} "
        for i in range(len(getattr(model, blocks))):
            keys = tuple(f"{blocks}.{i}.{part}.processor" for part in ("attn1", "attn2"))
            layers.append(AttentionLayer(f"{stage}{blocks}.{i}", number, keys))
    return layers


class PipelineTeacher:
    """A frozen diffusers pipeline; with what a family adds, vdm_priors.families.Teacher.

    A subclass sets `max_text_tokens`, `trained_frames`, `trained_size` and `cell`, and defines `schedule`,
    `encode_text`, `predict` and `attention_processor`.
    """

    guidance_kind = "batched"
    patch_frames = 1  # latent frames that a token joins
    offloaded = False  # whether text encoders and VAE wait in main memory

    max_text_tokens: int
    trained_frames: int
    trained_size: tuple[int, int]  # height, width in pixels
    cell: tuple[int, int]  # height, width of a token in pixels

    def __init__(self, pipeline: Any, folder: Path, frames_per_latent: int) -> None:
        self.folder = folder
        self.tokenizer = pipeline.tokenizer
        self.text_encoder = pipeline.text_encoder.eval().requires_grad_(False)
        self.vae = pipeline.vae.eval().requires_grad_(False)
        self.transformer = pipeline.transformer.eval().requires_grad_(False)
        self.scheduler = pipeline.scheduler
        self.attention_models: list[Any] = [self.transformer]
        self._frames_per_latent = frames_per_latent
        if not self.tokenizer.is_fast:
            raise ModelError(
                f"The tokenizer of the teacher {folder.name} does not say which characters a token came "
                f"from. Put a tokenizer.json (fast tokenizer) into its tokenizer folder."
            )

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def offload(self, device: str | torch.device) -> None:
        """Brings the transformers to `device`; text encoders and VAE are there only while they work.

        Of a teacher that was loaded in main memory, to be called once. Results do not change.
        """
        def comes(module: Any, *_: Any) -> None:
            module.to(device)

        def goes(module: Any, *_: Any) -> None:
            module.to("cpu")

        for network in self.networks:
            network.to(device)
        for encoder in self._parts(TEXT_ENCODERS):
            encoder.register_forward_pre_hook(comes)
            encoder.register_forward_hook(goes)
        self.offloaded = True

    @property
    def networks(self) -> list[Any]:
        """The transformers, of which `predict` runs one."""
        return self._parts(TRANSFORMERS)

    def _parts(self, names: Sequence[str]) -> list[Any]:
        """Those of these networks that the model has."""
        return [part for name in names if (part := getattr(self, name, None)) is not None]

    @contextmanager
    def _working(self, network: Any) -> Iterator[None]:
        """Inside, the network is where the transformer is."""
        if self.offloaded:
            network.to(self.device)
        try:
            yield
        finally:
            if self.offloaded:
                network.to("cpu")

    def fingerprint(self) -> str:
        """What tells this teacher from others: vdm_priors.fingerprint of its folder."""
        return fingerprint(self.folder)

    @property
    def attention_layers(self) -> list[AttentionLayer]:
        """Every attention layer over vision, in the network's order: here those with one processor each."""
        return [
            AttentionLayer(key.removesuffix(".processor"), number, (key,))
            for number, model in enumerate(self.attention_models)
            for key in model.attn_processors
        ]

    # ---- video --------------------------------------------------------------------------------

    def check_frames(self, frames: int) -> None:
        """Raises ClipError naming the nearest counts that the causal VAE takes (rk+1)."""
        r = self._frames_per_latent
        if frames < 1 or (frames - 1) % r:
            lower = max(0, frames - 1) // r * r + 1
            raise ClipError(
                f"The teacher {self.folder.name} takes clips of {r}k+1 frames, not {frames}. Sample "
                f"{lower} or {lower + r} frames."
            )

    def frame_size(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """(height, width) in pixels that frames are resized to; None: the trained size.

        Raises ModelError for a size that is no multiple of a token's.
        """
        if size is None:
            return self.trained_size
        cell, trained = self.cell, self.trained_size
        if any(side < unit or side % unit for side, unit in zip(size, cell, strict=True)):
            units = f"{cell[0]}" if cell[0] == cell[1] else f"{cell[0]} and {cell[1]}"
            raise ModelError(
                f"The teacher {self.folder.name} takes frames whose height and width are multiples "
                f"of {units} pixels, not {size[0]}×{size[1]}. It was trained on "
                f"{trained[0]}×{trained[1]}."
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

        Takes the posterior's mode: no random draw. Where a token joins several latent frames, copies of the first
        one fill up the front to whole tokens.
        """
        with self._working(self.vae):
            posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
            latents = self._scaled(posterior.mode().float()).transpose(1, 2)
        padding = self._padding(latents.shape[1])
        return torch.cat([latents[:, :1]] * padding + [latents], dim=1) if padding else latents

    @torch.no_grad()
    def decode(self, latents: Tensor, frames: int | None = None) -> Tensor:
        """Latents [B, F, C, h, w] -> pixels [B, 3, N, h·r, w·r] float32, about [-1, 1].

        `frames` is N, the number that was encoded: latent frames before the last ones that they need are padding and
        left out; None decodes every latent frame.
        """
        if frames is not None:
            self.check_frames(frames)
            latents = latents[:, -((frames - 1) // self._frames_per_latent + 1) :]
        with self._working(self.vae):
            return self._decoded(self._unscaled(latents.transpose(1, 2)).to(self.device, self.vae.dtype)).float()

    def _decoded(self, z: Tensor) -> Tensor:
        """The VAE's own frames [B, 3, N, h·r, w·r] of its latents [B, C, F, h, w]."""
        return self.vae.decode(z).sample

    def _scaled(self, z: Tensor) -> Tensor:
        """The VAE's latents [B, C, F, h, w] as the transformer takes them."""
        return z * self.vae.config.scaling_factor

    def _unscaled(self, z: Tensor) -> Tensor:
        return z / self.vae.config.scaling_factor

    def _padding(self, latent_frames: int) -> int:
        return -latent_frames % self.patch_frames

    def token_grid(
        self, frame_times: Sequence[float], duration: float | None = None, box: Sequence[float] = WHOLE_FRAME,
        size: tuple[int, int] | None = None,
    ) -> TokenGrid:
        """Where the vision tokens lie: frame_times [N] in seconds, box of the frames in the source.

        A token that joins padding with the first latent frame spans the time of that frame alone; padding, of which
        there is less than a token, has no cell of its own.
        """
        self.check_frames(len(frame_times))
        height, width = self.frame_size(size)
        r, p = self._frames_per_latent, self.patch_frames
        latents = [[0]] + [list(range(i, i + r)) for i in range(1, len(frame_times), r)]
        latents = [[]] * self._padding(len(latents)) + latents
        groups = [sum(latents[i : i + p], []) for i in range(0, len(latents), p)]
        spans = merge_spans(frame_spans(frame_times, duration), groups)
        return TokenGrid.regular(spans, height // self.cell[0], width // self.cell[1], tuple(box))

    # ---- text ---------------------------------------------------------------------------------

    def _tokens(self, texts: Sequence[str], length: int | None = None) -> tuple[Tensor, Tensor, list[list[Span]]]:
        """ids and mask [B, L] of texts padded and cut to `length` tokens (default L), and each token's characters.

        Special and padding tokens have empty spans.
        """
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=length or self.max_text_tokens, truncation=True,
            return_offsets_mapping=True, return_attention_mask=True, return_tensors="pt",
        )
        offsets = [[(start, end) for start, end in row] for row in tokens.offset_mapping.tolist()]
        return tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device), offsets
