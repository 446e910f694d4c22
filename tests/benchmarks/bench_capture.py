"""What reading the student's attention costs: a step with alignment, beside one without and one by eager attention.

    python tests/benchmarks/bench_capture.py                                (or: make bench)
    python tests/benchmarks/bench_capture.py --size 3b --device cuda --dtype bfloat16

A step is forward, loss and backward of a random Qwen2.5-VL of transformers' real classes; the vision tower is left out,
its tokens come as embeddings, so that nothing dilutes what capture adds. `small`: 4,352 tokens, of them 4,096 visual,
4 layers of 256, 4 heads of 64 (2 of keys), MLP 704; `3b`: Qwen2.5-VL-3B's decoder (36 layers of 2,048, 16 heads of 128,
2 of keys, MLP 11,008, vocabulary 151,936) at 8,192 tokens.

Ways: plain: the answer loss; aligned: the same and the alignment of 16 words' rows (24 tokens) over all visual tokens,
through capture; eager: attn_implementation="eager" with output_attentions=True, rows cut from the full matrices, the
usual way.

Ways take turns, each in a process of its own; n is the number of turns. On a CPU: CPU seconds of the quickest step of a
turn after a first one, since other work on the machine stretches the clock; memory is how much the largest resident set
grows over what it is once the model and its gradients are there. On a GPU: the clock between synchronisations, and the
largest allocation.

Prints JSON lines {"name", "ours", "other", "ratio", "unit", "n", "machine"}, ratio = ours/other of medians, which are
appended to benchmarks.jsonl as well. Bars: aligned/plain at most 1.10 in time and memory; eager's memory at least 3
times ours.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vlm_hooks.alignment import alignment_loss
from vlm_hooks.capture import CaptureRequest, capture

WAYS = ("plain", "aligned", "eager")
OUT = Path("benchmarks.jsonl")
STEPS = 2  # the first one warms up
ROWS, WORDS, LEARNT = 24, 16, 32  # captured rows, words they make, answer tokens
SIZES = {  # frames × rows × columns of visual tokens, all tokens, decoder
    "small": ((16, 16, 16), 4352, dict(vocab_size=1024, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
                                       num_attention_heads=4, num_key_value_heads=2)),
    "3b": ((16, 22, 22), 8192, dict(vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                                    num_attention_heads=16, num_key_value_heads=2)),
}


def build(size: str, way: str, device: str, dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    head = SIZES[size][2]["hidden_size"] // SIZES[size][2]["num_attention_heads"]
    section = [head // 8, 3 * head // 16, 3 * head // 16]
    config = Qwen2_5_VLConfig(
        text_config={**SIZES[size][2], "max_position_embeddings": 16384, "tie_word_embeddings": True,
                     "bos_token_id": 0, "eos_token_id": 0,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}},
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
                       "out_hidden_size": SIZES[size][2]["hidden_size"], "fullatt_block_indexes": [0]},
        tie_word_embeddings=True,
    )
    config._attn_implementation = "eager" if way == "eager" else "sdpa"
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = Qwen2_5_VLForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
    return model.train()


class Step:
    """One training step of a way."""

    def __init__(self, size: str, way: str, device: str, dtype: torch.dtype) -> None:
        self.way, (self.grid, self.tokens, _) = way, SIZES[size]
        self.model = build(size, way, device, dtype)
        cells = self.grid[0] * self.grid[1] * self.grid[2]
        with torch.device(device):
            self.embeds = torch.randn(1, self.tokens, self.model.config.text_config.hidden_size, dtype=dtype)
            self.positions = torch.arange(self.tokens)[None, None].expand(4, 1, -1)
            self.targets = torch.randint(0, 1000, (LEARNT,))
            self.prior = torch.rand(WORDS, *self.grid)
            self.columns = torch.arange(16, 16 + cells)
            self.rows = torch.arange(16 + cells + 32, 16 + cells + 32 + ROWS)
            self.owner = torch.arange(ROWS) % WORDS

    def __call__(self) -> float:
        inputs = {"inputs_embeds": self.embeds, "position_ids": self.positions, "use_cache": False}
        if self.way == "eager":
            output = self.model(**inputs, output_attentions=True)
            heads = [attention[0, :, self.rows][:, :, self.columns] for attention in output.attentions]
            loss = self.answer(output.logits) + self.alignment(torch.stack(heads).float().mean(dim=(0, 1)))
        elif self.way == "aligned":
            request = CaptureRequest.from_positions([self.rows], [self.columns])
            with capture(self.model):
                output = self.model(**inputs, motion_capture=request)
            loss = self.answer(output.logits) + self.alignment(request.mean()[0])
        else:
            loss = self.answer(self.model(**inputs).logits)
        del inputs
        loss.backward()
        return float(loss.detach())

    def answer(self, logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits[0, -LEARNT - 1:-1].float(), self.targets)

    def alignment(self, rows_rc: Tensor) -> Tensor:
        words = torch.zeros(WORDS, rows_rc.shape[1], device=rows_rc.device).index_add(0, self.owner, rows_rc)
        return alignment_loss(words.reshape(WORDS, *self.grid), self.prior)


def measure(size: str, way: str, device: str, dtype: str, layers: int | None) -> dict:
    """Seconds of the quickest step, bytes that a step takes beyond the model and its gradients, and the loss."""
    torch.set_num_threads(1)
    if layers:
        SIZES[size][2]["num_hidden_layers"] = layers
    step, cuda = Step(size, way, device, getattr(torch, dtype)), device == "cuda"
    for parameter in step.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else resident()
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter() if cuda else time.process_time()
        loss = step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() if cuda else time.process_time()) - began)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"s": min(seconds[1:]), "MB": (peak - before) / 2**20, "loss": loss}


def resident() -> int:
    """Bytes that are resident now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, help="another number of decoder layers")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    args = parser.parse_args()
    figures: dict[str, list[dict]] = {way: [] for way in args.ways}
    for _ in range(args.turns):
        for way in args.ways:
            with ProcessPoolExecutor(1, get_context("fork")) as fresh:  # which has the libraries already
                work = fresh.submit(measure, args.size, way, args.device, args.dtype, args.layers)
                figures[way].append(work.result())
            print(way, figures[way][-1], flush=True)
    report(figures, args)


def report(figures: dict[str, list[dict]], args: argparse.Namespace) -> None:
    median = {way: {unit: statistics.median(row[unit] for row in rows) for unit in ("s", "MB")}
              for way, rows in figures.items()}
    where = torch.cuda.get_device_name() if args.device == "cuda" else "1 thread"
    layers = args.layers or SIZES[args.size][2]["num_hidden_layers"]
    shape = f"{SIZES[args.size][1]} tokens, {layers} layers of {SIZES[args.size][2]['hidden_size']}, {args.dtype}"
    pairs = [("aligned", "plain"), ("eager", "plain"), ("eager", "aligned")]
    lines = []
    for ours, other in pairs:
        if ours in median and other in median:
            lines += [(f"{ours} step against {other}, {shape}", median[ours][unit], median[other][unit], unit)
                      for unit in ("s", "MB")]
    with open(OUT, "a", encoding="utf-8") as file:
        for name, ours, other, unit in lines:
            figure = {"name": name, "ours": round(ours, 4), "other": round(other, 4), "ratio": round(ours / other, 3)}
            figure.update(unit=unit, n=args.turns, machine=f"{where}, torch {torch.__version__}")
            line = json.dumps(figure)
            print(line)
            file.write(line + "\n")


if __name__ == "__main__":
    main()
