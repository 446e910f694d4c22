"""Harvested rows against dense softmax, the module's own output, and the untouched model.

Legend: B entries, H heads, T text tokens, L text length, S_v vision tokens.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from tests.vdm_priors.tiny_teacher import generator, tiny_teacher
from vdm_priors import attention_rows
from vdm_priors.attention_rows import probability_chunks
from vdm_priors.errors import ModelError
from vdm_priors.harvest import HarvestRequest, harvest
from vdm_priors.memory import Streams, reference_memory

L, S_V = 16, 48
ROWS = torch.tensor([0, 5, 17, 30, 47])


def inputs(batch: int, seed: int = 0):
    g = generator(seed)
    return torch.randn(batch, 3, 4, 8, 8, generator=g), torch.randn(batch, L, 32, generator=g)


@contextmanager
def seen(teacher):
    """q, k, v and the output of every attention layer, taken beside the harvest by hooks."""
    calls = {}
    hooks = []
    for name, module in teacher.transformer.named_modules():
        if name.endswith("attn1"):
            calls[name] = {}
            store = calls[name]
            hooks += [
                module.norm_q.register_forward_hook(lambda m, i, o, s=store: s.update(q=o.clone())),
                module.norm_k.register_forward_hook(lambda m, i, o, s=store: s.update(k=o.clone())),
                module.to_v.register_forward_hook(lambda m, i, o, s=store: s.update(v=o.clone())),
                module.to_out[0].register_forward_pre_hook(lambda m, i, s=store: s.update(out=i[0])),
            ]
    yield calls
    for hook in hooks:
        hook.remove()


def dense(teacher, call, heads=2):
    """Probabilities [B, H, L+S_v, L+S_v] and v [B, H, L+S_v, d] from the hooks' q, k, v."""
    from diffusers.models.embeddings import apply_rotary_emb

    rotary = teacher._rotary_positions((1, 3, 4, 8, 8))
    q, k = call["q"].clone(), call["k"].clone()
    if rotary is not None:
        q[:, :, L:] = apply_rotary_emb(q[:, :, L:], rotary)
        k[:, :, L:] = apply_rotary_emb(k[:, :, L:], rotary)
    v = call["v"].unflatten(-1, (heads, -1)).transpose(1, 2)
    return (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1), v


@pytest.mark.parametrize("rotary", [True, False])
def test_rows_are_the_dense_softmax(rotary, monkeypatch):
    monkeypatch.setattr(
        attention_rows, "probability_chunks",
        lambda q, k, scale, bias: probability_chunks(q, k, scale, bias, chunk_elements=2 * 2 * 64 * 7),
    )  # seven rows at a time, so that chunks do not divide the rows
    teacher = tiny_teacher(rotary=rotary)
    latents, embeds = inputs(2)
    request = HarvestRequest(6, ROWS, direction="both", head_scope="layer_head")
    with seen(teacher) as calls, harvest(teacher, request) as harvested:
        teacher.predict(latents, 500, embeds)
    p = torch.cat([dense(teacher, call)[0] for call in calls.values()], dim=1)  # 2 layers × 2 heads
    assert p.std() > 1e-3  # not uniform, or the comparison says little
    assert harvested.t2v.shape == (2, 4, 6, S_V) and harvested.v2v.shape == (2, 4, 5, S_V)
    torch.testing.assert_close(harvested.t2v, p[:, :, :6, L:], atol=1e-6, rtol=0)
    torch.testing.assert_close(harvested.v2t, p[:, :, L:, :6].transpose(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(harvested.v2v, p[:, :, L + ROWS, L:], atol=1e-6, rtol=0)


def test_head_scope_head_averages_layers_and_forwards():
    teacher = tiny_teacher()
    request = {"rows": ROWS, "direction": "both"}
    runs = [inputs(2, seed) for seed in (1, 2)]
    with (
        harvest(teacher, HarvestRequest(6, **request)) as per_head,
        harvest(teacher, HarvestRequest(6, **request, head_scope="layer_head")) as per_layer,
        harvest(teacher, HarvestRequest(6, **request, layers=[1])) as last_layer,
    ):
        for latents, embeds in runs:
            teacher.predict(latents, 300, embeds)
    assert per_head.forwards == 2
    for name in ("t2v", "v2t", "v2v"):
        layers = getattr(per_layer, name).unflatten(1, (2, 2))
        torch.testing.assert_close(getattr(per_head, name), layers.mean(1), atol=1e-7, rtol=0)
        torch.testing.assert_close(getattr(last_layer, name), layers[:, 1], atol=1e-7, rtol=0)


def test_probabilities_times_v_are_the_modules_own_output():
    teacher = tiny_teacher()
    latents, embeds = inputs(2)
    request = HarvestRequest(
        L, torch.arange(S_V), direction="both", layers=[1], head_scope="layer_head"
    )
    with seen(teacher) as calls, harvest(teacher, request) as harvested:
        teacher.predict(latents, 500, embeds)
    call = calls["transformer_blocks.1.attn1"]
    _, v = dense(teacher, call)
    rows = torch.cat([harvested.v2t.transpose(2, 3), harvested.v2v], dim=-1)  # all keys of a row
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 2, S_V), atol=1e-5, rtol=0)
    out = (rows @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, call["out"][:, L:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("rotary", [True, False])
def test_outputs_are_bit_identical_and_processors_come_back(rotary):
    teacher = tiny_teacher(rotary=rotary)
    latents, embeds = inputs(3)
    before = dict(teacher.transformer.attn_processors)
    plain = teacher.predict(latents, 700, embeds)
    with harvest(teacher, HarvestRequest(L, ROWS, direction="both")):
        assert torch.equal(teacher.predict(latents, 700, embeds), plain)
    streams = Streams.of_clips(1, guided=True)
    with reference_memory(teacher, streams):
        remembered = teacher.predict(latents, 700, embeds)
        with harvest(teacher, HarvestRequest(4, ROWS, direction="both")):
            assert torch.equal(teacher.predict(latents, 700, embeds), remembered)
    after = teacher.transformer.attn_processors
    assert all(after[name] is processor for name, processor in before.items())


def test_processors_come_back_after_an_error():
    teacher = tiny_teacher()
    before = dict(teacher.transformer.attn_processors)
    with (
        pytest.raises(RuntimeError, match="interrupted"),
        harvest(teacher, HarvestRequest(4)), reference_memory(teacher, Streams.of_clips(1, False)),
    ):
        raise RuntimeError("interrupted")
    with (
        pytest.raises(ModelError, match="20 text tokens"),
        harvest(teacher, HarvestRequest(20)),
    ):
        teacher.predict(*_with_time(inputs(1)))
    after = teacher.transformer.attn_processors
    assert after.keys() == before.keys()
    assert all(after[name] is processor for name, processor in before.items())


def _with_time(pair, t=500):
    return pair[0], t, pair[1]


def test_fused_projections_are_harvested_alike():
    teacher = tiny_teacher(seed=5)
    latents, embeds = inputs(1)
    with harvest(teacher, HarvestRequest(4)) as plain:
        teacher.predict(latents, 500, embeds)
    teacher.transformer.fuse_qkv_projections()
    fused_output = teacher.predict(latents, 500, embeds)
    with harvest(teacher, HarvestRequest(4)) as fused:
        assert torch.equal(teacher.predict(latents, 500, embeds), fused_output)
    teacher.transformer.unfuse_qkv_projections()
    torch.testing.assert_close(fused.t2v, plain.t2v, atol=1e-6, rtol=0)


def test_reference_stream_runs_as_if_alone():
    teacher = tiny_teacher()
    latents, embeds = inputs(6)  # 2 clips: text, negative, reference
    with reference_memory(teacher, Streams.of_clips(2, guided=True)):
        together = teacher.predict(latents, 400, embeds)
    alone = teacher.predict(latents[4:], 400, embeds[4:])
    torch.testing.assert_close(together[4:], alone, atol=2e-6, rtol=0)
    without = teacher.predict(latents[:4], 400, embeds[:4])
    assert (together[:4] - without).abs().max() > 1e-3  # the generated ones do look


def test_memory_rows_are_softmax_over_both_streams():
    """Rows of the guided text (batch_index) in one batch with guidance and references."""
    teacher = tiny_teacher()
    latents, embeds = inputs(6)
    common = {"text_tokens": 6, "rows": ROWS, "direction": "both", "batch_index": [0, 1],
              "layers": [0], "head_scope": "layer_head"}
    with (
        seen(teacher) as calls,
        reference_memory(teacher, Streams.of_clips(2, guided=True)),
        harvest(teacher, HarvestRequest(**common)) as summed,
        harvest(teacher, HarvestRequest(**common, memory_columns="own")) as own,
    ):
        teacher.predict(latents, 400, embeds)
    call = calls["transformer_blocks.0.attn1"]
    from diffusers.models.embeddings import apply_rotary_emb

    rotary = teacher._rotary_positions(latents.shape)
    q, k = call["q"].clone(), call["k"].clone()
    for x in (q, k):
        x[:, :, L:] = apply_rotary_emb(x[:, :, L:], rotary)
    v = call["v"].unflatten(-1, (2, -1)).transpose(1, 2)
    for clip in (0, 1):
        keys = torch.cat([k[clip], k[4 + clip]], dim=1)
        values = torch.cat([v[clip], v[4 + clip]], dim=1)
        p = (q[clip] @ keys.transpose(1, 2) / 4).softmax(-1)  # [H, L+S_v, 2(L+S_v)]
        torch.testing.assert_close(
            (p @ values).transpose(0, 1).flatten(1), call["out"][clip], atol=1e-5, rtol=0
        )
        mine, theirs = p[..., L : L + S_V], p[..., 2 * L + S_V :]
        both = mine + theirs
        torch.testing.assert_close(own.t2v[clip], mine[:, :6], atol=1e-6, rtol=0)
        torch.testing.assert_close(summed.t2v[clip], both[:, :6], atol=1e-6, rtol=0)
        torch.testing.assert_close(own.v2v[clip], mine[:, L + ROWS], atol=1e-6, rtol=0)
        torch.testing.assert_close(summed.v2v[clip], both[:, L + ROWS], atol=1e-6, rtol=0)
        v2t = p[:, L:, :6].transpose(1, 2)
        torch.testing.assert_close(summed.v2t[clip], v2t, atol=1e-6, rtol=0)
        torch.testing.assert_close(own.v2t[clip], v2t, atol=1e-6, rtol=0)


def test_batch_index_picks_entries():
    teacher = tiny_teacher()
    latents, embeds = inputs(3)
    with harvest(teacher, HarvestRequest(4)) as all_entries:
        teacher.predict(latents, 400, embeds)
    with harvest(teacher, HarvestRequest(4, batch_index=[2, 0])) as some:
        teacher.predict(latents, 400, embeds)
    torch.testing.assert_close(some.t2v, all_entries.t2v[[2, 0]], atol=1e-7, rtol=0)
    assert some.v2t is None and some.v2v is None
    with (
        pytest.raises(ModelError, match=r"batch_index \[2\].*2 generated streams"),
        reference_memory(teacher, Streams.of_clips(1, guided=True)),
        harvest(teacher, HarvestRequest(4, batch_index=[2])),
    ):
        teacher.predict(latents, 400, embeds)


def test_nan_is_an_error_that_names_the_layer():
    teacher = tiny_teacher(seed=9)
    weight = teacher.transformer.transformer_blocks[1].attn1.to_k.weight
    kept = weight[0, 0].item()
    weight[0, 0] = float("nan")
    try:
        with (
            pytest.raises(ModelError, match=r"layer transformer_blocks\.1\.attn1.*NaN"),
            harvest(teacher, HarvestRequest(4)),
        ):
            teacher.predict(*_with_time(inputs(1)))
    finally:
        weight[0, 0] = kept


def test_refusals():
    teacher = tiny_teacher()
    with pytest.raises(ValueError, match="direction must be one of t2v, v2t, both"):
        HarvestRequest(4, direction="sideways")
    with (
        pytest.raises(ModelError, match="layers 0 to 1"),
        harvest(teacher, HarvestRequest(4, layers=[2])),
    ):
        pass
    with harvest(teacher, HarvestRequest(4)) as harvested:
        pass
    with pytest.raises(ModelError, match="nothing was recorded"):
        _ = harvested.t2v
    with (
        pytest.raises(ModelError, match="below 48"),
        harvest(teacher, HarvestRequest(4, torch.tensor([48]))),
    ):
        teacher.predict(*_with_time(inputs(1)))
    with (
        pytest.raises(ModelError, match="later forward"),
        harvest(teacher, HarvestRequest(4)),
    ):
        teacher.predict(*_with_time(inputs(1)))
        teacher.predict(*_with_time(inputs(2)))
    with (
        pytest.raises(ModelError, match="batch of 2|batch 2"),
        reference_memory(teacher, Streams.of_clips(1, guided=True)),
    ):
        teacher.predict(*_with_time(inputs(2)))
