"""What a harvest costs: one CogVideoX denoising forward without it, with it, and with the attention written out.

    python tests/benchmarks/bench_harvest.py            (or: make bench)

The transformer is of diffusers' real class, small and random: 2 layers, 4 heads of 32. Each way runs in a process of
its own, one after the other in turn. Seconds: the quickest forward of each process after a first one, and their median over
the processes. Peak memory: how much the process's largest resident set grows from just before the first forward to the
end (RSS, so with what the allocator keeps), with outputs and harvested rows alive.

Prints a line a size and way (the sums of what was kept show that both ways keep the same), then for each other way
JSON lines {"name", "ours", "other", "ratio", "unit", "n", "machine"}, ratio = ours/other, which are appended to
benchmarks.jsonl as well.

Legend: b batch, h heads, s tokens (text first, then vision), d head width, T text tokens.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed
from torch import Tensor

from vdm_priors.attention import AttentionLayer
from vdm_priors.families._cogvideox_attention import CogVideoXAttention
from vdm_priors.harvest import HarvestRequest, harvest

SIZES = {2016: (7, 36, 32), 4032: (14, 36, 32)}  # vision tokens: latent frames, rows, columns; patches are 2 × 2
TEXT, HEADS, WIDTH, LAYERS, ROWS = 64, 4, 32, 2, 512
WAYS = ("plain", "harvest", "naive")
TURNS, FORWARDS = 3, 2
OUT = Path("benchmarks.jsonl")


class NaiveAttention:
    """CogVideoX's attention with the whole [b, h, s, s] softmax written out, as attention is usually recorded."""

    def __init__(self, kept: list) -> None:
        self.kept = kept

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        parts = (attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (part(joint).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k = (torch.cat([x[:, :, :text], apply_rotary_emb(x[:, :, text:], image_rotary_emb)], dim=2) for x in (q, k))
        p_bhss = (q @ k.transpose(2, 3) * WIDTH**-0.5).softmax(dim=-1)
        rows = text + chosen_rows(p_bhss.shape[2] - text)
        self.kept.append((p_bhss[:, :, :text, text:].clone(), p_bhss[:, :, rows, text:]))
        out = (p_bhss @ v).transpose(1, 2).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        return out[:, text:], out[:, :text]


def chosen_rows(vision: int) -> Tensor:
    """The vision tokens whose rows are kept, evenly spread."""
    return torch.linspace(0, vision - 1, ROWS).long()


def measure(way: str, vision: int) -> dict:
    """Seconds of each forward, the growth of the largest RSS in MB, and the sums of what was kept."""
    torch.manual_seed(0)
    frames, rows, columns = SIZES[vision]
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH, in_channels=4, out_channels=4, time_embed_dim=32,
        text_embed_dim=32, num_layers=LAYERS, sample_width=columns, sample_height=rows, sample_frames=4 * frames - 3,
        max_text_seq_length=TEXT, use_rotary_positional_embeddings=True).eval()
    grid = (rows // 2, columns // 2)
    rotary = get_3d_rotary_pos_embed(WIDTH, ((0, 0), grid), grid, frames)
    inputs = dict(hidden_states=torch.randn(1, frames, 4, rows, columns),
                  encoder_hidden_states=torch.randn(1, TEXT, 32), timestep=torch.tensor([500]), image_rotary_emb=rotary, return_dict=False)
    layers = [AttentionLayer(key, 0, (key,)) for key in transformer.attn_processors]
    teacher = SimpleNamespace(attention_models=[transformer], attention_layers=layers,
                              attention_processor=lambda layer, previous, recorder: CogVideoXAttention.extending(
                                  layer, previous, recorder, None))
    seconds, kept = [], None
    before = peak_mb()
    with torch.no_grad():
        for _ in range(FORWARDS + 1):
            start = time.perf_counter()
            if way == "harvest":
                with harvest(teacher, HarvestRequest(text_tokens=TEXT, rows=chosen_rows(vision))) as harvested:
                    out = transformer(**inputs)[0]
                    kept = harvested.t2v, harvested.v2v
            elif way == "naive":
                layers: list = []
                own = dict(transformer.attn_processors)
                transformer.set_attn_processor(NaiveAttention(layers))
                out = transformer(**inputs)[0]
                transformer.set_attn_processor(own)
                kept = tuple(sum(parts) / len(parts) for parts in zip(*layers))
            else:
                out = transformer(**inputs)[0]
            seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds[1:]), "mb": peak_mb() - before, "tokens": TEXT + frames * grid[0] * grid[1],
            "sums": [round(float(x.double().sum()), 3) for x in kept or ()],
            "out": round(float(out.double().abs().sum()), 3)}


def peak_mb() -> float:
    """Largest resident set of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measured_apart(way: str, vision: int) -> dict:
    """`measure` in a process of its own, so that no way inherits another's memory; a fork spares the imports."""
    with get_context("fork" if sys.platform == "linux" else "spawn").Pool(1) as pool:
        return pool.apply(measure, (way, vision))


def main() -> None:
    machine = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    for vision in SIZES:
        found: dict[str, list[dict]] = {way: [] for way in WAYS}
        for _ in range(TURNS):
            for way in WAYS:
                found[way].append(measured_apart(way, vision))
        median = {way: {unit: statistics.median(one[unit] for one in all_of) for unit in ("seconds", "mb")}
                  for way, all_of in found.items()}
        for way in WAYS:
            times = median[way]["seconds"] / median["plain"]["seconds"]
            one = found[way][0]
            print(f"{vision} vision + {TEXT} text tokens, {way:8s} {median[way]['seconds']:.3f} s a forward "
                  f"({times:.2f} × plain), peak memory + {median[way]['mb']:.0f} MB; kept rows sum to {one['sums']}, "
                  f"|output| {one['out']}")
        for other in ("plain", "naive"):
            for unit in ("seconds", "mb"):
                ours, theirs = median["harvest"][unit], median[other][unit]
                line = json.dumps({"name": f"harvest against {other}, {vision} vision tokens", "ours": round(ours, 4),
                                   "other": round(theirs, 4), "ratio": round(ours / theirs, 3) if theirs else None,
                                   "unit": "s" if unit == "seconds" else "MB", "n": TURNS, "machine": machine})
                print(line)
                with OUT.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
