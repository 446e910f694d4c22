"""What a harvest costs: a CogVideoX denoising forward without it, with it in its ways, and with attention written out.

    python tests/benchmarks/bench_harvest.py                      (or: make bench)
    python tests/benchmarks/bench_harvest.py --size 5b --device cuda --dtype bfloat16 [--layers 42]

The transformer is of diffusers' real class with random weights. `small`: 4,032 vision + 64 text tokens, 11 heads of 64,
so that attention's part of a forward's arithmetic, S/(S + 6·width), is 0.49 as in CogVideoX-5B at 49 frames of 480×720,
which is `5b`: 17,550 + 226 tokens, 48 heads of 64. Layers do alike work, so that ratios hardly depend on their number.

Ways: plain; harvest: 40 text rows over vision and sampled vision rows (512, or as many as extraction takes); v2t: 40
text columns of all vision rows; all rows: exact head statistics of all vision rows, beside the 40 text rows; naive: the
[h, s, s] softmax of a layer written out, and the harvest's rows taken from it.

Ways take turns, a forward each, after a first one that is not counted. On a CPU, with one thread: CPU seconds, since
other work on the machine stretches the clock; peak memory is how much the largest resident set of a process that runs
this way alone grows from before its first forward. On a GPU: the clock, between synchronisations, and the largest
allocation. Each way's extra memory is what it takes beyond the plain one.

Prints a line a way with the spread over turns, then JSON lines {"name", "ours", "other", "ratio", "unit", "n",
"machine"}, ratio = ours/other of medians, which are appended to benchmarks.jsonl as well.

Legend: b batch, h heads, s tokens (text first, then vision), d head width.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed
from torch import Tensor

from vdm_priors.attention import AttentionLayer
from vdm_priors.extract import query_rows
from vdm_priors.families._cogvideox_attention import CogVideoXAttention
from vdm_priors.grid import TokenGrid
from vdm_priors.harvest import HarvestRequest, harvest
from vdm_priors.heads import HeadAccumulator, MotionMask
from vdm_priors.settings import ExtractionSettings

WORDS = 40  # text tokens of 30 words
WAYS = ("plain", "harvest", "v2t", "all rows", "naive")
TURNS = 7
OUT = Path("benchmarks.jsonl")


@dataclass(frozen=True)
class Size:
    """Latent frames, rows and columns (patches are 2 × 2); text tokens; heads of 64; latent channels; text width."""

    frames: int
    rows: int
    columns: int
    text: int
    heads: int
    channels: int
    text_width: int
    layers: int

    @property
    def vision(self) -> int:
        return self.frames * self.rows * self.columns // 4

    @property
    def kept_rows(self) -> int:
        """As extraction samples them, where a grid is too large for all."""
        return query_rows(ExtractionSettings(), max(self.vision, 4096), self.heads)[0]


SIZES = {"small": Size(14, 36, 32, 64, 11, 4, 32, layers=2), "5b": Size(13, 60, 90, 226, 48, 16, 4096, layers=4)}
HEAD = 64


class NaiveAttention:
    """CogVideoX's attention with the whole [b, h, s, s] softmax written out, as attention is usually recorded."""

    def __init__(self, kept: list, rows: Tensor) -> None:
        self.kept, self.rows = kept, rows

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        parts = (attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (part(joint).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k = (torch.cat([x[:, :, :text], apply_rotary_emb(x[:, :, text:], image_rotary_emb)], dim=2) for x in (q, k))
        p_bhss = (q @ k.transpose(2, 3) * HEAD**-0.5).softmax(dim=-1)
        self.kept.append((p_bhss[:, :, :WORDS, text:].clone(), p_bhss[:, :, text + self.rows, text:]))
        out = (p_bhss @ v).transpose(1, 2).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        return out[:, text:], out[:, :text]


class Teacher:
    """A random transformer, the inputs of one forward, and what `harvest` asks of a teacher."""

    def __init__(self, size: Size, layers: int, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.device, self.size = device, size
        with torch.device(device):
            self.transformer = CogVideoXTransformer3DModel(
                num_attention_heads=size.heads, attention_head_dim=HEAD, in_channels=size.channels,
                out_channels=size.channels, time_embed_dim=512, text_embed_dim=size.text_width, num_layers=layers,
                sample_width=size.columns, sample_height=size.rows, sample_frames=4 * size.frames - 3,
                max_text_seq_length=size.text, use_rotary_positional_embeddings=True,
            ).to(dtype).eval()
            grid = (size.rows // 2, size.columns // 2)
            rotary = get_3d_rotary_pos_embed(HEAD, ((0, 0), grid), grid, size.frames, device=device)
            self.inputs = {
                "hidden_states": torch.randn(1, size.frames, size.channels, size.rows, size.columns, dtype=dtype),
                "encoder_hidden_states": torch.randn(1, size.text, size.text_width, dtype=dtype),
                "timestep": torch.tensor([500]), "image_rotary_emb": rotary, "return_dict": False,
            }
        self.grid = TokenGrid.regular([[float(f), f + 1.0] for f in range(size.frames)], *grid)
        self.rows = torch.linspace(0, size.vision - 1, size.kept_rows).long()
        self.attention_models = [self.transformer]
        self.attention_layers = [AttentionLayer(key, 0, (key,)) for key in self.transformer.attn_processors]

    def attention_processor(self, layer, previous, recorder=None, streams=None, keeper=None):
        return CogVideoXAttention.extending(layer, previous, recorder, streams, keeper)

    @torch.no_grad()
    def forward(self, way: str) -> tuple:
        """The output and what was kept."""
        if way == "plain":
            return self.transformer(**self.inputs)[0], ()
        if way == "naive":
            kept, own = [], dict(self.transformer.attn_processors)
            self.transformer.set_attn_processor(NaiveAttention(kept, self.rows.to(self.device)))
            try:
                out = self.transformer(**self.inputs)[0]
            finally:
                self.transformer.set_attn_processor(own)
            return out, tuple(sum(parts) / len(parts) for parts in zip(*kept, strict=True))
        everything = torch.arange(self.size.vision)
        request = {
            "harvest": HarvestRequest(WORDS, self.rows),
            "v2t": HarvestRequest(WORDS, direction="v2t"),
            "all rows": HarvestRequest(
                WORDS, everything, row_taker=lambda _: HeadAccumulator(self.grid, MotionMask(), everything)
            ),
        }[way]
        with harvest(self, request) as harvested:
            out = self.transformer(**self.inputs)[0]
        if way == "all rows":
            taken = harvested.row_takers(0)[0].statistics()
            return out, (harvested.t2v, taken.mass, taken.inside, taken.outside)
        return out, tuple(x for x in (harvested.t2v, harvested.v2t, harvested.v2v) if x is not None)


def measure_seconds(
    ways: list[str], size: Size, layers: int, device: str, dtype: torch.dtype, turns: int
) -> dict[str, list[float]]:
    """Seconds a forward of every way and turn; a way that does not fit into a GPU's memory has none."""
    cuda = start(device)
    teacher = Teacher(size, layers, device, dtype)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(turns + 1):
        for way in list(seconds):
            before = clock(cuda)
            try:
                teacher.forward(way)
            except torch.cuda.OutOfMemoryError:
                print(f"{way}: does not fit")
                del seconds[way]
                continue
            if turn:
                seconds[way].append(clock(cuda) - before)
    return seconds


def measure_memory(way: str, size: Size, layers: int, device: str, dtype: torch.dtype) -> tuple[float, str]:
    """MB at the peak of two forwards, and sums of what was kept and of the output, to be compared between ways."""
    cuda = start(device)
    teacher = Teacher(size, layers, device, dtype)
    before = memory_mb(cuda, reset=True)
    for _ in range(2):
        out = kept = None
        out, kept = teacher.forward(way)
    peak = memory_mb(cuda) - before
    sums = [round(float(x.double().sum()), 3) for x in kept]
    return peak, f"kept sums {sums}, |output| {float(out.double().abs().sum()):.3f}"


def start(device: str) -> bool:
    """Whether the device is a GPU; else one thread."""
    cuda = torch.device(device).type == "cuda"
    if not cuda:
        torch.set_num_threads(1)
    return cuda


def clock(cuda: bool) -> float:
    if not cuda:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def memory_mb(cuda: bool, reset: bool = False) -> float:
    """The largest resident set so far; on a GPU the largest allocation since the last reset, or that now."""
    if not cuda:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    if reset:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 2**20


def alone(function: Callable, *given: Any, cuda: bool) -> Any:
    """In a process of its own, so that no way inherits another's memory; a GPU's is counted without."""
    if cuda:
        return function(*given)
    with get_context("fork" if sys.platform == "linux" else "spawn").Pool(1) as pool:  # a fork spares the imports
        return pool.apply(function, given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--layers", type=int, help="default: 2 of small, 4 of 5b (the whole model has 42)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--turns", type=int, default=TURNS)
    given = parser.parse_args()
    size = SIZES[given.size]
    layers = given.layers or size.layers
    ways = ["plain", *(way for way in given.ways if way != "plain")]
    cuda = torch.device(given.device).type == "cuda"
    host = torch.cuda.get_device_name(given.device) if cuda else f"{os.cpu_count()} cores, 1 thread"
    machine = f"{host}, torch {torch.__version__}"
    common = (size, layers, given.device, getattr(torch, given.dtype))
    seconds = alone(measure_seconds, ways, *common, given.turns, cuda=cuda)
    memory = {way: alone(measure_memory, way, *common, cuda=cuda) for way in seconds}
    median = {way: {"seconds": statistics.median(all_of), "mb": memory[way][0]} for way, all_of in seconds.items()}
    label = f"{size.vision} + {size.text} tokens, {size.heads} heads, {layers} layers, {given.dtype}"
    print(f"{label}; {size.kept_rows} sampled rows")
    for way, all_of in seconds.items():
        ratios = sorted(one / other for one, other in zip(all_of, seconds["plain"], strict=True))
        print(f"  {way:8s} {median[way]['seconds']:.3f} s a forward, × plain {statistics.median(ratios):.3f} "
              f"({ratios[0]:.3f} to {ratios[-1]:.3f}; of the quickest {min(all_of) / min(seconds['plain']):.3f}); "
              f"peak + {median[way]['mb']:.0f} MB, beyond plain {median[way]['mb'] - median['plain']['mb']:.0f}; "
              f"{memory[way][1]}")
    lines = [(way, "plain", {unit: (median[way][unit], median["plain"][unit]) for unit in ("seconds", "mb")})
             for way in seconds if way != "plain"]
    if "naive" in seconds and "harvest" in seconds:
        for unit in ("seconds", "mb"):
            ours, naive = (median[way][unit] - median["plain"][unit] for way in ("harvest", "naive"))
            lines.append(("harvest's own", "naive's own", {unit: (ours, naive)}))
    for name, other, units in lines:
        for unit, (ours, theirs) in units.items():
            line = json.dumps({
                "name": f"{name} against {other}, {label}", "ours": round(ours, 4), "other": round(theirs, 4),
                "ratio": round(ours / theirs, 3) if theirs else None, "unit": "s" if unit == "seconds" else "MB",
                "n": given.turns, "machine": machine,
            })
            print(line)
            with OUT.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
