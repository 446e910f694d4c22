"""Qwen2.5-VL as a student: prompts, batches, labels, where visual tokens lie.

What it has in common with every family is in test_families.py and test_families_geometry.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vlm_hooks.tiny_student import (
    Clip,
    make_clip,
    tiny_folder,
    tiny_student,
)
from vdm_priors.errors import ModelError, SampleError
from vdm_priors.words import split_words
from vlm_hooks.families import known_families, load_student
from vlm_hooks.words import match_words

VOCABULARIES = ["bytes", "qwen2"]


@pytest.fixture(scope="module", params=VOCABULARIES)
def student(request):
    return tiny_student(request.param)


@pytest.fixture(scope="module")
def small():
    return tiny_student("bytes")


# --- loading -----------------------------------------------------------------------------


def test_family_is_found_by_model_type(small):
    assert known_families()["qwen2_5_vl"].Student is type(small)
    assert small.model.config._attn_implementation == "sdpa"
    assert small.tokenizer is small.processor.tokenizer
    assert small.end_token == "<|im_end|>"


def test_unknown_or_missing_models_are_named(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        load_student(tmp_path / "nothing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="'bert'.*known: .*qwen2_5_vl"):
        load_student(tmp_path)
    incomplete = json.loads((tiny_folder() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(incomplete))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_student(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_named_as_the_models_fault(tmp_path, file):
    folder = Path(shutil.copytree(tiny_folder(), tmp_path / "model"))
    (folder / file).write_bytes((folder / file).read_bytes()[:900])
    with pytest.raises(ModelError, match="cannot be loaded .* A complete folder"):
        load_student(folder)


def test_weights_that_are_not_there_are_not_drawn_at_random(tmp_path):
    folder = Path(shutil.copytree(tiny_folder(), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("q_proj.weight"))
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="lack 1 weights"):
        load_student(folder)


def test_processor_of_another_model_is_refused(small):
    small.processor.video_processor.patch_size = 14
    try:
        with pytest.raises(ModelError, match="patch_size 8, but its processor 14"):
            small._check_processor()
    finally:
        small.processor.video_processor.patch_size = 8


# --- prompts -----------------------------------------------------------------------------


def test_prompt_has_one_video_and_says_where_the_question_is(student):
    question = "You are a helpful assistant."  # also stands in the template's system message
    prompt = student.prompt(question)
    assert prompt.text.count("<|video_pad|>") == 1
    assert prompt.text[prompt.question_start :].startswith(question)
    assert prompt.question_start > prompt.text.index("<|vision_end|>")
    assert prompt.text.endswith("<|im_start|>assistant\n")


def test_options_are_lettered_after_the_question(small):
    prompt = small.prompt("Which?", ["left", "right"], system="Be brief.")
    assert "Which?\nA. left\nB. right\nAnswer with the option's letter.<|im_end|>" in prompt.text
    assert prompt.text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert prompt.text[prompt.question_start :].startswith("Which?")
    with pytest.raises(SampleError, match="27 options"):
        small.prompt("Which?", ["x"] * 27)


def test_a_template_without_the_video_is_refused(small):
    template = small.processor.chat_template
    small.processor.chat_template = "{{ messages[0]['content'][1]['text'] }}"
    try:
        with pytest.raises(ModelError, match="does not write one video"):
            small.prompt("q?")
    finally:
        small.processor.chat_template = template


# --- batches -----------------------------------------------------------------------------


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_offsets_give_the_unexpanded_texts_characters(student, padding_side):
    clips = [make_clip(4), make_clip(5, 48, 32, seed=1)]
    prompts = [student.prompt("Où va l'éléphant 12 fois?").text, student.prompt("It?").text]
    encoding = student.encode(clips, prompts, ["à gauche", "up"], padding_side=padding_side)
    ids = encoding.inputs["input_ids"]
    for b in range(2):
        spans, text = encoding.offsets[b], encoding.texts[b]
        assert len(spans) == ids.shape[1]
        assert text == prompts[b] + ["à gauche", "up"][b] + "<|im_end|>"
        real = encoding.inputs["attention_mask"][b].bool()
        special = torch.isin(ids[b], torch.tensor(student.tokenizer.all_special_ids)) | ~real
        assert [span == (0, 0) for span in spans] == special.tolist()
        covered = sorted({c for start, end in spans for c in range(start, end)})
        parts = text
        for token in student.tokenizer.all_special_tokens:
            parts = parts.replace(token, "\0" * len(token))
        assert covered == [i for i, character in enumerate(parts) if character != "\0"]
        for (start, end), token in zip(spans, ids[b].tolist(), strict=True):
            piece = student.tokenizer.decode([token])
            if end > start and "\ufffd" not in piece:
                assert piece == text[start:end]


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_labels_are_the_answer_and_its_end(student, padding_side):
    prompts = [student.prompt("Where?").text, student.prompt("Where does it go then?").text]
    answers = ["to the left", "up"]
    encoding = student.encode([make_clip()] * 2, prompts, answers, padding_side=padding_side)
    for b, answer in enumerate(answers):
        labels = encoding.inputs["labels"][b]
        learnt = labels != -100
        assert student.tokenizer.decode(labels[learnt]) == answer + "<|im_end|>"
        assert torch.equal(labels[learnt], encoding.inputs["input_ids"][b][learnt])
        assert encoding.texts[b][encoding.answer_starts[b] :] == answer + "<|im_end|>"
    plain = student.encode([make_clip()] * 2, prompts)
    assert "labels" not in plain.inputs and plain.texts == prompts


@pytest.mark.parametrize("answer", ["", " up", "up\n"])
def test_answers_without_a_token_of_their_own_are_refused(small, answer):
    with pytest.raises(SampleError, match="sample clip-7"):
        small.encode([make_clip()], [small.prompt("q?").text], [answer], names=["clip-7"])


def test_a_prompt_that_swallows_the_answers_first_token_is_refused(student):
    if len(student.tokenizer) < 1000:
        pytest.skip("a byte vocabulary merges nothing")
    with pytest.raises(SampleError, match="token of its own"):
        student.encode([make_clip()], [student.prompt("q?").text + "le"], ["ft"])


def test_model_runs_on_the_batch_with_m_rope(small):
    clips = [make_clip(4), make_clip(5, 48, 32, seed=1)]
    prompts = [small.prompt("Where?").text, small.prompt("Where does it go?").text]
    inputs = small.encode(clips, prompts, ["up", "down"]).inputs
    with torch.no_grad():
        assert small.model(**inputs).loss.isfinite()
        flat = {k: v for k, v in inputs.items() if k != "mm_token_type_ids"}
        assert not torch.equal(small.model(**inputs).logits, small.model(**flat).logits)


@pytest.mark.parametrize(
    ("times", "duration", "seconds"),
    [([0.0, 0.5, 1.0, 1.5], 2.0, 1.0), ([1.0, 1.1, 1.2], 9.0, 0.2), ([0.0], 3.0, 6.0)],
)
def test_seconds_per_grid_are_the_true_ones(small, times, duration, seconds):
    clip = Clip(make_clip(len(times)).frames, times, duration)
    inputs = small.encode([clip], [small.prompt("q?").text]).inputs
    assert inputs["second_per_grid_ts"].tolist() == pytest.approx([seconds])


# --- where visual tokens lie ---------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 5, 8])
def test_an_index_encoded_video_points_back_to_the_grids_cells(small, frames):
    """Pixels hold (frame, cell row, cell column); the processor's patches must agree."""
    rows, cols = 2, 3
    video = np.zeros((frames, rows * 16, cols * 16, 3), np.uint8)
    video[..., 0] = np.arange(frames)[:, None, None] * 20
    video[..., 1] = np.arange(rows * 16)[None, :, None] // 16 * 100
    video[..., 2] = np.arange(cols * 16)[None, None, :] // 16 * 100
    clip = Clip(video, [i / 4 for i in range(frames)], frames / 4, box=(0.1, 0.2, 0.9, 0.8))
    inputs = small.encode([clip], [small.prompt("q?").text]).inputs
    (grid,), (columns,) = small.grids(inputs, [clip])
    assert grid.shape == ((frames + 1) // 2, rows, cols)
    assert torch.equal(columns, torch.arange(columns[0], columns[0] + grid.num_tokens))

    processor = small.processor.video_processor
    mean = torch.tensor(processor.image_mean)[:, None, None, None]
    std = torch.tensor(processor.image_std)[:, None, None, None]
    patches = inputs["pixel_values_videos"].reshape(-1, 4, 3, 2, 8, 8)  # token, merged, c, t, …
    pixels = (patches * std + mean) * 255
    for token in range(grid.num_tokens):
        (start, end), (top, left, bottom, right) = grid.cell(token)
        codes = pixels[token].permute(1, 2, 0, 3, 4).flatten(2)  # channel, frame, pixels
        assert (codes.std(dim=2) < 0.01).all()
        first, second = (codes[0, :, 0] / 20).round().int().tolist()
        row, col = (codes[1:, 0, 0] / 100).round().int().tolist()
        assert start <= clip.times[first] < end and start <= clip.times[second] < end
        assert second == min(first + 1, frames - 1)
        assert top == pytest.approx(0.1 + 0.8 * row / rows)
        assert bottom == pytest.approx(0.1 + 0.8 * (row + 1) / rows)
        assert left == pytest.approx(0.2 + 0.6 * col / cols)
        assert right == pytest.approx(0.2 + 0.6 * (col + 1) / cols)


@pytest.mark.parametrize(("height", "width"), [(70, 41), (200, 300), (20, 90)])
def test_resized_videos_keep_their_places(small, height, width):
    """A ramp over the frame has, in every token, the value of the token's centre."""
    video = np.zeros((2, height, width, 3), np.float64)
    video[..., 0] = ((np.arange(height) + 0.5) / height)[None, :, None]
    video[..., 1] = ((np.arange(width) + 0.5) / width)[None, None, :]
    clip = Clip((video * 255).round().astype(np.uint8), [0.0, 0.5], 1.0)
    inputs = small.encode([clip], [small.prompt("q?").text]).inputs
    (grid,), _ = small.grids(inputs, [clip])
    assert grid.num_tokens == small.num_video_tokens(2, height, width)
    processor = small.processor.video_processor
    means = inputs["pixel_values_videos"].reshape(grid.num_tokens, 4, 3, -1).mean(dim=(1, 3))
    centres = means * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)
    for token in range(grid.num_tokens):
        _, (top, left, bottom, right) = grid.cell(token)
        expected = torch.tensor([(top + bottom) / 2, (left + right) / 2])
        assert (centres[token, :2] - expected).abs().max() < 0.02


def test_the_models_features_come_in_the_grids_order():
    """Without its blocks the tower maps a token's own patches: change one cell, one feature."""
    student = tiny_student()
    for block in student.model.model.visual.blocks:
        for layer in (block.attn.proj, block.mlp.down_proj):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    clip = make_clip(4, 64, 96)
    changed = Clip(clip.frames.copy(), clip.times, clip.duration)
    row, col = 2, 5  # 16-pixel cells; windows of 32 pixels reorder tokens inside the tower
    changed.frames[2:, row * 16 : row * 16 + 16, col * 16 : col * 16 + 16] ^= 0xFF
    features = []
    for one in (clip, changed):
        inputs = student.encode([one], [student.prompt("q?").text]).inputs
        (grid,), _ = student.grids(inputs, [one])
        pixels, thw = inputs["pixel_values_videos"], inputs["video_grid_thw"]
        with torch.no_grad():
            features.append(student.model.model.get_video_features(pixels, thw).pooler_output[0])
    different = (features[0] != features[1]).any(dim=1).nonzero()[:, 0].tolist()
    assert different == [1 * 4 * 6 + row * 6 + col]
    (_, _), (top, left, _, _) = grid.cell(different[0])
    assert (top, left) == pytest.approx((row / 4, col / 6))


def test_grids_and_columns_of_an_uneven_padded_batch(small):
    clips = [make_clip(4), make_clip(5, 48, 32), make_clip(4)]
    prompts = [small.prompt(q).text for q in ("a longer question?", "q?", "Where?")]
    inputs = small.encode(clips, prompts, padding_side="left").inputs
    grids, columns = small.grids(inputs, clips)
    assert [g.shape for g in grids] == [(2, 2, 3), (3, 3, 2), (2, 2, 3)]
    assert grids[0] is grids[2]  # equal geometry is built once
    for b, positions in enumerate(columns):
        assert (inputs["input_ids"][b, positions] == small.processor.video_token_id).all()
        assert len(positions) == grids[b].num_tokens
    assert grids[1].spans[-1].tolist() == pytest.approx([1.75, 2.5])
    with pytest.raises(ModelError, match="same clips"):
        small.grids(inputs, clips[::-1][:2] + [make_clip(8)])


def test_words_of_the_question_are_found_in_the_encoded_batch(student):
    question = "Does the red ball pass the blue ball?"
    prompt = student.prompt(question, ["the red ball", "the blue ball"])
    encoding = student.encode([make_clip()], [prompt.text], ["A"])
    words = split_words(question)
    match = match_words(
        words, question, encoding.texts[0], encoding.offsets[0], prompt.question_start
    )
    assert not match.unmatched
    for index, positions in match.pairs:
        tokens = encoding.inputs["input_ids"][0, positions]
        assert student.tokenizer.decode(tokens).strip(" ?") == words[index].text
