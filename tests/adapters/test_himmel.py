"""HY-Himmel's adapter in real, small hosts."""

from __future__ import annotations

import pytest
import torch

from tests.adapters.codec_clips import motion_clip
from tests.vlm_hooks.tiny_families import family_student
from vlm_hooks.adapters.himmel import Adapter
from vlm_hooks.adapters.himmel_alignment import Alignment
from vlm_hooks.adapters.himmel_encoder import HimmelConfig
from vlm_hooks.adapters.inputs import picture_clip
from vlm_hooks.adapters.model import AdapterModel
from vlm_hooks.adapters.motion_tensors import frame_inputs

SMALL = dict(rows=2, columns=2, width=8, ssm_blocks=1, ssm_states=2, trunk_width=4, trunk_blocks=1, context=16, steps=3)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "internvl"])
def model(request):
    torch.manual_seed(0)
    return AdapterModel.create(family_student(request.param), Adapter, HimmelConfig(**SMALL)).eval()


def batch(model, clips):
    prompts = [model.student.prompt("What moves?").text] * len(clips)
    return model.student.encode(clips, prompts)


def test_intervals_stand_after_their_anchors(model):
    clip = motion_clip([2, 0, 3])
    segments = [segment for segment, _ in model.student.segments(batch(model, [clip]).inputs, [clip])[0]]
    assert [segment.moving for segment in segments] == [False, True, False, True, False]
    assert [segment.times[0] for segment in segments] == [0, 0.5, 1, 1.5, 2]
    assert [segment.grid.shape for segment in segments if segment.moving] == [(1, 2, 2)] * 2
    assert segments[1].grid.spans.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    "placement, order", [("prefix", [True, True, False, False, False]), ("suffix", [False, False, False, True, True])]
)
def test_intervals_stand_together_in_the_other_placements(model, placement, order):
    adapter, clip = Adapter(HimmelConfig(**SMALL, placement=placement), model.adapter.host), motion_clip([1, 1, 1])
    segments = adapter.plan(clip, (3, 2, 2))
    assert [segment.moving for segment in segments] == order
    assert [segment.times[0] for segment in segments] == sorted(segment.times[0] for segment in segments)


def test_clips_together_give_what_they_give_alone(model):
    clips = [motion_clip([5, 1, 0], seed=1), motion_clip([0, 1], seed=2), motion_clip([2], seed=3)]
    with torch.no_grad():
        inputs = batch(model, clips).inputs
        assert inputs["himmel_intervals"].sum(1).tolist() == [2, 1, 0]
        assert inputs["himmel_steps"].sum(2).tolist() == [[3, 1], [0, 0], [0, 0]]
        together = model(**inputs).logits
        for n, clip in enumerate(clips):
            logits = model(**batch(model, [clip]).inputs).logits[0]
            torch.testing.assert_close(together[n][inputs["attention_mask"][n].bool()], logits, rtol=2e-3, atol=2e-3)


def test_gates_are_readable_of_every_sample(model):
    inputs = batch(model, [motion_clip([2, 1, 0], seed=1), motion_clip([1, 0], seed=2)]).inputs
    gates = model.adapter.gates(inputs)
    assert list(gates) == ["motion", "residual", "context"]
    total = sum(gates.values())
    torch.testing.assert_close(total[inputs["himmel_intervals"]], torch.ones(3))
    assert total[1, 1].isnan()


def test_motion_and_context_reach_the_answer_and_gradients_the_adapter(model):
    inputs = batch(model, [motion_clip([2, 2], seed=4)]).inputs
    output = model(**inputs)
    still = model.adapter.without_motion(inputs)
    assert torch.equal(still["himmel_context"], inputs["himmel_context"])
    assert torch.equal(still["himmel_vectors"][..., 2], inputs["himmel_vectors"][..., 2])
    for changed in (still, {**inputs, "himmel_context": -inputs["himmel_context"]}):
        assert (output.logits[:, -1] - model(**changed).logits[:, -1]).abs().max() > 1e-6
    output.logits[:, -1].square().sum().backward()
    without = {name for name, p in model.adapter.named_parameters() if p.grad is None}
    assert not without
    model.zero_grad()


def test_steps_of_a_long_interval_are_chosen_evenly(model):
    clip = motion_clip([9, 0], unknown=0)
    vectors = model.adapter.inputs([clip])["himmel_vectors"][0, 0, ..., :2]
    expected = torch.from_numpy(clip.motion[0].vectors[[0, 4, 8]]) / 0.25
    torch.testing.assert_close(vectors, expected)


def test_stage_1_aims_at_the_difference_of_the_anchors(model):
    clips = [motion_clip([2, 1, 0], seed=1), motion_clip([1, 0], seed=2)]
    objective, seen = Alignment(model, {}), {}
    objective.loss.register_forward_pre_hook(lambda _module, args: seen.update(target=args[3]))
    result = objective(**objective.batch(clips, []))
    with torch.no_grad():
        frames = model.frame_tokens(frame_inputs(model, clips))
        means = [[frame.reshape(-1, frame.shape[-1]).mean(0) for frame in clip.tokens] for clip in frames]
    expected = [means[0][1] - means[0][0], means[0][2] - means[0][1], means[1][1] - means[1][0]]
    torch.testing.assert_close(seen["target"], torch.stack(expected))
    result["loss"].backward()
    assert all(p.grad is None for p in model.host.parameters())
    assert all(p.grad is not None for p in model.adapter.parameters())  # the head that stays is the projector
    model.zero_grad()


def test_a_picture_is_an_anchor_alone(model):
    inputs = batch(model, [picture_clip(motion_clip([1], seed=5)), motion_clip([2, 0], seed=6)]).inputs
    assert inputs["himmel_intervals"].sum(1).tolist() == [0, 1]
