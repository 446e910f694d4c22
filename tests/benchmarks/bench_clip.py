"""Seconds and memory that a clip takes, in each mode of extraction, with CogVideoX of random weights.

    python tests/benchmarks/bench_clip.py                                        (or: make bench)
    python tests/benchmarks/bench_clip.py --size 5b --device cuda --dtype bfloat16

`5b` is CogVideoX-5B whole: 42 layers of 48 heads, 49 frames of 480 × 720, 226 text tokens; `tiny`, the default without
a GPU, goes the same way with 2 layers of 2 heads, to see that all of it runs: its seconds say nothing of a real
teacher. Every part of an extraction is in it but the text encoder, whose weights and milliseconds are left out:
encoding by the VAE, 5 steps of inversion, of denoising or of noise probing with their harvest, and choosing heads and
words.

Modes are those of `teacher.extraction.mode` (docs/teachers.md, "How to ask"). Seconds are the clock's, synchronised, the
quickest of TURNS after a first one; on a CPU CPU seconds. "other" is what the estimate says for the card (400
TFLOP/s) or a CPU core. Memory is the largest allocation, of the weights too (on a CPU none is printed). --offload: the
VAE is on the GPU only while it works.

Aims on an H100-class card: paper ≤ 25 s, kept_keys ≤ 10 s, inversion ≤ 5 s, peak ≤ 60 GB, and ≤ 24 GB with
--offload with inversion. Prints JSON lines {"name", "ours", "other", "ratio", "unit", "n", "machine"}, which are
appended to benchmarks.jsonl as well.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

from vdm_priors.estimate import CARDS, estimate
from vdm_priors.extract import extract_priors
from vdm_priors.families.cogvideox import CogVideoX
from vdm_priors.settings import MODES, ExtractionSettings

TURNS = 2
OUT = Path("benchmarks.jsonl")
QUESTION = "Which way does the small red ball that rolls behind the green box move after it has hit the wall?"
NOISE = {  # scheduler_config.json of CogVideoX-5b
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
}
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what differs from diffusers' defaults
    "5b": ({"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True},
           {"block_out_channels": (128, 256, 256, 512), "scaling_factor": 0.7}),
    "tiny": ({"num_layers": 2, "num_attention_heads": 2, "use_rotary_positional_embeddings": True, "text_embed_dim": 32,
              "time_embed_dim": 32, "sample_frames": 9, "sample_height": 8, "sample_width": 12},
             {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 2, "layers_per_block": 1}),
}


class RandomTeacher(CogVideoX):
    """The family's own class over networks of random weights; a text is random numbers, a token a word."""

    def __init__(self, size: str, device: str, dtype: torch.dtype, offload: bool) -> None:
        torch.manual_seed(0)
        of_transformer, of_vae = SIZES[size]
        with numbers(dtype):
            with torch.device(device):
                transformer = CogVideoXTransformer3DModel(**of_transformer)
            with torch.device("cpu" if offload else device):
                vae = AutoencoderKLCogVideoX(**of_vae)
        parts = {"transformer": transformer, "vae": vae, "scheduler": CogVideoXDDIMScheduler(**NOISE),
                 "tokenizer": SimpleNamespace(is_fast=True), "text_encoder": torch.nn.Identity()}
        super().__init__(SimpleNamespace(**parts), Path(f"random-{size}"))
        if offload:
            self.offload(device)

    def fingerprint(self) -> str:
        return self.folder.name

    def encode_text(self, texts: Sequence[str]) -> tuple[torch.Tensor, list[list[tuple[int, int]]]]:
        width, length = self.transformer.config.text_embed_dim, self.max_text_tokens
        embeds = torch.randn(len(texts), length, width, generator=torch.Generator().manual_seed(0))
        spans = []
        for text in texts:
            words, start = [], 0
            for word in text.split():
                start = text.index(word, start)
                words.append((start, start + len(word)))
                start += len(word)
            spans.append(words + [(0, 0)] * (length - len(words)))
        return embeds.to(self.device), spans


@contextmanager
def numbers(dtype: torch.dtype) -> Iterator[None]:
    """Weights that are made inside are of this type: 5 billion in float32 would take 22 GB for a moment."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def measure(teacher: RandomTeacher, settings: ExtractionSettings, turns: int) -> tuple[float, float]:
    """Seconds of the quickest extraction after a first one, and the largest allocation in GB (NaN on a CPU)."""
    cuda = teacher.device.type == "cuda"
    height, width = teacher.trained_size
    frames = torch.randint(0, 256, (teacher.trained_frames, height, width, 3), dtype=torch.uint8)
    times = [n / 8 for n in range(len(frames))]
    clip = SimpleNamespace(frames=frames, times=times, duration=len(frames) / 8, box=(0.0, 0.0, 1.0, 1.0))
    seconds = []
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(turns + 1):
        start = clock(cuda)
        extract_priors(teacher, [clip], [QUESTION], settings)
        seconds.append(clock(cuda) - start)
    return min(seconds[1:]), torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")


def clock(cuda: bool) -> float:
    if not cuda:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--size", choices=SIZES, default="5b" if cuda else "tiny")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32",
                        choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--offload", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    teacher = RandomTeacher(given.size, given.device, getattr(torch, given.dtype), given.offload)
    on_gpu = teacher.device.type == "cuda"
    host = torch.cuda.get_device_name(given.device) if on_gpu else f"{os.cpu_count()} cores, 1 thread"
    for mode in given.modes:
        settings = ExtractionSettings(mode=mode, steps=given.steps, reconstruction=False)
        cost = estimate(teacher, settings, dtype=given.dtype, count_vae=False)
        seconds, memory = measure(teacher, settings, given.turns)
        expected = cost.seconds(CARDS["H100" if on_gpu else "a CPU core"])
        label = f"{mode}, {given.size}, {given.steps} steps, {given.dtype}" + ", offloaded" * given.offload
        print(f"{label}: {seconds:.2f} s a clip, {cost.forwards} forwards, {cost.network_flops:.2g} FLOP, "
              f"{cost.network_flops / seconds / 1e12:.3g} TFLOP/s" + (f", peak {memory:.1f} GB" if on_gpu else ""))
        figures = [("s", seconds, expected)] + [("GB", memory, cost.memory / 2**30)] * on_gpu
        for unit, ours, other in figures:
            line = json.dumps({
                "name": f"a clip, measured against estimated: {label}", "ours": round(ours, 3),
                "other": round(other, 6), "ratio": round(ours / other, 3), "unit": unit, "n": given.turns,
                "machine": f"{host}, torch {torch.__version__}"})
            print(line)
            with OUT.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
