"""The embedded world: seeded motion clips with ground truth, as real H.264 files."""

from enhancer.world.make import WorldSettings, make_world
from enhancer.world.truth import WorldTruth, load_truth

__all__ = ["WorldSettings", "WorldTruth", "load_truth", "make_world"]
