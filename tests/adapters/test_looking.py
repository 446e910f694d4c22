"""Codec adapters under `inspect`, `visualize` and the alignment loss: their tokens have cells like any student's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from enhancer.adapters.opening import is_adapter, open_adapter
from enhancer.adapters.reading import ClipReader
from enhancer.adapters.schema import ReadingSettings
from enhancer.adapters.stages import run_stage
from enhancer.cli import app
from enhancer.console import Console
from enhancer.data.samples import Sample
from enhancer.inspection import inspect_clip
from enhancer.shipped import student_path
from enhancer.training import AlignmentSettings
from enhancer.visualize.gather import Gatherer, VisualizeKeys
from enhancer.visualize.stored import stored_view
from enhancer.visualize.views import density
from tests.adapters.codec_clips import motion_clip
from tests.adapters.test_preprocess import gop_clip
from tests.adapters.test_stages import SAMPLES, Clips, stage
from tests.adapters.toy import Adapter as Toy
from tests.enhancer.priors import prior_of
from tests.vlm_hooks.tiny_families import family_student
from vdm_priors.errors import ModelError
from vlm_hooks.adapters import find_adapter
from vlm_hooks.adapters.ema import Adapter as EMA
from vlm_hooks.adapters.model import AdapterModel
from vlm_hooks.alignment import align_batch
from vlm_hooks.capture import CaptureRequest, capture
from vlm_hooks.words import match_words

QUESTION = "Which way does the red disc move?"
SMALL = {"width": 16, "heads": 2, "layers": 1, "trunk_width": 8, "trunk_blocks": 1}
ADAPTERS = {
    "cope": (SMALL | {"motion_tokens": 1, "residual_tokens": 2}, {"clips": "keyed", "fuse": 8}),
    "himmel": (
        {"anchors": 2, "rows": 2, "columns": 3, "steps": 4, "width": 16, "ssm_blocks": 1, "trunk_width": 8,
         "trunk_blocks": 1, "context": 8},
        {"clips": "anchored", "anchors": 2, "fuse": 8},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return gop_clip(tmp_path_factory.mktemp("video"))


def saved(name: str, folder: Path) -> Path:
    """An untrained adapter on the shipped student, in a folder as a stage leaves it."""
    torch.manual_seed(0)
    settings, reading = ADAPTERS[name]
    kind = find_adapter(name)
    model = AdapterModel.create(student_path("world"), kind, kind.Config(**settings))
    ClipReader(ReadingSettings(size=[64, 64], **reading)).save(model.save_pretrained(folder))
    return folder


def inspected(folder: Path, video: Path, *flags: str) -> tuple[str, str]:
    """What the command prints, and its page."""
    page = folder.parent / "page.html"
    call = ["inspect", "--adapter", folder, "--video", video, "--text", QUESTION, "--out", page, *flags]
    environment = {"COLUMNS": "200", "ENHANCER_TRACEBACK": "0"}
    done = CliRunner().invoke(app, [str(part) for part in call], env=environment)
    assert done.exit_code == 0, done.output
    return done.output, page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ADAPTERS)
def test_inspect_draws_frames_and_motion_tokens_apart(name, video, tmp_path):
    """Every token of either kind once, at its own position; the words' attention to both adds up with the text's."""
    folder = saved(name, tmp_path / "adapter")
    said, page = inspected(folder, video, "--attention")
    model, reader = open_adapter(folder, "world")
    clip = reader.get(video)
    inputs = model.student.encode([clip], [model.student.prompt(QUESTION).text]).inputs
    runs = model.student.segments(inputs, [clip])[0]
    moving = [segment for segment, _ in runs if segment.moving]
    tokens = sum(segment.num_tokens for segment in moving)
    assert tokens and f"and {tokens} motion tokens in {len(moving)} runs" in said
    frames = sum(segment.num_tokens for segment, _ in runs if not segment.moving)
    assert page.count('class="cell"') == frames and f"= {frames}</dd>" in page
    drawn = re.findall(r"<h3>Motion tokens (\d+)(?:–(\d+))? · ([\d.]+)–([\d.]+) s</h3>", page)
    assert [int(first) for first, *_ in drawn] == [int(last) + 1 for _, last, *_ in [("", "-1"), *drawn[:-1]]]
    assert int(drawn[-1][1]) == tokens - 1 and [float(start) for *_, start, _ in drawn] == pytest.approx(
        [float(segment.grid.spans[0, 0]) for segment in moving], abs=0.006
    )
    cells = {"cope": len(moving), "himmel": 2 * 3 * len(moving)}[name]  # queries share the whole frame
    assert page.count('class="moving"') == cells
    shown = inspect_clip(model.student, video, clip, QUESTION, [], attention=True)
    assert sorted(shown.positions + [p for _, own in shown.motion for p in own]) == sorted(
        p for _, own in runs for p in own.tolist()
    )
    for on_frames, on_motion in zip(shown.attention.sum(dim=(1, 2, 3)), shown.on_motion, strict=True):
        assert 0 < on_motion and 0 < on_frames and on_frames + on_motion < 1
    assert page.count("% on motion tokens") == len(shown.attended)


def test_a_folder_that_does_not_say_how_clips_are_read_is_refused(tmp_path):
    folder = saved("himmel", tmp_path / "adapter")
    assert is_adapter(folder) and not is_adapter(tmp_path) and not is_adapter("world")
    (folder / "reading.json").unlink()
    with pytest.raises(ModelError, match="has no reading.json"):
        open_adapter(folder)


def test_visualize_shows_an_adapters_maps_beside_its_hosts(video, tmp_path):
    """The adapter's are those that `inspect` finds on its key frames; the host's are on frames of its own."""
    folder = saved("himmel", tmp_path / "adapter")
    sample = Sample("a", video, QUESTION, "NA")
    prior = prior_of(sample)
    view = stored_view(prior, "a")
    gatherer = Gatherer(VisualizeKeys(device="cpu"), Console(quiet=True))
    gatherer.keys.student.sampling.frames = 4
    for name, model in (("host", "world"), ("adapter", str(folder))):
        gatherer.add_student(view, prior, sample, name, model)
    host, adapter = (next(one for one in view.maps if one.name == name) for name in ("host", "adapter"))
    assert len(host.layers) == len(adapter.layers) == 4
    model, reader = open_adapter(folder)
    shown = inspect_clip(model.student, video, reader.get(video), QUESTION, [], attention=True)
    own = [n for n, word in enumerate(view.words) if word.text in {word.text for word in shown.attended}]
    assert len(own) == len(shown.attended) > 0
    for n, values in zip(own, shown.attention, strict=True):
        expected = density(values[None].numpy(), shown.grid)[0]
        torch.testing.assert_close(torch.tensor(adapter.maps[n]), torch.tensor(expected), atol=1e-3, rtol=1e-3)
    assert host.grid.shape == (2, 4, 6) and adapter.grid.shape == (2, 4, 4)  # the adapter's reading makes it square


def test_the_alignment_loss_reaches_an_adapter_and_falls(tmp_path):
    """Of a sequence with motion tokens among the frames': its gradient reaches EMA's fusion through the captured rows,
    and by training the rows come nearer to the prior."""
    torch.manual_seed(0)
    kind = EMA.Config(width=16, heads=2, fusion_heads=2, cells=4, patch=2, pooling=1, layers=1, prompt="")
    fused = AdapterModel.create(family_student("qwen2_5_vl"), EMA, kind)
    torch.nn.init.normal_(fused.adapter.fusion.ffn[-1].weight, std=0.1)  # it begins as 0, and passes nothing on
    clip, sample = motion_clip([2, 1]), SAMPLES[0]
    prompt, prior = fused.student.prompt(sample.question), prior_of(sample)
    encoding = fused.student.encode([clip], [prompt.text])
    grids, columns = fused.student.grids(encoding.inputs, [clip])
    match = match_words(prior.words, prior.text, prompt.text, encoding.offsets[0], prompt.question_start)
    request = CaptureRequest.from_positions([match.rows], columns)
    with capture(fused):
        fused(**encoding.inputs, motion_capture=request)
    loss = align_batch(request, [match], grids, [prior], torch.nn.Identity(), "l2", "row", "overlap").loss
    loss.backward()
    learning = {name for name, p in fused.adapter.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name.split(".")[0] for name in learning} == {"motion", "fusion"} and len(learning) > 10

    toy = AdapterModel.create(family_student("qwen2_5_vl"), Toy)
    settings = stage(steps=12, batch_size=4, alignment=AlignmentSettings(weight=20.0, aligner="identity"))
    run_stage(toy, settings, SAMPLES, Clips(), tmp_path, 0, priors=prior_of)
    losses = [json.loads(line)["alignment_loss"] for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert len(losses) == 12 and losses[-1] < 0.9 * losses[0], losses
