"""Views of random numbers, of any size, for the tests and the benchmark of the page."""

from __future__ import annotations

import functools

import numpy as np
import torch

from enhancer.visualize.page import page
from enhancer.visualize.views import METRICS, ClipView, CodecView, HeadMaps, HeadsView, InversionView, MapSet, WordView
from vdm_priors.grid import TokenGrid
from vdm_priors.masks import MotionMask
from vdm_priors.words import split_words

TEXT = "Which way does the red ball roll after it hits the wall?"


def fake_view(
    text: str = TEXT,
    *,
    frames: int = 5,
    size: tuple[int, int] = (48, 64),
    grid: tuple[int, int, int] = (2, 3, 4),
    layers: int = 2,
    heads: int = 3,
    places: int = 12,
    steps: int = 2,
    name: str = "clip.mp4",
    by_layer: bool = True,
    seed: int = 0,
) -> ClipView:
    """A clip with every section. by_layer: heads of each layer were judged, not their means over layers."""
    rng = np.random.default_rng(seed)
    times = [n / 8 for n in range(frames)]
    edges = np.linspace(0, times[-1] + 1 / 8, grid[0] + 1)
    cells = TokenGrid.regular(list(zip(edges[:-1], edges[1:], strict=True)), *grid[1:])
    words = [
        WordView(
            word.text,
            word.start,
            word.end,
            float(rng.uniform(0.001, 0.002)),
            0.001,
            float(rng.uniform(0, 0.001)),
            n % 2 == 0,
            rng.uniform(0, 0.002, grid[0]).tolist(),
        )
        for n, word in enumerate(split_words(text))
    ]

    def maps(*before: int) -> np.ndarray:
        return rng.exponential(1, (*before, len(words), *grid)).astype(np.float32)

    teacher = MapSet(
        "teacher",
        "teacher",
        cells,
        maps(),
        maps(steps),
        [f"step {n + 1}" for n in range(steps)],
        maps(layers),
        [f"layer {n}" for n in range(layers)],
    )
    teacher.layers[-1] = np.nan  # a layer without a selected head
    student = MapSet(
        "before: base model", "student", cells, maps(), layers=maps(3), layer_names=["layer 0", "layer 1", "layer 2"]
    )
    video = fake_frames(frames, size, rng)
    return ClipView(
        name,
        text,
        times,
        video,
        words,
        [MapSet("ground truth", "truth", cells, maps()), teacher, student],
        heads=fake_heads(cells, layers, heads, places, by_layer, rng),
        codec=fake_codec(times, rng),
        inversion=InversionView(
            video,
            rng.normal(size=(grid[0], 4, 6, 8)).astype(np.float32),
            np.clip(video + 9, 0, 255).astype(np.uint8),
            27.0,
            0.1,
        ),
        video=name,
        question=text,
        answer="left",
        facts=[("source", "vdm")],
    )


@functools.cache
def large_page() -> str:
    """A page of CogVideoX-5B's size: 42 layers of 48 heads, 49 frames of 480×720, 13×30×45 cells, and as many places
    of a frame as look_again keeps of so many heads (test_visualize_look.py)."""
    return page(
        [
            fake_view(
                frames=49, size=(480, 720), grid=(13, 30, 45), layers=42, heads=48, steps=5, places=17, by_layer=False
            )
        ],
        "large",
    )


def fake_frames(frames: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Smooth shapes that drift, under a camera's noise: about as much work for JPEG as a film."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]] / 40
    waves = [
        np.sin(a * x + b * y)[..., None] * c
        for a, b, c in zip(*rng.normal(0, 1, (2, 9)), rng.normal(0, 20, (9, 3)), strict=True)
    ]
    still, noise = 128 + sum(waves), rng.normal(0, 3, (*size, 3))
    return np.stack(
        [
            np.clip(np.roll(still, 3 * n, axis=1) + np.roll(noise, 7 * n, axis=0), 0, 255).astype(np.uint8)
            for n in range(frames)
        ]
    )


def fake_heads(
    cells: TokenGrid, layers: int, heads: int, places: int, by_layer: bool, rng: np.random.Generator
) -> HeadsView:
    rows = ([] if by_layer else ["mean over layers"]) + [f"layer {n}" for n in range(layers)]
    groups = [(range(len(rows)), places)] if by_layer or places < 3 else [([0], places), (range(1, len(rows)), 2)]
    maps = []
    for of_rows, count in groups:
        shown = torch.linspace(0, cells.rows * cells.columns - 1, count).round().long().unique()
        tokens = (torch.arange(cells.frames)[:, None] * cells.rows * cells.columns + shown).flatten()
        attention = rng.exponential(1, (len(of_rows) * heads, len(tokens), len(tokens))).astype(np.float32)
        mask = MotionMask()(tokens, cells)[:, tokens].numpy()
        maps.append(HeadMaps(list(of_rows), shown.numpy(), attention, np.full(len(attention), 1.0, np.float32), mask))
    metrics = {name: rng.normal(size=(len(rows), heads)) for name in METRICS}
    return HeadsView(
        rows, metrics, metrics["score"] > 0, list(range(len(rows))), cells, maps, "half of the heads kept."
    )


def fake_codec(times: list[float], rng: np.random.Generator, rows: int = 6, columns: int = 8) -> CodecView:
    count = len(times)
    velocity = rng.normal(0, 20, (count, rows, columns, 2)).astype(np.float32)
    velocity[0] = np.nan
    return CodecView(
        np.array(times),
        times[-1] + 1 / 8,
        ["I", *"PB" * count][:count],
        np.arange(count) == 0,
        np.arange(count) == count - 1,
        rng.integers(100, 9000, count),
        rng.uniform(0, 30, count),
        rng.uniform(0, 1, count),
        np.arange(count),
        velocity,
        rng.integers(0, 5, (count, rows, columns)).astype(np.int8),
        rng.uniform(0, 9, (count, rows, columns)).astype(np.float32),
        np.linspace(0, 1, rows + 1),
        np.linspace(0, 1, columns + 1),
        (48, 64),
        [("stream", "h264")],
        ["a note"],
    )
