"""Inversion and reconstruction against an oracle, the scheduler's own step, and plain formulas."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from tests.vdm_priors.tiny_teacher import generator, random_clip, tiny_teacher
from vdm_priors.errors import ModelError
from vdm_priors.inversion import invert, reconstruct
from vdm_priors.schedules import DdimSchedule


def scheduler(snr_shift_scale=1.0):
    from diffusers import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
        clip_sample=False, snr_shift_scale=snr_shift_scale,
    )


class Oracle:
    """Knows x0 and ε, and so the exact v of any mixture √α·x0 + √(1−α)·ε that it is given."""

    def __init__(self, x0, noise, snr_shift_scale=1.0):
        self.scheduler = scheduler(snr_shift_scale)
        self.alphas_cumprod = self.scheduler.alphas_cumprod.double()
        self.final_alpha_cumprod = float(self.scheduler.final_alpha_cumprod)
        self.basis = torch.stack([x0.double(), noise.double()], dim=-1).flatten(1, -2)
        self.called = []

    guidance_kind = "batched"
    networks = ()

    def schedule(self, shape):
        return DdimSchedule(self.alphas_cumprod, self.final_alpha_cumprod, self.timesteps)

    def timesteps(self, steps):
        self.scheduler.set_timesteps(steps)
        return self.scheduler.timesteps.tolist()

    def predict(self, latents, timestep, embeds):
        self.called.append(timestep)
        repeats = len(latents) // len(self.basis)
        basis = self.basis.repeat(repeats, 1, 1)
        share = torch.linalg.lstsq(basis, latents.double().flatten(1)[..., None]).solution
        v = basis[..., 1] * share[:, 0] - basis[..., 0] * share[:, 1]
        return v.reshape(latents.shape).float()


def start(batch=2):
    g = generator(0)
    shape = (batch, 3, 4, 8, 8)
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g)


@pytest.mark.parametrize("steps", [1, 2, 5, 7, 12])  # 7 and 12 do not divide 1000
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_oracle_returns_to_the_start(steps, shift, guidance):
    x0, noise = start()
    oracle = Oracle(x0, noise, shift)
    text = torch.zeros(2, 4, 8)
    trajectory = invert(oracle, x0, text, steps)
    torch.testing.assert_close(trajectory.noise, noise, atol=1e-5, rtol=0)  # ᾱ_999 = 0
    for t, x in zip(trajectory.timesteps, trajectory.latents[1:], strict=True):
        alpha = float(oracle.alphas_cumprod[t])
        torch.testing.assert_close(
            x, sqrt(alpha) * x0 + sqrt(1 - alpha) * noise, atol=1e-5, rtol=0
        )
    back = reconstruct(oracle, trajectory, text, text, guidance=guidance, memory=False)
    torch.testing.assert_close(back, x0, atol=1e-5, rtol=0)
    assert oracle.called == trajectory.timesteps + trajectory.timesteps[::-1]
    assert back.dtype == torch.float32 and len(trajectory.latents) == steps + 1


def test_every_number_of_steps_has_as_many_timesteps():
    """diffusers counts 62 of them one too many, with t = −1 as the last: 61, 103, 121, …"""
    teacher = tiny_teacher()
    for steps in range(1, 1001):
        timesteps = teacher.timesteps(steps)
        assert len(timesteps) == steps and timesteps[0] == 999 and timesteps[-1] >= 0
        assert all(a > b for a, b in zip(timesteps, timesteps[1:]))


def test_levels_are_the_forward_schedulers_own():
    """snr_shift_scale 3.0 is honoured; diffusers' inverse scheduler would drop it."""
    x0, noise = start()
    shifted, plain = Oracle(x0, noise, 3.0), Oracle(x0, noise, 1.0)
    text = torch.zeros(2, 4, 8)
    middle = invert(shifted, x0, text, 5).latents[2]
    alpha = float(scheduler(3.0).alphas_cumprod[399])
    torch.testing.assert_close(middle, sqrt(alpha) * x0 + sqrt(1 - alpha) * noise, atol=1e-5, rtol=0)
    assert (middle - invert(plain, x0, text, 5).latents[2]).abs().max() > 0.1


def test_denoising_step_is_the_schedulers_where_steps_divide_1000():
    teacher = tiny_teacher(snr_shift_scale=3.0)
    x0, _ = start(1)
    text, _ = teacher.encode_text(["a red ball moves"])
    trajectory = invert(teacher, x0, text, 5)
    ours = reconstruct(teacher, trajectory, text, guidance=1.0, memory=False)
    reference = scheduler(3.0)
    reference.set_timesteps(5)
    x = trajectory.noise
    for t in reference.timesteps:
        x = reference.step(teacher.predict(x, int(t), text), int(t), x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)


def test_guidance_and_memory_against_a_plain_loop():
    """One batch of [text, negative, reference] gives what separate calls of the formulas give."""
    from vdm_priors.memory import Streams, reference_memory

    teacher = tiny_teacher()
    x0, _ = start(1)
    text, _ = teacher.encode_text(["a red ball moves"])
    empty, _ = teacher.encode_text([""])
    trajectory = invert(teacher, x0, empty, 3)
    steps = []
    ours = reconstruct(
        teacher, trajectory, text, guidance=4.0, on_step=lambda i, t, x: steps.append((i, t))
    )
    assert steps == [(0, 999), (1, 666), (2, 332)] and trajectory.timesteps == [332, 666, 999]
    levels = [1.0] + [float(teacher.alphas_cumprod[t]) for t in trajectory.timesteps]
    x = trajectory.noise
    for k in (3, 2, 1):
        t, reference = trajectory.timesteps[k - 1], trajectory.latents[k]
        with reference_memory(teacher, Streams((1,))):
            v_text = teacher.predict(torch.cat([x, reference]), t, torch.cat([text, empty]))[:1]
            v_negative = teacher.predict(torch.cat([x, reference]), t, torch.cat([empty, empty]))[:1]
        v = v_negative + 4.0 * (v_text - v_negative)
        a, b = levels[k], levels[k - 1]
        keep = sqrt((1 - b) / (1 - a))
        x = keep * x + (sqrt(b) - sqrt(a) * keep) * (sqrt(a) * x - sqrt(1 - a) * v)
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


def test_refinements_bring_the_clip_back_and_are_harvested_once():
    """Of a step's forwards the last is recorded; a few bring extraction's own figure down."""
    from vdm_priors.extract import ExtractionSettings, extract_priors
    from vdm_priors.harvest import HarvestRequest, harvest

    teacher = tiny_teacher()
    x0, _ = start(1)
    text, _ = teacher.encode_text(["a red ball moves"])
    with harvest(teacher, HarvestRequest(4)) as harvested:
        trajectory = invert(teacher, x0, text, 3, refinements=2)
    assert harvested.forwards == 3
    schedule = teacher.schedule(x0.shape)
    levels, recorded = schedule.levels(3), []
    for x, below, above in zip(trajectory.latents, levels, levels[1:]):
        first = schedule.up(x, teacher.predict(x, above.timestep, text), below, above)
        second = schedule.refined(x, first, teacher.predict(first, above.timestep, text), below, above)
        recorded.append((second, above.timestep))
    with harvest(teacher, HarvestRequest(4)) as by_hand:
        for x, t in recorded:
            teacher.predict(x, t, text)
    torch.testing.assert_close(harvested.t2v, by_hand.t2v, atol=1e-6, rtol=0)
    errors = []
    for refinements in (0, 4):
        settings = ExtractionSettings(  # up and down under the same text
            steps=10, refinements=refinements, guidance=1.0, memory=False, harvest_at="inversion")
        (prior,) = extract_priors(teacher, [random_clip()], ["a red ball moves"], settings)
        errors.append(prior.provenance["reconstruction"]["latent_relative_l2"])
    assert errors[0] > 5 * errors[1]


def test_latents_stay_float32_when_the_network_is_bfloat16():
    x0, noise = start()
    oracle = Oracle(x0, noise)
    exact = oracle.predict
    oracle.predict = lambda *arguments: exact(*arguments).bfloat16()
    trajectory = invert(oracle, x0.bfloat16(), torch.zeros(2, 4, 8), 2)
    assert all(x.dtype == torch.float32 for x in trajectory.latents)


def test_nan_names_the_step():
    x0, noise = start()
    oracle = Oracle(x0, noise)
    exact = oracle.predict

    def broken(latents, timestep, embeds):
        return exact(latents, timestep, embeds) * (float("nan") if timestep > 500 else 1.0)

    oracle.predict = broken
    with pytest.raises(ModelError, match=r"Inversion step 3 of 5 \(t=599\).*NaN"):
        invert(oracle, x0, torch.zeros(2, 4, 8), 5)


def test_a_broken_prediction_names_the_layer_that_broke_first():
    teacher = tiny_teacher(seed=9)
    text, _ = teacher.encode_text(["a red ball moves"])
    weight = teacher.transformer.transformer_blocks[0].ff.net[0].proj.weight
    kept = weight[0, 0].item()
    weight[0, 0] = float("inf")
    try:
        with pytest.raises(ModelError, match=(
                r"^Inversion step 1 of 2 \(t=499\): the prediction, from transformer_blocks\.0\.ff\.net\.0\.proj on: "
                r"768 of 768 values are NaN or infinite\.")):
            invert(teacher, start(1)[0], text, 2)
    finally:
        weight[0, 0] = kept
    assert not any(part._forward_hooks for part in teacher.transformer.modules())


def test_attention_nan_names_step_and_layer():
    from vdm_priors.harvest import HarvestRequest, harvest

    teacher = tiny_teacher(seed=9)
    x0, _ = start(1)
    empty, _ = teacher.encode_text([""])
    trajectory = invert(teacher, x0, empty, 2)
    weight = teacher.transformer.transformer_blocks[1].attn1.to_q.weight
    kept = weight[0, 0].item()
    weight[0, 0] = float("inf")
    try:
        with (
            pytest.raises(ModelError, match=r"Denoising step 1 of 2 \(t=999\).*blocks\.1\.attn1"),
            harvest(teacher, HarvestRequest(4, batch_index=[0])),
        ):
            reconstruct(teacher, trajectory, empty)
    finally:
        weight[0, 0] = kept


def test_refusals():
    teacher = tiny_teacher()
    x0, _ = start(1)
    empty, _ = teacher.encode_text([""])
    with pytest.raises(ModelError, match="1 to 1000 steps, not 0"):
        invert(teacher, x0, empty, 0)
    with pytest.raises(ValueError, match="one text each"):
        invert(teacher, x0.expand(2, -1, -1, -1, -1), empty)
    trajectory = invert(teacher, x0, empty, 2)
    trajectory.timesteps[0] = 3
    with pytest.raises(ModelError, match="are not this teacher's"):
        reconstruct(teacher, trajectory, empty)
