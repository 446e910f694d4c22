"""EMA: motion encoder, fusions, pooling, and its warm-up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.adapters.codec_clips import motion_clip
from tests.vlm_hooks.tiny_families import family_student
from vdm_priors.errors import SampleError
from vlm_hooks.adapters.base import HostShape
from vlm_hooks.adapters.ema import Adapter, EMAConfig
from vlm_hooks.adapters.ema_warmup import MotionClassifier
from vlm_hooks.adapters.inputs import picture_clip
from vlm_hooks.adapters.model import AdapterModel
from vlm_hooks.streams import FrameTokens

HOST = HostShape(24, "Host")
SMALL = {"width": 16, "heads": 2, "fusion_heads": 2, "cells": 4, "patch": 2, "pooling": 1, "layers": 1}


def adapter(seed: int = 0, **settings) -> Adapter:
    torch.manual_seed(seed)
    made = Adapter(EMAConfig(**{**SMALL, **settings}), HOST).eval()
    with torch.no_grad():  # the last layer begins as zero
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def frames(counts, side=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [FrameTokens(torch.randn(count, side, side, HOST.hidden, generator=generator)) for count in counts]


@pytest.mark.parametrize("fusion", ["crossattn", "add", "concat", "none"])
@pytest.mark.parametrize("aggregate", [True, False])
def test_an_untrained_fusion_leaves_frames_as_they_are(fusion, aggregate):
    made = Adapter(EMAConfig(**SMALL, fusion=fusion, aggregate=aggregate), HOST)
    given = frames([2])
    assert torch.equal(made(given, **made.inputs([motion_clip([2, 3])])).frames[0].tokens, given[0].tokens)
    assert made(given, **made.inputs([motion_clip([2, 3])])).motion is None


@pytest.mark.parametrize("fusion", ["crossattn", "add", "concat"])
@pytest.mark.parametrize("aggregate", [True, False])
def test_a_clip_does_not_depend_on_the_others_of_its_batch(fusion, aggregate):
    """Others have more GOPs and more fields: what is padded takes no part."""
    made, clips = (
        adapter(fusion=fusion, aggregate=aggregate),
        [motion_clip([1, 2], seed=1), motion_clip([3, 2, 4], seed=2)],
    )
    given = frames([2, 3])
    both = made(given, **made.inputs(clips)).frames
    for n in range(2):
        alone = made(given[n : n + 1], **made.inputs(clips[n : n + 1])).frames[0].tokens
        torch.testing.assert_close(both[n].tokens, alone, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(alone, given[n].tokens, atol=1e-3)


@pytest.mark.parametrize("position,told", [("pre", True), ("post", False), ("none", False)])
def test_the_order_of_fields_is_told_before_the_encoder_alone(position, told):
    """Averaged over time, features whose place is added after the encoder say nothing of the order (Table 4)."""
    made, clip, given = adapter(position=position), motion_clip([4]), frames([1])
    forward = made(given, **made.inputs([clip])).frames[0].tokens
    clip.motion[0].vectors = clip.motion[0].vectors[::-1].copy()
    assert torch.allclose(forward, made(given, **made.inputs([clip])).frames[0].tokens, atol=1e-5) != told


def test_encoder_of_each_field_and_mean_against_loops():
    """Eq. 6 and 7: each field for itself, then the mean over those that there are."""
    made, clip = adapter(layers=2), motion_clip([1, 3])
    inputs = made.inputs([clip])
    features, there = made.motion(inputs["ema_vectors"][0], inputs["ema_fields"][0])
    mean = made.fusion.pooled(features, there, (2, 2))
    for gop, count in enumerate([1, 3]):
        total = torch.zeros(4, made.config.width)
        for moment in range(count):
            maps = inputs["ema_vectors"][0, gop, moment]
            patches = [maps[:, r : r + 2, c : c + 2] for r in (0, 2) for c in (0, 2)]
            x = torch.stack(
                [(made.motion.project.weight * patch).sum((1, 2, 3)) + made.motion.project.bias for patch in patches]
            )
            total += made.motion.norm(made.motion.layers((x + made.motion.place + made.motion.time[moment])[None])[0])
        torch.testing.assert_close(mean[gop].flatten(0, 1), total / count, atol=1e-5, rtol=1e-4)
    assert there.tolist() == [[True, False, False], [True, True, True]]


def test_maps_hold_vectors_and_what_is_known():
    made, clip = adapter(cells=4, scale=10.0), motion_clip([1], unknown=0.0)
    clip.motion[0].vectors[0, 1, 2] = np.nan
    maps = made.inputs([clip])["ema_vectors"][0, 0, 0]
    assert maps[:, 1, 2].tolist() == [0, 0, 0] and maps[2].sum() == 15
    np.testing.assert_allclose(maps[:2, 3, 0], 10 * clip.motion[0].vectors[0, 3, 0], rtol=1e-6)
    assert torch.equal(adapter(cells=8).inputs([clip])["ema_vectors"][0, 0, 0, 2, ::2, ::2], maps[2])  # each cell twice
    made = adapter(cells=96, patch=7)
    assert made.motion(**{"vectors": torch.zeros(1, 1, 3, 96, 96), "fields": torch.ones(1)})[0].shape == (1, 1, 196, 16)


def test_a_picture_is_a_gop_of_known_rest():
    """Section 3.4: "a single GOP, with a blank motion vector indicating no motion"."""
    made, clip = adapter(), picture_clip(motion_clip([2, 3]))
    inputs = made.inputs([clip])
    assert inputs["ema_fields"].tolist() == [[1]]
    assert (inputs["ema_vectors"][0, 0, 0, :2] == 0).all() and (inputs["ema_vectors"][0, 0, 0, 2] == 1).all()
    assert len(made.plan(clip, (1, 4, 4))) == 1


def test_motion_taken_away_is_rest_where_it_was_known():
    made, clip = adapter(), motion_clip([3, 2])
    inputs = made.inputs([clip])
    still = made.without_motion(inputs)
    assert (still["ema_vectors"][:, :, :, :2] == 0).all() and inputs["ema_vectors"].abs().sum() > 0
    assert torch.equal(still["ema_vectors"][:, :, :, 2], inputs["ema_vectors"][:, :, :, 2])
    other = made.exchanged(clip, motion_clip([3, 2], seed=5))
    assert other.frames is clip.frames and not np.array_equal(other.motion[0].vectors, clip.motion[0].vectors)
    assert other.motion[0].times is clip.motion[0].times


def test_fields_are_chosen_evenly():
    made, clip = adapter(vectors=3), motion_clip([9], unknown=0.0)
    maps = made.inputs([clip])["ema_vectors"][0, 0]
    assert maps.shape[0] == 3
    np.testing.assert_allclose(
        maps[:, 0, 0, 0], made.config.scale * clip.motion[0].vectors[[0, 4, 8], 0, 0, 0], rtol=1e-6
    )


@pytest.mark.parametrize("kernel,tokens", [(1, 729), (2, 196), (3, 81), (4, 49)])
def test_pooling_of_table_7(kernel, tokens):
    made = adapter(pooling=kernel)
    (segment,) = made.plan(motion_clip([1]), (1, 27, 27))
    assert segment.num_tokens == tokens
    pooled = made(frames([1], side=27), **made.inputs([motion_clip([1])])).frames[0].tokens
    assert pooled.shape[1] * pooled.shape[2] == tokens


def test_a_gop_lasts_to_the_next_and_has_a_prompt():
    clip = motion_clip([1, 2])
    first, second = adapter(prompt="Segment {number} ({time} s): ").plan(clip, (2, 4, 4))
    assert (first.label, second.label) == ("Segment 1 (0.0 s): ", "Segment 2 (1.0 s): ")
    assert first.grid.spans.tolist() == [[0.0, 1.0]] and second.times == (1.0,)
    assert adapter(prompt="").plan(clip, (2, 4, 4))[0].label is None


@pytest.mark.parametrize("layers", [0, 4])
def test_the_motion_encoder_may_have_no_layer_or_many(layers):
    made = adapter(layers=layers)
    assert made(frames([1]), **made.inputs([motion_clip([2])])).frames[0].tokens.isfinite().all()


def test_warm_up_learns_actions_from_vectors_alone():
    """Its loss falls, it reads no frame, and it touches the motion encoder alone."""
    torch.manual_seed(0)
    model = AdapterModel.create(family_student("internvl"), Adapter, EMAConfig(**SMALL))
    clips = []
    for n in range(8):
        clip = motion_clip([2, 2], seed=n)
        for motion in clip.motion:
            motion.vectors[..., 0] = 0.05 if n % 2 else -0.05
        clips.append(clip)
    samples = [type("Sample", (), {"id": str(n)}) for n in range(8)]
    objective = MotionClassifier(model, {str(n): ["right" if n % 2 else "left"] for n in range(8)})
    batch = objective.batch(clips, samples)
    assert set(batch) == {*Adapter.INPUTS, "targets"} and batch["targets"].sum(1).tolist() == [1.0] * 8
    trained = [*model.adapter.parts()["motion"], *objective.head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(12):
        found = objective(**batch)
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        losses.append(float(found["loss"].detach()))
    assert losses[-1] < 0.3 * losses[0] and found["accuracy"] == 1
    assert all(p.grad is None for p in [*model.host.parameters(), *model.adapter.parts()["fusion"]])
    several = MotionClassifier(model, {"a": ["left", "still"], "b": ["left"]})
    assert several.batch(clips[:2], [type("S", (), {"id": "a"}), type("S", (), {"id": "b"})])["targets"].tolist() == [
        [0.5, 0.5],
        [1, 0],
    ]
    with pytest.raises(SampleError, match="two classes"):
        MotionClassifier(model, {"a": ["left"]})
