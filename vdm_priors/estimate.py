"""What a teacher costs, counted from its configurations alone: parameters, tokens, arithmetic, memory.

    teacher = load_skeleton("THUDM/CogVideoX-5b")           # networks on the meta device, no weights
    cost = estimate(teacher, ExtractionSettings(), dtype="bfloat16")
    cost.clip_flops, cost.seconds(400), cost.memory

One forward of one clip, with P parameters of the transformer and S tokens (vision, and text where it is joint):

    2·P·S                  every weight multiplies every token once; of those that diffusers' names give away, weights
                           of the text alone its L tokens, and modulation by time (a seventh of CogVideoX-5B) one
    + 4·S·K·width·layers   QKᵀ and PV over K keys: S of them, 2S where a reference is looked at; and over L where text
                           has a cross-attention

The VAE's arithmetic is counted by running it on the meta device. Memory is weights + activations + harvest + kept
keys, each by the formula beside it; the VAE's activations are left out. Of parts that are offloaded one at a time
visits, and leaves before the transformer works.

Legend: B clips, S tokens, S_v vision tokens, L text tokens, H heads, T harvested text tokens, R harvested rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vdm_priors.errors import ClipError, ModelError
from vdm_priors.extract import AUTO_ROWS, query_rows
from vdm_priors.settings import ExtractionSettings

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# TFLOP/s that long attention and wide matrices really get, about: GPUs in 16 bits, a core in float32
CARDS = {"H100": 400, "A100": 200, "RTX 4090": 120, "a CPU core": 0.05}
# tensors [S, width] of a block that are alive at once: states, q, k, v, output, the feed-forward's four and four
ACTIVATIONS = 12
# diffusers' names of weights that meet one vector a clip, and, of the others, of those that meet text alone
ONCE, TEXT = re.compile(r"norm|time"), re.compile(r"(^|[._])add_|context|caption|text_(proj|embed)|attn2\.to_[kv]\b")
WORDS = 40  # text tokens that are harvested of a clip, where its text is not known
PARTS = ("transformer", "transformer_2", "vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Estimate:
    """Costs of a batch of `batch_size` clips with one teacher and one kind of extraction; FLOPs are of one clip.

    parameters: by part; forwards: of the transformer, in clips (a clip's text, negative text and reference are three);
    forward_flops: of one such forward without a reference to look at; network_flops: of all of them, with it;
    vae_flops: encoding, and decoding where the reconstruction is measured; weights, visiting, activations, harvest,
    kept: bytes of networks that stay, of the largest that is offloaded, of a forward, of the harvest's sums, of keys
    and values of the inversion (memory_from inversion), which a GPU that has no room leaves to main memory.
    """

    parameters: dict[str, int]
    dtype: str
    frames: int
    size: tuple[int, int]
    vision_tokens: int
    text_tokens: int
    batch_size: int
    forwards: int
    forward_flops: float
    network_flops: float
    vae_flops: float
    offload: bool
    weights: float
    visiting: float
    activations: float
    harvest: float
    kept: float

    @property
    def clip_flops(self) -> float:
        """Of the transformer and the VAE, for one clip."""
        return self.network_flops + self.vae_flops

    @property
    def memory(self) -> float:
        """Bytes at the peak."""
        return self.weights + max(self.visiting, self.activations + self.harvest + self.kept)

    def seconds(self, tflops: float) -> float:
        """A clip's, on a device that does so many 10¹² operations a second."""
        return self.clip_flops / (tflops * 1e12)


def estimate(
    teacher: Any, settings: ExtractionSettings, frames: int | None = None, size: Sequence[int] | None = None,
    batch_size: int = 1, dtype: str = "bfloat16", harvested_text: int = WORDS, count_vae: bool = True,
    offload: bool | None = None,
) -> Estimate:
    """Cost of an extraction with a teacher, a skeleton or a loaded one, of any family.

    frames, size (height, width), offload: null is the teacher's own. harvested_text: T. count_vae: False leaves its
    arithmetic out, which takes seconds to count. Raises ClipError and ModelError for frames and sizes that the
    teacher refuses.
    """
    frames = teacher.trained_frames if frames is None else frames
    offload = teacher.offloaded if offload is None else offload
    height, width = teacher.frame_size(None if size is None else (int(size[0]), int(size[1])))
    vision = teacher.token_grid(range(frames), float(frames), size=(height, width)).num_tokens
    config = teacher.transformer.config
    model_width = config.num_attention_heads * config.attention_head_dim
    # of a model in stages one runs at a time
    layers = [layer for layer in teacher.attention_layers if layer.model == 0]
    separate = len(layers[0].keys) > 1  # self- and cross-attention
    text = teacher.max_text_tokens
    queries = vision if separate else vision + text

    shared, of_text, once = _parameters(teacher.transformer)
    looking = 4 * queries**2 * model_width * len(layers)  # at as many keys as there are queries
    forward = 2 * (shared * queries + of_text * text + once) + looking
    if separate:
        forward += 4 * vision * text * model_width * len(layers)
    plain, generated, widest = _forwards(settings, teacher.guidance_kind)
    streamed = settings.memory * generated  # look at a reference's keys as well
    parameters = {
        part: sum(weight.numel() for weight in network.parameters())
        for part in PARTS if (network := getattr(teacher, part, None)) is not None
    }
    others = [count for part, count in parameters.items() if not part.startswith("transformer")]
    size_of = BYTES[dtype]
    return Estimate(
        parameters=parameters,
        dtype=dtype,
        frames=frames,
        size=(height, width),
        vision_tokens=vision,
        text_tokens=text,
        batch_size=batch_size,
        forwards=plain + generated,
        forward_flops=forward,
        network_flops=(plain + generated) * forward + streamed * looking,
        vae_flops=_vae_flops(teacher, frames, (height, width), settings.reconstruction) if count_vae else 0.0,
        offload=offload,
        weights=(sum(parameters.values()) - offload * sum(others)) * size_of,
        visiting=offload * max(others) * size_of,
        activations=batch_size * widest * ACTIVATIONS * queries * model_width * size_of,
        harvest=batch_size * _harvest_bytes(
            settings, vision, config.num_attention_heads, len(teacher.attention_layers), harvested_text),
        kept=settings.keeps_path * batch_size * settings.steps * len(layers) * 2 * queries * model_width * size_of,
    )


def _parameters(network: Any) -> tuple[int, int, int]:
    """How many meet every token, how many text alone, and how many one vector a clip."""
    shared = of_text = once = 0
    for name, weight in network.named_parameters():
        if ONCE.search(name):
            once += weight.numel()
        elif TEXT.search(name):
            of_text += weight.numel()
        else:
            shared += weight.numel()
    return shared, of_text, once


def _forwards(settings: ExtractionSettings, guidance_kind: str) -> tuple[int, int, int]:
    """A clip's forwards that see themselves alone, those of generated streams, and the entries of the largest batch.

    As vdm_priors.extract.run_teacher and vdm_priors.inversion make them.
    """
    inversion = settings.steps * (settings.refinements + 1)
    passes = 2 if settings.guidance > 1 and guidance_kind != "embedded" else 1
    references = passes if guidance_kind == "separate" else 1  # each call has a reference of its own
    streamed = settings.memory and not settings.keeps_path
    generated, plain = settings.steps * passes, settings.steps * references * streamed
    widest = (1 if guidance_kind == "separate" else passes) + streamed
    if not settings.denoises:
        return (settings.steps if settings.harvest_at == "noise" else inversion), 0, 1
    probes = settings.steps if settings.harvest_at == "noise" else 0
    return probes + inversion + plain, generated, widest


def _harvest_bytes(settings: ExtractionSettings, vision: int, heads: int, layers: int, text: int) -> float:
    """float32 sums of one clip: H heads (of each layer for layer_head) × (T tokens, twice for both, + R rows) × S_v.

    Rows that are streamed are not kept (vdm_priors.extract.query_rows).
    """
    judged = heads * (len(settings.layers_of(layers)) if settings.head_scope == "layer_head" else 1)
    rows, streamed = query_rows(settings, vision, judged)
    kept = vision if rows == "all" else min(int(rows), vision)
    if not settings.head_selection or streamed:
        kept = 0
    directions = 2 if settings.direction == "both" else 1
    return 4.0 * judged * (directions * text + kept) * vision


def _vae_flops(teacher: Any, frames: int, size: tuple[int, int], decodes: bool) -> float:
    """Counted on the meta device, where nothing is computed; 0 for a teacher whose weights are elsewhere."""
    if teacher.vae.device.type != "meta":
        return 0.0
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        latents = teacher.encode_video(torch.empty(1, 3, frames, *size, device="meta"))
        if decodes:
            teacher.decode(latents, frames)
    return float(counter.get_total_flops())


# ---- what to turn where memory is short ----------------------------------------------------------


def smaller_choices(
    teacher: Any, settings: ExtractionSettings, now: Estimate
) -> list[tuple[str, Estimate]]:
    """Settings that need less memory than `now`, each alone with its own estimate, the largest saving first."""

    def again(**changes: Any) -> Estimate:
        given = {"frames": now.frames, "size": now.size, "batch_size": now.batch_size, "dtype": now.dtype,
                 "offload": now.offload}
        return estimate(teacher, changes.pop("settings", settings), **{**given, **changes}, count_vae=False)

    choices: dict[str, Estimate] = {}
    if now.batch_size > 1:
        choices["teacher.batch_size=1"] = again(batch_size=1)
    if not now.offload and _computes_on_a_gpu(teacher):
        choices["teacher.offload=true"] = again(offload=True)
    if now.dtype == "float32":
        choices["teacher.dtype=bfloat16"] = again(dtype="bfloat16")
    half = tuple(max(unit, side // 2 // unit * unit) for side, unit in zip(now.size, teacher.cell, strict=True))
    if half != now.size and _takes(teacher, half):
        choices[f"teacher.size=[{half[0]},{half[1]}]"] = again(size=half)
    fewer = taken_frames(teacher, now.frames // 2 + 1)
    if fewer < now.frames:
        choices[f"teacher.sampling.frames={fewer}"] = again(frames=fewer)
    rows = AUTO_ROWS // 4
    if settings.head_selection:
        choices[f"teacher.extraction.rows={rows}"] = again(settings=replace(settings, rows=rows))
    if settings.head_scope == "layer_head":
        choices["teacher.extraction.head_scope=head"] = again(settings=replace(settings, head_scope="head"))
    if settings.memory and settings.harvest_at == "denoise":
        choices["teacher.extraction.memory=false"] = again(settings=replace(settings, memory=False))
    if settings.keeps_path:
        choices["teacher.extraction.memory_from=forward"] = again(settings=replace(settings, memory_from="forward"))
    saving = [(key, cost) for key, cost in choices.items() if cost.memory < now.memory]
    return sorted(saving, key=lambda choice: choice[1].memory)


def _computes_on_a_gpu(teacher: Any) -> bool:
    """Where it does not, what is offloaded stays in the same memory. A skeleton is asked for this machine."""
    return torch.cuda.is_available() if teacher.device.type == "meta" else teacher.device.type == "cuda"


def _takes(teacher: Any, size: tuple[int, int]) -> bool:
    try:
        teacher.frame_size(size)
    except ModelError:
        return False
    return True


def taken_frames(teacher: Any, frames: int) -> int:
    """The largest number of frames up to `frames` that the teacher takes."""
    for count in range(frames, 1, -1):
        try:
            teacher.check_frames(count)
        except ClipError:
            continue
        return count
    return 1
