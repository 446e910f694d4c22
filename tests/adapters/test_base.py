"""The adapters' core over every family: what the host sees, where tokens lie, and that nothing else is changed."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from tests.adapters.codec_clips import motion_clip
from tests.adapters.toy import Adapter as Toy
from tests.vlm_hooks.tiny_families import SAVERS, family_folder, family_student
from tests.vlm_hooks.tiny_student import Clip, make_clip, save_tiny_student
from vdm_priors.errors import ModelError, SampleError, UserError
from vlm_hooks.adapters import find_adapter, known_adapters
from vlm_hooks.adapters.base import MOTION_TOKEN
from vlm_hooks.adapters.ema import Adapter as EMA
from vlm_hooks.adapters.ema import EMAConfig
from vlm_hooks.adapters.model import AdapterModel, add_tokens
from vlm_hooks.adapters.te_fusion import Adapter as Frames
from vlm_hooks.capture import capture
from vlm_hooks.capture_request import CaptureRequest
from vlm_hooks.families import load_student
from vlm_hooks.mrope import block_positions, timed_positions
from vlm_hooks.streams import StreamPlaces

SMALL = EMAConfig(width=16, heads=2, fusion_heads=2, cells=4, patch=2, pooling=1, layers=1, prompt="")
QUESTION = "What moves?"
FEW = ["qwen2_5_vl", "qwen3_vl", "internvl"]  # an absolute temporal axis, blocks with DeepStack, one dimension


@pytest.fixture(scope="module", params=list(SAVERS))
def student(request):
    return family_student(request.param)


@pytest.fixture(scope="module", params=FEW)
def toy(request):
    torch.manual_seed(0)
    return AdapterModel.create(family_student(request.param), Toy).eval()


def prompts(student, texts=(QUESTION,)):
    return [student.prompt(text).text for text in texts]


def moving(model: AdapterModel) -> AdapterModel:
    """Fusions begin as zero: with other numbers, motion reaches the tokens."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def close(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


# ---- the host as it is ---------------------------------------------------------------------------


def test_without_fusion_it_is_the_stock_host_bit_for_bit(student):
    """The same ids, positions and logits, and the same words, whether the host or the adapter writes the sequence."""
    clips = [make_clip(4, seed=0), make_clip(4, seed=1)]
    asked = prompts(student, [QUESTION, QUESTION])
    stock = student.encode(clips, asked, ["left", "down"])
    model = AdapterModel.create(student, Frames, Frames.Config(k=1)).eval()
    ours = model.student.encode(clips, asked, ["left", "down"])
    assert torch.equal(ours.inputs["input_ids"], stock.inputs["input_ids"])
    assert torch.equal(ours.inputs["labels"], stock.inputs["labels"])
    assert ours.offsets == stock.offsets and ours.texts == stock.texts
    with torch.no_grad():
        assert torch.equal(model(**ours.inputs).logits, student.model(**stock.inputs).logits)
    for (grid, at), (theirs, there) in zip(
        zip(*model.student.grids(ours.inputs, clips)), zip(*student.grids(stock.inputs, clips))
    ):
        assert grid == theirs and torch.equal(at, there)
    prompt = model.student.encode(clips, asked).inputs
    plain = student.encode(clips, asked).inputs
    words = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**prompt, **words), student.model.generate(**plain, **words))


def test_ema_before_training_is_the_host_on_key_frames(student):
    clip = motion_clip([2, 1, 3], size=(32, 32))
    model = AdapterModel.create(student, EMA, SMALL).eval()
    depth = student.frames_per_token()
    # frames as far apart as the key frames, each for itself; Qwen3 writes the mean time of a pair
    timestamps = student.model.config.model_type == "qwen3_vl"
    times = [n + (0 if timestamps else m / depth) for n in range(3) for m in range(depth)]
    stock = student.encode([Clip(np.repeat(clip.frames, depth, axis=0), times, 3.0)], prompts(student)).inputs
    ours = model.student.encode([clip], prompts(student)).inputs
    assert torch.equal(ours["input_ids"], stock["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**ours).logits, student.model(**stock).logits)
        assert not torch.equal(moving(model)(**ours).logits, student.model(**stock).logits)


def test_the_host_is_as_it_was(toy):
    """After a call no hook is left, and a question without the adapter's tokens is answered as ever."""
    inputs = toy.student.encode([motion_clip([1, 2])], prompts(toy.student)).inputs
    text = toy.base.tokenizer("some words", return_tensors="pt")
    with torch.no_grad():
        before = toy.host(**text).logits
        toy(**inputs)
        assert torch.equal(toy.host(**text).logits, before)
    assert not toy.host.get_input_embeddings()._forward_hooks


# ---- batches, padding, cache ----------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_what_each_sample_gives(toy, side):
    clips, texts = (
        [motion_clip([1, 2], seed=1), motion_clip([2, 1], seed=2)],
        [QUESTION, "Which way does the red one go?"],
    )
    both = toy.student.encode(clips, prompts(toy.student, texts), padding_side=side).inputs
    with torch.no_grad():
        logits = toy(**both).logits
        for n, (clip, text) in enumerate(zip(clips, texts, strict=True)):
            alone = toy(**toy.student.encode([clip], prompts(toy.student, [text])).inputs).logits[0]
            close(logits[n][both["attention_mask"][n].bool()], alone)


def test_generation_with_and_without_cache_padding_and_beams(toy):
    clips = [motion_clip([1, 2], seed=1), motion_clip([2, 1], seed=2)]
    texts = prompts(toy.student, [QUESTION, "Which way does the red one go?"])
    both = toy.student.encode(clips, texts, padding_side="left").inputs
    length = both["input_ids"].shape[1]
    options = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    cached = toy.generate(**both, **options)[:, length:]
    for n in range(2):
        alone = toy.student.encode(clips[n : n + 1], texts[n : n + 1]).inputs
        assert torch.equal(toy.generate(**alone, **options)[0, alone["input_ids"].shape[1] :], cached[n])
    beams = toy.generate(**both, **options, num_beams=2)[:, length:]
    one = toy.student.encode(clips[1:], texts[1:]).inputs
    assert torch.equal(toy.generate(**one, **options, num_beams=2)[0, one["input_ids"].shape[1] :], beams[1])
    # without a cache: the next token of the whole sequence, one after the other
    answer = toy.base.tokenizer.decode(cached[1][:1])
    if toy.base.tokenizer(answer)["input_ids"] == cached[1][:1].tolist():
        with torch.no_grad():
            further = toy.student.encode(clips[1:], [texts[1] + answer]).inputs
            assert toy(**further).logits[0, -1].argmax() == cached[1][1]


def test_what_is_continued_from_the_cache_is_as_if_it_had_been_there(toy):
    """Options are scored like this: ids and the keys and values of a prompt, nothing else."""
    clip, (text,) = motion_clip([1, 2]), prompts(toy.student)
    prompt = toy.student.encode([clip], [text]).inputs
    whole = toy.student.encode([clip], [text], ["left"]).inputs
    labels = whole.pop("labels")
    count = int((labels != -100).sum())
    with torch.no_grad():
        full = toy(**whole).logits[:, -count:]
        past = toy(**prompt, use_cache=True).past_key_values
        continued = toy(input_ids=whole["input_ids"][:, -count:], past_key_values=past, use_cache=True).logits
    close(continued, full)


# ---- gradients ------------------------------------------------------------------------------------


def test_gradient_checkpointing_gives_the_same_gradients(toy):
    inputs = toy.student.encode([motion_clip([1, 2])], prompts(toy.student), ["left"]).inputs
    found = []
    for checkpointing in (False, True):
        toy.train()
        if checkpointing:
            toy.gradient_checkpointing_enable()
        toy.zero_grad()
        toy(**inputs, use_cache=False).loss.backward()
        found.append({name: p.grad.clone() for name, p in toy.named_parameters() if p.grad is not None})
    toy.gradient_checkpointing_disable()
    toy.eval().zero_grad()
    assert found[0].keys() == found[1].keys() and found[0]["adapter.project.weight"].abs().sum() > 0
    for name, gradient in found[0].items():
        close(found[1][name], gradient, atol=1e-6)


def test_the_stock_trainer_trains_and_saves_it(tmp_path):
    model = AdapterModel.create(family_student("qwen2_5_vl"), Toy)
    for parameter in model.host.parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(model.adapter.state_dict())
    clips = [motion_clip([1, 2], seed=n) for n in range(4)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=2,
        learning_rate=1e-2,
    )
    collate = lambda rows: model.student.encode(rows, prompts(model.student) * len(rows), ["left"] * len(rows)).inputs  # noqa: E731
    Trainer(model=model, args=arguments, train_dataset=clips, data_collator=collate).train()
    assert not torch.equal(model.adapter.state_dict()["project.weight"], before["project.weight"])
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()


# ---- where tokens lie -------------------------------------------------------------------------------


def test_cells_of_motion_tokens(toy):
    clip = motion_clip([1, 2])
    inputs = toy.student.encode([clip], prompts(toy.student)).inputs
    (segments,) = toy.student.segments(inputs, [clip])
    assert [segment.moving for segment, _ in segments] == [False, True, False, True]
    ids = inputs["input_ids"][0]
    for segment, at in segments:
        token = MOTION_TOKEN if segment.moving else toy.base.frame_token
        assert set(ids[at].tolist()) == {toy.base.tokenizer.convert_tokens_to_ids(token)}
    moved = segments[1][0].grid
    assert moved.shape == (2, 1, 1) and moved.spans.tolist() == [[0.0, 0.5], [0.5, 1.0]]
    assert toy.student.clip_tokens(clip) >= toy.student.visual_tokens(clip) == sum(s.num_tokens for s, _ in segments)


def test_motion_tokens_lie_at_their_true_time():
    """Qwen2.5-VL's temporal axis counts tokens_per_second; labels lie at the time of what they name."""
    model = AdapterModel.create(
        family_student("qwen2_5_vl"), EMA, EMAConfig(**{**SMALL.to_dict(), "prompt": "Segment {number}: "})
    )
    clip = motion_clip([1, 1, 1])
    clip.times = [0.0, 2.0, 7.0]
    inputs = model.student.encode([clip], prompts(model.student)).inputs
    rate = model.host.config.vision_config.tokens_per_second
    start = inputs["input_ids"][0].tolist().index(model.base.tokenizer.convert_tokens_to_ids("<|vision_start|>")) + 1
    time, row, column = inputs["position_ids"][:, 0]
    for (segment, at), seconds in zip(model.student.segments(inputs, [clip])[0], clip.times, strict=True):
        assert (time[at] == start + math.floor(rate * seconds)).all()
        assert row[at].min() == start and column[at].min() == start
        label = range(int(at[0]) - len(model.base.tokenizer(segment.label)["input_ids"]), int(at[0]))
        assert [time[n] for n in label] == [time[at[0]]] * len(label)
        assert [row[n] - start for n in label] == list(range(len(label)))


runs = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4)


def places_of(runs, before, after):
    """Text, then for each run a label and a block of cells a second later than the one before, then text."""
    rows = [(False, False, 0, 0.0, 0, 0)] * before
    for n, (label, height, width) in enumerate(runs):
        rows += [(True, False, n, float(n), 0, 0)] * label
        rows += [(True, True, n, float(n), r, c) for r in range(height) for c in range(width)]
    rows += [(False, False, len(runs) - 1, 0.0, 0, 0)] * after
    stream, visual, block, time, row, column = map(torch.tensor, zip(*rows, strict=True))
    return StreamPlaces(stream, visual, block, time.double(), row, column)


@settings(max_examples=25, deadline=None)
@given(runs, st.integers(0, 3), st.integers(0, 3))
def test_positions_against_plain_loops(runs, before, after):
    places = places_of(runs, before, after)
    timed, blocks, index = (
        timed_positions(places, lambda seconds: (2 * seconds).long()),
        block_positions(places),
        before,
    )
    current, extent = before, 1 + max(max(label - 1, height - 1, width - 1) for label, height, width in runs)
    for n, (label, height, width) in enumerate(runs):
        for k in range(label):
            assert timed[:, index].tolist() == [before + 2 * n, before + k, before + k]
            assert blocks[:, index].tolist() == [current] * 3
            index, current = index + 1, current + 1
        for r in range(height):
            for c in range(width):
                assert timed[:, index].tolist() == [before + 2 * n, before + r, before + c]
                assert blocks[:, index].tolist() == [current, current + r, current + c]
                index += 1
        current += max(height, width)
    for k in range(after):
        assert timed[:, index + k].tolist() == [before + extent + k] * 3
        assert blocks[:, index + k].tolist() == [current + k] * 3


def test_attention_is_captured_over_an_adapters_frames(toy):
    """Captured rows times nothing of ours: with and without capture the logits are the same, and rows add up to less
    than 1 over the frames' tokens."""
    clip = motion_clip([1, 2])
    inputs = toy.student.encode([clip], prompts(toy.student)).inputs
    _, (columns,) = toy.student.grids(inputs, [clip])
    request = CaptureRequest.from_positions([[inputs["input_ids"].shape[1] - 1]], [columns])
    with torch.no_grad(), capture(toy):
        seen = toy(**inputs, motion_capture=request).logits
    with torch.no_grad():
        assert torch.equal(toy(**inputs).logits, seen)
    assert 0 < request.mean()[0].sum() < 1


# ---- saving and refusing ----------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(tmp_path):
    clip = motion_clip([2, 1])
    model = moving(AdapterModel.create(family_student("internvl"), EMA, SMALL)).eval()
    inputs = model.student.encode([clip], prompts(model.student)).inputs
    folder = model.save_pretrained(tmp_path / "adapter")
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 1e6 and not (folder / "host").exists()
    again = AdapterModel.from_pretrained(family_folder("internvl", "bytes"), folder).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_a_host_trained_with_it_is_kept_with_it(tmp_path):
    clip = motion_clip([2, 1])
    model = moving(AdapterModel.create(family_student("internvl"), EMA, SMALL)).eval()
    with torch.no_grad():
        model.host.get_input_embeddings().weight.mul_(1.5)
    inputs = model.student.encode([clip], prompts(model.student)).inputs
    folder = model.save_pretrained(tmp_path / "adapter")
    for host in (None, family_folder("internvl", "bytes"), folder / "host"):
        again = AdapterModel.from_pretrained(host, folder).eval()
        with torch.no_grad():
            assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_another_host_is_refused_with_both_names(tmp_path):
    folder = AdapterModel.create(family_student("internvl"), EMA, SMALL).save_pretrained(tmp_path / "adapter")
    other = save_tiny_student(tmp_path / "other", seed=7)
    for host in (other, family_folder("llava_onevision", "bytes")):
        with pytest.raises(ModelError, match="made for the host") as error:
            AdapterModel.from_pretrained(host, folder)
        assert str(family_folder("internvl", "bytes")) in str(error.value) and str(host) in str(error.value)
    sibling = load_student(family_folder("internvl", "bytes"))
    with torch.no_grad():
        sibling.model.lm_head.weight.add_(1.0)
    with pytest.raises(ModelError, match="the weights are others"):
        AdapterModel.from_pretrained(sibling, folder)
    with pytest.raises(ModelError, match="has no host with it"):
        AdapterModel.from_pretrained(None, folder)


def test_weights_of_another_recipe_are_refused(tmp_path):
    folder = AdapterModel.create(family_student("internvl"), EMA, SMALL).save_pretrained(tmp_path / "adapter")
    text = (folder / "adapter.json").read_text()
    (folder / "adapter.json").write_text(text.replace('"width": 16', '"width": 32'))
    with pytest.raises(
        ModelError, match=r"weights of another recipe.*project\.weight: \(32, 16\) in the file, \(32, 32\)"
    ):
        AdapterModel.from_pretrained(family_folder("internvl", "bytes"), folder)
    (folder / "adapter.json").write_text(text.replace('"width"', '"breadth"'))
    with pytest.raises(ModelError, match="breadth: no setting"):
        AdapterModel.from_pretrained(family_folder("internvl", "bytes"), folder)
    (folder / "adapter.json").unlink()
    with pytest.raises(ModelError, match="is no adapter's folder"):
        AdapterModel.from_pretrained(family_folder("internvl", "bytes"), folder)


def test_placeholders_are_added_once_and_saved(tmp_path):
    student = family_student("qwen2_5_vl")
    rows = student.embedding_rows()
    model = AdapterModel.create(student, Toy)
    assert model.token_ids == {MOTION_TOKEN: rows} and student.embedding_rows() == rows + 1
    assert add_tokens(student, (MOTION_TOKEN,)) == {MOTION_TOKEN: rows} and student.embedding_rows() == rows + 1
    weight = student.model.get_input_embeddings().weight
    assert torch.equal(weight[rows], weight[student.tokenizer.convert_tokens_to_ids("<|video_pad|>")])
    model.base.processor.save_pretrained(tmp_path)
    assert type(student.tokenizer).from_pretrained(tmp_path).convert_tokens_to_ids(MOTION_TOKEN) == rows


def test_what_a_collator_dropped_is_named(toy):
    inputs = toy.student.encode([motion_clip([1])], prompts(toy.student)).inputs
    del inputs["toy_motion"]
    with pytest.raises(ModelError, match="no toy_motion"):
        toy(**inputs)


def test_clips_of_another_batch_are_refused(toy):
    inputs = toy.student.encode([motion_clip([1, 1])], prompts(toy.student)).inputs
    fewer = toy.student.encode([motion_clip([1])], prompts(toy.student)).inputs
    with pytest.raises((ModelError, ValueError, RuntimeError)):
        toy(**{**inputs, "toy_motion": fewer["toy_motion"]})


def test_texts_are_checked_as_ever(toy):
    with pytest.raises(SampleError, match="0 videos"):
        toy.student.encode([motion_clip([1])], ["no video at all"])
    with pytest.raises(SampleError, match="never cut off"):
        toy.student.encode([motion_clip([1])], prompts(toy.student), max_length=8)


def test_adapters_are_found_by_their_names():
    assert {"ema", "te_fusion", "cope", "himmel"} <= set(known_adapters())
    with pytest.raises(UserError, match="known: cope, ema"):
        find_adapter("emma")
    with pytest.raises(UserError, match="fusion must be one of"):
        EMAConfig(fusion="cross")
    with pytest.raises(UserError, match="layers must be at least 0"):
        EMAConfig(layers=-1)
