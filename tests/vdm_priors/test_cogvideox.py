"""The CogVideoX teacher: what it loads, refuses, and says about its own layout."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.vdm_priors.tiny_teacher import generator, random_clip, tiny_teacher
from vdm_priors.errors import ClipError, ModelError
from vdm_priors.families import load_teacher


def edited_folder(tmp_path, part, **changes):
    """A copy of the tiny teacher whose configuration of `part` is changed."""
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher().folder, folder)
    path = folder / part
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_prediction_is_the_pipelines(monkeypatch):
    """encode_text, predict and rotary positions are those that CogVideoXPipeline uses."""
    from diffusers import CogVideoXPipeline

    teacher = tiny_teacher()
    pipeline = CogVideoXPipeline(
        tokenizer=teacher.tokenizer, text_encoder=teacher.text_encoder, vae=teacher.vae,
        transformer=teacher.transformer, scheduler=teacher.scheduler,
    )
    embeds, _ = teacher.encode_text(["the red ball", ""])
    theirs, _ = pipeline.encode_prompt(
        ["the red ball", ""], do_classifier_free_guidance=False, max_sequence_length=16
    )
    assert torch.equal(embeds, theirs)
    for height, width in ((32, 32), (32, 48), (64, 16)):
        rotary = pipeline._prepare_rotary_positional_embeddings(height, width, 3, "cpu")
        ours = teacher._rotary_positions((1, 3, 4, height // 4, width // 4))
        assert all(torch.equal(a, b) for a, b in zip(ours, rotary, strict=True))
    latents = torch.randn(1, 3, 4, 8, 8, generator=generator(0))
    pipeline.set_progress_bar_config(disable=True)
    denoised = pipeline(
        prompt="the red ball", height=32, width=32, num_frames=9, num_inference_steps=2,
        guidance_scale=1.0, latents=latents, output_type="latent", max_sequence_length=16,
    ).frames
    x = latents
    teacher.scheduler.set_timesteps(2)
    for t in teacher.timesteps(2):
        x = teacher.scheduler.step(teacher.predict(x, t, embeds[:1]), t, x).prev_sample
    torch.testing.assert_close(denoised, x, atol=1e-6, rtol=1e-6)


def test_video_there_and_back_has_the_right_shapes():
    teacher = tiny_teacher()
    pixels = teacher.prepare_frames(random_clip(9).frames)
    assert pixels.shape == (1, 3, 9, 32, 32) and -1 <= pixels.min() and pixels.max() <= 1
    latents = teacher.encode_video(pixels)
    assert latents.shape == (1, 3, 4, 8, 8) and latents.dtype == torch.float32
    assert torch.equal(latents, teacher.encode_video(pixels))  # the mode: nothing random
    assert teacher.decode(latents).shape == pixels.shape
    for frames in (1, 5, 13, 17, 21):
        pixels = teacher.prepare_frames(random_clip(frames).frames)
        assert teacher.encode_video(pixels).shape[1] == (frames - 1) // 4 + 1
    same = torch.full((1, 32, 32, 3), 255, dtype=torch.uint8)
    assert torch.equal(teacher.prepare_frames(same), torch.ones(1, 3, 1, 32, 32))


@pytest.mark.parametrize("frames, nearest", [(8, "5 or 9"), (2, "1 or 5"), (12, "9 or 13"), (0, "1 or 5")])
def test_wrong_frame_counts_name_the_nearest(frames, nearest):
    with pytest.raises(ClipError, match=f"4k\\+1 frames, not {frames}. Sample {nearest} frames"):
        tiny_teacher().check_frames(frames)


def test_sizes():
    teacher = tiny_teacher()
    assert teacher.frame_size() == (32, 32) and teacher.frame_size((16, 48)) == (16, 48)
    with pytest.raises(ModelError, match="multiples of 8 pixels, not 30×48"):
        teacher.frame_size((30, 48))
    pixels = teacher.prepare_frames(random_clip(5).frames, (16, 48))
    latents = teacher.encode_video(pixels)
    assert latents.shape == (1, 2, 4, 4, 12)
    embeds, _ = teacher.encode_text(["a ball"])
    assert teacher.predict(latents, 10, embeds).shape == latents.shape


@pytest.mark.parametrize("frames", [1, 5, 9, 13])
def test_as_many_frames_are_decoded_as_were_encoded(frames):
    teacher = tiny_teacher()
    pixels = teacher.prepare_frames(random_clip(frames).frames)
    assert teacher.decode(teacher.encode_video(pixels)).shape == pixels.shape


def test_token_grid_follows_the_causal_vae():
    grid = tiny_teacher().token_grid([i / 4 for i in range(9)], 2.25, (0.1, 0.0, 0.9, 1.0))
    assert grid.shape == (3, 4, 4)
    expected = torch.tensor([[0.0, 0.125], [0.125, 1.125], [1.125, 2.25]], dtype=torch.float64)
    torch.testing.assert_close(grid.spans, expected)
    assert grid.cell(0)[1] == pytest.approx((0.1, 0.0, 0.3, 0.25))
    assert tiny_teacher().token_grid([0, 1, 2, 3, 4], 5, size=(16, 48)).shape == (2, 2, 6)


def test_text_offsets_point_into_the_text():
    teacher = tiny_teacher()
    text = "Señor's ball moves, 3 times; it rotates counterclockwise and stops at once."
    embeds, offsets = teacher.encode_text([text, ""])
    assert embeds.shape == (2, 16, 32) and len(offsets[0]) == teacher.max_text_tokens == 16
    covered = [text[start:end] for start, end in offsets[0] if end > start]
    assert covered[0].startswith("S") and "ball" in covered
    assert max(end for _, end in offsets[0]) < len(text)  # cut at 16 tokens
    assert all(start == end for start, end in offsets[1])


def test_load_is_exact_and_fingerprint_follows_content(tmp_path):
    teacher = tiny_teacher()
    folder = tmp_path / "copy"
    shutil.copytree(teacher.folder, folder)
    again = load_teacher(str(folder))
    assert again.fingerprint() == teacher.fingerprint()
    assert not any(p.requires_grad for p in again.transformer.parameters())
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"snr_shift_scale": 1.0', '"snr_shift_scale": 3.0'))
    assert load_teacher(folder).fingerprint() != teacher.fingerprint()
    assert float(load_teacher(folder).alphas_cumprod[500]) != float(teacher.alphas_cumprod[500])
    half = load_teacher(folder, dtype=torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16
    embeds, _ = half.encode_text(["a ball"])
    latents = half.encode_video(half.prepare_frames(random_clip(5).frames))
    assert latents.dtype == torch.float32 == half.predict(latents, 9, embeds).dtype


def test_the_trained_number_of_frames_is_read_without_loading(tmp_path, monkeypatch):
    from vdm_priors.families import trained_frames

    assert tiny_teacher().trained_frames == trained_frames(tiny_teacher().folder) == 9
    folder = edited_folder(tmp_path, "transformer/config.json", sample_frames=49)
    monkeypatch.setattr("diffusers.CogVideoXPipeline.from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    assert trained_frames(folder) == 49
    (folder / "transformer" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="does not say .*sample_frames.*teacher.sampling.frames"):
        trained_frames(folder)


def test_refusals(tmp_path):
    with pytest.raises(ModelError, match="no teacher folder .*nowhere"):
        load_teacher("./nowhere/at/all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="model_index.json"):
        load_teacher(tmp_path / "empty")
    (tmp_path / "empty" / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    with pytest.raises(ModelError, match="'OtherPipeline'.*Known families: cogvideox"):
        load_teacher(tmp_path / "empty")
    (tmp_path / "empty" / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    with pytest.raises(ModelError, match="could not be loaded"):
        load_teacher(tmp_path / "empty")


def test_the_hubs_other_scheduler_has_the_same_levels(tmp_path):
    """CogVideoX-5b names the multistep DPM sampler; the levels of noise and the network are the same."""
    folder = edited_folder(tmp_path, "scheduler/scheduler_config.json", _class_name="CogVideoXDPMScheduler")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"))
    teacher = load_teacher(folder)
    assert type(teacher.scheduler).__name__ == "CogVideoXDPMScheduler"
    for steps in (5, 7, 61):
        assert teacher.schedule((1,)).levels(steps) == tiny_teacher().schedule((1,)).levels(steps)


def test_epsilon_prediction_is_refused(tmp_path):
    folder = edited_folder(tmp_path, "scheduler/scheduler_config.json", prediction_type="epsilon")
    with pytest.raises(ModelError, match="predicts 'epsilon'"):
        load_teacher(folder)


def test_unknown_processors_are_refused():
    from vdm_priors.harvest import HarvestRequest, harvest

    teacher = tiny_teacher(seed=7)
    before = dict(teacher.transformer.attn_processors)
    teacher.transformer.set_attn_processor(lambda *a, **k: None)
    with (
        pytest.raises(ModelError, match="transformer_blocks.0.attn1 .*function"),
        harvest(teacher, HarvestRequest(4)),
    ):
        pass
    teacher.transformer.set_attn_processor(before)
