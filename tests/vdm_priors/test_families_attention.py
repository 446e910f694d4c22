"""One contract for every family: attention as harvested, with memory, and as diffusers' own processors compute it.

The reference is what those hand to PyTorch's attention, without a harvest; softmax is written out row by row. Legend: B
entries, H heads of one layer, T text tokens, L text length, S vision tokens.
"""

from __future__ import annotations

import copy

import pytest
import torch

from tests.vdm_priors.family_contract import (
    SEPARATE, close, entries_of, every_family, latents_of, middle, own_attention, softmax_by_rows, text_of, times_of,
)
from tests.vdm_priors.tiny_families import tiny_family
from tests.vdm_priors.tiny_teacher import random_clip
from vdm_priors.conditioning import MaskedText, join_texts
from vdm_priors.errors import ModelError
from vdm_priors.harvest import HarvestRequest, harvest
from vdm_priors.memory import Streams, reference_memory


@every_family
def test_outputs_are_bit_identical_and_processors_come_back(name):
    teacher, latents, text = tiny_family(name), latents_of(name), text_of(name)
    before = [dict(model.attn_processors) for model in teacher.attention_models]
    request = HarvestRequest(4, torch.tensor([1, 3]), direction="both")
    for level in teacher.schedule(latents.shape).levels(4)[1:]:  # of both stages
        plain = teacher.predict(latents, level.timestep, text)
        with harvest(teacher, request):
            assert torch.equal(teacher.predict(latents, level.timestep, text), plain)
    with (
        pytest.raises(RuntimeError, match="interrupted"), harvest(teacher, request),
        reference_memory(teacher, Streams.of_clips(1, guided=False)),
    ):
        raise RuntimeError("interrupted")
    with pytest.raises(ModelError, match="were asked for, the model has"), harvest(teacher, HarvestRequest(1000)):
        teacher.predict(latents, level.timestep, text)
    for model, processors in zip(teacher.attention_models, before, strict=True):
        after = model.attn_processors
        assert after.keys() == processors.keys() and all(after[key] is processors[key] for key in after)


@every_family
def test_rows_are_the_dense_softmax_and_give_the_modules_own_output(name, monkeypatch):
    teacher, latents, text = tiny_family(name), latents_of(name), text_of(name)
    t = middle(name, latents.shape)
    with own_attention(teacher, monkeypatch) as calls:
        teacher.predict(latents, t, text)
    masks = text.mask if isinstance(text, MaskedText) else torch.ones(text.shape[:2], dtype=torch.bool)
    length, joint_first = masks.shape[1], name.startswith("cogvideox")
    tokens = len(teacher.token_grid(*times_of(name)).valid.flatten())
    request = HarvestRequest(length, torch.arange(tokens), direction="both", head_scope="layer_head")
    with harvest(teacher, request) as found:
        teacher.predict(latents, t, text)
    layers = [layer for layer in teacher.attention_layers if layer.model == 0]
    heads = found.v2v.shape[1] // len(layers)
    assert found.v2v.shape == (2, heads * len(layers), tokens, tokens)
    assert found.t2v.shape == found.v2t.shape == (2, heads * len(layers), length, tokens)
    for place, layer in enumerate(layers):
        of_layer = slice(place * heads, (place + 1) * heads)
        reads = [list(entries_of(calls[0, key])) for key in layer.keys]
        for i, (q, k, v, mask, out) in enumerate(reads[0]):
            p = softmax_by_rows(q, k, mask)
            assert p.std() > 1e-3  # not uniform, or the comparison says little
            real = masks[i].nonzero().flatten()
            v2v, v2t, t2v = (x[i, of_layer].double() for x in (found.v2v, found.v2t, found.t2v))
            if name in SEPARATE:
                close(v2v, p)
                close(v2v @ v.double(), out)
                q, k, v, mask, out = reads[1][i]
                p = softmax_by_rows(q, k, mask).transpose(1, 2)  # [H, L, S]
                close(v2t, p)
                close(t2v[:, real], (p / p.sum(dim=2, keepdim=True))[:, real])
                close(v2t.transpose(1, 2) @ v.double(), out)
                continue
            seen = v.shape[1] - tokens  # Mochi's own call has no padding, the others' have all of it
            columns = real if name == "mochi" else torch.arange(length)
            assert seen == len(columns)
            words, vision = slice(tokens, None), slice(0, tokens)
            if joint_first:
                words, vision = slice(0, seen), slice(seen, None)
            close(v2v, p[:, vision, vision])
            close(v2t[:, columns], p[:, vision, words].transpose(1, 2))
            close(t2v[:, real], p[:, words, vision][:, : len(real)])
            own = v2t[:, columns].transpose(1, 2) @ v.double()[:, words] + v2v @ v.double()[:, vision]
            close(own, out[:, vision])
            if not joint_first:
                close(v2t[:, ~masks[i]], torch.zeros_like(v2t[:, ~masks[i]]))


def test_padding_that_mochi_drops_looks_nowhere():
    """Rows of a shorter text's padding, which the batch's longest text brings into a harvest, by their log-sum-exp."""
    teacher, latents, text = tiny_family("mochi"), latents_of("mochi"), text_of("mochi")
    longest = int(text.mask.sum(dim=1).max())
    with harvest(teacher, HarvestRequest(longest, direction="both")) as found:
        teacher.predict(latents, middle("mochi", latents.shape), text)
    padding = ~text.mask[:, :longest]
    assert padding.any() and not found.t2v.transpose(1, 2)[padding].any()
    assert found.t2v.transpose(1, 2)[~padding].gt(0).all()


@every_family
def test_head_means_layers_and_entries(name):
    teacher, latents, text = tiny_family(name), latents_of(name), text_of(name)
    t, rows = middle(name, latents.shape), torch.tensor([4, 0])
    common = {"text_tokens": 3, "rows": rows, "direction": "both"}
    with (
        harvest(teacher, HarvestRequest(**common)) as mean,
        harvest(teacher, HarvestRequest(**common, head_scope="layer_head")) as each,
        harvest(teacher, HarvestRequest(**common, layers=[1], batch_index=[1])) as last,
    ):
        teacher.predict(latents, t, text)
    assert mean.forwards == each.forwards == last.forwards == 1
    for corner in ("t2v", "v2t", "v2v"):
        heads = getattr(mean, corner).shape[1]
        layers = getattr(each, corner).unflatten(1, (-1, heads))
        assert layers.shape[1] == 2
        torch.testing.assert_close(getattr(mean, corner), layers.mean(1), atol=1e-6, rtol=0)
        torch.testing.assert_close(getattr(last, corner), layers[1:, 1], atol=1e-6, rtol=0)


def test_of_two_stages_the_one_of_the_timestep_is_harvested():
    teacher, latents, text = tiny_family("wan22"), latents_of("wan22"), text_of("wan22")
    names = [layer.name for layer in teacher.attention_layers]
    assert names == ["blocks.0", "blocks.1", "stage 2 blocks.0", "stage 2 blocks.1"]
    request = HarvestRequest(3, torch.tensor([0]), head_scope="layer_head")
    runs = []
    for times in ([900.0], [100.0], [900.0, 100.0]):
        with harvest(teacher, request) as found:
            for t in times:
                teacher.predict(latents, t, text)
        assert found.forwards == len(times)
        runs.append(found.v2v)
    high, low, both = runs
    assert (high - low).abs().max() > 1e-4
    assert torch.equal(both, torch.cat([high, low], dim=1))  # heads of two networks are not one another's
    with harvest(teacher, HarvestRequest(3, layers=[0])) as first:
        teacher.predict(latents, 499.0, text)
    with pytest.raises(ModelError, match="nothing was recorded"):
        _ = first.t2v
    with harvest(teacher, HarvestRequest(3, layers=[0])) as first:
        teacher.predict(latents, 500.0, text)  # the boundary itself belongs to the first stage
    assert first.t2v.isfinite().all()


def test_the_other_vae_of_wan22_joins_more_pixels():
    """That of Wan 2.2 5B: 16 pixels a latent, so 32 a token."""
    from diffusers import AutoencoderKLWan, WanPipeline

    from vdm_priors.families.wan import Wan

    small = tiny_family("wan22")
    vae = AutoencoderKLWan(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, is_residual=True,
        temperal_downsample=[False, True, True], patch_size=2, in_channels=12, out_channels=12,
        scale_factor_spatial=16, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.5, 1.0, 2.0],
    )
    teacher = Wan(WanPipeline(
        tokenizer=small.tokenizer, text_encoder=small.text_encoder, vae=vae, transformer=small.transformer,
        scheduler=small.scheduler, expand_timesteps=True,
    ), small.folder)
    with pytest.raises(ModelError, match="multiples of 32 pixels, not 32×48"):
        teacher.frame_size((32, 48))
    pixels = teacher.prepare_frames(random_clip(5).frames, (32, 64))
    latents = teacher.encode_video(pixels)
    assert latents.shape == (1, 2, 4, 2, 4) and teacher.decode(latents, 5).shape == pixels.shape
    grid = teacher.token_grid([0.0, 1.0, 2.0, 3.0, 4.0], 5.0, (0.0, 0.0, 1.0, 1.0), (32, 64))
    with harvest(teacher, HarvestRequest(2, torch.tensor([0]))) as found:
        assert teacher.predict(latents, 900.0, text_of("wan22", batch=1)).shape == latents.shape
    assert grid.shape == (2, 1, 2) and found.v2v.shape[-1] == 4


@every_family
def test_memory_of_itself_changes_nothing(name):
    """A reference equal to the clip doubles every key: halves of the rows, the same sums and the same output."""
    teacher, latents = tiny_family(name), latents_of(name, batch=1)
    text = text_of(name, batch=1)
    t, twice = middle(name, latents.shape), torch.cat([latents, latents])
    common = {"text_tokens": 3, "rows": torch.tensor([0, 5]), "direction": "both"}
    with harvest(teacher, HarvestRequest(**common)) as plain:
        alone = teacher.predict(latents, t, text)
    with (
        reference_memory(teacher, Streams.of_clips(1, guided=False)),
        harvest(teacher, HarvestRequest(**common)) as summed,
        harvest(teacher, HarvestRequest(**common, memory_columns="own")) as own,
    ):
        together = teacher.predict(twice, t, join_texts([text, text]))
    torch.testing.assert_close(together, torch.cat([alone, alone]), atol=1e-5, rtol=1e-5)
    close = {"atol": 1e-6, "rtol": 1e-5}  # a float32 log-sum-exp is rounded by 2e-7, and of twice the keys otherwise
    torch.testing.assert_close(summed.v2v, plain.v2v, **close)
    torch.testing.assert_close(own.v2v, plain.v2v / 2, **close)
    share = 1 if name in SEPARATE else 2  # of a joint softmax, the reference's text takes half
    torch.testing.assert_close(summed.v2t, plain.v2t / share, **close)
    torch.testing.assert_close(summed.t2v, plain.t2v, **close)


@every_family
def test_memory_of_another_clip_is_seen_and_unchanged(name):
    teacher, latents = tiny_family(name), latents_of(name, batch=3)
    text = join_texts([text_of(name), text_of(name, batch=1)])
    t = middle(name, latents.shape)
    with reference_memory(teacher, Streams.of_clips(1, guided=True)):
        together = teacher.predict(latents, t, text)
    alone = teacher.predict(latents, t, text)
    torch.testing.assert_close(together[2:], alone[2:], atol=1e-5, rtol=1e-5)
    assert (together[:2] - alone[:2]).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-4


@every_family
def test_unknown_processors_are_refused(name):
    teacher = copy.copy(tiny_family(name))
    model = teacher.attention_models[0]
    before = dict(model.attn_processors)
    stranger = type("StrangeProcessor", (), {"__call__": lambda *a, **k: None})()
    model.set_attn_processor({key: stranger for key in before})
    try:
        with pytest.raises(ModelError, match="StrangeProcessor, whose result"), harvest(teacher, HarvestRequest(2)):
            pass
        assert all(processor is stranger for processor in model.attn_processors.values())
    finally:
        model.set_attn_processor(before)
