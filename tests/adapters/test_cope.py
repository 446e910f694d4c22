"""CoPE-VideoLM's adapter in real, small hosts."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from tests.adapters.codec_clips import motion_clip
from tests.vlm_hooks.tiny_families import family_student
from vdm_priors.errors import SampleError
from vlm_hooks.adapters.cope import Adapter
from vlm_hooks.adapters.cope_encoder import CoPEConfig
from vlm_hooks.adapters.cope_pretraining import Pretraining
from vlm_hooks.adapters.inputs import picture_clip
from vlm_hooks.adapters.model import AdapterModel, host_shape
from vlm_hooks.adapters.motion_tensors import frame_inputs

CONFIG = CoPEConfig(motion_tokens=2, residual_tokens=1, width=16, layers=1, heads=2, trunk_width=4, trunk_blocks=1)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "internvl"])
def model(request):
    torch.manual_seed(0)
    return AdapterModel.create(family_student(request.param), Adapter, CONFIG).eval()


def batch(model, clips):
    prompts = [model.student.prompt("What moves?").text] * len(clips)
    return model.student.encode(clips, prompts)


def test_the_stream_is_interleaved_in_the_order_of_time(model):
    clip = motion_clip([2, 0, 1])
    encoding = batch(model, [clip])
    segments = model.student.segments(encoding.inputs, [clip])[0]
    assert [segment.moving for segment, _ in segments] == [False, True, True, False, False, True]
    assert [segment.times[0] for segment, _ in segments] == pytest.approx([0, 1 / 3, 2 / 3, 1, 2, 2.5])
    positions = torch.cat([positions for _, positions in segments])
    assert (positions.diff() > 0).all()
    for segment, _ in segments:
        assert segment.num_tokens == (3 if segment.moving else segments[0][0].num_tokens)
        start, end = segment.grid.spans[0, 0], segment.grid.spans[-1, 1]
        assert end == segment.times[0] if segment.moving else start == segment.times[0]


def test_placeholders_become_the_delta_tokens_of_their_own_clip(model):
    clips = [motion_clip([2, 1], seed=1), motion_clip([0, 1], seed=2)]
    inputs = batch(model, clips).inputs
    seen = []
    handle = (
        model.host.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda _module, args, named: seen.append(args[0] if args else named["hidden_states"]), with_kwargs=True
        )
    )
    with torch.no_grad():
        own, _ = model._split(dict(inputs))
        tokens = model.visual_tokens(**own)
        model(**inputs)
    handle.remove()
    for row, clip in enumerate(clips):
        at = torch.cat([p for segment, p in model.student.segments(inputs, clips)[row] if segment.moving])
        torch.testing.assert_close(seen[0][row, at], tokens.motion[row])
    assert [len(clip) for clip in tokens.motion] == [9, 3]
    values, known = inputs["cope_vectors"], inputs["cope_known"]
    assert known.sum(1).tolist() == [3, 1]
    one = model.adapter.delta(values[1, :1], inputs["cope_errors"][1, :1])[0]
    torch.testing.assert_close(tokens.motion[1], one, rtol=1e-4, atol=1e-5)


def test_clips_together_give_what_they_give_alone(model):
    clips = [motion_clip([2, 1], seed=1), motion_clip([0, 1], seed=2), motion_clip([0, 0], seed=3)]
    with torch.no_grad():
        inputs = batch(model, clips).inputs
        together = model(**inputs).logits
        for n, clip in enumerate(clips):
            alone = batch(model, [clip]).inputs
            logits = model(**alone).logits[0]
            torch.testing.assert_close(together[n][inputs["attention_mask"][n].bool()], logits, rtol=2e-3, atol=2e-3)


def test_motion_reaches_the_answer_and_its_gradient_the_encoder(model):
    clip = motion_clip([2], seed=4)
    inputs = batch(model, [clip]).inputs
    still = model.adapter.without_motion(inputs)
    assert not still["cope_vectors"][..., :2].any() and torch.equal(
        still["cope_vectors"][..., 2], inputs["cope_vectors"][..., 2]
    )
    output = model(**inputs)
    assert (output.logits[:, -1] - model(**still).logits[:, -1]).abs().max() > 1e-5
    output.logits[:, -1].square().sum().backward()
    assert all(p.grad is not None for p in model.adapter.parameters())
    model.zero_grad()
    assert sorted(p.numel() for part in model.adapter.parts().values() for p in part) == sorted(
        p.numel() for p in model.adapter.parameters()
    )


def test_vectors_by_the_clips_own_largest():
    adapter = Adapter(CoPEConfig(**{**CONFIG.to_dict(), "normalise": "clip"}), host_shape(family_student("qwen2_5_vl")))
    vectors = adapter.inputs([motion_clip([2, 1], seed=1), motion_clip([0], seed=2)])["cope_vectors"]
    assert vectors[0, ..., :2].abs().max() == 1 and vectors.shape[:2] == (2, 3)
    assert vectors[0, 0, ..., :2].abs().max() != vectors[0, 1, ..., :2].abs().max()  # of the clip, not of each frame


def test_pretraining_compares_each_p_frame_with_its_own_picture(model):
    clips = [motion_clip([2, 0], seed=1), motion_clip([1], seed=2)]
    objective = Pretraining(model, {})
    batch = objective.batch(clips, [])
    assert batch["cope_moving"].tolist() == [[False, True, True, False], [False, True, False, False]]
    result = objective(**batch)
    squares = []
    for clip in clips:
        every = [
            np.concatenate([key[None], motion.pictures if motion.pictures is not None else key[None][:0]])
            for key, motion in zip(clip.frames, clip.motion, strict=True)
        ]
        shown = copy.copy(clip)
        shown.frames, shown.times = np.concatenate(every), list(range(len(np.concatenate(every))))
        with torch.no_grad():
            tokens = model.frame_tokens(frame_inputs(model, [shown]))[0].tokens
        for n in range(1, len(clip.motion[0].times) + 1):
            squares.append((tokens[n] - tokens[n - 1]).square().mean())
    torch.testing.assert_close(result["loss"], torch.stack(squares).mean(), rtol=1e-3, atol=1e-5)
    assert {"recall1", "recall1_frame", "recall5", "of_copying"} <= set(result)
    result["loss"].backward()
    assert objective.head.out.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.host.parameters())
    model.zero_grad()
    with pytest.raises(SampleError, match="set reading.pictures to true"):
        objective.batch([without_pictures(clips[0])], [])


def without_pictures(clip):
    for motion in clip.motion:
        motion.pictures = None
    return clip


def test_a_picture_is_a_key_frame_alone_and_vectors_need_residuals(model):
    picture, video = picture_clip(motion_clip([1], seed=5)), motion_clip([2], seed=6)
    inputs = batch(model, [picture, video]).inputs
    assert inputs["cope_known"].sum(1).tolist() == [0, 2]
    video.motion[0].residuals = None
    with pytest.raises(SampleError, match="no residuals"):
        batch(model, [video])
