"""Keys and values that the inversion leaves: against diffusers' own calls, and against a reference stream."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

import vdm_priors.forwards
from tests.vdm_priors.family_contract import (
    entries_of, every_family, latents_of, own_attention, softmax_by_rows, text_of,
)
from tests.vdm_priors.tiny_families import FRAMES, SIZE, tiny_family
from tests.vdm_priors.tiny_teacher import generator, random_clip, tiny_teacher
from vdm_priors.conditioning import join_texts, repeat_text
from vdm_priors.errors import ModelError, RecipeError
from vdm_priors.estimate import estimate
from vdm_priors.extract import ExtractionSettings, extract_priors
from vdm_priors.harvest import HarvestRequest, harvest
from vdm_priors.inversion import invert, reconstruct
from vdm_priors.kept_memory import KeptLayer, KeptPath, KeptStreams
from vdm_priors.memory import Streams, attend, reference_memory

KEPT = ExtractionSettings(steps=2, memory_from="inversion", rows=4, reconstruction=False)
TEXT = "the red ball moves left"
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def walked(name, steps=2, clips=2):
    """A teacher, clips' way to noise in its own text, and what was kept of it."""
    teacher, path = tiny_family(name), KeptPath()
    empty = repeat_text(teacher.encode_text([""])[0], clips)
    return teacher, invert(teacher, latents_of(name, batch=clips), empty, steps, kept=path), path


@every_family
def test_what_is_kept_is_what_diffusers_attention_is_called_with(name, monkeypatch):
    teacher, trajectory, path = walked(name)
    layers = [(layer.model, layer.keys[0]) for layer in teacher.attention_layers]  # self-attention, where text is apart
    if name == "wan22":  # each step is one transformer's
        assert len(path.layers) == len(layers)
    else:
        assert set(path.layers) == {(step, layer) for step in range(2) for layer in layers}
    for step, t in enumerate(trajectory.timesteps):
        with own_attention(teacher, monkeypatch) as calls:
            teacher.predict(trajectory.latents[step], t, trajectory.embeds)
        for layer in layers:
            if (step, layer) not in path.layers:
                assert layer not in calls
                continue
            kept, reads = path.layers[step, layer], list(entries_of(calls[layer]))
            assert len(reads) == len(kept.k_bhsd) == 2
            for i, (_, k, v, mask, _) in enumerate(reads):
                seen = slice(None)
                if name == "mochi":  # whose call leaves padding out
                    seen = kept.mask_b11s[i, 0, 0]
                elif mask is not None:
                    assert torch.equal(kept.mask_b11s[i], mask)
                assert torch.equal(kept.k_bhsd[i][:, seen], k) and torch.equal(kept.v_bhsd[i][:, seen], v)


@every_family
@pytest.mark.parametrize("passes", [1, 2])
def test_kept_keys_are_a_reference_stream_at_the_same_forward(name, passes):
    """The stream is given the latent that the inversion's forward read: outputs and maps agree, in every step."""
    teacher, trajectory, path = walked(name)
    text, b = join_texts([text_of(name)] * passes), 2 * passes
    x = torch.randn(b, *trajectory.noise.shape[1:], generator=generator(1))
    request = {"text_tokens": 3, "rows": torch.tensor([0, 5]), "direction": "both"}
    for step, t in enumerate(trajectory.timesteps):
        path.step = step
        with path.seen(teacher, b), harvest(teacher, HarvestRequest(**request)) as found:
            kept = teacher.predict(x, t, text)
        streams = Streams(tuple(b + i % 2 for i in range(b)))
        batch, texts = torch.cat([x, trajectory.latents[step]]), join_texts([text, trajectory.embeds])
        with reference_memory(teacher, streams), harvest(teacher, HarvestRequest(**request)) as expected:
            streamed = teacher.predict(batch, t, texts)[:b]
        assert (kept - teacher.predict(x, t, text)).abs().max() > 1e-4  # it is looked at
        torch.testing.assert_close(kept, streamed, **CLOSE)
        for corner in ("t2v", "v2t", "v2v"):
            torch.testing.assert_close(getattr(found, corner), getattr(expected, corner), **CLOSE)


@pytest.mark.parametrize("hidden", [None, "bool", "bias"])
def test_attention_is_the_dense_one_over_both_keys(hidden):
    """Four entries of two clips, every row on its own."""
    g = generator(3)
    q, k, v = (torch.randn(4, 2, 5, 8, generator=g) for _ in range(3))
    theirs = [torch.randn(2, 2, 5, 8, generator=g) for _ in range(2)]
    own_mask, kept_mask = (torch.rand(n, 1, 1, 5, generator=g) > 0.3 for n in (4, 2))
    own_mask[..., 0] = True
    path = KeptPath(layers={(0, (0, "a")): KeptLayer(*theirs, None if hidden is None else kept_mask)})
    streams = KeptStreams(path, (0, "a"), generated=4)
    mask = None if hidden is None else own_mask
    if hidden == "bias":
        mask = torch.zeros(4, 1, 1, 5).masked_fill(~own_mask, -torch.inf)
    out, lse = attend(q, k, v, streams, mask, lse=True)
    for i in range(4):
        keys, values = (torch.cat([own[i], kept[i % 2]], dim=1) for own, kept in zip((k, v), theirs, strict=True))
        both = None if hidden is None else torch.cat([own_mask[i], kept_mask[i % 2]], dim=2)[0]
        p = softmax_by_rows(q[i], keys, both)
        torch.testing.assert_close(out[i].double(), p @ values.double(), **CLOSE)
        logits = q[i].double() @ keys.double().transpose(1, 2) / 8**0.5
        if both is not None:
            logits = logits.masked_fill(~both, -torch.inf)
        torch.testing.assert_close(lse[i].double(), logits.logsumexp(-1), **CLOSE)


@every_family
def test_processors_come_back_and_keeping_changes_nothing(name):
    teacher, latents, text = tiny_family(name), latents_of(name), text_of(name)
    before = [dict(model.attn_processors) for model in teacher.attention_models]
    plain, kept = invert(teacher, latents, text, 2), invert(teacher, latents, text, 2, kept=(path := KeptPath()))
    assert all(torch.equal(a, b) for a, b in zip(plain.latents, kept.latents, strict=True))
    with pytest.raises(RuntimeError, match="interrupted"), path.keeping(teacher), path.seen(teacher, 2):
        raise RuntimeError("interrupted")
    reconstruct(teacher, kept, text, guidance=3.0, kept=path)
    for model, processors in zip(teacher.attention_models, before, strict=True):
        after = model.attn_processors
        assert after.keys() == processors.keys() and all(after[key] is processors[key] for key in after)


def test_refined_inversions_keep_what_the_stream_computes():
    """Their last forward reads the latent at t itself, as the stream does, once the iteration has converged."""
    teacher = tiny_teacher()
    x0 = torch.randn(1, 3, 4, 8, 8, generator=generator(0))
    empty, text = (teacher.encode_text([words])[0] for words in ("", TEXT))
    apart = []
    for refinements in (0, 8):
        trajectory = invert(teacher, x0, empty, 10, refinements=refinements, kept=(path := KeptPath()))
        kept = reconstruct(teacher, trajectory, text, guidance=1.0, kept=path)
        streamed = reconstruct(teacher, trajectory, text, guidance=1.0)
        apart.append(float((kept - streamed).norm() / streamed.norm()))
    assert apart[0] > 1e-4 and apart[1] < apart[0] / 20


@every_family
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_extraction_runs_without_reference_entries_and_frees_what_it_kept(name, guidance, monkeypatch):
    teacher, settings = tiny_family(name), replace(KEPT, guidance=guidance)
    clips, entries, alive, held = [random_clip(FRAMES[name], seed=i) for i in range(2)], [], [], []
    predict, run = teacher.predict, vdm_priors.forwards.reconstruct

    def counting(x, *rest, **told):
        entries.append(len(x))
        return predict(x, *rest, **told)

    def watched(*given, kept, **options):
        tensors = [x for layer in kept.layers.values() for x in (layer.k_bhsd, layer.v_bhsd)]
        held.append(sum(x.nbytes for x in tensors))
        alive.extend(weakref.ref(x) for x in tensors)
        return run(*given, kept=kept, **options)

    monkeypatch.setattr(teacher, "predict", counting)
    monkeypatch.setattr(vdm_priors.forwards, "reconstruct", watched)
    priors = extract_priors(teacher, clips, [TEXT, TEXT], settings, size=SIZE)
    monkeypatch.undo()
    assert alive and not any(ref() is not None for ref in alive)
    cost = estimate(teacher, settings, FRAMES[name], SIZE, batch_size=2, dtype="float32", count_vae=False)
    assert 2 * cost.forwards == sum(entries)
    assert cost.kept == held[0]
    again = extract_priors(teacher, clips, [TEXT, TEXT], settings, size=SIZE)
    streamed = extract_priors(teacher, clips, [TEXT, TEXT], replace(settings, memory_from="forward"), size=SIZE)
    for one, two, other in zip(priors, again, streamed, strict=True):
        assert torch.equal(one.maps, two.maps) and one.provenance == two.provenance
        assert one.provenance["settings"]["memory_from"] == "inversion"
        assert one.words != other.words or (one.maps - other.maps).abs().max() > 1e-6
    (alone,) = extract_priors(teacher, clips[1:], [TEXT], settings, size=SIZE)
    assert alone.words == priors[1].words
    torch.testing.assert_close(alone.maps, priors[1].maps, atol=1e-5, rtol=1e-3)


def test_half_precision_is_kept_as_it_is():
    teacher, path = tiny_teacher(seed=11), KeptPath()
    teacher.transformer.to(torch.bfloat16)
    empty, _ = teacher.encode_text([""])
    trajectory = invert(teacher, torch.randn(1, 3, 4, 8, 8, generator=generator(0)), empty, 2, kept=path)
    assert {layer.k_bhsd.dtype for layer in path.layers.values()} == {torch.bfloat16}
    rebuilt = reconstruct(teacher, trajectory, empty, guidance=3.0, kept=path)
    assert rebuilt.dtype == torch.float32 and rebuilt.isfinite().all()


def test_refusals():
    teacher, trajectory, path = walked("cogvideox")
    text = text_of("cogvideox")
    with pytest.raises(ModelError, match="no keys of transformer_blocks.0.attn1.processor were kept at step 2"):
        reconstruct(teacher, trajectory, text, kept=KeptPath())
    with pytest.raises(ModelError, match="batch 2 does not fit 4 generated entries that see 2 kept clips"), \
            path.seen(teacher, 4):
        teacher.predict(trajectory.noise, trajectory.timesteps[-1], text)
    with pytest.raises(RecipeError, match="memory_from must be one of forward, inversion, not 'disk'"):
        extract_priors(teacher, [random_clip()], [TEXT], replace(KEPT, memory_from="disk"))


def test_a_gpu_keeps_keys_until_a_quarter_of_it_is_left(monkeypatch):
    """No GPU is needed to be asked: what is free of 80 GB decides, with what PyTorch holds without using it."""
    from types import SimpleNamespace

    from vdm_priors.kept_memory import _place

    gb, device = 10**9, torch.device("cuda")
    x = SimpleNamespace(device=device, nbytes=gb)
    for free, reserved, allocated, stays in ((30, 40, 40, True), (21, 40, 40, False), (15, 50, 40, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free * gb, 80 * gb))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _, reserved=reserved: reserved * gb)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _, allocated=allocated: allocated * gb)
        assert _place(x) == (device if stays else torch.device("cpu"))
