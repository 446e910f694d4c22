"""How right codec motion is: end-point error against the embedded world's true flow, for every codec and preset, beside
DIS.

python tests/benchmarks/bench_codec_accuracy.py [CLIPS] [SIDE]            (or: make bench)

CLIPS (default 12) clips of the world's test split, two of each question type in turn, SIDE × SIDE pixels (default 192),
each encoded by every encoder at hand, read with `read_motion`, and compared cell by cell (8 × 8 pixels):

- error: mean distance in pixels of a cell's displacement and the true one of its content since the frame before, over
  the cells that the field says it knows; DIS: the same cells' mean of OpenCV's DIS flow (medium) on the decoded frames.
- known: share of cells, of frames after the first, that the field knows.
- right: of textured cells (least eigenvalue of the structure tensor over 100) that lie whole in one thing, move alike
  within 0.5 px and by more than 0.5 px a frame: share whose displacement is within 0.5 px a frame (or 15%) of the truth
  over the vector's own span: a vector to a frame four away tells the mean of four frames.
- near: the same where every reference is taken to be 1 frame away (H.264 only).

Prints a Markdown table, and JSON lines {"name", "ours", "other", "ratio", "unit", "n", "machine"} of the errors, which
are appended to benchmarks.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from enhancer.video.codec import MotionField, read_motion
from enhancer.video.codec.pictures import pictures_of
from enhancer.world.render import background_matrix, render_clip, render_masks, thing_matrix
from enhancer.world.sampling import draw_scene
from enhancer.world.scene import Scene
from enhancer.world.text import TYPES

CELL, TEXTURED, MOVING, ALIKE, RIGHT, RIGHT_SHARE = 8, 100.0, 0.5, 0.5, 0.5, 0.15
OUT = Path("benchmarks.jsonl")
CODED = {"qmin": "2", "qmax": "5"}
ENCODERS = {
    **{
        f"H.264 {preset}": ("libx264", ".mp4", {"preset": preset})
        for preset in ("ultrafast", "superfast", "veryfast", "medium", "slower")
    },
    "H.264 medium, no B-frames": ("libx264", ".mp4", {"preset": "medium", "bf": "0"}),
    "H.264 medium, crf 35": ("libx264", ".mp4", {"preset": "medium", "crf": "35"}),
    "MPEG-1, 2 B-frames": ("mpeg1video", ".mpg", {**CODED, "bf": "2"}),
    "MPEG-2, 2 B-frames": ("mpeg2video", ".ts", {**CODED, "bf": "2"}),
    "MPEG-4": ("mpeg4", ".mp4", CODED),
    "MPEG-4, 2 B-frames": ("mpeg4", ".mp4", {**CODED, "bf": "2"}),
    "H.263 (FLV1)": ("flv", ".flv", CODED),
    "HEVC": ("libx265", ".mp4", {"x265-params": "log-level=none:frame-threads=1:pools=none"}),
    "VP8": ("libvpx", ".webm", {"b": "800k"}),
    "VP9": ("libvpx-vp9", ".webm", {"b": "800k", "deadline": "realtime", "cpu-used": "8"}),
    "AV1": ("libsvtav1", ".mp4", {"preset": "12"}),
}


@dataclass
class Tally:
    """Sums over cells of one encoder and one way of reading."""

    error: list[float] = field(default_factory=list)
    dis: list[float] = field(default_factory=list)
    known: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)

    def row(self, name: str, near: Tally | None = None) -> str:
        assumed = f"{100 * np.mean(near.right):.1f}" if near else ""
        return (
            f"| {name} | {np.mean(self.error):.3f} | {np.mean(self.dis):.3f} | {100 * np.mean(self.known):.1f} | "
            f"{100 * np.mean(self.right):.1f} | {assumed} |"
        )


class Truth:
    """True displacements of one scene, by cells."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._owners: dict[int, np.ndarray] = {}
        self._cells: dict[tuple[int, int], np.ndarray] = {}

    def owner(self, frame: int) -> np.ndarray:
        """[H, W] number of the thing seen, −1 for the background."""
        if frame not in self._owners:
            masks = render_masks(self.scene, frame)
            self._owners[frame] = np.where(masks.any(axis=0), masks.argmax(axis=0), -1)
        return self._owners[frame]

    def pixels(self, frame: int, other: int) -> np.ndarray:
        """[H, W, 2] where the content of `frame` goes to until frame `other`."""
        scene, times = self.scene, (self.scene.time(frame), self.scene.time(other))
        y, x = np.mgrid[0 : scene.height, 0 : scene.width].astype(float)
        points, found = np.stack([x, y, np.ones_like(x)]), np.zeros((scene.height, scene.width, 2))
        for number in range(-1, len(scene.things)):
            start, end = (
                background_matrix(scene, t) if number < 0 else thing_matrix(scene, scene.things[number], t)
                for t in times
            )
            moved = (np.einsum("ij,jhw->ihw", end @ np.linalg.inv(start), points) - points)[:2].transpose(1, 2, 0)
            found = np.where((self.owner(frame) == number)[..., None], moved, found)
        return found

    def cells(self, frame: int, other: int) -> np.ndarray:
        """[R, C, 2] mean over cells of the motion a frame between the two."""
        if (frame, other) not in self._cells:
            self._cells[frame, other] = by_cells(self.pixels(frame, other)).mean(axis=2) / (other - frame)
        return self._cells[frame, other]


def by_cells(pixels: np.ndarray) -> np.ndarray:
    """[H, W, …] to [R, C, 64, …]; sides must be whole cells."""
    rows, columns = pixels.shape[0] // CELL, pixels.shape[1] // CELL
    split = pixels.reshape(rows, CELL, columns, CELL, *pixels.shape[2:])
    return np.moveaxis(split, 2, 1).reshape(rows, columns, CELL * CELL, *pixels.shape[2:])


def judged(grey: np.ndarray, truth: Truth, frame: int) -> np.ndarray:
    """[R, C] bool: textured cells that lie whole in one thing and move alike."""
    right, down = (cv2.Sobel(grey.astype(np.float32), cv2.CV_32F, *order) for order in ((1, 0), (0, 1)))
    a, b, c = (by_cells(product).mean(axis=2) for product in (right * right, down * down, right * down))
    texture = (a + b) / 2 - np.sqrt(((a - b) / 2) ** 2 + c * c)
    owner, motion = by_cells(truth.owner(frame)), by_cells(-truth.pixels(frame, frame - 1))
    alike = np.abs(motion - motion.mean(axis=2, keepdims=True)).max(axis=(2, 3)) < ALIKE
    speed = np.hypot(*np.moveaxis(truth.cells(frame, frame - 1), -1, 0))
    return (texture > TEXTURED) & (owner == owner[..., :1]).all(axis=2) & alike & (speed > MOVING)


def judge(found: MotionField, truth: Truth, greys: list[np.ndarray], flows: list[np.ndarray], tally: Tally) -> None:
    for frame in range(1, min(len(found.times), truth.scene.frames)):
        valid, moved = found.valid[frame], found.displacement[frame]
        tally.known.append(valid.mean())
        expected = truth.cells(frame, frame - 1)
        tally.error += np.hypot(*(moved - expected)[valid].T).tolist()
        tally.dis += np.hypot(*(flows[frame] - expected)[valid].T).tolist()
        own, count = np.zeros_like(expected), np.zeros((*valid.shape, 1))
        for distance in np.unique(found.reference[frame]):
            if distance and 0 <= frame + distance < truth.scene.frames:
                refers = (found.reference[frame] == distance).sum(axis=0)[..., None]
                own, count = own + refers * truth.cells(frame, frame + int(distance)), count + refers
        chosen = judged(greys[frame], truth, frame) & valid & (count[..., 0] > 0)
        off = np.hypot(*(moved - own / np.maximum(count, 1))[chosen].T)
        tally.right += (off <= np.maximum(RIGHT, RIGHT_SHARE * np.hypot(*expected[chosen].T))).tolist()


def backward_flows(greys: list[np.ndarray]) -> list[np.ndarray]:
    """[R, C, 2] a frame: where its content came from, negated, by DIS."""
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return [
        by_cells(-dis.calc(now, before, None)).mean(axis=2)
        for before, now in zip([greys[0], *greys[:-1]], greys, strict=True)
    ]


def encode(path: Path, pictures: np.ndarray, fps: float, codec: str, options: dict[str, str]) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(max(fps, 24)).limit_denominator(1001), options=dict(options))
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        converter = VideoReformatter()
        for image in pictures:
            frame = converter.reformat(av.VideoFrame.from_ndarray(image, format="rgb24"), format="yuv420p", threads=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", metavar="CLIPS", type=int, nargs="?", default=12)
    parser.add_argument("side", metavar="SIDE", type=int, nargs="?", default=192)
    given = parser.parse_args()
    clips, side = given.clips, given.side
    cv2.setNumThreads(1)
    scenes = [
        draw_scene(np.random.default_rng([7, n]), list(TYPES)[n % len(TYPES)], "test", size=(side, side))[0]
        for n in range(clips)
    ]
    world = [(Truth(scene), render_clip(scene)) for scene in scenes]
    print(f"{clips} clips, {side}×{side} pixels\n")
    print("| encoder | error, px | DIS, px | known, % | right, % | near, % |\n| --- | --- | --- | --- | --- | --- |")
    machine = f"{os.cpu_count()} cores, PyAV {av.__version__}, OpenCV {cv2.__version__}"
    with tempfile.TemporaryDirectory(prefix="bench-codec-") as folder:
        for name, (codec, suffix, options) in ENCODERS.items():
            try:
                av.Codec(codec, "w")
            except av.codec.codec.UnknownCodecError:
                print(f"| {name} | this PyAV has no encoder {codec} | | | | |")
                continue
            tallies: dict[str, Tally] = {}
            for n, (truth, pictures) in enumerate(world):
                path = Path(folder) / f"{codec}{n}{suffix}"
                encode(path, pictures, truth.scene.fps, codec, options)
                first = read_motion(path)
                greys = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for _, picture in pictures_of(first)]
                flows = backward_flows(greys)
                made = first.provenance["origins"].keys() - {"native", "none"}
                fields = {"": first}
                if codec == "libx264":
                    fields["near"] = read_motion(path, references="assume")
                if made:
                    fields["mestimate"] = read_motion(path, fallback="mestimate")
                for way, found in fields.items():
                    judge(found, truth, greys, flows, tallies.setdefault(way, Tally()))
                path.unlink()
            made = "mestimate" in tallies
            print(tallies[""].row(f"{name}{' (re-encoded)' if made else ''}", tallies.get("near")), flush=True)
            if made:
                print(tallies["mestimate"].row(f"{name} (mestimate)"), flush=True)
            ours, other = np.mean(tallies[""].error), np.mean(tallies[""].dis)
            with OUT.open("a", encoding="utf-8") as file:
                file.write(
                    json.dumps(
                        {
                            "name": f"codec end-point error against DIS, {name}, {side} px",
                            "ours": round(ours, 4),
                            "other": round(other, 4),
                            "ratio": round(ours / other, 2),
                            "unit": "px/frame",
                            "n": clips,
                            "machine": machine,
                        }
                    )
                    + "\n"
                )


if __name__ == "__main__":
    main()
