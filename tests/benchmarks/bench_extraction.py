"""What it saves to decode and write beside the compute, and what a second process gains.

    python tests/benchmarks/bench_extraction.py [CLIPS] [--only processes]            (or: make bench)

The teacher is a small random pipeline of the real CogVideoX classes; CLIPS (default 32) random H.264 clips of 480 × 720
pixels and 17 frames, of which it sees 9, make decoding as dear as it is with real videos. Every process has one thread
of torch. Two comparisons, each way in a store of its own and in processes of their own, in turns:

1. overlapped: fill_store as it is; one after the other: the same with decoding and writing in the computing thread.
   "s for CLIPS clips", one process, so that a second core is what the thread beside it takes.
2. processes: one, and two on one store, as `torchrun --nproc-per-node 2 -m enhancer extract` has them, each held to a
   core of its own where the system can do that, decoding and writing too; seconds from the moment that all have loaded
   their teacher (which is the launcher's and the libraries' time) to the end of the last. The bar: two do at least 1.8
   times as much a second. That takes two free cores: each turn says how much of its core each process got. Where there
   is other work, a second figure (Linux) takes off what it took: CPU seconds of the slowest process, all its threads,
   and the seconds in which its main thread waited, but not for a core (at most: it may wait for its own other thread).

Prints JSON lines {"name", "ours", "other", "ratio", "unit", "n", "machine"} (medians over the turns, ratio =
ours/other), which are appended to benchmarks.jsonl as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

TURNS = 3
BATCH, FRAMES, HEIGHT, WIDTH = 2, 17, 480, 720
OUT = Path("benchmarks.jsonl")


class Immediate:
    """Stands in for a pool of threads: what is submitted is done at once, in the same thread."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> Immediate:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, do, *arguments):
        do(*arguments)
        return mock.Mock(done=lambda: True, result=lambda: None)


def write_clip(path: Path, seed: int) -> None:
    """A bright square over moving noise, which takes a decoder as long as a real scene."""
    rng = np.random.default_rng(seed)
    background = rng.integers(0, 160, (HEIGHT, WIDTH, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(8), options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for n in range(FRAMES):
            image = np.roll(background, 3 * n, axis=1)
            image[200:260, 20 * n:20 * n + 60] = (220, 30, 30)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def work(
    clips: list[Path], teacher: str, store: str, rank: int, count: int, overlapped: bool, one_core: bool, barrier, ended
) -> None:
    """One process's part of filling the store; tells when it began and when it had finished."""
    if one_core and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1 - rank]})  # before torch asks how many there are
    import torch

    from enhancer.data.samples import Sample
    from enhancer.processes import Process, Team
    from enhancer.filling import fill_store
    from enhancer.sources import SourceContext, build_source
    from enhancer.video.clip import Sampling
    from vdm_priors.families import load_teacher
    from vdm_priors.settings import ExtractionSettings
    from vdm_priors.store import PriorStore

    torch.set_num_threads(1)
    loaded = load_teacher(teacher)
    samples = [Sample(path.stem, path, f"Which way does the red square {path.stem} move?", "left") for path in clips]
    context = SourceContext(
        samples=samples, store=PriorStore(store), sampling=Sampling(9), teacher_fingerprint="random", batch_size=BATCH,
        settings=ExtractionSettings(steps=4, reconstruction=False), load_teacher=lambda: loaded)
    source = build_source("vdm", context)
    in_turn = [mock.patch("enhancer.sources.vdm.ahead", iter),
               mock.patch("enhancer.sources.ThreadPoolExecutor", Immediate)]
    decoding, writing = [nullcontext(), nullcontext()] if overlapped else in_turn
    with decoding, writing:
        with Team(Path(store), "bench", Process(rank, count)).working() as team:
            barrier.wait()
            began, worked, used = time.time(), time.process_time(), on_or_for_a_core()
            report = fill_store(source, samples, context.store, team=team, label="vdm")
            clock = time.time() - began
            waited = max(0.0, clock - (on_or_for_a_core() - used))
            ended.put((began, began + clock, time.process_time() - worked + waited))
    if rank == 0 and report.made != len(clips):  # nothing may be left out, or the ways differ
        raise RuntimeError(f"{report.made} of {len(clips)} priors were made: {report.problems[:1]}")


def on_or_for_a_core() -> float:
    """Seconds that this thread has run or could have run; where the system does not say, the clock's."""
    try:
        ran, could = Path("/proc/thread-self/schedstat").read_text(encoding="utf-8").split()[:2]
        return (int(ran) + int(could)) / 1e9
    except OSError:
        return time.time()


def seconds(
    clips: list[Path], teacher: Path, count: int, overlapped: bool = True, one_core: bool = False
) -> tuple[float, float]:
    """Of filling an empty store with that many processes: by the clock, and of the slowest if its core were free."""
    spawn = get_context("spawn")
    barrier, ended = spawn.Barrier(count), spawn.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="bench-extraction-") as store:
        given = (clips, str(teacher), store)
        started = [spawn.Process(target=work, args=(*given, rank, count, overlapped, one_core, barrier, ended))
                   for rank in range(count)]
        for process in started:
            process.start()
        times = [ended.get() for _ in started]
        for process in started:
            process.join()
    assert [process.exitcode for process in started] == [0] * count, "a process failed"
    clock = max(end for _, end, _ in times) - min(began for began, _, _ in times)
    print(f"{count} of {'a core each' if one_core else 'any core'}, {'over' if overlapped else 'not over'}lapped: "
          + ", ".join(f"{end - began:.1f} s, {free:.1f} on a free core" for began, end, free in times))
    return clock, max(free for *_, free in times)


def told(name: str, ours: list[float], other: list[float], unit: str, machine: str) -> None:
    first, second = statistics.median(ours), statistics.median(other)
    line = json.dumps({"name": name, "ours": round(first, 3), "other": round(second, 3),
                       "ratio": round(first / second, 3), "unit": unit, "n": len(ours), "machine": machine})
    print(line)
    with OUT.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def main() -> None:
    import torch

    from tests.vdm_priors.tiny_teacher import build_tiny_teacher

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", metavar="CLIPS", type=int, nargs="?", default=32)
    parser.add_argument("--only", choices=("overlap", "processes"), help="one of the two comparisons")
    parser.add_argument("--turns", type=int, default=TURNS)
    given = parser.parse_args()
    count = given.clips
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    machine = f"{os.cpu_count()} cores, 1 thread a process, torch {torch.__version__}"
    found: dict[str, list[tuple[float, float]]] = {"overlapped": [], "in turn": [], "one": [], "two": []}
    with tempfile.TemporaryDirectory(prefix="bench-extraction-data-") as folder:
        teacher = build_tiny_teacher(Path(folder) / "teacher", layers=4, heads=4, head_dim=32, latent_side=24)
        clips = [Path(folder) / f"{n}.mp4" for n in range(count)]
        for n, clip in enumerate(clips):
            write_clip(clip, n)
        for _ in range(given.turns):
            if given.only != "processes":
                found["overlapped"].append(seconds(clips, teacher, 1))
                found["in turn"].append(seconds(clips, teacher, 1, overlapped=False))
            if given.only != "overlap":
                found["one"].append(seconds(clips, teacher, 1, one_core=True))
                found["two"].append(seconds(clips, teacher, 2, one_core=True))
    clock, free = ({way: [one[unit] for one in times] for way, times in found.items()} for unit in (0, 1))
    if given.only != "processes":
        told(f"extraction, {count} clips, decoding and writing beside the compute against in turn",
             clock["overlapped"], clock["in turn"], "s", machine)
    if given.only != "overlap":
        for name, of in (("", clock), (", other work taken off", free)):
            told(f"extraction, two processes against one{name}", [count / s for s in of["two"]],
                 [count / s for s in of["one"]], "clips/s", machine)


if __name__ == "__main__":
    main()
