"""How fast a store is looked through: headers alone (`enhancer store ls`) and whole files with checksums (`verify`).

    python tests/benchmarks/bench_store.py [PRIORS]            (or: make bench)

Priors of CogVideoX-5B's geometry with 30 words and the whole record of an extraction: a grid of 13 × 30 × 45 cells, the
scores of 48 heads, or of every head of 42 layers (head_scope layer_head), with their errors, and of 60 words. PRIORS
(default 300) of each are written to a temporary folder; both ways then read all of them in turn, from the system's
cache. Seconds are CPU seconds of the one thread, which other work on the machine hardly changes.

Prints how large a file and its header are, then JSON lines {"name", "ours", "other", "ratio", "unit", "n", "machine"}:
ours is headers alone, other whole files, both in priors a second (medians over the turns), ratio = ours/other. They are
appended to benchmarks.jsonl as well. The bars: 2,000 priors a second by their headers, 1.2 MB a file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vdm_priors.confidence import confidence_report
from vdm_priors.grid import TokenGrid
from vdm_priors.prior import MotionPrior
from vdm_priors.settings import ExtractionSettings
from vdm_priors.store import PriorStore, content_key
from vdm_priors.words import split_words

FRAMES, ROWS, COLUMNS, WORDS, HEADS, LAYERS = 13, 30, 45, 30, 48, 42
METRICS = ("dfc", "tcs", "dsr", "score")
TURNS = 5
OUT = Path("benchmarks.jsonl")


def make_prior(heads: int) -> MotionPrior:
    """A prior as the vdm source writes it, with random numbers."""
    draw = torch.Generator().manual_seed(heads)
    text = " ".join(f"word{n}" for n in range(2 * WORDS))
    words = split_words(text)

    def scores() -> dict[str, list[float]]:
        return {name: torch.rand(heads, generator=draw).tolist() for name in METRICS}

    of_words = [{"text": word.text, "start": word.start, "end": word.end, "score": 0.0123456789, "mean": 0.0123456789,
                 "fluctuation": 0.000123456789, "selected": n < WORDS} for n, word in enumerate(words)]
    grid = TokenGrid.regular([(n / 2, n / 2 + 0.5) for n in range(FRAMES)], ROWS, COLUMNS)
    maps = torch.rand(WORDS, *grid.shape, generator=draw)
    return MotionPrior(text, words[:WORDS], maps, grid, torch.ones(WORDS), {
        "source": "vdm", "model": "THUDM/CogVideoX-5b", "revision": "0123456789" * 4, "frame_size": [480, 720],
        "settings": ExtractionSettings().effective(), "seconds": [n / 8 for n in range(49)],
        "scheduler": {"class": "CogVideoXDPMScheduler", "settings": {f"a_setting_{n}": 0.123456789 for n in range(25)}},
        "head_scores": {**scores(), "selected": [n % 2 == 0 for n in range(heads)], "rows": [318, grid.num_tokens],
                        "error": scores(), "exchanged": 1.23},
        "word_scores": of_words, "confidence": confidence_report(maps, grid)})


def priors_a_second(read: Callable[[str], object], keys: list[str]) -> float:
    start = time.process_time()
    for key in keys:
        read(key)
    return len(keys) / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("priors", metavar="PRIORS", type=int, nargs="?", default=300)
    count = parser.parse_args().priors
    torch.set_num_threads(1)
    machine = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    for name, heads in (("48 heads", HEADS), (f"{HEADS * LAYERS} heads", HEADS * LAYERS)):
        with tempfile.TemporaryDirectory(prefix="bench-store-") as folder:
            store, prior = PriorStore(folder), make_prior(heads)
            for n in range(count):
                store.put(content_key(n=n), prior)
            keys = store.keys()
            size = store.path(keys[0]).stat().st_size
            with open(store.path(keys[0]), "rb") as file:
                header = int.from_bytes(file.read(8), "little")
            print(f"{name}: {size / 2**20:.2f} MB a prior, {header / 2**10:.0f} kB of it the header")
            ways = {"entry": store.entry, "get": store.get}
            found: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(TURNS):
                for way, read in ways.items():
                    found[way].append(priors_a_second(read, keys))
            ours, other = (statistics.median(found[way]) for way in ways)
            line = json.dumps({
                "name": f"store scan, headers against whole files, {name}", "ours": round(ours, 1),
                "other": round(other, 1), "ratio": round(ours / other, 2), "unit": "priors/s", "n": TURNS,
                "machine": machine})
            print(line)
            with OUT.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
