"""Token accounting with the papers' numbers: what CoPE-VideoLM and HY-Himmel claim, on their own terms."""

from __future__ import annotations

import numpy as np
import pytest

from enhancer.adapters.gop_clips import anchored_clip, keyed_clip
from enhancer.adapters.gops import Gop, plan_gops
from enhancer.jobs import load_recipe
from tests.adapters.codec_clips import motion_clip
from tests.adapters.test_preprocess import gop_clip
from tests.vlm_hooks.tiny_families import family_student
from vlm_hooks.adapters.base import HostShape
from vlm_hooks.adapters.cope import Adapter as CoPE
from vlm_hooks.adapters.cope_encoder import CoPEConfig
from vlm_hooks.adapters.himmel import Adapter as Himmel
from vlm_hooks.adapters.himmel_encoder import HimmelConfig
from vlm_hooks.adapters.model import AdapterModel, host_shape


def gops(count: int, steps: int = 7, seconds: float = 8.0) -> list[Gop]:
    """So many GOPs of the paper's: a key picture and 7 steps in 8 seconds, of 16 × 16 pixels."""
    return [
        Gop(
            n,
            n * seconds + np.arange(steps + 1) * seconds / (steps + 1),
            (n + 1) * seconds,
            np.zeros((steps + 1, 16, 16, 3), np.uint8),
            np.zeros((steps, 2, 2, 2), np.float32),
            np.ones((steps, 2, 2), bool),
            np.zeros((steps, 16, 16, 3), np.int16),
            "native",
        )
        for n in range(count)
    ]


def tokens_of(adapter, clip, frame: tuple[int, int]) -> int:
    """Visual tokens of a clip on a host with so many rows and columns of tokens a frame."""
    return sum(segment.num_tokens for segment in adapter.plan(clip, (len(clip.frames), *frame)))


@pytest.fixture
def plan(tmp_path):
    return plan_gops(gop_clip(tmp_path, frames=4, keyint=2))


SMALL = dict(width=12, trunk_width=4, trunk_blocks=1)


def test_copes_tokens_are_those_of_its_tables(plan):
    """M = 210 tokens a frame (section G.5), N = 8: Table G.4 has 1680 tokens a GOP with 8 key frames.

    With 4 it has 876, where 4 · 210 + 4 · 8 is 872: four more, of which the paper says nothing.
    """
    cope = CoPE(CoPEConfig(**SMALL, layers=1, heads=3), HostShape(16, "Host"))
    frame = (14, 15)
    per_gop = {keys: tokens_of(cope, keyed_clip(gops(1), plan, 30, keys), frame) for keys in (1, 2, 4, 8)}
    assert per_gop == {1: 210 + 7 * 8, 2: 2 * 210 + 6 * 8, 4: 4 * 210 + 4 * 8, 8: 1680}
    # Table 1, PerceptionTest: videos of 23 s on average against 64 key frames whatever the length; 93% fewer
    clip = keyed_clip(gops(3), plan, 30, 1)
    assert 1 - tokens_of(cope, clip, frame) / (64 * 210) > 0.93
    # against the same 8 pictures a GOP as frames, it is 84%: what one Δ-token for 26 of a frame's gives
    assert 1 - per_gop[1] / per_gop[8] == pytest.approx(0.842, abs=1e-3)


def test_himmels_tokens_are_3_6_times_fewer_than_32_frames(plan):
    """1.4 k tokens a frame (section 1): 44.7 k of 32 frames against 12.2 k (Table 1)."""
    himmel = Himmel(HimmelConfig(**SMALL, ssm_blocks=1), HostShape(16, "Host"))
    frame = (37, 38)
    tokens = tokens_of(himmel, anchored_clip(gops(8), plan, 30, anchors=8), frame)
    assert tokens == 8 * 37 * 38 + 7 * 64
    assert 32 * 37 * 38 / tokens >= 3.6


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_the_sequence_has_as_many_visual_tokens_as_the_plan_says(family):
    host = family_student(family)
    model = AdapterModel(host, CoPE(CoPEConfig(**SMALL, layers=1, heads=3), host_shape(host)))
    clip = motion_clip([2, 3])
    inputs = model.student.encode([clip], [model.student.prompt("What moves?").text]).inputs
    ids = [model.token_ids["<|motion_pad|>"], model.student.tokenizer.convert_tokens_to_ids(model.base.frame_token)]
    assert sum(int((inputs["input_ids"] == token).sum()) for token in ids) == model.student.visual_tokens(clip)
    assert int((inputs["input_ids"] == ids[0]).sum()) == 5 * 8


@pytest.mark.parametrize("name", ["cope/world", "cope/llava_onevision_7b", "himmel/world", "himmel/qwen2_5_vl_7b"])
def test_recipes_are_whole_and_the_large_ones_have_the_papers_sizes(name):
    recipe = load_recipe(f"adapters/{name}").recipe
    config = recipe.config()
    assert [stage.objective for stage in recipe.stages] == [
        {"cope": "pretraining", "himmel": "alignment"}[recipe.adapter],
        "answer",
    ]
    if name == "cope/llava_onevision_7b":
        assert (config.tokens, config.layers, config.heads, recipe.reading.fuse, recipe.reading.key_interval) == (
            8,
            4,
            9,
            30,
            240,
        )
    if name == "himmel/qwen2_5_vl_7b":
        lora = recipe.stages[1].training.lora
        assert (config.anchors, config.tokens, lora.rank, lora.alpha, len(lora.targets)) == (8, 64, 32, 64, 7)
    assert recipe.reading.pictures == (recipe.adapter == "cope")  # what pre-training compares with
    if recipe.adapter == "himmel":
        assert recipe.reading.anchors == config.anchors and recipe.reading.clips == "anchored"
