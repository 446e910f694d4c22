"""Extraction from clips to priors: words, maps, heads, batches, artifacts, refusals."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.vdm_priors.tiny_teacher import random_clip, tiny_teacher
from vdm_priors.attention_rows import probability_chunks
from vdm_priors.confidence import confidence_report, word_weights
from vdm_priors.errors import ClipError, RecipeError, SampleError
from vdm_priors.extract import KEPT_BYTES, ExtractionSettings, extract_priors, query_rows
from vdm_priors.harvest import Harvest, HarvestRequest, harvest
from vdm_priors.heads import BandMask, head_metrics
from vdm_priors.inversion import invert, reconstruct
from vdm_priors.prior import MotionPrior
from vdm_priors.tokens import motion_scores

TEXT = "The red circle's moving left, then stops."
FAST = ExtractionSettings(steps=2, reconstruction=False)


def test_prior_against_a_plain_run():
    """Maps by hand: invert, denoise, harvest, mean over all heads, mean over a word's tokens."""
    teacher, clip = tiny_teacher(), random_clip()
    settings = replace(FAST, head_selection=False, token_selection=False, frame_weight="token")
    (prior,) = extract_priors(teacher, [clip], [TEXT], settings)
    latents = teacher.encode_video(teacher.prepare_frames(clip.frames))
    embeds, offsets = teacher.encode_text([TEXT])
    empty, _ = teacher.encode_text([""])
    trajectory = invert(teacher, latents, empty, 2)
    with harvest(teacher, HarvestRequest(16, batch_index=[0])) as harvested:
        reconstruct(teacher, trajectory, embeds, empty)
    maps = harvested.t2v[0].mean(0).unflatten(1, (3, 4, 4))
    assert [word.text for word in prior.words] == ["The", "red", "circle's", "moving", "left", "then", "stops"]
    for word, found in zip(prior.words, prior.maps, strict=True):
        tokens = [i for i, (a, b) in enumerate(offsets[0]) if a < b and word.start <= a < word.end]
        torch.testing.assert_close(found, maps[tokens].mean(0), atol=1e-6, rtol=0)
    (weighted,) = extract_priors(teacher, [clip], [TEXT], replace(settings, frame_weight="span"))
    spans = prior.grid.spans[:, 1] - prior.grid.spans[:, 0]
    for n, seconds in enumerate(spans.tolist()):  # one frame, then four, four
        torch.testing.assert_close(weighted.maps[:, n], prior.maps[:, n] * (3 * seconds / float(spans.sum())))
    assert len([t for t in offsets[0] if 8 <= t[0] < 16 and t[1] > t[0]]) == 3  # circle ' s
    assert prior.grid == teacher.token_grid(clip.times, clip.duration, clip.box)
    assert torch.equal(prior.weight, torch.ones(7))


def test_head_and_token_selection(tmp_path):
    teacher = tiny_teacher()
    (prior,) = extract_priors(teacher, [random_clip()], [TEXT], FAST)
    heads = prior.provenance["head_scores"]
    assert sum(heads["selected"]) == 1 and all(len(heads[k]) == 2 for k in ("dfc", "tcs", "dsr", "score"))
    assert heads["selected"][max(range(2), key=lambda h: heads["score"][h])]
    words = prior.provenance["word_scores"]
    assert [w["text"] for w in words if w["selected"]] == [w.text for w in prior.words]
    assert 0 < len(prior.words) < len(words) == 7
    assert min(w["score"] for w in words if w["selected"]) >= max(
        w["score"] for w in words if not w["selected"]
    )
    prior.save(tmp_path / "prior.safetensors")
    assert MotionPrior.load(tmp_path / "prior.safetensors").words == prior.words
    (wide,) = extract_priors(teacher, [random_clip()], [TEXT], replace(FAST, head_scope="layer_head"))
    assert len(wide.provenance["head_scores"]["selected"]) == 4
    assert sum(wide.provenance["head_scores"]["selected"]) == 2


def test_words_can_be_the_scored_unit():
    teacher = tiny_teacher()
    everything = replace(FAST, token_unit="word", token_selection=False, frame_weight="token")
    (full,) = extract_priors(teacher, [random_clip()], [TEXT], everything)
    (prior,) = extract_priors(teacher, [random_clip()], [TEXT], replace(everything, token_selection=True))
    scores = motion_scores(full.maps)
    torch.testing.assert_close(
        torch.tensor([w["score"] for w in full.provenance["word_scores"]]), scores
    )
    best = sorted(scores.argsort(descending=True)[:4].tolist())  # ⌈0.5 · 7⌉
    assert [w.text for w in prior.words] == [full.words[i].text for i in best]


@pytest.mark.parametrize("direction", ["t2v", "v2t", "both"])
def test_a_batch_gives_what_single_clips_give(direction):
    teacher, settings = tiny_teacher(), replace(FAST, direction=direction)
    clips = [random_clip(seed=1), random_clip(height=20, width=70, seed=2)]
    texts = [TEXT, "Does it spin?"]
    together = extract_priors(teacher, clips, texts, settings)
    for clip, text, prior in zip(clips, texts, together, strict=True):
        (alone,) = extract_priors(teacher, [clip], [text], settings)
        assert alone.words == prior.words
        torch.testing.assert_close(alone.maps, prior.maps, atol=1e-6, rtol=1e-3)
    again = extract_priors(teacher, clips, texts, settings)
    assert all(torch.equal(a.maps, b.maps) for a, b in zip(together, again, strict=True))


def test_noise_harvest_against_a_plain_run():
    """Maps by hand at t = 125 and 375 of 1000 (two parts of the half below the ceiling); no batch changes the noise."""
    teacher, clip = tiny_teacher(), random_clip()
    settings = replace(
        FAST, harvest_at="noise", head_selection=False, token_selection=False, frame_weight="token", seed=3)
    told = []
    (prior,) = extract_priors(teacher, [clip], [TEXT], settings, on_step=lambda *step: told.append(step))
    assert told == [("noise", 0, 2), ("noise", 1, 2)]
    latents = teacher.encode_video(teacher.prepare_frames(clip.frames))
    embeds, offsets = teacher.encode_text([TEXT])
    with harvest(teacher, HarvestRequest(16)) as harvested:
        for step, t in enumerate((125, 375)):
            noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(3000 + step))
            level = teacher.alphas_cumprod[t].double()
            teacher.predict((level.sqrt() * latents + (1 - level).sqrt() * noise).float(), t, embeds)
    maps = harvested.t2v[0].mean(0).unflatten(1, (3, 4, 4))
    for word, found in zip(prior.words, prior.maps, strict=True):
        tokens = [i for i, (a, b) in enumerate(offsets[0]) if a < b and word.start <= a < word.end]
        torch.testing.assert_close(found, maps[tokens].mean(0), atol=1e-6, rtol=1e-4)


def test_inversion_harvest_runs_no_denoising():
    teacher = tiny_teacher()
    told = []
    settings = replace(FAST, harvest_at="inversion")
    (prior,) = extract_priors(
        teacher, [random_clip()], [TEXT], settings, on_step=lambda *step: told.append(step)
    )
    assert told == [("inversion", 0, 2), ("inversion", 1, 2)]
    assert prior.provenance["reconstruction"] == {"psnr_db": None, "latent_relative_l2": None}


def test_artifacts_and_reconstruction_quality():
    teacher, clip = tiny_teacher(), random_clip()
    settings = ExtractionSettings(steps=2)
    (kept,) = extract_priors(teacher, [clip], [TEXT], settings, keep=True)
    assert kept.frames.shape == kept.reconstruction.shape == (9, 32, 32, 3)
    assert kept.frames.dtype == kept.reconstruction.dtype == torch.uint8
    assert kept.inverted.shape == (3, 4, 8, 8)
    quality = kept.prior.provenance["reconstruction"]
    error = ((kept.frames.double() - kept.reconstruction.double()) / 255).square().mean()
    assert quality["psnr_db"] == pytest.approx(float(-10 * error.log10()), abs=0.05)
    assert quality["latent_relative_l2"] > 0
    (fast,) = extract_priors(teacher, [clip], [TEXT], FAST, keep=True)
    assert fast.reconstruction is None
    assert fast.prior.provenance["reconstruction"]["psnr_db"] is None
    assert fast.prior.provenance["reconstruction"]["latent_relative_l2"] == pytest.approx(
        quality["latent_relative_l2"]
    )


def test_provenance_says_what_was_seen():
    teacher = tiny_teacher()
    long_text = "Which way does the small green triangle move before it touches the big yellow square twice?"
    (prior,) = extract_priors(teacher, [random_clip()], [long_text], FAST)
    said = prior.provenance
    assert said["seconds"] == [i / 8 for i in range(9)] and said["source"] == "vdm"
    assert said["not_covered"][-1] == "twice" and "Which" not in said["not_covered"]
    assert said["fingerprint"] == teacher.fingerprint() and said["frame_size"] == [32, 32]
    assert set(said["versions"]) == {"torch", "diffusers", "transformers"}
    assert said["sampling"] == {"frames": 9, "duration": 1.125, "box": [0.0, 0.0, 1.0, 1.0]}
    assert said["model"] == teacher.folder.name and said["revision"] is None
    assert said["scheduler"]["class"] == "CogVideoXDDIMScheduler"
    assert said["scheduler"]["settings"]["prediction_type"] == "v_prediction"
    assert said["scheduler"]["settings"]["snr_shift_scale"] == 1.0
    assert said["seed"] == 0  # of the query rows
    assert said["confidence"] == confidence_report(prior.maps, prior.grid)
    assert [len(measure["words"]) for measure in said["confidence"].values()] == [len(prior.words)] * 2
    everything = replace(FAST, rows="all")
    assert extract_priors(teacher, [random_clip()], [TEXT], everything)[0].provenance["seed"] is None
    (sized,) = extract_priors(teacher, [random_clip()], [TEXT], FAST, size=(16, 48))
    assert sized.grid.shape == (3, 2, 6)


def test_a_hub_teacher_is_known_by_its_name_and_commit(monkeypatch):
    teacher = tiny_teacher()
    monkeypatch.setattr(type(teacher), "fingerprint", lambda self: "owner/name@" + "0123456789" * 4)
    (prior,) = extract_priors(teacher, [random_clip()], [TEXT], replace(FAST, head_selection=False))
    assert (prior.provenance["model"], prior.provenance["revision"]) == ("owner/name", "0123456789" * 4)


def test_sampled_rows_have_errors_and_all_rows_none():
    teacher = tiny_teacher()
    (sampled,) = extract_priors(teacher, [random_clip()], [TEXT], replace(FAST, rows=18))
    heads = sampled.provenance["head_scores"]
    assert heads["rows"] == [18, 48]
    assert all(len(errors) == 2 for errors in heads["error"].values())
    assert set(heads["error"]) == {"dfc", "tcs", "dsr", "score"}
    assert min(heads["error"]["dfc"]) > 0 and 0 <= heads["exchanged"] <= 1
    (exact,) = extract_priors(teacher, [random_clip()], [TEXT], replace(FAST, rows="all"))
    heads = exact.provenance["head_scores"]
    assert heads["rows"] == [48, 48] and heads["exchanged"] == 0
    assert set(sum(heads["error"].values(), [])) == {0.0}
    (few,) = extract_priors(teacher, [random_clip()], [TEXT], replace(FAST, rows=3))
    assert few.provenance["head_scores"]["error"] is None and few.provenance["head_scores"]["exchanged"] is None


@pytest.mark.parametrize("scope", ["head", "layer_head"])
@pytest.mark.parametrize("memory", [True, False])
def test_streamed_rows_judge_heads_as_kept_ones(monkeypatch, scope, memory):
    """All rows of a grid that is called large: nothing S×S is kept, and the metrics are those of kept rows."""
    teacher, clips = tiny_teacher(), [random_clip(seed=1), random_clip(seed=2)]
    settings = replace(FAST, steps=1, rows="all", head_scope=scope, memory=memory)
    kept = extract_priors(teacher, clips, [TEXT, "Does it spin?"], settings)
    monkeypatch.setattr("vdm_priors.extract.ALL_ROWS_BELOW", 48)
    monkeypatch.setattr(Harvest, "v2v", None)  # whoever asked for the whole map would fail
    few_rows = partial(probability_chunks, chunk_elements=1000)
    monkeypatch.setattr("vdm_priors.attention_rows.probability_chunks", few_rows)
    streamed = extract_priors(teacher, clips, [TEXT, "Does it spin?"], settings)
    for one, other in zip(kept, streamed, strict=True):
        ours, theirs = one.provenance["head_scores"], other.provenance["head_scores"]
        metrics = ("tcs", "dsr") if scope == "head" else ("dfc", "tcs", "dsr", "score")
        for name in metrics:  # of several layers' mean, the energies are the mean of theirs
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4), name
        assert theirs["rows"] == [48, 48]
        if scope == "layer_head":
            torch.testing.assert_close(other.maps, one.maps)


def test_rows_are_kept_where_their_sums_fit():
    """CogVideoX-5B: 48 heads, 17,550 vision tokens; and grids of less than 4096 tokens."""
    auto = ExtractionSettings()
    rows, streamed = query_rows(auto, 17550, 48)
    assert not streamed and 0.99 < 4 * 48 * 17550 * rows / KEPT_BYTES <= 1
    assert query_rows(auto, 17550, 12) == (512, False)
    assert query_rows(replace(auto, head_scope="layer_head"), 17550, 48 * 42) == (512, True)
    assert query_rows(replace(auto, rows=rows + 1), 17550, 48) == (rows + 1, True)
    assert query_rows(replace(auto, rows="all"), 17550, 48) == ("all", True)
    assert query_rows(auto, 4095, 4) == ("all", False)
    assert query_rows(auto, 4095, 48) == ("all", True)
    assert query_rows(replace(auto, rows=9999), 300, 4) == (9999, False)  # no more than there are


@pytest.mark.parametrize("order", ["frame", "place"])
def test_heads_are_judged_by_the_mask_that_is_named(order):
    teacher, clip = tiny_teacher(), random_clip()
    settings = replace(FAST, rows="all", mask="band", band_width=2.0, band_unit="places", band_order=order,
                       mask_own_frame=False, harvest_at="inversion")
    (prior,) = extract_priors(teacher, [clip], [TEXT], settings)
    latents, (embeds, _) = teacher.encode_video(teacher.prepare_frames(clip.frames)), teacher.encode_text([TEXT])
    with harvest(teacher, HarvestRequest(1, rows=torch.arange(48))) as harvested:
        invert(teacher, latents, embeds, 2)
    metrics = head_metrics(harvested.v2v[0], prior.grid, BandMask(2.0, "places", order, own_frame=False))
    assert prior.provenance["head_scores"]["dfc"] == pytest.approx(metrics.dfc.tolist(), rel=1e-5)


@pytest.mark.parametrize("layers", [[0], [-1], [1, 0]])
def test_layers_are_the_ones_named(layers):
    """Maps by hand: of all layers apart, the mean over the named ones."""
    teacher, clip = tiny_teacher(), random_clip()
    settings = replace(FAST, head_selection=False, token_selection=False, frame_weight="token", harvest_at="inversion")
    (prior,) = extract_priors(teacher, [clip], [TEXT], replace(settings, layers=layers))
    latents, (embeds, offsets) = teacher.encode_video(teacher.prepare_frames(clip.frames)), teacher.encode_text([TEXT])
    with harvest(teacher, HarvestRequest(16, head_scope="layer_head")) as harvested:
        invert(teacher, latents, embeds, 2)
    per_layer = harvested.t2v[0].unflatten(0, (2, 2))  # layers, heads
    maps = torch.stack([per_layer[layer].mean(0) for layer in layers]).mean(0).unflatten(1, (3, 4, 4))
    for word, found in zip(prior.words, prior.maps, strict=True):
        tokens = [i for i, (a, b) in enumerate(offsets[0]) if a < b and word.start <= a < word.end]
        torch.testing.assert_close(found, maps[tokens].mean(0), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["concentration", "mobility", "both"])
def test_confidence_weighs_words_and_leaves_their_maps(kind):
    teacher = tiny_teacher()
    (plain,) = extract_priors(teacher, [random_clip()], [TEXT], FAST)
    (gated,) = extract_priors(teacher, [random_clip()], [TEXT], replace(FAST, confidence=kind))
    assert torch.equal(gated.maps, plain.maps) and gated.words == plain.words
    assert torch.equal(gated.weight, word_weights(plain.maps, plain.grid, kind))
    assert (gated.weight < 1).all() and (plain.weight == 1).all()


def test_processors_are_restored_after_extraction():
    teacher = tiny_teacher()
    before = dict(teacher.transformer.attn_processors)
    extract_priors(teacher, [random_clip()], [TEXT], FAST)
    assert all(teacher.transformer.attn_processors[k] is p for k, p in before.items())


def test_refusals():
    teacher = tiny_teacher()
    with pytest.raises(ClipError, match="not 8. Sample 5 or 9"):
        extract_priors(teacher, [random_clip(8)], [TEXT], FAST)
    with pytest.raises(ClipError, match="same number of frames"):
        extract_priors(teacher, [random_clip(5), random_clip(9)], [TEXT, TEXT], FAST)
    for text in ("", "?!", "  "):
        with pytest.raises(SampleError, match="no word"):
            extract_priors(teacher, [random_clip()], [text], FAST)
    with pytest.raises(RecipeError, match="steps must lie in.*direction must be one of.*rows must match"):
        extract_priors(
            teacher, [random_clip()], [TEXT], ExtractionSettings(steps=0, direction="x", rows="some")
        )
    with pytest.raises(RecipeError, match=r"layers names \[2, -3\].*layers 0 to 1 \(-2 to -1"):
        extract_priors(teacher, [random_clip()], [TEXT], replace(FAST, layers=[0, 2, -3]))
    with pytest.raises(RecipeError, match="layers names no layer"):
        extract_priors(teacher, [random_clip()], [TEXT], replace(FAST, layers=[]))
    with pytest.raises(RecipeError, match="mask must be one of place, band.*confidence must be one of none"):
        extract_priors(teacher, [random_clip()], [TEXT], replace(FAST, mask="disc", confidence="off"))
    with pytest.raises(ValueError, match="one text per clip"):
        extract_priors(teacher, [random_clip()], [], FAST)
