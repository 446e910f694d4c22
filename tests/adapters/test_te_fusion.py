"""TE Fusion and its baselines: who sees whom inside the tower, and how groups become frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from enhancer.data.samples import Sample
from tests.vlm_hooks.tiny_families import SAVERS, family_student
from tests.vlm_hooks.tiny_student import make_clip
from vdm_priors.errors import SampleError
from vlm_hooks.adapters.base import HostShape
from vlm_hooks.adapters.model import COUNTS, AdapterModel
from vlm_hooks.adapters.te_fusion import Adapter, Concat, QFormer, TEFusionConfig
from vlm_hooks.adapters.motion_tensors import frame_inputs
from vlm_hooks.adapters.te_fusion_warmup import FrameClassifier
from vlm_hooks.frame_groups import _grouped

QUESTION = "What moves?"


@pytest.fixture(scope="module", params=list(SAVERS))
def student(request):
    return family_student(request.param)


def logits(model, clip):
    inputs = model.student.encode([clip], [model.student.prompt(QUESTION).text]).inputs
    with torch.no_grad():
        return model(**inputs).logits


def tower(model, clip):
    """What the host's tower makes of a clip's frames [T, H, W, D], inside the adapter."""
    inputs = model.student.encode([clip], [model.student.prompt(QUESTION).text]).inputs
    own = {name: inputs[name] for name in (*model.base.PIXELS, COUNTS)}
    with torch.no_grad():
        return model.frame_tokens(own)[0].tokens


def test_a_frame_sees_its_group_and_no_other(student):
    """Changing the last frame of the first group changes both rows of that group, and not a bit of the other."""
    depth = student.frames_per_token()
    clip = make_clip(4 * depth, height=32, width=32)
    changed = make_clip(4 * depth, height=32, width=32)
    changed.frames[2 * depth - 1] = 255 - changed.frames[2 * depth - 1]
    for fusion, seen in (("through", [True, True, False, False]), ("post", [False, True, False, False])):
        model = AdapterModel.create(student, Adapter, TEFusionConfig(k=2, fusion=fusion)).eval()
        before, after = tower(model, clip), tower(model, changed)
        assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == seen, fusion


def test_k_of_one_is_the_stock_host_again_after_another_k(student):
    clip = make_clip(4)
    with torch.no_grad():
        student.prepare_groups(1)
        stock = student.model(**student.encode([clip], [student.prompt(QUESTION).text]).inputs).logits
    AdapterModel.create(student, Adapter, TEFusionConfig(k=2))
    assert torch.equal(logits(AdapterModel.create(student, Adapter, TEFusionConfig(k=1)).eval(), clip), stock)


def test_tokens_and_cells_of_groups(student):
    depth = student.frames_per_token()
    clip = make_clip(4 * depth)
    full = AdapterModel.create(student, Adapter, TEFusionConfig(k=1))
    for fusion in ("through", "pre", "post"):
        model = AdapterModel.create(student, Adapter, TEFusionConfig(k=2, fusion=fusion)).eval()
        assert 2 * model.student.visual_tokens(clip) == full.student.visual_tokens(clip)
        inputs = model.student.encode([clip], [model.student.prompt(QUESTION).text]).inputs
        (grid,), (at,) = model.student.grids(inputs, [clip])
        assert grid.frames == 2 and len(at) == grid.num_tokens
        assert grid.spans[0, 0] == 0 and grid.spans[0, 1] == grid.spans[1, 0] and grid.spans[1, 1] == clip.duration
        assert logits(model, clip).isfinite().all()


def test_the_place_in_a_group_is_told_before_the_first_block(student):
    """Frames of a group exchanged are told apart once the embedding is there, and it begins as nothing."""
    depth = student.frames_per_token()
    clip, model = make_clip(2 * depth), AdapterModel.create(student, Adapter, TEFusionConfig(k=2)).eval()
    plain = AdapterModel.create(student, Adapter, TEFusionConfig(k=2, order=False)).eval()
    assert plain.adapter.order is None and torch.equal(tower(model, clip), tower(plain, clip))
    turned = make_clip(2 * depth)
    turned.frames = np.concatenate([clip.frames[depth:], clip.frames[:depth]])
    torch.testing.assert_close(tower(model, turned), tower(model, clip).flip(0), atol=2e-5, rtol=1e-3)
    with torch.no_grad():
        model.adapter.order.copy_(torch.randn_like(model.adapter.order))
    assert not torch.allclose(tower(model, turned), tower(model, clip).flip(0), atol=1e-2)


def test_attention_in_groups_against_loops():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, 2, 5, 4, generator=generator) for _ in range(3))

    def attend(module, query, key, value, mask, **_):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2), None

    found, _ = _grouped(attend, 3)(None, q, k, v, None)
    for group in range(2):
        for frame in range(3):
            n = 3 * group + frame
            keys = torch.cat([k[3 * group + other] for other in range(3)], dim=1)
            values = torch.cat([v[3 * group + other] for other in range(3)], dim=1)
            weights = (q[n] @ keys.transpose(1, 2) / 2).softmax(-1)
            torch.testing.assert_close(found[n], (weights @ values).transpose(0, 1), atol=1e-5, rtol=1e-4)


def test_compressions_begin_as_the_mean():
    tokens = torch.randn(2, 4, 3, 3, 16)
    for kind in (Concat, QFormer):
        made = kind(TEFusionConfig(k=4, heads=2), 16)
        torch.testing.assert_close(made(tokens), tokens.mean(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("depth", [1, 2])
def test_controls_keep_each_groups_first_frame(depth):
    adapter = Adapter(TEFusionConfig(k=2), HostShape(8, "Host", 8, depth))
    clip, other = make_clip(4 * depth, seed=0), make_clip(4 * depth, seed=1)
    still, exchanged = adapter.still(clip), adapter.exchanged(clip, other)
    for n in range(4 * depth):
        first = n // (2 * depth) * 2 * depth
        assert np.array_equal(still.frames[n], clip.frames[first])
        assert np.array_equal(exchanged.frames[n], (clip if n == first else other).frames[n])
    assert not np.array_equal(clip.frames[1], clip.frames[0])  # the clip itself is as it was


def test_frames_that_do_not_fill_groups_are_refused():
    model = AdapterModel.create(family_student("internvl"), Adapter, TEFusionConfig(k=3))
    with pytest.raises(SampleError, match="4 frames, which do not fill groups of 3"):
        model.student.encode([make_clip(4)], [model.student.prompt(QUESTION).text])


def test_the_warm_up_reads_the_mean_of_each_clips_own_tokens():
    """Against loops, clip by clip; its gradient reaches the places in a group, the compression and the tower."""
    torch.manual_seed(0)
    model = AdapterModel.create(family_student("internvl"), Adapter, TEFusionConfig(k=2))
    clips, labels = [make_clip(4), make_clip(2)], {"a": ["left"], "b": ["left", "rests"]}
    clips[1].frames = 255 - clips[1].frames
    objective = FrameClassifier(model, labels)
    result = objective(**objective.batch(clips, [Sample(name, Path(name), "", "") for name in labels]))
    losses = []
    for clip, target in zip(clips, ([1.0, 0.0], [0.5, 0.5]), strict=True):
        with torch.no_grad():
            tokens = model.visual_tokens(**frame_inputs(model, [clip])).frames[0].tokens
            mean = tokens.reshape(-1, tokens.shape[-1]).mean(0)
            scores = objective.head((mean - mean.mean()) / (mean.var(correction=0) + 1e-5).sqrt()).log_softmax(-1)
        losses.append(-(torch.tensor(target) * scores).sum())
    torch.testing.assert_close(result["loss"], torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)
    result["loss"].backward()
    patches = model.host.get_submodule(model.base.PATCH_EMBEDDING).parameters()
    for parameter in (model.adapter.order, *model.adapter.compress.parameters(), *patches):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
