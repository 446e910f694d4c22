"""Cross-stream memory without a reference stream: keys and values that the inversion computed anyway.

    path = KeptPath()
    trajectory = invert(teacher, latents, empty, kept=path)
    reconstruct(teacher, trajectory, embeds, kept=path)

A reference stream (memory.py) walks the clip's path a second time, one forward more a denoising step. The inversion
called the same network at the same timesteps; what it computed there is looked at instead, of text and vision alike.

What matches is the timestep: the denoising step that calls the network at t sees the keys of the inversion step that
called it at t, so that both are modulated by the same time, in the reverse order. Their latents differ by a step: the
reference stream reads the latent *at* the noise level of t, the inversion stood one level below and was on its way
there (in its first step, and so in the last one of denoising, at the clip itself). Of an inversion step with
refinements the last forward is kept; its input tends to the latent at t, and its keys to those of the stream.

Legend: b batch, B clips, h heads, s tokens of one clip, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vdm_priors.errors import ModelError
from vdm_priors.kernels import as_bias
from vdm_priors.memory import entries_of, extended_attention

DEVICE_SHARE = 0.75  # of a GPU that may be full when keys are kept there; the rest is for denoising and its harvest
Layer = tuple[int, str]  # the model's place in `attention_models`, the processor's key


@dataclass(frozen=True, eq=False)
class KeptLayer:
    """One layer's keys and values [B, h, s, d] in one forward, and what it hid of them (mask_b11s), if anything."""

    k_bhsd: Tensor
    v_bhsd: Tensor
    mask_b11s: Tensor | None


@dataclass(eq=False)
class KeptPath:
    """What every attention layer over vision had as keys and values at every step of an inversion.

    step: of the inversion, from 0, that the forwards inside `keeping` or `seen` belong to; who runs them says it.
    Takes steps × layers × 2 × tokens × width numbers a clip, in the network's own number format, until the last
    reference to it is gone: on the device, or in main memory once a GPU is filled to DEVICE_SHARE.
    """

    step: int = 0
    layers: dict[tuple[int, Layer], KeptLayer] = field(default_factory=dict)

    @contextmanager
    def keeping(self, teacher: Any) -> Iterator[None]:
        """Inside, the keys and values of every forward are kept as those of `step`, instead of earlier ones of it."""
        with extended_attention(teacher, lambda *layer: {"keeper": partial(self._keep, layer)}):
            yield

    @contextmanager
    def seen(self, teacher: Any, generated: int) -> Iterator[None]:
        """Inside, every forward is of `generated` entries, the kept clips one or several times over, which see them."""
        with extended_attention(teacher, lambda *layer: {"streams": KeptStreams(self, layer, generated)}):
            yield

    def of(self, layer: Layer) -> KeptLayer:
        """What a layer had at `step`. Raises ModelError where nothing was kept."""
        if (self.step, layer) not in self.layers:
            raise ModelError(
                f"Memory: no keys of {layer[1]} were kept at step {self.step + 1}. Invert the clip with this path, in "
                f"as many steps, before it is looked at."
            )
        return self.layers[self.step, layer]

    def _keep(self, layer: Layer, k_bhsd: Tensor, v_bhsd: Tensor, mask_b11s: Tensor | None) -> None:
        self.layers.pop((self.step, layer), None)
        place = _place(k_bhsd)
        # copies: a view would keep the projection that it is cut from
        kept = [x if x is None else x.detach().to(place, copy=True) for x in (k_bhsd, v_bhsd, mask_b11s)]
        self.layers[self.step, layer] = KeptLayer(*kept)


@dataclass(frozen=True, eq=False)
class KeptStreams:
    """As vdm_priors.memory.Streams for one layer, all of whose entries are generated: references are kept ones.

    Entry i sees clip i modulo the number of clips.
    """

    path: KeptPath
    layer: Layer
    generated: int

    def check(self, batch: int) -> None:
        """Raises ModelError if a forward's batch is not of this layout, or nothing is kept for it."""
        clips = len(self.path.of(self.layer).k_bhsd)
        if batch != self.generated or batch % clips:
            raise ModelError(
                f"Memory: a forward of batch {batch} does not fit {self.generated} generated entries that see {clips} "
                f"kept clips. Run only the batch that was named, of the clips that were inverted."
            )

    def keys(self, k_bhsd: Tensor, entries: list[int] | None = None) -> Tensor:
        """What the generated `entries` (default: all) attend to, [n, h, 2s, d]."""
        return self._joined(k_bhsd, self.path.of(self.layer).k_bhsd, entries, dim=2)

    def values(self, v_bhsd: Tensor) -> Tensor:
        """The values of all `keys`."""
        return self._joined(v_bhsd, self.path.of(self.layer).v_bhsd, None, dim=2)

    def mask(self, mask_b11s: Tensor, entries: list[int] | None = None) -> Tensor:
        """What hides them, [n, 1, 1, 2s], of the kind of `mask`: bool, or a bias that is added."""
        kept = self.path.of(self.layer).mask_b11s
        return self._joined(mask_b11s, kept if mask_b11s.dtype == torch.bool else as_bias(kept), entries, dim=3)

    def _joined(self, own: Tensor, kept: Tensor, entries: list[int] | None, dim: int) -> Tensor:
        entries = list(range(self.generated)) if entries is None else entries
        theirs = entries_of(kept, [i % len(kept) for i in entries]).to(own.device, own.dtype)
        return torch.cat([entries_of(own, entries), theirs], dim=dim)


def _place(x: Tensor) -> torch.device:
    """Where as many numbers as x has are kept, and later on others."""
    if x.device.type != "cuda":
        return x.device
    free, total = torch.cuda.mem_get_info(x.device)
    # what PyTorch holds without using it is free as well
    free += torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
    return x.device if free - 2 * x.nbytes > (1 - DEVICE_SHARE) * total else torch.device("cpu")
