"""Random clips of key frames and motion, for the tests of adapters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm_hooks.adapters.inputs import Motion, MotionClip


def motion_clip(
    steps: Sequence[int], seed: int = 0, size: tuple[int, int] = (32, 32), unknown: float = 0.2
) -> MotionClip:
    """A key frame for each entry of `steps`, a second apart, and so many moments after it."""
    rng = np.random.default_rng(seed)
    height, width = size
    motion = []
    for n, count in enumerate(steps):
        vectors = rng.normal(0, 0.1, (count, height // 8, width // 8, 2)).astype(np.float32)
        vectors[rng.random(vectors.shape[:3]) < unknown] = np.nan
        residuals = rng.uniform(-0.5, 0.5, (count, height, width, 3)).astype(np.float32)
        times = n + np.arange(1, count + 1) / (count + 1)
        pictures = rng.integers(0, 256, (count, height, width, 3)).astype(np.uint8)
        motion.append(Motion(vectors, times, n + 1.0, np.full(count, 4), residuals, pictures))
    frames = rng.integers(0, 256, (len(steps), height, width, 3)).astype(np.uint8)
    return MotionClip(frames, [float(n) for n in range(len(steps))], float(len(steps)), motion)
