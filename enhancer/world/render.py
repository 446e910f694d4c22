"""Draws a scene: frames, per-thing masks and dense flow, all from the same affine maps.

Shapes: frame_hwc uint8, masks_nhw bool (n = things, later ones lie above earlier ones), flow_hw2 float32 (x, y in pixels
to the next frame, NaN-free; a cell whose content leaves the frame still has its true displacement).
"""

from __future__ import annotations

import math
from functools import lru_cache

import cv2
import numpy as np

from enhancer.world.scene import COLOURS, Scene, Thing

TRAIN_BACKGROUNDS = ("astronaut", "brick", "chelsea", "coffee", "gravel", "rocket")
VALIDATION_BACKGROUNDS = ("moon", "camera")
TEST_BACKGROUNDS = ("grass", "motorcycle_left", "hubble_deep_field", "coins")
SPRITE = 64  # sprite side in pixels; the shape's radius is SPRITE / 2 minus a border
RADIUS = SPRITE / 2 - 4


@lru_cache(maxsize=64)
def background_image(name: str) -> np.ndarray:
    """A real photograph from scikit-image's wheel, or a procedural texture, uint8 [256, 256, 3], muted."""
    if name == "procedural":
        image = np.repeat((_noise(0, 256, 8) * 255).astype(np.uint8)[..., None], 3, axis=2)
    else:
        from pathlib import Path

        import skimage

        folder = Path(skimage.__file__).parent / "data"
        path = next(p for p in (folder / f"{name}.png", folder / f"{name}.jpg") if p.is_file())
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1]
        side = min(image.shape[:2])
        image = cv2.resize(image[:side, :side], (256, 256), interpolation=cv2.INTER_AREA)
    grey = image.mean(axis=2, keepdims=True)
    muted = 90.0 + 0.35 * ((0.4 * image + 0.6 * grey) - grey.mean())  # things stand out, content stays visible
    return np.clip(muted, 0, 255).astype(np.uint8)


def _noise(seed: int, side: int, cells: int) -> np.ndarray:
    """Smooth value noise in [0, 1], [side, side]."""
    coarse = np.random.default_rng(seed).random((cells, cells), dtype=np.float32)
    return np.clip(cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC), 0.0, 1.0)


@lru_cache(maxsize=4096)
def sprite(colour: str, shape: str, texture: int) -> np.ndarray:
    """Premultiplied colour and alpha of a textured shape, float32 [SPRITE, SPRITE, 4], values 0..255 and 0..1."""
    y, x = np.mgrid[0:SPRITE, 0:SPRITE].astype(np.float32) - (SPRITE - 1) / 2
    if shape == "disc":
        inside = x**2 + y**2 <= RADIUS**2
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= 0.84 * RADIUS
    elif shape == "triangle":
        inside = (y <= 0.75 * RADIUS) & (y >= -RADIUS + 1.75 * abs(x))
    elif shape == "cross":
        inside = (np.minimum(abs(x), abs(y)) <= 0.33 * RADIUS) & (np.maximum(abs(x), abs(y)) <= RADIUS)
    else:
        raise ValueError(f"unknown shape {shape!r}")
    alpha = cv2.GaussianBlur(inside.astype(np.float32), (3, 3), 0)
    kind = texture % 3  # value noise, stripes or blotches: none has a rotational symmetry that would hide a spin
    surface = _noise(texture, SPRITE, 5 + texture % 4)
    if kind == 1:
        angle = (texture % 7) * math.pi / 7
        surface = 0.5 + 0.5 * np.sin((x * math.cos(angle) + y * math.sin(angle)) * 0.35 + surface * 3)
    elif kind == 2:
        surface = (surface > 0.5).astype(np.float32)
    light = (0.55 + 0.45 * surface)[..., None] * np.array(COLOURS[colour], dtype=np.float32)
    return np.concatenate([light * alpha[..., None], alpha[..., None]], axis=2)


def thing_matrix(scene: Scene, thing: Thing, t: float) -> np.ndarray:
    """Affine map [3, 3] from sprite pixels to frame pixels at time t in [0, 1]."""
    x, y, angle = thing.pose(t)
    side = min(scene.height, scene.width)
    scale = thing.size * side / RADIUS
    c, s = math.cos(angle) * scale, math.sin(angle) * scale
    half = (SPRITE - 1) / 2
    px, py = x * scene.width - 0.5, y * scene.height - 0.5
    local = np.array([[c, -s, px - c * half + s * half], [s, c, py - s * half - c * half], [0, 0, 1]])
    return camera_matrix(scene, t) @ local


def camera_matrix(scene: Scene, t: float) -> np.ndarray:
    """Affine map [3, 3] from still-camera pixels to frame pixels at time t."""
    zoom, dx, dy = scene.camera.view(t)
    cx, cy = (scene.width - 1) / 2, (scene.height - 1) / 2
    return np.array([[zoom, 0, cx - zoom * cx + dx * scene.width], [0, zoom, cy - zoom * cy + dy * scene.height],
                     [0, 0, 1.0]])


def background_matrix(scene: Scene, t: float) -> np.ndarray:
    """Affine map [3, 3] from background-image pixels to frame pixels at time t; the crop leaves room for a pan."""
    rng = np.random.default_rng(scene.background_seed)
    zoom = max(scene.height, scene.width) / rng.uniform(110.0, 150.0)
    left, top = rng.uniform(256 * 0.2, 256 * 0.3, size=2)
    return camera_matrix(scene, t) @ np.array([[zoom, 0, -left * zoom], [0, zoom, -top * zoom], [0, 0, 1.0]])


def render_frame(scene: Scene, frame: float) -> np.ndarray:
    """Frame number `frame` (may be fractional) as uint8 [H, W, 3] RGB."""
    t, size = scene.time(frame), (scene.width, scene.height)
    image = cv2.warpAffine(background_image(scene.background), background_matrix(scene, t)[:2], size,
                           flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT).astype(np.float32)
    for thing in scene.things:
        drawn = cv2.warpAffine(sprite(thing.colour, thing.shape, thing.texture), thing_matrix(scene, thing, t)[:2], size,
                               flags=cv2.INTER_AREA)
        image = drawn[..., :3] + image * (1.0 - drawn[..., 3:])
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def render_masks(scene: Scene, frame: float) -> np.ndarray:
    """Visible pixels of every thing (things above hide those below), bool [n, H, W]."""
    t, size = scene.time(frame), (scene.width, scene.height)
    masks = np.stack([
        cv2.warpAffine(sprite(thing.colour, thing.shape, thing.texture)[..., 3], thing_matrix(scene, thing, t)[:2], size,
                       flags=cv2.INTER_LINEAR) > 0.5
        for thing in scene.things
    ])
    covered = np.zeros(masks.shape[1:], dtype=bool)
    for n in range(len(masks) - 1, -1, -1):
        masks[n] &= ~covered
        covered |= masks[n]
    return masks


def render_flow(scene: Scene, frame: int) -> np.ndarray:
    """Displacement of each pixel's content from `frame` to `frame + 1`, float32 [H, W, 2] (x, y) in pixels."""
    now, then = scene.time(frame), scene.time(frame + 1)
    y, x = np.mgrid[0:scene.height, 0:scene.width].astype(np.float64)
    points = np.stack([x, y, np.ones_like(x)])

    def displaced(start: np.ndarray, end: np.ndarray) -> np.ndarray:
        moved = np.einsum("ij,jhw->ihw", end @ np.linalg.inv(start), points)
        return (moved - points)[:2].transpose(1, 2, 0)

    flow = displaced(background_matrix(scene, now), background_matrix(scene, then))
    for thing, mask in zip(scene.things, render_masks(scene, frame), strict=True):
        moved = displaced(thing_matrix(scene, thing, now), thing_matrix(scene, thing, then))
        flow = np.where(mask[..., None], moved, flow)
    return flow.astype(np.float32)


def render_clip(scene: Scene) -> np.ndarray:
    """All frames, uint8 [N, H, W, 3]."""
    return np.stack([render_frame(scene, n) for n in range(scene.frames)])
