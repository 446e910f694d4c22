"""A stage's training: beside the alignment loss, with LoRA, and from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from enhancer.adapters.schema import StageSettings, StageTraining
from enhancer.adapters.stages import is_done, run_stage, stage_summary
from enhancer.data.samples import Sample
from enhancer.training import AlignmentSettings, LoraSettings
from tests.adapters.codec_clips import motion_clip
from tests.enhancer.priors import prior_of
from tests.vlm_hooks.tiny_families import family_student
from vdm_priors.errors import SampleError, UserError
from vlm_hooks.adapters.cope import Adapter as CoPE
from vlm_hooks.adapters.cope import CoPEConfig
from vlm_hooks.adapters.ema import Adapter as EMA
from vlm_hooks.adapters.ema import EMAConfig
from vlm_hooks.adapters.model import AdapterModel

SMALL = EMAConfig(width=16, heads=2, fusion_heads=2, cells=4, patch=2, pooling=1, layers=1, prompt="")
SAMPLES = [
    Sample(f"s{n}", Path(f"{n}.mp4"), "Which way does it go?", answer)
    for n, answer in enumerate(["up", "down", "left", "up"])
]


class Clips:
    """A reader of random clips; steps: after each key frame, of the samples that have others than [2, 1]."""

    def __init__(self, steps=None):
        self.steps = steps or {}

    def save(self, folder):
        pass

    def get(self, video, sampling=None):
        number = int(Path(video).stem)
        return motion_clip(self.steps.get(f"s{number}", [2, 1]), seed=number)


def ema() -> AdapterModel:
    student = family_student("qwen2_5_vl")  # drawn at its first call
    torch.manual_seed(0)
    return AdapterModel.create(student, EMA, SMALL)


def cope() -> AdapterModel:
    student = family_student("qwen2_5_vl")
    torch.manual_seed(0)
    small = CoPEConfig(motion_tokens=1, residual_tokens=1, width=16, layers=1, heads=2, trunk_width=8, trunk_blocks=1)
    return AdapterModel.create(student, CoPE, small)


def stage(objective: str = "answer", **training) -> StageSettings:
    common = {
        "steps": 2,
        "batch_size": 2,
        "learning_rate_adapter": 1e-2,
        "learning_rate_llm": 1e-2,
        "log_every": 1,
        "warmup": 0.0,
    }
    return StageSettings("tuning", objective, training=StageTraining(**{**common, **training}))


def weights(model: AdapterModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_stage_with_lora_and_the_alignment_loss(tmp_path):
    """The adapter and LoRA's targets are trained, the rest of the host is not; what is saved is what was trained."""
    model, settings = (
        ema(),
        stage(lora=LoraSettings(rank=2, targets=["q_proj"]), alignment=AlignmentSettings(weight=1.0)),
    )
    before = weights(model)
    assert run_stage(model, settings, SAMPLES, Clips(), tmp_path, 0, priors=prior_of) == []
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["alignment_loss"] > 0 and row["ar_loss"] > 0 for row in rows)
    after = weights(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if name.startswith("host.")} == {
        name for name in before if name.endswith("q_proj.weight") and "language_model" in name
    }
    assert any(name.startswith("adapter.fusion") for name in changed) and any(
        n.startswith("adapter.motion") for n in changed
    )
    assert is_done(tmp_path) and stage_summary(tmp_path)["steps"] == 2
    again = weights(AdapterModel.from_pretrained(None, tmp_path / "model"))
    assert again.keys() == after.keys() and all(torch.equal(again[name], after[name]) for name in after)


@pytest.mark.parametrize("made, objective", [(ema, "answer"), (cope, "answer"), (cope, "pretraining")])
def test_an_interrupted_stage_goes_on_from_its_checkpoint(tmp_path, made, objective):
    """To the same bits, the means of batch norms (CoPE's) and the history among them."""
    whole = made()
    run_stage(whole, stage(objective), SAMPLES, Clips(), tmp_path / "whole", 0)

    def stop(done, total, text):
        if done == 2 and not seen:
            seen.append(done)
            raise KeyboardInterrupt

    seen: list[int] = []
    settings = stage(objective, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        run_stage(made(), settings, SAMPLES, Clips(), tmp_path / "stopped", 0, progress=stop)
    assert not is_done(tmp_path / "stopped") and (tmp_path / "stopped" / "checkpoints" / "checkpoint-1").is_dir()
    model, began = made(), []
    run_stage(model, settings, SAMPLES, Clips(), tmp_path / "stopped", 0, progress=lambda done, *_: began.append(done))
    assert began == [2]  # the first step was not made again
    resumed, straight = model.state_dict(), whole.state_dict()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "history.jsonl").read_text().splitlines()]
        for run in ("whole", "stopped")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert not (tmp_path / "stopped" / "checkpoints").exists()


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    """It is kept while a stage runs; with another rate, or other samples, it is not gone on from."""

    def stop(done, total, text):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(cope(), stage("pretraining", save_every=1), SAMPLES, Clips(), tmp_path, 0, progress=stop)
    other = stage("pretraining", save_every=1, learning_rate_adapter=1e-3)
    with pytest.raises(UserError, match="checkpoint of another training; what differs: .*learning_rate_adapter"):
        run_stage(cope(), other, SAMPLES, Clips(), tmp_path, 0)
    with pytest.raises(UserError, match="the samples or their order are others"):
        run_stage(cope(), stage("pretraining", save_every=1), SAMPLES[:3], Clips(), tmp_path, 0)


def test_what_an_objective_gives_on_held_out_clips_is_not_learnt(tmp_path):
    """Means over whole batches of 2; a clip without P-frames and the fifth clip, which fills no batch, take no part."""
    held_out = [Sample(f"h{n}", Path(f"{n}.mp4"), "", "up") for n in range(10, 16)]
    clips = Clips({"s12": [0]})
    alone, both = cope(), cope()
    run_stage(alone, stage("pretraining"), SAMPLES, clips, tmp_path / "alone", 0)
    left_out = run_stage(both, stage("pretraining"), SAMPLES, clips, tmp_path / "both", 0, held_out=held_out)
    assert [problem.id for problem in left_out] == ["h12"]
    straight = alone.state_dict()
    assert all(torch.equal(value, straight[name]) for name, value in both.state_dict().items())
    told = stage_summary(tmp_path / "both")
    assert {"test_loss", "test_recall1", "test_recall1_frame", "test_recall5"} <= set(told)
    objective = CoPE.OBJECTIVES["pretraining"](both, {}).eval()
    pairs = [[clips.get(f"{n}.mp4") for n in pair] for pair in ((10, 11), (13, 14))]
    with torch.no_grad():
        found = [objective(**objective.batch(pair, [])) for pair in pairs]
    for name in ("recall1_frame", "recall5_frame"):  # of frames alone, which no head has a part in
        assert told[f"test_{name}"] == pytest.approx(float(torch.stack([row[name] for row in found]).mean()))


def test_a_frozen_part_stays_as_it_is(tmp_path):
    model = ema()
    before = weights(model)
    run_stage(model, stage(learning_rate_llm=0.0, rates={"motion": 0.0}), SAMPLES, Clips(), tmp_path, 0)
    changed = {name for name, value in weights(model).items() if not torch.equal(before[name], value)}
    assert changed and all(name.startswith("adapter.fusion") for name in changed)
    assert not (tmp_path / "model" / "host").exists()


def test_clips_without_p_frames_are_left_out_of_pretraining(tmp_path):
    model, pretraining = cope(), stage("pretraining", steps=1, batch_size=4)
    still = Clips({"s1": [0]})
    assert [(p.id, p.reason[:18]) for p in run_stage(model, pretraining, SAMPLES, still, tmp_path, 0)] == [
        ("s1", "It has no P-frame,")
    ]
    with pytest.raises(SampleError, match="None of the 4 clips can be used: It has no P-frame"):
        run_stage(model, pretraining, SAMPLES, Clips({f"s{n}": [0] for n in range(4)}), tmp_path, 0)
