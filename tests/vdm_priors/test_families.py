"""One contract for every family, on small random models of diffusers' real classes, saved and loaded as folders.

The reference for attention is what diffusers' own processors hand to PyTorch's attention, without a harvest; softmax
is written out row by row. Legend: B entries, H heads of one layer, T text tokens, L text length, S vision tokens.
"""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vdm_priors.test_inversion import Oracle
from tests.vdm_priors.tiny_families import FAMILIES, FRAMES, SIZE, tiny_family
from tests.vdm_priors.tiny_teacher import generator, random_clip, tiny_teacher
from vdm_priors.conditioning import MaskedText, join_texts, repeat_text
from vdm_priors.errors import ClipError, ModelError
from vdm_priors.extract import ExtractionSettings, extract_priors
from vdm_priors.families import family_of, load_teacher, trained_frames
from vdm_priors.grid import frame_spans
from vdm_priors.harvest import HarvestRequest, harvest
from vdm_priors.inversion import InversionTrajectory, invert, probe, reconstruct
from vdm_priors.memory import Streams, reference_memory
from vdm_priors.words import split_words, tokens_of_words

MODULES = {"cogvideox15": "cogvideox", "wan22": "wan", "hunyuan": "hunyuan_video"}
SEPARATE = ("wan", "wan22", "ltx")  # text is attended to by cross-attention
MASKED = ("ltx", "hunyuan", "mochi")  # padding of the text is hidden
TEXTS = ["the red ball moves left", "it spins"]
every_family = pytest.mark.parametrize("name", FAMILIES)


def latents_of(name, batch=2, seed=0, size=SIZE):
    """Noise of the shape that a clip's latents have, [B, F, C, h, w]."""
    teacher = tiny_family(name)
    pixels = teacher.prepare_frames(random_clip(FRAMES[name]).frames, size)
    shape = teacher.encode_video(pixels).shape[1:]
    return torch.randn(batch, *shape, generator=generator(seed))


def text_of(name, batch=2):
    return tiny_family(name).encode_text(TEXTS[:batch])[0]


def middle(name, shape):
    """A timestep of the schedule, told to the first stage where there are two."""
    return tiny_family(name).schedule(shape).levels(4)[3].timestep


@contextmanager
def own_attention(teacher, monkeypatch):
    """q, k, v, mask, out of every call that diffusers' own processors make, by the name of their module."""
    calls, inside, hooks = {}, [], []
    plain = torch.nn.functional.scaled_dot_product_attention

    def seen(query, key, value, attn_mask=None, **options):
        out = plain(query, key, value, attn_mask=attn_mask, **options)
        if inside:
            calls.setdefault(inside[-1], []).append((query, key, value, attn_mask, out))
        return out

    models = {id(model): model for model in [teacher.transformer, getattr(teacher, "transformer_2", None)] if model}
    for number, model in enumerate(models.values()):
        for path, module in model.named_modules():
            if hasattr(module, "processor"):
                label = (number, f"{path}.processor")
                hooks.append(module.register_forward_pre_hook(lambda *_, label=label: inside.append(label)))
                hooks.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    yield calls
    monkeypatch.undo()
    for hook in hooks:
        hook.remove()


def softmax_by_rows(q_hsd, k_hkd, mask_1k=None):
    """Probabilities [H, s, k] of one entry, every row on its own, in float64."""
    heads, rows, width = q_hsd.shape
    p = torch.zeros(heads, rows, k_hkd.shape[1], dtype=torch.float64)
    for h in range(heads):
        for r in range(rows):
            logits = (k_hkd[h].double() @ q_hsd[h, r].double()) / width**0.5
            if mask_1k is not None:
                mask = mask_1k[min(h, len(mask_1k) - 1)].flatten()
                logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
            weights = (logits - logits.max()).exp()
            p[h, r] = weights / weights.sum()
    return p


def entries_of(calls):
    """(q, k, v, mask, out) of each batch entry, whether it was called for in one batch or alone (Mochi)."""
    for query, key, value, mask, out in calls:
        for i in range(len(query)):
            yield query[i], key[i], value[i], None if mask is None else mask[i], out[i]


# ---- what a folder is ---------------------------------------------------------------------------


@every_family
def test_found_by_its_name_and_loaded_exactly(name):
    teacher = tiny_family(name)
    assert family_of(teacher.folder).__name__ == f"vdm_priors.families.{MODULES.get(name, name)}"
    assert trained_frames(teacher.folder) == teacher.trained_frames
    teacher.check_frames(teacher.trained_frames)
    assert not any(weight.requires_grad for weight in teacher.transformer.parameters())
    assert len({layer.name for layer in teacher.attention_layers}) == len(teacher.attention_layers) >= 2
    assert not teacher.transformer.training and not teacher.vae.training


def test_unknown_families_are_told_the_known_ones(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanImageToVideoPipeline"}')
    known = "cogvideox, hunyuan_video, ltx, mochi, wan"
    with pytest.raises(ModelError, match=f"'WanImageToVideoPipeline'.*Known families: {known}"):
        load_teacher(tmp_path)


# ---- attention ----------------------------------------------------------------------------------


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


def close(found, expected):
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-5, rtol=0)


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


# ---- noise --------------------------------------------------------------------------------------


class FlowOracle:
    """Knows x0 and ε, and so v = ε − x0 everywhere."""

    def __init__(self, teacher, x0, noise):
        self.schedule, self.guidance_kind = teacher.schedule, teacher.guidance_kind
        self.v, self.told = noise - x0, []

    def predict(self, latents, timestep, embeds, **guidance):
        self.told.append(timestep)
        return self.v.repeat(len(latents) // len(self.v), 1, 1, 1, 1)


@every_family
@pytest.mark.parametrize("steps, guidance", [(2, 1.0), (5, 6.0), (7, 1.0)])  # 7 does not divide 1000
def test_oracle_returns_to_the_start(name, steps, guidance):
    teacher = tiny_family(name)
    x0, noise = latents_of(name), latents_of(name, seed=1)
    oracle = FlowOracle(teacher, x0, noise)
    if name.startswith("cogvideox"):
        oracle = Oracle(x0, noise)
        oracle.schedule = teacher.schedule
        oracle.told = oracle.called
    schedule, text = teacher.schedule(x0.shape), torch.zeros(2, 4, 8)
    trajectory = invert(oracle, x0, text, steps)
    levels = schedule.levels(steps)
    for x, level in zip(trajectory.latents, levels, strict=True):
        torch.testing.assert_close(x, schedule.mix(x0, noise, level), atol=1e-5, rtol=0)
    torch.testing.assert_close(trajectory.noise, noise, atol=1e-2, rtol=0)  # UniPC's σ ends a little below 1
    back = reconstruct(oracle, trajectory, text, text, guidance=guidance, memory=False)
    torch.testing.assert_close(back, x0, atol=1e-5, rtol=0)
    calls = 2 if guidance > 1 and oracle.guidance_kind == "separate" else 1
    down = [t for t in trajectory.timesteps[::-1] for _ in range(calls)]
    assert oracle.told == trajectory.timesteps + down and len(trajectory.timesteps) == steps


@every_family
def test_levels_rise_from_the_clip_to_noise(name):
    teacher, shape = tiny_family(name), latents_of(name).shape
    schedule = teacher.schedule(shape)
    fewest = 2 if name in ("mochi", "ltx") else 1
    for steps in (fewest, 61, 1000):
        levels = schedule.levels(steps)
        noise = [1 - level.noise if name.startswith("cogvideox") else level.noise for level in levels]
        assert len(levels) == steps + 1 and noise[0] == 0 and noise[-1] > 0.999
        assert all(a < b or (a == b and steps == 1000) for a, b in zip(noise, noise[1:]))
    for ceiling in (0.01, 0.5, 1.0):
        probes = schedule.probes(3, ceiling)
        assert len({level.timestep for level in probes}) == 3 and all(0 <= level.timestep <= 1000 for level in probes)
    for wrong in (fewest - 1, 1001):
        with pytest.raises(ModelError, match=f"takes {fewest} to 1000 steps, not {wrong}"):
            schedule.levels(wrong)


@every_family
def test_probes_are_the_clip_with_seeded_noise(name, monkeypatch):
    teacher, x0, text = tiny_family(name), latents_of(name), text_of(name)
    seen = []
    monkeypatch.setattr(teacher, "predict", lambda x, t, text: seen.append((x, t)) or x)
    probe(teacher, x0, text, steps=2, ceiling=0.4, seed=3)
    for step, (x, t) in enumerate(seen):
        noise = torch.randn(x0.shape[1:], generator=torch.Generator().manual_seed(3000 + step))
        share = 0.4 * (step + 0.5) / 2
        if name.startswith("cogvideox"):
            level = float(teacher.alphas_cumprod[int(1000 * share)])
            expected, told = level**0.5 * x0 + (1 - level) ** 0.5 * noise, int(1000 * share)
        else:
            expected, told = (1 - share) * x0 + share * noise, 1000 * (1 - share if name == "mochi" else share)
        torch.testing.assert_close(x, expected, atol=1e-6, rtol=0)
        assert t == pytest.approx(told)


@every_family
def test_refinement_finds_the_exact_inverse(name):
    """Without guidance and memory, the round trip's error falls with every fixed-point iteration."""
    teacher, x0, text = tiny_family(name), latents_of(name), text_of(name)
    errors = []
    for refinements in (0, 3, 8):
        trajectory = invert(teacher, x0, text, 10, refinements=refinements)
        back = reconstruct(teacher, trajectory, text, guidance=1.0, memory=False)
        errors.append(float((back - x0).norm() / x0.norm()))
    assert errors[0] > 10 * errors[1] and errors[1] > errors[2], errors


def test_pure_noise_in_one_step_has_nothing_to_refine():
    teacher, x0, text = tiny_family("cogvideox"), latents_of("cogvideox"), text_of("cogvideox")
    plain, refined = (invert(teacher, x0, text, 1, refinements=n).noise for n in (0, 2))
    assert torch.equal(plain, refined)


@pytest.mark.parametrize("name", ["cogvideox15", "wan22", "ltx", "hunyuan", "mochi"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_denoising_is_the_pipelines(name, guidance):
    """From the same noise, reconstruct without memory ends where diffusers' own pipeline does."""
    pipeline, teacher, options = pipeline_of(name)
    height, width = (32, 64) if name == "ltx" else SIZE  # whose pipeline takes no other multiples
    text, empty = teacher.encode_text(TEXTS[:1])[0], teacher.encode_text([""])[0]
    noise = latents_of(name, batch=1, size=(height, width))
    timesteps = [level.timestep for level in teacher.schedule(noise.shape).levels(4)[1:]]
    trajectory = InversionTrajectory([noise] * 5, timesteps, empty)
    ours = reconstruct(teacher, trajectory, text, empty, guidance=guidance, memory=False)
    theirs = pipeline(
        prompt=TEXTS[0], height=height, width=width, num_frames=FRAMES[name], num_inference_steps=4,
        guidance_scale=guidance, latents=as_pipeline(name, noise), output_type="latent", **options,
    ).frames
    torch.testing.assert_close(as_pipeline(name, ours), theirs, atol=2e-5, rtol=1e-4)


def as_pipeline(name, latents):
    if name.startswith("cogvideox"):
        return latents
    bcfhw = latents.transpose(1, 2)
    return bcfhw.flatten(2).transpose(1, 2) if name == "ltx" else bcfhw


def pipeline_of(name):
    """diffusers' pipeline of a teacher's own parts, the teacher, and what the call needs beside the usual."""
    import diffusers

    teacher, options, extra = tiny_family(name), {}, {}
    if name == "cogvideox15":  # the text-to-video pipeline gives no ofs
        teacher = tiny_teacher(patch_frames=2, latent_side=12)
        options = {"max_sequence_length": 16}
    if name == "wan22":
        extra = {"transformer_2": teacher.transformer_2, "boundary_ratio": 0.5, "expand_timesteps": True}
    if name == "hunyuan":
        from vdm_priors.families.hunyuan_video import AFTER, BEFORE

        extra = {"text_encoder_2": teacher.text_encoder_2, "tokenizer_2": teacher.tokenizer_2}
        template = {"template": BEFORE + "{}" + AFTER, "crop_start": teacher._template_tokens}
        options = {"prompt_template": template}
    if name == "mochi":
        extra = {"force_zeros_for_empty_prompt": True}
    kind = getattr(diffusers, json.loads((teacher.folder / "model_index.json").read_text())["_class_name"])
    pipeline = kind(
        tokenizer=teacher.tokenizer, text_encoder=teacher.text_encoder, vae=teacher.vae,
        transformer=teacher.transformer, scheduler=teacher.scheduler, **extra,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, teacher, options


def test_a_told_guidance_changes_the_forward_and_makes_no_second_one(monkeypatch):
    teacher, latents, text = tiny_family("hunyuan"), latents_of("hunyuan"), text_of("hunyuan")
    trajectory = invert(teacher, latents, text, 2)
    sizes, forward = [], teacher.transformer.forward
    monkeypatch.setattr(teacher.transformer, "forward", lambda **k: sizes.append(len(k["timestep"])) or forward(**k))
    ends = [reconstruct(teacher, trajectory, text, guidance=g, memory=False) for g in (1.0, 6.0)]
    assert sizes == [2] * 4 and (ends[0] - ends[1]).abs().max() > 1e-4


def test_separate_calls_record_the_text_only():
    """Guidance by a second call: the harvest holds the text's forwards, not the negative text's."""
    teacher, latents, text = tiny_family("wan"), latents_of("wan"), text_of("wan")
    trajectory = invert(teacher, latents, text, 2)
    with harvest(teacher, HarvestRequest(3)) as found:
        reconstruct(teacher, trajectory, text, guidance=5.0)
    assert found.forwards == 2
    with harvest(teacher, HarvestRequest(3)) as unguided:
        reconstruct(teacher, trajectory, text, guidance=1.0)
    assert unguided.forwards == 2 and (unguided.t2v - found.t2v).abs().max() > 1e-6


# ---- video and text -----------------------------------------------------------------------------


def times_of(name):
    """Arguments of token_grid for the family's clip."""
    frames = FRAMES[name]
    return [i / 8 for i in range(frames)], frames / 8, (0.1, 0.0, 0.9, 1.0), SIZE


@every_family
def test_token_grid_covers_the_clip(name):
    teacher = tiny_family(name)
    times, duration, box, size = times_of(name)
    grid = teacher.token_grid(times, duration, box, size)
    spans = frame_spans(times, duration)
    assert float(grid.spans[0, 0]) == float(spans[0, 0]) and float(grid.spans[-1, 1]) == float(spans[-1, 1])
    assert torch.equal(grid.spans[1:, 0], grid.spans[:-1, 1])  # without gaps
    edges = (grid.row_edges[0], grid.column_edges[0], grid.row_edges[-1], grid.column_edges[-1])
    assert tuple(map(float, edges)) == pytest.approx(box)
    assert grid.valid.all()
    latents, text = latents_of(name, batch=1), text_of(name, batch=1)
    request = HarvestRequest(1, torch.tensor([grid.num_tokens - 1]))
    with harvest(teacher, request) as found:
        teacher.predict(latents, middle(name, latents.shape), text)
    assert found.v2v.shape[-1] == grid.num_tokens  # a cell for every token


@pytest.mark.parametrize("name", FAMILIES)
def test_offloaded_parts_come_for_their_work_and_go(name, monkeypatch):
    """Text encoders and VAE are brought to the device, work, and leave; what they give does not change."""
    plain, teacher = tiny_family(name), copy.deepcopy(tiny_family(name))
    teacher.offload("cpu")
    assert teacher.offloaded and not plain.offloaded
    told, parts = [], [part for part in ("vae", "text_encoder", "text_encoder_2") if getattr(teacher, part, None)]
    for part in parts:
        def to(device, part=part):
            told.append((part, str(device)))

        monkeypatch.setattr(getattr(teacher, part), "to", to)
    pixels = plain.prepare_frames(random_clip(FRAMES[name]).frames, SIZE)
    latents = teacher.encode_video(pixels)
    torch.testing.assert_close(latents, plain.encode_video(pixels))
    # a copy's weights lie elsewhere in memory, and convolutions may round otherwise
    torch.testing.assert_close(teacher.decode(latents, FRAMES[name]), plain.decode(latents, FRAMES[name]))
    assert told == [("vae", "cpu")] * 4  # the device that is computed on, and main memory; here they are the same
    told.clear()
    text, ours = plain.encode_text(["the red ball"])[0], teacher.encode_text(["the red ball"])[0]
    embeds = [x.embeds if isinstance(x, MaskedText) else x for x in (text, ours)]
    torch.testing.assert_close(*embeds)
    assert told == [(part, "cpu") for part in parts[1:] for _ in range(2)]


def test_front_padding_joins_the_first_frame():
    """9 frames are latents [pad, 0], [1, 2]: the first token stands for the first frame, the second for the others."""
    teacher = tiny_family("cogvideox15")
    grid = teacher.token_grid([i / 4 for i in range(9)], 2.25, (0.0, 0.0, 1.0, 1.0), SIZE)
    torch.testing.assert_close(grid.spans, torch.tensor([[0.0, 0.125], [0.125, 2.25]], dtype=torch.float64))
    even = teacher.token_grid([i / 4 for i in range(5)], 1.25, (0.0, 0.0, 1.0, 1.0), SIZE)  # latents [0, 1]
    torch.testing.assert_close(even.spans, torch.tensor([[0.0, 1.25]], dtype=torch.float64))
    for frames, held in ((9, 4), (5, 2), (1, 2), (13, 4)):
        pixels = teacher.prepare_frames(random_clip(frames).frames, SIZE)
        latents = teacher.encode_video(pixels)
        assert latents.shape[1] == held
        if held != (frames - 1) // 4 + 1:
            assert torch.equal(latents[:, 0], latents[:, 1])
        changed = latents.clone()
        changed[:, : held - (frames - 1) // 4 - 1] = 7.0  # the padding is dropped before decoding
        assert torch.equal(teacher.decode(changed, frames), teacher.decode(latents, frames))
        assert teacher.decode(latents, frames).shape == pixels.shape


def test_front_padding_is_that_of_diffusers_image_to_video():
    """Its pipeline puts a copy of the first latent frame before those of the image; ours does before a clip's."""
    from diffusers import CogVideoXImageToVideoPipeline

    teacher = tiny_family("cogvideox15")
    pipeline = CogVideoXImageToVideoPipeline(
        tokenizer=teacher.tokenizer, text_encoder=teacher.text_encoder, vae=teacher.vae,
        transformer=teacher.transformer, scheduler=teacher.scheduler)
    pixels, channels = teacher.prepare_frames(random_clip(9).frames, SIZE), teacher.vae.config.latent_channels
    _, theirs = pipeline.prepare_latents(pixels[:, :, 0], num_frames=9, num_channels_latents=channels, height=SIZE[0],
                                         width=SIZE[1], device="cpu", dtype=torch.float32, generator=generator(0))
    ours = teacher.encode_video(pixels)
    assert theirs.shape == ours.shape  # three latent frames and one before them
    for latents in (theirs, ours):
        assert torch.equal(latents[:, 0], latents[:, 1]) and not torch.equal(latents[:, 1], latents[:, 2])


def test_ofs_is_told():
    teacher, latents, text = tiny_family("cogvideox15"), latents_of("cogvideox15"), text_of("cogvideox15")
    seen = []
    hook = teacher.transformer.ofs_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    teacher.predict(latents, 500, text)
    hook.remove()
    assert seen[0].tolist() == [2.0]


@every_family
def test_video_there_and_back(name):
    teacher = tiny_family(name)
    pixels = teacher.prepare_frames(random_clip(FRAMES[name]).frames, SIZE)
    latents = teacher.encode_video(pixels)
    assert latents.dtype == torch.float32 and torch.equal(latents, teacher.encode_video(pixels))
    decoded = teacher.decode(latents, FRAMES[name])
    assert decoded.shape == pixels.shape and decoded.isfinite().all()
    z = teacher.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(teacher._unscaled(teacher._scaled(z)), z, atol=1e-5, rtol=1e-5)
    config = teacher.vae.config
    mean, deviation = (getattr(teacher.vae, key, config.get(key)) for key in ("latents_mean", "latents_std"))
    scale = config.get("scaling_factor", 1.0)
    if mean is None:
        expected = z * scale
    else:
        mean, deviation = (torch.as_tensor(x)[:, None, None, None] for x in (mean, deviation))
        expected = (z - mean) / deviation * scale
    torch.testing.assert_close(teacher._scaled(z), expected, atol=1e-5, rtol=1e-5)


@every_family
def test_padding_is_never_a_word(name):
    teacher = tiny_family(name)
    text = "Señor's ball moves, 3 times; it rotates."
    embeds, offsets = teacher.encode_text([text, "", text + " again" * 600])
    length = teacher.max_text_tokens
    assert [len(row) for row in offsets] == [length] * 3 and len(embeds) == 3
    words = split_words(text)
    tokens = tokens_of_words(words, offsets[0])
    read = ["".join(text[a:b] for a, b in (offsets[0][i] for i in of_word)) for of_word in tokens]
    assert all(word.text.startswith(seen[:1]) and seen for word, seen in zip(words, read, strict=True)) or length < 32
    assert all(start == end for start, end in offsets[1])
    used = [i for of_word in tokens for i in of_word]
    assert max(end for _, end in offsets[0]) <= len(text)
    if isinstance(embeds, MaskedText):
        assert embeds.mask[0, used].all() and not embeds.mask[0, max(used) + 16 :].any()  # the template's end, at most
        assert embeds.mask.shape == (3, length) and name in MASKED
    long = text + " again" * 600
    beyond = tokens_of_words(split_words(long), offsets[2])
    assert beyond[0] and not beyond[-1]  # words beyond the limit have no token


def test_template_tokens_are_cut_off():
    teacher = tiny_family("hunyuan")
    text = "a ball {moves} left"
    embeds, offsets = teacher.encode_text([text])
    covered = {i for a, b in offsets[0] for i in range(a, b)}
    assert covered >= {i for i, letter in enumerate(text) if letter != " "} and offsets[0][0][1] > 0
    after = len([span for span in offsets[0] if span[1] > span[0]])
    assert embeds.mask[0, : after + 1].all()  # the template goes on behind the text


@every_family
def test_clips_of_a_batch_do_not_meet(name):
    """Priors from clips and texts of different lengths, in one batch and alone."""
    teacher = tiny_family(name)
    settings = ExtractionSettings(steps=2, reconstruction=False, direction="both", guidance=3.0)
    clips = [random_clip(FRAMES[name], seed=seed) for seed in (1, 2)]
    together = extract_priors(teacher, clips, TEXTS, settings, size=SIZE)
    for clip, text, prior in zip(clips, TEXTS, together, strict=True):
        (alone,) = extract_priors(teacher, [clip], [text], settings, size=SIZE)
        assert [word.text for word in alone.words] == [word.text for word in prior.words]
        torch.testing.assert_close(alone.maps, prior.maps, atol=1e-5, rtol=1e-2)
        assert prior.maps.sum() > 0


@every_family
def test_half_precision_is_harvested_in_float32(name):
    teacher = load_teacher(tiny_family(name).folder, dtype=torch.bfloat16)
    pixels = teacher.prepare_frames(random_clip(FRAMES[name]).frames, SIZE)
    latents = teacher.encode_video(pixels)
    text = teacher.encode_text(TEXTS[:1])[0]
    t = middle(name, latents.shape)
    plain = teacher.predict(latents, t, text)
    with harvest(teacher, HarvestRequest(3, torch.tensor([0]), direction="both")) as found:
        assert torch.equal(teacher.predict(latents, t, text), plain)
    assert plain.dtype == latents.dtype == found.v2v.dtype == found.t2v.dtype == torch.float32
    told = []
    probe(teacher, latents, text, 2, on_step=lambda step, t, x: told.append(x.dtype))
    assert told == [torch.float32] * 2


# ---- bad input ----------------------------------------------------------------------------------


@every_family
def test_refused_clips(name):
    teacher = tiny_family(name)
    frames, cell = FRAMES[name], teacher.cell[0]
    with pytest.raises(ClipError, match=rf"k\+1 frames, not {frames + 1}\. Sample {frames} or"):
        teacher.prepare_frames(random_clip(frames + 1).frames, SIZE)
    with pytest.raises(ModelError, match=rf"multiples of {cell} pixels, not {cell}×{cell + 1}\."):
        teacher.frame_size((cell, cell + 1))
    with pytest.raises(ModelError, match="steps, not 1001"):
        invert(teacher, latents_of(name), text_of(name), 1001)


def test_temporal_patches_have_a_largest_frame():
    with pytest.raises(ModelError, match="at most 48×48 pixels, not 32×56"):
        tiny_family("cogvideox15").frame_size((32, 56))


@every_family
def test_truncated_weights_are_refused(name, tmp_path):
    folder = shutil.copytree(tiny_family(name).folder, tmp_path / "teacher")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="teacher .* could not be loaded"):
        load_teacher(folder)


@pytest.mark.parametrize("part, key", [
    ("transformer", "proj_in.weight"), ("text_encoder", "encoder.block.0.layer.0.SelfAttention.k.weight"),
])
@pytest.mark.parametrize("shape, message", [(None, "lack 1 weights, of them"), ((3, 3), "[Mm]ismatch|expected shape")])
def test_weights_that_do_not_fit_are_refused(part, key, shape, message, tmp_path):
    folder = shutil.copytree(tiny_family("ltx").folder, tmp_path / "teacher")
    (path,) = (folder / part).glob("*.safetensors")
    weights = load_file(path)
    if shape is None:
        del weights[key]  # which diffusers leaves empty, and transformers draws at random
    else:
        weights[key] = torch.zeros(shape)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message) as error:
        load_teacher(folder)
    assert "\n" not in str(error.value)


UNSUPPORTED = [
    ("cogvideox", "scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "predicts 'epsilon'"),
    ("wan", "scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "UniPC.*'epsilon'.*no flow's"),
    ("wan", "model_index.json", {"boundary_ratio": 0.9}, "boundary_ratio 0.9 asks for"),
    ("mochi", "scheduler/scheduler_config.json", {"invert_sigmas": False}, "invert_sigmas to true"),
    ("hunyuan", "tokenizer/tokenizer_config.json", {"padding_side": "left"}, "pads on the left"),
]


@pytest.mark.parametrize("name, file, changes, message", UNSUPPORTED)
def test_unsupported_configurations_are_refused(name, file, changes, message, tmp_path):
    folder = shutil.copytree(tiny_family(name).folder, tmp_path / "teacher")
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelError, match=message) as error:
        load_teacher(folder)
    assert "\n" not in str(error.value)


def test_texts_join_and_repeat():
    text = tiny_family("hunyuan").encode_text(TEXTS)[0]
    one = tiny_family("hunyuan").encode_text(TEXTS[:1])[0]
    joined = join_texts([repeat_text(one, 2), text])
    assert len(joined) == 4 and torch.equal(joined.mask[1], text.mask[0])
    torch.testing.assert_close(joined.embeds[0], joined.embeds[2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(joined.pooled[1], joined.pooled[2], atol=1e-5, rtol=1e-5)
