"""Samples that show several videos, and a picture beside them: read, counted, encoded, captured, aligned, trained.

Where their tokens lie is in tests/vlm_hooks/test_families_geometry.py, what rows may say in test_samples.py.
"""

from __future__ import annotations

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from enhancer.checkpoints import identity
from enhancer.cli import app
from enhancer.collate import NOTES, Collator, TrainingClips, check_texts
from enhancer.data.samples import Picture, load_samples
from enhancer.runfolder import read_json, read_lines
from enhancer.training import AlignmentSettings, TrainSettings, train
from enhancer.video.clip import FrameCache, Sampling
from tests.enhancer.priors import prior_of
from tests.enhancer.tiny_run import recipe_values, write_data, write_video
from tests.vlm_hooks.tiny_families import family_student
from vdm_priors.errors import SampleError
from vdm_priors.grid import regrid
from vlm_hooks.alignment import align_batch, normalize_rows, row_losses
from vlm_hooks.capture import capture

SAMPLING = Sampling(frames=4)
FAMILIES = ["qwen2_5_vl", "internvl"]
FAST = TrainSettings(steps=2, batch_size=2, learning_rate_llm=3e-3, learning_rate_merger=3e-3,
                     learning_rate_vision=1e-3, log_every=1, warmup=0.0, schedule="constant")


def row(name: str, question: str, answer: str, **shown) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns, **shown}


BOTH = row("both", "<video>\n<image>\n<video>\nWhich of them stops first?", "the second", videos=["a.mp4", "b.mp4"],
           images=["p.png"])


def write_media(root):
    """Two clips of a second, of different size, and a picture."""
    write_video(root / "a.mp4", 8, seed=1)
    write_video(root / "b.mp4", 8, (32, 48), seed=2)
    cv2.imwrite(str(root / "p.png"), np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8))


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    root = tmp_path_factory.mktemp("several")
    write_media(root)
    rows = [row("one", "<video>\nWhere does it go?", "left", video="b.mp4"), BOTH]
    (root / "train.json").write_text(json.dumps(rows))
    return load_samples(root / "train.json", several=True)[0]


@pytest.fixture(scope="module")
def cache():
    return FrameCache()


def collated(student, samples, cache, priors):
    """The samples in one batch."""
    usable, prompts, problems = check_texts(samples, student)
    assert usable == samples and not problems
    clips = TrainingClips(usable, prompts, student, SAMPLING, cache)
    batch = Collator(student, prompts, priors, None)([clips[n] for n in range(len(samples))])
    return batch, batch.pop(NOTES)


def aligned(student, batch, notes):
    with capture(student.model), torch.no_grad():
        student.model(**batch, motion_capture=notes.request)
    return align_batch(notes.request, notes.matches, notes.grids, notes.priors, samples=notes.samples)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_video_is_aligned_with_its_own_prior(name, samples, cache):
    student = family_student(name)
    batch, notes = collated(student, samples, cache, prior_of)
    assert notes.samples == [0, 1, 1] and [len(match.pairs) for match in notes.matches] == [4, 5, 5]
    result = aligned(student, batch, notes)

    dense = family_student(name, attn="eager").model
    attention_bss = torch.stack(dense(**batch, output_attentions=True).attentions).mean(dim=(0, 2)).detach()
    videos = [video for of_sample in student.videos(batch) for video in of_sample]
    losses: list[list] = [[], []]
    for video, sample, grid, match, prior in zip(
        videos, notes.samples, notes.grids, notes.matches, notes.priors, strict=True
    ):
        for index, positions in match.pairs:
            row_s = attention_bss[sample, positions].mean(dim=0)
            row_fhw = regrid(row_s[video.positions].reshape(1, *video.shape), grid, prior.grid)
            losses[sample] += row_losses(normalize_rows(row_fhw), normalize_rows(prior.maps[index : index + 1]), "l2")
    expected = torch.stack([torch.stack(each).mean() for each in losses]).mean()
    torch.testing.assert_close(result.loss, expected)
    assert result.words_matched == result.words_total == 14

    exchanged = replace(notes, priors=[notes.priors[n] for n in (0, 2, 1)])
    again = align_batch(notes.request, notes.matches, notes.grids, exchanged.priors, samples=notes.samples)
    assert (again.loss - expected).abs() > 1e-4, "which prior is of which video makes no difference"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_video_without_a_prior_is_left_out_and_said(name, samples, cache):
    student = family_student(name)
    whole, second = (aligned(student, *collated(student, samples[1:], cache, priors)) for priors in (
        prior_of, lambda view: prior_of(view) if view.id == "both@2" else None))
    batch, notes = collated(student, samples[1:], cache, lambda view: prior_of(view) if view.id == "both" else None)
    first = aligned(student, batch, notes)
    assert [(remark.id, remark.reason) for remark in notes.remarks] == [
        ("both@2", "has no prior: this video is not aligned")]
    assert first.words_total == first.words_matched == 5 and whole.words_total == 10
    torch.testing.assert_close((first.loss + second.loss) / 2, whole.loss)


@pytest.mark.parametrize("name", [*FAMILIES, "llava_onevision"])
def test_the_length_that_is_checked_is_the_sequences(name, samples, cache, monkeypatch):
    student = family_student(name)
    batch, _ = collated(student, samples[1:], cache, None)
    length = batch["input_ids"].shape[1]
    usable, prompts, _ = check_texts(samples[1:], student)
    monkeypatch.setattr(type(student), "max_length", length - 1)
    with pytest.raises(SampleError, match=f"has {length} tokens .*4 frames of 32×32 .* for a picture of 64×40 pixels"):
        TrainingClips(usable, prompts, student, SAMPLING, cache)[0]
    monkeypatch.setattr(type(student), "max_length", length)
    assert TrainingClips(usable, prompts, student, SAMPLING, cache)[0].sample.id == "both"


def test_internvl_takes_a_samples_videos_with_equally_many_frames(samples, cache):
    student = family_student("internvl")
    usable, prompts, _ = check_texts(samples[1:], student)
    item = TrainingClips(usable, prompts, student, SAMPLING, cache)[0]
    item.shown[0] = replace(item.shown[0], frames=item.shown[0].frames[:2], times=item.shown[0].times[:2])
    with pytest.raises(SampleError, match="equally many frames only, but those of both have 2, 4"):
        Collator(student, prompts, None, None)([item])


def test_training_and_its_policies_for_missing_priors(samples, cache, tmp_path):
    def fit(folder, policy, priors):
        settings = replace(FAST, alignment=AlignmentSettings(missing_prior=policy))
        return train(family_student("qwen2_5_vl"), samples, settings, tmp_path / folder, priors, SAMPLING, cache)

    first = lambda view: prior_of(view) if view.id == "both" else None  # noqa: E731
    result = fit("ar", "ar_only", first)
    assert result.history[0]["words_matched"] == 5 and result.history[0]["alignment_loss"] > 0
    assert {remark.id for remark in result.remarks} == {"one", "both@2"} and not result.problems
    with pytest.raises(SampleError, match="2 samples have no prior .one, both@2"):
        fit("fail", "fail", first)
    result = fit("skip", "skip", first)
    assert [problem.id for problem in result.problems] == ["one"] and result.history[0]["words_matched"] == 5
    whole = fit("whole", "ar_only", prior_of)
    assert whole.history[0]["words_matched"] == 14 and whole.history[0]["ar_loss"] != result.history[0]["ar_loss"]


def test_a_training_is_known_by_all_that_its_samples_show(samples):
    def digests(samples, priors=None):
        model = torch.nn.Linear(1, 1)
        described = identity(FAST, samples, SAMPLING, 0, 1, model, priors)
        return described["samples"], described["priors"]

    both = samples[1]
    others = [both, replace(both, shown=both.shown[::-1]), replace(both, shown=()),
              replace(both, shown=(*both.shown[:1], Picture(both.video), *both.shown[2:]))]
    assert len({digests([sample])[0] for sample in others}) == 4
    changed = lambda view: prior_of(view, text="Which now?") if view.id == "both@2" else prior_of(view)  # noqa: E731
    assert digests([both], prior_of)[1] != digests([both], changed)[1]


def test_the_whole_job(tmp_path):
    """Priors of every video, the preflight's count, the training; a test question about several videos is refused."""
    data = write_data(tmp_path / "data", train=2, test=2)
    write_media(data)
    for split in ("train", "test"):
        rows = json.loads((data / f"{split}.json").read_text())
        (data / f"{split}.json").write_text(json.dumps([*rows, BOTH]))
    recipe = tmp_path / "r.yaml"
    arms = [{"name": "difference", "source": "frame_difference"}]
    recipe.write_text("# Purpose: a test\n" + yaml.safe_dump(recipe_values(tmp_path, arms=arms, examples=0)))
    student = family_student("qwen2_5_vl")
    loaded = load_samples(data / "train.json", several=True)[0]
    batch, _ = collated(student, loaded[2:], FrameCache(), None)
    said = CliRunner().invoke(app, ["validate", str(recipe)], env={"COLUMNS": "250"}).output
    said = " ".join(said.split())
    assert f"at most {batch['input_ids'].shape[1]} " in said and "longest: both" in said
    done = CliRunner().invoke(app, ["train", str(recipe)], env={"COLUMNS": "250"})
    assert done.exit_code == 0, done.output
    run = tmp_path / "runs" / "tiny"
    priors = {prior["sample_id"]: prior for prior in read_json(run / "priors.json", [])}
    assert priors.keys() == {"train0", "train1", "both", "both@2"}
    assert [priors[name]["video"].rsplit("/", 1)[1] for name in ("both", "both@2")] == ["a.mp4", "b.mp4"]
    history = read_lines(run / "arms" / "difference" / "seed0" / "history.jsonl")
    assert all(step["alignment_loss"] > 0 and step["words_matched"] for step in history)
    assert not read_lines(run / "arms" / "difference" / "seed0" / "remarks.jsonl")
    asked = CliRunner().invoke(app, ["run", str(recipe)], env={"COLUMNS": "250"})
    assert asked.exit_code == 0, asked.output
    skipped = [line for line in read_lines(run / "skipped.jsonl") if line["id"] == "both"]
    assert len(skipped) == 1 and "here a sample is one question about one video" in skipped[0]["reason"]
