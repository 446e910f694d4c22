"""One contract for every family: to noise and back, refined, probed, and step for step as the family's own pipeline."""

from __future__ import annotations

import json

import pytest
import torch

from tests.vdm_priors.family_contract import TEXTS, every_family, latents_of, text_of
from tests.vdm_priors.test_inversion import Oracle
from tests.vdm_priors.tiny_families import FRAMES, SIZE, tiny_family
from tests.vdm_priors.tiny_teacher import tiny_teacher
from vdm_priors.errors import ModelError
from vdm_priors.harvest import HarvestRequest, harvest
from vdm_priors.inversion import InversionTrajectory, invert, probe, reconstruct


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
