"""One contract for every family: video and text in and out, where tokens lie, and clips that are refused.

Small random models of diffusers' real classes, saved and loaded as folders (test_families_loading.py).
"""

from __future__ import annotations

import copy

import pytest
import torch

from tests.vdm_priors.family_contract import MASKED, TEXTS, every_family, latents_of, middle, text_of, times_of
from tests.vdm_priors.tiny_families import FAMILIES, FRAMES, SIZE, tiny_family
from tests.vdm_priors.tiny_teacher import generator, random_clip
from vdm_priors.conditioning import MaskedText, join_texts, repeat_text
from vdm_priors.errors import ClipError, ModelError
from vdm_priors.extract import ExtractionSettings, extract_priors
from vdm_priors.families import load_teacher
from vdm_priors.grid import frame_spans
from vdm_priors.harvest import HarvestRequest, harvest
from vdm_priors.inversion import invert, probe
from vdm_priors.words import split_words, tokens_of_words


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


def test_texts_join_and_repeat():
    text = tiny_family("hunyuan").encode_text(TEXTS)[0]
    one = tiny_family("hunyuan").encode_text(TEXTS[:1])[0]
    joined = join_texts([repeat_text(one, 2), text])
    assert len(joined) == 4 and torch.equal(joined.mask[1], text.mask[0])
    torch.testing.assert_close(joined.embeds[0], joined.embeds[2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(joined.pooled[1], joined.pooled[2], atol=1e-5, rtol=1e-5)
