"""What a clip of the embedded world shows: things with shapes, colours and motions, seen by a camera.

A scene is plain data. Everything else (frames, masks, flow, evidence) is a function of it, so ground truth is never
stored but computed again. Lengths are fractions of the frame's shorter side, times run from 0 to 1 over the clip.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

import numpy as np

COLOURS = {
    "red": (225, 45, 40), "green": (50, 190, 60), "blue": (55, 90, 235),
    "yellow": (240, 215, 40), "purple": (165, 60, 205), "cyan": (40, 210, 215),
}
SHAPES = ("disc", "square", "triangle", "cross")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
MOTIONS = ("rest", "slide", "curve", "spin", "bounce", "jump", "turn", "stop")
JUMPING = 0.93  # share of a clip in which the hops are done: 8 or 9 sampled frames then tell every number of hops apart
CAMERAS = ("still", "left", "right", "up", "down", "in", "out")


@dataclass(frozen=True)
class Motion:
    """How a thing moves.

    kind: rest | slide (straight) | curve (arc) | spin (in place) | bounce (to an obstacle and back) | jump (`count`
    hops) | turn (first one way, then another) | stop (moves in the first half only).
    directions: words of DIRECTIONS; one, or two for `turn`. reach: path length. count: hops. clockwise: for curve, spin.
    """

    kind: str = "rest"
    directions: tuple[str, ...] = ()
    reach: float = 0.0
    count: int = 1
    clockwise: bool = True

    def offset(self, t: float) -> tuple[float, float, float]:
        """Displacement (x, y) from the path's origin and rotation in radians at time t in [0, 1]."""
        turn = 1.0 if self.clockwise else -1.0
        if self.kind == "rest":
            return 0.0, 0.0, 0.0
        if self.kind == "spin":
            return 0.0, 0.0, turn * 1.5 * math.pi * t
        if self.kind == "jump":
            hops = self.count * min(t / JUMPING, 1.0)
            return 0.0, -self.reach * abs(math.sin(math.pi * hops)), 0.0
        dx, dy = DIRECTIONS[self.directions[0]]
        if self.kind == "slide":
            return dx * self.reach * t, dy * self.reach * t, 0.0
        if self.kind == "stop":
            way = min(2.0 * t, 1.0)
            return dx * self.reach * way, dy * self.reach * way, 0.0
        if self.kind == "bounce":
            way = 1.0 - abs(2.0 * t - 1.0)
            return dx * self.reach * way, dy * self.reach * way, 0.0
        if self.kind == "turn":
            ex, ey = DIRECTIONS[self.directions[1]]
            first, second = min(2.0 * t, 1.0), max(2.0 * t - 1.0, 0.0)
            return (dx * first + ex * second) * self.reach, (dy * first + ey * second) * self.reach, 0.0
        angle = turn * math.pi * t  # curve: half a circle whose first tangent is the direction
        radius = self.reach / 2.0
        along, aside = math.sin(angle) * turn, (1.0 - math.cos(angle)) * turn
        return radius * (dx * along - dy * aside), radius * (dy * along + dx * aside), 0.0


@dataclass(frozen=True)
class Thing:
    """A textured shape. origin: its centre (x, y) at time 0; size: radius; texture: seed of its surface; tilt: its
    rotation at time 0 in radians, so that one frame does not tell what has turned."""

    colour: str
    shape: str
    origin: tuple[float, float]
    size: float
    texture: int
    motion: Motion = field(default_factory=Motion)
    tilt: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def pose(self, t: float) -> tuple[float, float, float]:
        """Centre x, y (fractions of the frame) and rotation (radians) at time t in [0, 1]."""
        dx, dy, angle = self.motion.offset(t)
        return self.origin[0] + dx, self.origin[1] + dy, self.tilt + angle


@dataclass(frozen=True)
class Camera:
    """still | left | right | up | down (a pan: content moves the other way) | in | out (zoom by 1 + amount)."""

    kind: str = "still"
    amount: float = 0.0

    def view(self, t: float) -> tuple[float, float, float]:
        """Scale about the frame's centre and content shift (x, y) at time t in [0, 1]."""
        if self.kind == "in":
            return 1.0 + self.amount * t, 0.0, 0.0
        if self.kind == "out":
            return 1.0 + self.amount * (1.0 - t), 0.0, 0.0
        if self.kind == "still":
            return 1.0, 0.0, 0.0
        dx, dy = DIRECTIONS[self.kind]
        return 1.0, -dx * self.amount * (t - 0.5), -dy * self.amount * (t - 0.5)


@dataclass(frozen=True)
class Scene:
    """One clip. height, width in pixels; frames; fps; background: (image name, crop seed); split names the look."""

    things: tuple[Thing, ...]
    camera: Camera = field(default_factory=Camera)
    background: str = "procedural"
    background_seed: int = 0
    height: int = 64
    width: int = 64
    frames: int = 17
    fps: float = 8.0

    def time(self, frame: float) -> float:
        """Frame index (may be fractional) to clip time in [0, 1]."""
        return frame / max(self.frames - 1, 1)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Scene:
        things = tuple(
            Thing(**{**thing, "origin": tuple(thing["origin"]),
                     "motion": Motion(**{**thing["motion"], "directions": tuple(thing["motion"]["directions"])})})
            for thing in data["things"]
        )
        return cls(**{**data, "things": things, "camera": Camera(**data["camera"])})


def place_motion(rng: np.random.Generator, motion: Motion, margin: float = -0.04) -> tuple[float, float]:
    """Draw an origin, uniform over all those that keep the thing at least half visible all the time.

    Uniform over a box larger than the frame (margin < 0), so that one frame's position says little about the motion: a
    thing near the left edge may be about to leave as well as to come in.
    """
    path = np.array([motion.offset(t)[:2] for t in np.linspace(0.0, 1.0, 33)])
    low, high = margin - path.min(axis=0), 1.0 - margin - path.max(axis=0)
    if (high < low).any():
        raise ValueError(f"a {motion.kind} of reach {motion.reach} does not fit into a frame with margin {margin}")
    x, y = rng.uniform(low, high)
    return float(x), float(y)
