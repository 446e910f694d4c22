from __future__ import annotations

import json
import math
import shutil
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from enhancer import train_settings
from enhancer.checkpoints import identity
from enhancer.collate import NOTES, Collator, PriorCache, TrainingClips, check_texts, match_prior
from enhancer.data.samples import Sample
from enhancer.recipe import build, to_plain
from enhancer.recipe_schema import EnhanceRecipe
from enhancer.runfolder import changes
from enhancer.training import AlignmentSettings, LoraSettings, TrainSettings, remove_checkpoints, train
from enhancer.video.clip import FrameCache, Sampling
from enhancer.video.footage import Footage
from tests.enhancer.priors import prior_of
from tests.video.clips import write
from tests.vlm_hooks.tiny_student import tiny_student
from vdm_priors.errors import SampleError, UserError
from vlm_hooks.aligners import ALIGNERS
from vlm_hooks.alignment import GRIDS, LOSSES, NORMALIZATIONS
from vlm_hooks.student import PARTS

SAMPLING = Sampling(frames=4)
FAST = TrainSettings(
    steps=3, batch_size=2, learning_rate_llm=3e-3, learning_rate_merger=3e-3, learning_rate_vision=1e-3, log_every=1,
    warmup=0.0, schedule="constant",
)


def write_video(path, seed, frames=4):
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, 32, 32, 3), np.uint8)
    return write(path, pixels, rate=4)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    answers = ["up", "down", "to the left", "up", "round", "it stops"]
    return [Sample(f"s{n}", write_video(folder / f"{n}.mp4", n), f"Where goes ball {n}?", answer)
            for n, answer in enumerate(answers)]


@pytest.fixture(scope="module")
def cache():
    return FrameCache()


def run(samples, folder, cache, settings=FAST, priors=prior_of, student=None, **how):
    student = student or tiny_student()
    result = train(student, samples, settings, folder, priors, SAMPLING, cache, **how)
    return {name: p.detach().clone() for name, p in student.model.named_parameters()}, result


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


LAMBDA0 = replace(FAST, alignment=AlignmentSettings(weight=0.0))


def test_history_has_both_losses_and_the_answer_loss_falls(samples, cache, tmp_path):
    ticks = []
    settings = replace(FAST, steps=12, batch_size=6)
    _, result = run(samples, tmp_path, cache, settings, progress=lambda *tick: ticks.append(tick))
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert rows == result.history and [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        assert row["loss"] == pytest.approx(row["ar_loss"] + row["alignment_loss"], rel=1e-5)
        assert row["words_matched"] == row["words_total"] == 6 * 4 and 0 < row["video_mass"] < 1
    assert rows[-1]["ar_loss"] < 0.7 * rows[0]["ar_loss"]
    assert rows[-1]["alignment_loss"] < rows[0]["alignment_loss"]
    assert result.problems == [] and ticks[-1][:2] == (12, 12) and "alignment" in ticks[-1][2]


def test_a_linear_lambda_falls_to_nothing(samples, cache, tmp_path):
    settings = replace(FAST, steps=4, alignment=AlignmentSettings(weight=2.0, schedule="linear"))
    _, result = run(samples, tmp_path, cache, settings)
    weights = [(row["loss"] - row["ar_loss"]) / row["alignment_loss"] for row in result.history]
    assert weights == pytest.approx([2.0, 1.5, 1.0, 0.5], rel=1e-4)


def test_lambda_zero_captures_nothing_and_sees_the_same_batches(samples, cache, tmp_path):
    aligned, with_prior = run(samples, tmp_path / "a", cache)
    plain, without = run(samples, tmp_path / "b", cache, LAMBDA0)
    assert not same(aligned, plain)
    row, other = without.history[0], with_prior.history[0]
    assert row["alignment_loss"] is None and row["video_mass"] is None and row["loss"] == row["ar_loss"]
    # same samples, same weights at the first step: the same answer loss, bit for bit
    assert row["ar_loss"] == other["ar_loss"]


def test_a_seed_gives_the_same_weights_and_another_one_another_order(samples, cache, tmp_path):
    first, _ = run(samples, tmp_path / "a", cache, seed=1)
    again, _ = run(samples, tmp_path / "b", cache, seed=1)
    other, _ = run(samples, tmp_path / "c", cache, seed=2)
    assert same(first, again) and not same(first, other)


def gradients(samples, folder, cache, settings, priors=prior_of):
    """Gradients of the first step, caught before the optimizer."""
    from transformers import TrainerCallback

    from enhancer import trainer as module

    caught = {}

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            caught.update({name: p.grad.clone() for name, p in model.named_parameters()})

    class Watched(module.AlignedTrainer):
        def __init__(self, **how):
            super().__init__(**how)
            self.add_callback(Catch())
            caught["aligner"] = self.aligner

    settings = replace(settings, max_grad_norm=0.0)
    original, module.AlignedTrainer = module.AlignedTrainer, Watched
    try:
        _, result = run(samples, folder, cache, settings, priors)
    finally:
        module.AlignedTrainer = original
    del caught["aligner"]
    return caught, result.history[0]


def test_accumulation_changes_no_gradient(samples, cache, tmp_path):
    # answers of different lengths, and a sample without a prior would break a mean of means
    def priors(sample):
        return None if sample.id == "s2" else prior_of(sample)

    settings = replace(FAST, steps=1)
    one, row_one = gradients(samples, tmp_path / "a", cache, replace(settings, batch_size=6), priors)
    six, row_six = gradients(samples, tmp_path / "b", cache, replace(settings, batch_size=1, accumulate=6), priors)
    assert len(one) == len(six) > 10
    for name, gradient in one.items():
        assert torch.allclose(gradient, six[name], rtol=1e-3, atol=1e-6 + 1e-4 * float(gradient.abs().max())), name
    for key in ("loss", "ar_loss", "alignment_loss", "video_mass"):
        assert row_one[key] == pytest.approx(row_six[key], rel=1e-5)


@pytest.mark.parametrize("kind", ["pointwise", "row", "conv3d", "identity"])
def test_every_aligner_trains(samples, cache, tmp_path, kind):
    settings = replace(FAST, steps=1, alignment=AlignmentSettings(aligner=kind, layers=[-1]))
    _, result = run(samples, tmp_path, cache, settings)
    assert math.isfinite(result.history[0]["alignment_loss"])


def test_gradient_norms_are_those_of_each_loss(samples, cache, tmp_path):
    """Every log_every steps, over all accumulated batches, and no weight changes by being looked at."""
    settings = replace(FAST, steps=4, batch_size=3, accumulate=2, log_every=2, gradient_checkpointing=True)
    looked, result = run(samples, tmp_path / "a", cache, settings)
    norms = [(row["ar_grad_norm"], row["alignment_grad_norm"]) for row in result.history]
    assert norms[0] == norms[2] == (None, None) and min(norms[1] + norms[3]) > 0
    without = replace(settings, alignment=AlignmentSettings(gradient_norms="none"))
    unseen, other = run(samples, tmp_path / "b", cache, without)
    assert same(looked, unseen) and other.history[1]["ar_grad_norm"] is None
    # with λ alone, what the last layer's attention gets is the alignment's gradient: |g(ar + λ·al) - g(ar)| = λ·|g(al)|
    once = replace(settings, steps=1, log_every=1, accumulate=1, batch_size=6)
    caught = {}
    for where in ("last", "all"):
        for weight in (1.0, 3.0):
            chosen = replace(once, alignment=AlignmentSettings(weight=weight, gradient_norms=where))
            caught[weight], row = gradients(samples, tmp_path / f"{where}{weight}", cache, chosen)
        aligned = {name: (caught[3.0][name] - caught[1.0][name]) / 2 for name in caught[1.0]}
        reached = [name for name in aligned if where == "all" or ".layers.2.self_attn." in name]
        if where == "last":  # the alignment reaches a layer by its queries and keys alone
            reached = [name for name in reached if "q_proj" in name or "k_proj" in name]
        norm = torch.cat([aligned[name].flatten() for name in reached]).norm()
        assert row["alignment_grad_norm"] == pytest.approx(float(norm), rel=1e-3)
        answers = {name: caught[1.0][name] - aligned[name] for name in aligned}
        of_last = [f".layers.2.{part}" for part in ("mlp", "post", "self_attn.v_", "self_attn.o_")]
        after = [*of_last, "language_model.norm", "lm_head"]  # what the answer alone reaches
        both = [name for name in reached if not any(part in name for part in after)]
        norm = torch.cat([answers[name].flatten() for name in both]).norm()
        assert row["ar_grad_norm"] == pytest.approx(float(norm), rel=1e-3)


def test_history_says_how_long_the_data_was_waited_for(samples, cache, tmp_path, monkeypatch):
    get = FrameCache.get

    def slow(self, *args):
        time.sleep(0.05)
        return get(self, *args)

    monkeypatch.setattr(FrameCache, "get", slow)
    _, result = run(samples, tmp_path, cache)
    # the loader fetches a batch ahead, so that the last step of an epoch waits for nothing
    assert sum(row["data_seconds"] for row in result.history) >= 6 * 0.05
    assert all(row["data_seconds"] <= row["seconds"] for row in result.history)


LORA = replace(FAST, lora=LoraSettings(rank=4, alpha=8.0, dropout=0.1), learning_rate_vision=0.0)


def test_adapters_alone_train_in_their_part_and_are_merged(samples, cache, tmp_path):
    student = tiny_student()
    before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    after, result = run(samples, tmp_path, cache, LORA, student=student)
    assert before.keys() == after.keys() and type(student.model) is type(tiny_student().model)  # plain again
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    targets = {name for name in before if ".language_model.layers." in name and name.split(".")[-2] in LORA.lora.targets
               and name.endswith("weight")}
    mergers = {name for name, _ in student.parts()["merger"]}
    assert moved == targets | mergers and len(targets) == 7 * 3
    for name in targets:  # a change of rank 4
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 4
    assert result.history[-1]["alignment_grad_norm"] > 0
    with pytest.raises(UserError, match="no linear layer of llm is called queries; there are .*q_proj"):
        run(samples, tmp_path / "b", cache, replace(FAST, lora=LoraSettings(targets=["q_proj", "queries"])))


def test_adapters_resume_and_their_checkpoints_are_small(samples, cache, tmp_path):
    settings = replace(LORA, steps=4, save_every=2, learning_rate_merger=0.0)
    whole, _ = run(samples, tmp_path / "a", cache, settings)
    saved = load_file(tmp_path / "a" / "checkpoints" / "checkpoint-2" / "trained.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert not (tmp_path / "a" / "checkpoints" / "checkpoint-2" / "model.safetensors").exists()
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "checkpoint-4")
    resumed, result = run(samples, tmp_path / "a", cache, settings)
    assert result.start_step == 2 and same(whole, resumed)
    finished, result = run(samples, tmp_path / "a", cache, settings)
    assert result.start_step == 4 and same(whole, finished)


def test_learning_rate_zero_freezes_a_part(samples, cache, tmp_path):
    student = tiny_student()
    before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    after, _ = run(samples, tmp_path, cache, replace(FAST, learning_rate_vision=0.0), student=student)
    for part, members in student.parts().items():
        moved = [not torch.equal(before[name], after[name]) for name, _ in members]
        assert not any(moved) if part == "vision" else all(moved), part
    assert all(p.requires_grad and p.grad is None for p in student.model.parameters())


def test_parameter_groups(samples, cache, tmp_path, monkeypatch):
    from enhancer.trainer import AlignedTrainer

    groups = []
    original = AlignedTrainer.create_optimizer

    def spy(self, model=None):
        optimizer = original(self, model)
        groups[:] = [(group["weight_decay"], len(group["params"]), {p.ndim > 1 for p in group["params"]})
                     for group in optimizer.param_groups]
        return optimizer

    monkeypatch.setattr(AlignedTrainer, "create_optimizer", spy)
    student = tiny_student()
    run(samples, tmp_path, cache, replace(FAST, steps=1), student=student)
    assert all(matrices == {decay > 0} for decay, _, matrices in groups)
    # the aligner has its own optimizer
    assert sum(count for _, count, _ in groups) == len(list(student.model.parameters()))


def test_a_workers_batch_arrives_as_it_was_sent(samples, cache):
    """In one shared file, and not one a tensor, of which a batch's priors and grids have hundreds."""
    from multiprocessing.reduction import ForkingPickler

    student = tiny_student()
    usable, prompts, _ = check_texts(samples[:2], student)
    clips = TrainingClips(usable, prompts, student, SAMPLING, cache)
    sent = Collator(student, prompts, PriorCache(prior_of), [0, 2])([clips[0], clips[1]])[NOTES]
    message = bytes(ForkingPickler.dumps(sent))
    assert message.count(b"rebuild_tensor") == 1
    arrived = ForkingPickler.loads(message)
    assert type(arrived) is type(sent) and arrived.ids == sent.ids and arrived.matches == sent.matches
    for name in ("rows", "row_mask", "columns", "column_mask"):
        assert torch.equal(getattr(arrived.request, name), getattr(sent.request, name))
    assert arrived.request.layers == [0, 2]
    for ours, theirs in zip(arrived.priors, sent.priors, strict=True):
        assert torch.equal(ours.maps, theirs.maps) and torch.equal(ours.weight, theirs.weight)
        assert ours.words == theirs.words and ours.grid.to_dict() == theirs.grid.to_dict()
    assert [grid.to_dict() for grid in arrived.grids] == [grid.to_dict() for grid in sent.grids]


@pytest.mark.parametrize("aligned", [True, False])
def test_resume_gives_the_same_weights_bit_for_bit(samples, cache, tmp_path, aligned):
    settings = replace(FAST if aligned else LAMBDA0, steps=5, schedule="cosine", save_every=2)
    whole, full = run(samples, tmp_path / "whole", cache, settings)

    def stop(done, total, text):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(samples, tmp_path / "cut", cache, settings, progress=stop)
    half_written = tmp_path / "cut" / "checkpoints" / "checkpoint-4"
    half_written.mkdir()
    resumed, result = run(samples, tmp_path / "cut", cache, settings)
    assert result.start_step == 2
    assert same(whole, resumed)
    steps = [json.loads(line) for line in (tmp_path / "cut" / "history.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in steps] == [row["loss"] for row in full.history]
    finished, result = run(samples, tmp_path / "cut", cache, settings)
    assert result.start_step == 5 and same(whole, finished) and len(result.history) == 5
    config = (tmp_path / "cut" / "checkpoints" / "checkpoint-5" / "config.json").read_text()
    assert "motion_capture" not in config
    remove_checkpoints(tmp_path / "cut")
    assert not (tmp_path / "cut" / "checkpoints").exists()


def test_a_checkpoint_of_another_training_is_not_taken(samples, cache, tmp_path):
    settings = replace(LAMBDA0, steps=2, save_every=1)
    run(samples, tmp_path, cache, settings)
    with pytest.raises(UserError, match="what differs: seed: 0 -> 5"):
        run(samples, tmp_path, cache, settings, seed=5)
    _, result = run(samples, tmp_path, cache, replace(settings, resume="never"), seed=5)
    assert result.start_step == 0 and len(result.history) == 2


def test_resume_takes_a_path(samples, cache, tmp_path):
    """A checkpoint, or the folder of a student or of a run that was moved; then the student's own."""
    settings = replace(FAST, steps=4, save_every=2)
    place = Path("arms", "vdm", "seed0")
    whole, full = run(samples, tmp_path / "old" / place, cache, settings)
    moved = (tmp_path / "old").rename(tmp_path / "moved")
    shutil.rmtree(moved / place / "checkpoints" / "checkpoint-4")
    for number, path in enumerate((moved, moved / place, moved / place / "checkpoints" / "checkpoint-2")):
        folder = tmp_path / f"new{number}" / place
        resumed, result = run(samples, folder, cache, replace(settings, resume=str(path)))
        assert result.start_step == 2 and same(whole, resumed)
        assert [row["loss"] for row in result.history] == [row["loss"] for row in full.history]
    assert run(samples, folder, cache, replace(settings, resume=str(path)))[1].start_step == 4  # its own is further
    with pytest.raises(UserError, match="training.resume: .*nowhere is no complete checkpoint.*to auto"):
        run(samples, folder, cache, replace(settings, resume=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="what differs: seed: 0 -> 1"):
        run(samples, tmp_path / "other" / place, cache, replace(settings, resume=str(moved)), seed=1)
    with pytest.raises(ValueError, match="resume is auto, never or a path, not false"):
        TrainSettings(resume="False")


def test_a_run_may_be_continued_with_other_workers_or_checkpoints():
    def recipe(**training):
        return to_plain(build(EnhanceRecipe, {"name": "a", "data": {"root": "d"}, "arms": [{"name": "b"}],
                                              "training": training}))

    free = dict(resume="somewhere", workers=3, save_every=7, log_every=2, report_to="wandb")
    assert changes(recipe(), recipe(**free)) == []
    assert changes(recipe(), recipe(**free, steps=7)) == ["training.steps: 400 -> 7"]


def test_a_checkpoints_files_run_no_code(samples, cache, tmp_path):
    settings = replace(LAMBDA0, steps=2, save_every=1)
    run(samples, tmp_path, cache, settings)
    checkpoint = tmp_path / "checkpoints" / "checkpoint-1"
    shutil.rmtree(checkpoint.with_name("checkpoint-2"))

    class Touches:
        def __reduce__(self):
            return Path.touch, (tmp_path / "code-was-run",)

    for name in ("optimizer.pt", "rng_state.pth"):
        before = (checkpoint / name).read_bytes()
        torch.save({"state": Touches()}, checkpoint / name)
        with pytest.raises(UserError, match="checkpoint-1: the optimizer's or the random state cannot be read"):
            run(samples, tmp_path, cache, settings)
        (checkpoint / name).write_bytes(before)
    assert not (tmp_path / "code-was-run").exists()


def test_a_tracker_gets_the_rows(samples, cache, tmp_path, monkeypatch):
    """TensorBoard's callback of transformers, with a writer that keeps what it is told."""
    import types

    import transformers.integrations.integration_utils as integrations

    told = {}

    class Writer:
        def __init__(self, log_dir):
            told["folder"] = log_dir

        def add_scalar(self, name, value, step):
            told.setdefault(name, {})[step] = value

        def add_text(self, *args):
            pass

        flush = close = add_text

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(integrations, "is_tensorboard_available", lambda: True)
    settings = replace(FAST, steps=4, log_every=2, report_to="tensorboard")
    with pytest.raises(UserError, match="report_to is tensorboard, which is not installed: `pip install tensorboard`"):
        run(samples, tmp_path, cache, settings)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: object())
    _, result = run(samples, tmp_path, cache, settings)
    assert told["folder"] == str(tmp_path / "tensorboard")
    for key in ("loss", "ar_loss", "alignment_loss", "ar_grad_norm", "video_mass", "data_share"):
        assert told[f"train/{key}"] == {step: result.history[step - 1][key] for step in (2, 4)}, key


def test_trackers_are_those_of_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(train_settings.TRACKERS) <= set(INTEGRATION_TO_CALLBACK)


def test_a_checkpoint_of_another_model_or_other_priors_is_not_taken(samples, cache, tmp_path):
    settings = replace(FAST, steps=2, save_every=1)
    run(samples, tmp_path, cache, settings)
    other = tiny_student()
    with torch.no_grad():
        next(p for p in reversed(list(other.model.parameters())) if p.ndim == 1)[0] += 0.5  # one number of one norm
    with pytest.raises(UserError, match="starting weights"):
        run(samples, tmp_path, cache, settings, student=other)

    def brighter(sample):
        prior = prior_of(sample)
        return replace(prior, maps=prior.maps * (2.0 if sample is samples[-1] else 1.0))

    with pytest.raises(UserError, match="priors"):
        run(samples, tmp_path, cache, settings, priors=brighter)
    with pytest.raises(UserError, match="priors"):
        run(samples, tmp_path, cache, settings, priors=Keyed("a"))
    assert run(samples, tmp_path, cache, settings)[1].start_step == 2


def test_samples_are_told_apart_by_every_picture_and_by_their_span():
    first, second, third = Path("0.png"), Path("1.png"), Path("2.png")
    shown = [first, Footage((first,)), Footage((first,), 1.0), Footage((first,), 1.0, 1000.0001),
             Footage((first,), 1.0, 1000.0002), Footage((first, second), fps=2.0), Footage((first, third), fps=2.0)]
    found = {identity(FAST, [Sample("a", video, "q", "a")], SAMPLING, 0, 1, torch.nn.Linear(1, 1), None)["samples"]
             for video in shown}
    assert len(found) == len(shown)


class Keyed:
    """Priors as a store has them: told apart by their keys, without reading them all."""

    def __init__(self, name):
        self.name, self.read = name, []

    def key(self, sample):
        return f"{self.name}-{sample.id}"

    def __call__(self, sample):
        self.read.append(sample.id)
        return prior_of(sample)


def test_priors_with_keys_are_told_apart_by_them(samples, cache, tmp_path):
    settings, priors = replace(FAST, steps=1, save_every=1), Keyed("a")
    run(samples, tmp_path, cache, settings, priors=priors)
    assert len(priors.read) < len(samples)  # only those of a batch: none was read for its identity
    assert run(samples, tmp_path, cache, settings, priors=Keyed("a"))[1].start_step == 1
    with pytest.raises(UserError, match="priors"):
        run(samples, tmp_path, cache, settings, priors=Keyed("b"))


def test_gradient_checkpointing_and_workers_change_nothing(samples, cache, tmp_path):
    plain, _ = run(samples, tmp_path / "a", cache)
    checkpointed, _ = run(samples, tmp_path / "b", cache, replace(FAST, gradient_checkpointing=True))
    workers, _ = run(samples, tmp_path / "c", cache, replace(FAST, workers=1))
    assert same(plain, workers)
    for name in plain:
        assert torch.allclose(plain[name], checkpointed[name], atol=1e-5), name


def test_a_bad_clip_is_listed_and_replaced_by_the_next(samples, cache, tmp_path):
    bad = replace(samples[1], id="bad", video=tmp_path / "none.mp4")
    control = replace(samples[2], id="words", question="Where <|im_end|> is it?")
    settings = replace(LAMBDA0, steps=3)
    _, result = run([samples[0], bad, samples[2], control], tmp_path / "run", cache, settings, priors=None)
    reasons = {p.id: p.reason for p in result.problems}
    assert set(reasons) == {"bad", "words"}
    assert "none.mp4" in reasons["bad"] and "in its place" in reasons["bad"] and "control token" in reasons["words"]
    with pytest.raises(SampleError, match="None of the 1 training samples"):
        run([bad], tmp_path / "b", cache, LAMBDA0)
    with pytest.raises(SampleError, match="no sample to train on: words"):
        run([control], tmp_path / "c", cache, LAMBDA0)


def test_a_sample_that_is_too_long_is_told_before_encoding(samples, cache):
    student = tiny_student()
    long = replace(samples[0], id="long", question="why " * 600)
    usable, prompts, _ = check_texts([long, samples[1]], student)
    clips = TrainingClips(usable, prompts, student, SAMPLING, cache)
    item = clips[0]
    assert item.sample.id == "s1" and "2048" in item.problems[0].reason
    # the check counts as the processor does
    batch = Collator(student, prompts, None, None)([clips[1]])
    text = len(student.tokenizer(prompts["s1"].text + "down" + student.end_token)["input_ids"])
    assert batch["input_ids"].shape[1] == text - 1 + student.num_video_tokens(*item.clips[0].frames.shape[:3])
    assert batch[NOTES].ids == ["s1"] and batch[NOTES].request is None


def test_the_row_that_gives_the_answer_is_captured_too(samples, cache):
    student = tiny_student()
    usable, prompts, _ = check_texts(samples[:3], student)
    items = [TrainingClips(usable, prompts, student, SAMPLING, cache)[n] for n in range(3)]
    words = Collator(student, prompts, prior_of, None)(items)[NOTES]
    batch = Collator(student, prompts, prior_of, None, answer_row=True)(items)
    for b, match in enumerate(batch[NOTES].matches):
        learnt = (batch["labels"][b] != -100).nonzero()[0].item()  # a row gives the token that follows it
        assert match.answer == learnt - 1 and match.rows == [*words.matches[b].rows, learnt - 1]
        assert batch[NOTES].request.rows[b][batch[NOTES].request.row_mask[b]].tolist() == match.rows
    elsewhere = Collator(student, prompts, lambda s: prior_of(s, text="of nothing here"), None, answer_row=True)(items)
    assert [match.answer for match in elsewhere[NOTES].matches] == [None] * 3


def test_missing_priors(samples, cache, tmp_path):
    def some(sample):
        return prior_of(sample) if sample.id in ("s0", "s1") else None

    def policy(name):
        return replace(FAST, alignment=AlignmentSettings(missing_prior=name))

    _, result = run(samples, tmp_path / "a", cache, policy("ar_only"), some)
    assert {r.id for r in result.remarks} == {"s2", "s3", "s4", "s5"} and result.problems == []
    _, result = run(samples, tmp_path / "b", cache, policy("skip"), some)
    assert {p.id for p in result.problems} == {"s2", "s3", "s4", "s5"}
    with pytest.raises(SampleError, match="4 samples have no prior .s2, s3"):
        run(samples, tmp_path / "c", cache, policy("fail"), some)
    with pytest.raises(UserError, match="no prior to align to"):
        run(samples, tmp_path / "d", cache, FAST, None)


def test_priors_of_other_texts_stop_the_run(samples, cache, tmp_path):
    def of_another_text(sample):
        return prior_of(sample, text="another question")

    with pytest.raises(UserError, match="6 of 6 words .*neither the sample's question nor its answer"):
        run(samples[:3], tmp_path, cache, replace(FAST, batch_size=3, steps=1), of_another_text)


def test_a_nan_loss_names_the_batch(samples, cache, tmp_path):
    student = tiny_student()
    with torch.no_grad():
        student.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"became nan at step 1, in the batch of the samples s\d, s\d"):
        run(samples, tmp_path, cache, LAMBDA0, student=student)


def test_dropped_token_types_stop_a_training_without_alignment_too(samples, cache, tmp_path, monkeypatch):
    make = Collator.__call__
    monkeypatch.setattr(Collator, "__call__", lambda self, items: {
        name: value for name, value in make(self, items).items() if name != "mm_token_type_ids"})
    with pytest.raises(UserError, match="no mm_token_type_ids.*one dimension"):
        run(samples, tmp_path, cache, LAMBDA0)


def test_an_alignment_that_can_teach_nothing_stops_the_run(samples, cache, tmp_path):
    frozen = replace(FAST, learning_rate_llm=0.0, learning_rate_merger=0.0, learning_rate_vision=0.0)
    with pytest.raises(UserError, match="All learning rates are 0"):
        run(samples, tmp_path, cache, frozen)

    def detached(request):
        return torch.zeros(len(request.rows), request.rows.shape[1], request.columns.shape[1])

    from vlm_hooks.capture import CaptureRequest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CaptureRequest, "mean", detached)
        with pytest.raises(UserError, match="no gradient"):
            run(samples, tmp_path, cache)


def test_models_that_are_loaded_after_a_zero3_training_are_whole(samples, cache, tmp_path):
    """transformers shards every model that it loads while the settings of a ZeRO-3 training are known to it."""
    from transformers.integrations import is_deepspeed_zero3_enabled, set_hf_deepspeed_config

    class Zero3:
        def is_zero3(self):
            return True

    known = Zero3()
    run(samples, tmp_path, cache, replace(LAMBDA0, steps=1), None, progress=lambda *_: set_hf_deepspeed_config(known))
    assert not is_deepspeed_zero3_enabled()


def test_a_recipes_choices_are_all_that_there_is():
    """They are written again beside the keys, so that reading a recipe imports no torch."""
    choices = {key.name: key.metadata["choices"] for key in fields(AlignmentSettings)}
    for key, known in (("loss", LOSSES), ("aligner", ALIGNERS), ("normalize", NORMALIZATIONS), ("compare_on", GRIDS)):
        assert sorted(choices[key]) == sorted(known), key
    assert train_settings.PARTS == PARTS


def test_settings_that_do_not_fit_the_student(samples, cache, tmp_path):
    with pytest.raises(UserError, match="decoder layers 0 to 2"):
        run(samples, tmp_path, cache, replace(FAST, alignment=AlignmentSettings(layers=[3])))
    eager = tiny_student(attn="eager")
    with pytest.raises(UserError, match="cannot be captured"):
        run(samples, tmp_path, cache, student=eager)


def test_an_unwritable_folder(samples, cache, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        run(samples, tmp_path / "file" / "run", cache)


# -- words of question and answer -----------------------------------------------------


def characters(text):
    return [(i, i + 1) for i in range(len(text))]


def test_words_of_a_prior_of_question_and_answer():
    question, answer = "Where to?", "to Rome"
    prompt = f"<q>{question}</q>{answer}"
    sample = Sample("x", None, question, answer)
    prior = prior_of(sample, text=f"{question} {answer}")
    match = match_prior(prior, (question, 3), (answer, 16), prompt, characters(prompt))
    assert [(prior.words[i].text, "".join(prompt[p] for p in positions)) for i, positions in match.pairs] == [
        ("Where", "Where"), ("to", "to"), ("to", "to"), ("Rome", "Rome")
    ]  # fmt: skip
    assert match.pairs[1][1][0] < 12 < match.pairs[2][1][0] and match.unmatched == []
    only_answer = match_prior(prior_of(sample, text=answer), (question, 3), (answer, 16), prompt, characters(prompt))
    assert [positions[0] for _, positions in only_answer.pairs] == [16, 19]


def test_prior_cache_is_bounded():
    loads = []

    def load(sample):
        loads.append(sample.id)
        return prior_of(sample)

    a, b = (Sample(name, None, "one two", "x") for name in "ab")
    cache = PriorCache(load, max_bytes=prior_of(a).maps.nbytes)
    for sample in (a, a, b, a):
        cache(sample)
    assert loads == ["a", "b", "a"]
