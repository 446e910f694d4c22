"""Optical flow between the sampled frames (OpenCV's DIS, Kroeger et al., ECCV 2016) as a prior.

The map is the speed beside the camera, which is fitted and taken away (enhancer/video/camera.py); where nothing moves
by itself, the camera's own motion. Flow is found from each frame to the one before, so that it lies on the later frame;
the first has none. With `sources.camera: keep` the camera's motion stays in the map.
"""

from __future__ import annotations

import cv2
import numpy as np

from enhancer.data.samples import Sample
from enhancer.sources import SourceContext
from enhancer.spatial_prior import Evidence, SpatialSource, beside_camera, camera_settings, without_grain
from enhancer.video.clip import Clip
from vdm_priors.errors import SampleError
from vdm_priors.grid import TokenGrid, frame_spans

RULE = 1
CELLS = 32  # along the shorter side, at most
GRAIN = 0.25  # px from a sampled frame to the next


def flow_to_the_frame_before(pictures: np.ndarray) -> np.ndarray:
    """[N, H, W, 2] float32 px of uint8 RGB [N, H, W, 3]: where content goes, by the frame before; NaN for the first.

    SampleError for frames too small for DIS, whose coarsest patch is 8 pixels.
    """
    if min(pictures.shape[1:3]) < 16:
        raise SampleError(
            f"optical flow needs frames of 16 pixels or more, and these have {pictures.shape[2]}×{pictures.shape[1]}"
        )
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    greys = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in pictures]
    flows = [-dis.calc(now, before, None) for before, now in zip(greys, greys[1:], strict=False)]
    return np.stack([np.full((*pictures.shape[1:3], 2), np.nan, np.float32), *flows])


def build(context: SourceContext) -> SpatialSource:
    """Found by the file's name."""

    def measure(sample: Sample, clip: Clip) -> Evidence:
        motion = flow_to_the_frame_before(clip.frames)
        height, width = motion.shape[1:3]
        step = max(1, min(height, width) // CELLS)
        motion = motion[:, step // 2 :: step, step // 2 :: step]  # DIS is smooth: one sample a cell serves
        rows, columns = motion.shape[1:3]
        valid = ~np.isnan(motion[..., 0])
        speed, of = without_grain(np.hypot(*np.moveaxis(motion, -1, 0)), GRAIN), "all"
        if context.camera == "remove":
            beside, _ = beside_camera(motion, valid, np.arange(columns) * step, np.arange(rows) * step, GRAIN)
            speed, of = (beside, "things") if np.nansum(beside) > 0 else (speed, "camera")
        seconds = np.maximum(np.diff(clip.times, prepend=clip.times[0] - 1), 1e-6)[:, None, None]
        grid = TokenGrid.regular(frame_spans(clip.times, clip.duration), rows, columns, clip.box)
        return Evidence((speed / seconds).astype(np.float32), grid, {"of": of, "opencv": cv2.__version__})

    return SpatialSource("flow", RULE, context, measure, camera_settings(context))
