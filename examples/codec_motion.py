"""What a compressed file says of motion, without any model.

    python examples/codec_motion.py
"""

from __future__ import annotations

import numpy as np
from clips import samples

from enhancer.video.codec import accumulate, read_motion
from enhancer.video.codec.field import Origin

field = read_motion(samples()[0].video)
frames, rows, columns = field.validity.shape
origins = {Origin(origin).name for origin in field.origin}  # NATIVE: what the file's own encoder chose
print(f"{frames} frames, {rows} × {columns} cells; origin: {', '.join(sorted(origins))}")
known = field.valid.mean(axis=(1, 2))                        # share of cells whose motion is known
speed = np.linalg.norm(field.displacement, axis=-1)          # px a frame; NaN where not valid
for n in range(1, frames, 4):
    print(f"  frame {n:2d}: {100 * known[n]:3.0f}% known, fastest cell {np.nanmax(speed[n]):.1f} px a frame")

far = accumulate(field, 4)                                   # motion over up to 4 frames, with its own mask
print(f"over 4 frames: up to {np.nanmax(np.linalg.norm(far.displacement, axis=-1)):.1f} px")
