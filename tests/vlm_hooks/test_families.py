"""The contract of a student family, over all families of vlm_hooks/families: text, batches, tokens, capture, export.

Where visual tokens lie is shown in test_families_geometry.py.
"""

from __future__ import annotations

import functools
import json

import pytest
import torch

from tests.vlm_hooks.tiny_families import SAVERS, family_folder, family_student
from tests.vlm_hooks.tiny_student import Clip, make_clip
from vdm_priors.errors import ModelError, SampleError
from vdm_priors.words import split_words
from vlm_hooks.capture import CaptureRequest, capture
from vlm_hooks.export import export, prove_export
from vlm_hooks.families import find_family, known_families, load_student
from vlm_hooks.words import match_words

LAYERS = 3
QUESTION = "Où va l'éléphant 12 fois?"
SIDES = ["right", "left"]
families = pytest.mark.parametrize("name", list(SAVERS))


@functools.cache
def shared(name, vocabulary="bytes"):
    """A student that no test changes."""
    return family_student(name, vocabulary)


def two_clips(name):
    """Clips of different shape; of different length where the family bears it in one batch."""
    return [make_clip(4), make_clip(4 if name == "llava_onevision" else 5, 48, 32, seed=1)]


def batch(name, student=None, side="right", answers=("left", "up")):
    student, clips = student or shared(name), two_clips(name)
    prompts = [student.prompt("Where does it go?").text, student.prompt("It?").text]
    encoding = student.encode(clips, prompts, list(answers), padding_side=side)
    return encoding.inputs, student.grids(encoding.inputs, clips)[1]


# ---- loading ------------------------------------------------------------------------------


def test_every_family_file_has_a_small_model_here():
    assert {known_families()[shared(name).model.config.model_type] for name in SAVERS} == set(known_families().values())


@families
def test_a_saved_folder_is_loaded_by_its_family(name):
    student = shared(name)
    assert type(student) is find_family(family_folder(name)).Student
    assert student.end_token == "<|im_end|>" and student.max_length == 2048
    assert student.model.config.get_text_config()._attn_implementation == "sdpa"


@families
def test_a_processor_of_another_model_is_refused(name):
    student = family_student(name)
    for name, ours, _ in student.same_in_both():
        assert ours is not None, name
    student.same_in_both = lambda: [("patch_size", 8, 14)]
    with pytest.raises(ModelError, match="patch_size 8, but its processor 14"):
        student._check_processor()


@pytest.mark.parametrize(("name", "attribute", "value", "message"), [
    ("qwen3_vl", "patch_size", 14, "patch_size 8, but its processor 14"),
    ("internvl", "size", {"height": 48, "width": 48}, "image_size"),
    ("internvl", "do_center_crop", True, "do_center_crop False, but its processor True"),
    ("llava_onevision", "do_center_crop", True, "do_center_crop False, but its processor True"),
    ("llava_onevision", "do_resize", False, "do_resize"),
])  # fmt: skip
def test_a_video_processor_that_cuts_or_sizes_otherwise_is_refused(name, attribute, value, message):
    student = family_student(name)
    setattr(student.processor.video_processor, attribute, value)
    with pytest.raises(ModelError, match=message):
        student._check_processor()


@pytest.mark.parametrize(("name", "config", "message"), [
    ("bert", {"model_type": "bert"}, "'bert'.*known: internvl, llava_onevision, qwen2_5_vl, qwen2_vl, qwen3_vl"),
    ("empty", {}, "cannot be read: there is no config.json that names a model_type"),
    ("InternVL3-8B", {"model_type": "internvl_chat", "auto_map": {"AutoConfig": "x.Y"}},
     "OpenGVLab/InternVL3-8B-hf, made"),
    ("InternVL3_5-4B", {"model_type": "x", "architectures": ["InternVLChatModel"]}, "OpenGVLab/InternVL3_5-4B-HF"),
    ("mine", {"model_type": "internvl_chat"}, "ends in -hf, like OpenGVLab/InternVL3-8B-hf"),
    ("llava-onevision-qwen2-7b-ov", {"model_type": "llava", "architectures": ["LlavaQwenForCausalLM"]},
     "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
])  # fmt: skip
def test_models_without_a_family_are_refused_by_their_config_alone(tmp_path, name, config, message):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load_student(folder)


# ---- text ---------------------------------------------------------------------------------


@families
def test_prompt_has_one_video_and_says_where_the_question_is(name):
    student = shared(name)
    prompt = student.prompt(QUESTION, ["left", "right"], system="Be brief.")
    assert prompt.text.count(student.processor.video_token) == 1
    asked = f"{QUESTION}\nA. left\nB. right\nAnswer with the option's letter.<|im_end|>"
    assert prompt.text[prompt.question_start :].startswith(asked)
    assert "Be brief." in prompt.text and prompt.text.endswith("<|im_start|>assistant\n")


@families
def test_control_tokens_in_a_text_are_refused(name):
    student = shared(name)
    for token in ("<|im_end|>", student.processor.video_token, student.processor.image_token):
        with pytest.raises(SampleError, match="control token"):
            student.prompt(f"a {token} b")
        with pytest.raises(SampleError, match="control token"):
            student.encode([make_clip()], [student.prompt("q?").text], [token])
        with pytest.raises(SampleError, match="sample clip-7 has"):
            prompt = student.prompt("q?").text.replace("q?", student.processor.image_token)
            student.encode([make_clip()], [prompt], names=["clip-7"])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("vocabulary", ["bytes", "qwen2"])
@families
def test_offsets_and_labels_are_the_texts(name, vocabulary, side):
    if vocabulary == "qwen2" and name not in ("qwen3_vl", "internvl", "llava_onevision"):
        pytest.skip("the Qwens' prompts are alike: test_qwen2_5_vl.py")
    student, clips = shared(name, vocabulary), two_clips(name)
    prompts, answers = [student.prompt(QUESTION).text, student.prompt("It?").text], ["à gauche", "up"]
    encoding = student.encode(clips, prompts, answers, padding_side=side)
    ids = encoding.inputs["input_ids"]
    lengths = encoding.inputs["attention_mask"].sum(dim=1).tolist()
    for clip, text, real in zip(clips, encoding.texts, lengths, strict=True):
        written = len(student.tokenizer(text)["input_ids"]) - 1  # the placeholder is replaced
        assert real == written + student.num_video_tokens(*clip.frames.shape[:3], clip.times)
    for b, answer in enumerate(answers):
        spans, text = encoding.offsets[b], encoding.texts[b]
        assert len(spans) == ids.shape[1] and text == prompts[b] + answer + "<|im_end|>"
        covered = [c for start, end in spans for c in range(start, end)]
        plain = text
        for token in student.tokenizer.all_special_tokens:
            plain = plain.replace(token, "\0" * len(token))
        assert sorted(set(covered)) == [i for i, character in enumerate(plain) if character != "\0"]
        for (start, end), token in zip(spans, ids[b].tolist(), strict=True):
            piece = student.tokenizer.decode([token])
            if end > start and "\ufffd" not in piece:
                assert piece == text[start:end]
        labels = encoding.inputs["labels"][b]
        assert student.tokenizer.decode(labels[labels != -100]) == answer + "<|im_end|>"
        question = (QUESTION, "It?")[b]
        match = match_words(split_words(question), question, text, spans, student.prompt(question).question_start)
        assert not match.unmatched


# ---- visual tokens ------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 3, 4])
@families
def test_a_clips_tokens_are_counted_before_they_are_made(name, frames):
    student = shared(name)
    light = find_family(family_folder(name)).Student.without_weights(family_folder(name))  # as `enhancer validate` does
    assert light.prompt("q?") == student.prompt("q?") and light.max_length == student.max_length
    for height, width in ((32, 48), (70, 41), (20, 90)):
        clip = make_clip(frames, height, width)
        prompt = student.prompt("q?").text
        encoding = student.encode([clip], [prompt])
        (grid,), (positions,) = student.grids(encoding.inputs, [clip])
        assert len(positions) == grid.num_tokens == len(set(positions.tolist()))
        added = encoding.inputs["input_ids"].shape[1] - (len(student.tokenizer(prompt)["input_ids"]) - 1)
        assert added == light.num_video_tokens(frames, height, width, clip.times)
        assert added <= light.num_video_tokens(frames, height, width)
        assert grid.spans[0, 0] == 0 and grid.spans[-1, 1] == pytest.approx(frames / 2)


@families
def test_too_long_a_sample_is_named_and_nothing_is_cut(name):
    student, clips = shared(name), two_clips(name)
    prompts = [student.prompt("q?").text, student.prompt("What then?").text]
    longest = int(student.encode(clips, prompts).inputs["attention_mask"].sum(dim=1).max())
    frames = len(clips[1].frames)
    with pytest.raises(SampleError, match=f"clip-b has {longest} tokens .* of {frames} frames.*sampling.frames"):
        student.encode(clips, prompts, names=["clip-a", "clip-b"], max_length=longest - 1)
    student.encode(clips, prompts, max_length=longest)


@families
def test_other_clips_than_the_batchs_are_refused(name):
    student = shared(name)
    inputs = student.encode([make_clip(4)], [student.prompt("q?").text]).inputs
    with pytest.raises(ModelError, match="same clips"):
        student.grids(inputs, [make_clip(8)])


def test_llava_onevision_refuses_clips_of_different_length_in_one_batch():
    student = shared("llava_onevision")
    with pytest.raises(SampleError, match="clip-a: 2, clip-b: 3.*sampling.frames without sampling.fps"):
        student.encode([make_clip(2), make_clip(3)], [student.prompt("q?").text] * 2, names=["clip-a", "clip-b"])


@pytest.mark.parametrize(("times", "written"), [
    ([0.0, 0.5, 1.0, 1.7], ["0.2", "1.4"]), ([3.31, 3.41, 20.0], ["3.4", "20.0"]), ([7.25], ["7.2"]),
])  # fmt: skip
def test_qwen3_vl_writes_the_clips_own_times(times, written):
    student = shared("qwen3_vl")
    clip = Clip(make_clip(len(times)).frames, times, 30.0)
    text = student.tokenizer.decode(student.encode([clip], [student.prompt("q?").text]).inputs["input_ids"][0])
    assert [part.split("<")[-1] for part in text.split(" seconds>")[:-1]] == written
    assert clip.times == times, "the processor changes the lists that it is given"


# ---- the model ----------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@families
def test_padding_does_not_change_a_sample(name, side):
    student, clips = shared(name), two_clips(name)
    prompts = [student.prompt("Where?").text, student.prompt("Where does it go from here?").text]
    alone = student.encode(clips[:1], prompts[:1]).inputs
    both = student.encode(clips, prompts, padding_side=side).inputs
    real = both["attention_mask"][0].bool()
    with torch.no_grad():
        padded, plain = student.model(**both).logits[0][real], student.model(**alone).logits[0]
    torch.testing.assert_close(padded, plain, atol=1e-4, rtol=1e-4)


@families
def test_an_answer_continues_from_the_prompts_keys_and_values(name):
    """As evaluation scores options: the same logits as prompt and answer in one forward."""
    student = family_student(name)
    clip, prompt = make_clip(), student.prompt("Where?").text
    whole = student.encode([clip], [prompt], ["up"]).inputs
    asked = student.encode([clip], [prompt]).inputs
    answer = whole["input_ids"][:, asked["input_ids"].shape[1] :]
    with torch.no_grad():
        once = student.model(**whole).logits[:, -answer.shape[1] - 1 :]
        first = student.model(**asked, use_cache=True, logits_to_keep=1)
        rest = student.model(input_ids=answer, past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), once, atol=1e-4, rtol=1e-4)


def rows_of(inputs, columns):
    """A few rows of each sample: a token after the video, the last real one, and the third visual token."""
    last = [int(mask.nonzero()[-1]) for mask in inputs["attention_mask"]]
    return [[int(positions[-1]) + 3, end, int(positions[2])] for end, positions in zip(last, columns, strict=True)]


def run(student, inputs, request):
    with capture(student.model):
        return student.model(**inputs, motion_capture=request)


@pytest.mark.parametrize("side", SIDES)
@families
def test_captured_rows_equal_the_dense_softmax_and_change_no_bit(name, side):
    student, eager = shared(name), family_student(name, attn="eager")
    inputs, columns = batch(name, side=side)
    rows = rows_of(inputs, columns)
    request = CaptureRequest.from_positions(rows, columns)
    with torch.no_grad():
        plain, captured = student.model(**inputs), run(student, inputs, request)
        dense = torch.stack(eager.model(**inputs, output_attentions=True).attentions).mean(dim=(0, 2))  # [B, S, S]
    assert torch.equal(plain.logits, captured.logits) and torch.equal(plain.loss, captured.loss)
    assert request.captured_layers == list(range(LAYERS))
    for b, (wanted, positions) in enumerate(zip(rows, columns, strict=True)):
        got = request.mean()[b, :, : len(positions)]
        assert (got - dense[b][wanted][:, positions]).abs().max() <= 1e-6 and got.sum() > 0.01


@families
def test_probabilities_times_values_are_the_modules_output(name):
    student = shared(name)
    inputs, _ = batch(name, side="left")
    size, length = inputs["input_ids"].shape
    every = [torch.arange(length)] * size
    request = CaptureRequest.from_positions(every, every, keep_layers=True)
    seen, handles = {}, []
    for index, layer in enumerate(student.model.model.language_model.layers):
        attention = layer.self_attn
        handles += [
            attention.o_proj.register_forward_pre_hook(lambda module, args, i=index: seen.update({i: args[0]})),
            attention.v_proj.register_forward_hook(lambda module, args, out, i=index: seen.update({(i, "v"): out})),
        ]
    with torch.no_grad():
        run(student, inputs, request)
    for handle in handles:
        handle.remove()
    real = inputs["attention_mask"].bool()
    for index in range(LAYERS):
        values = seen[index, "v"].unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(2, dim=1)
        output = (request.layer_rows[index] @ values).transpose(1, 2).flatten(2)
        torch.testing.assert_close(output[real], seen[index][real], atol=1e-5, rtol=1e-5)
        sums = request.layer_rows[index].sum(dim=-1).transpose(1, 2)[real]
        torch.testing.assert_close(sums, torch.ones_like(sums))


@families
def test_gradients_of_captured_rows_with_and_without_checkpointing(name):
    gradients = []
    for checkpointing in (False, True):
        student = family_student(name)
        student.model.train()
        if checkpointing:
            student.model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs, columns = batch(name, student)
        request = CaptureRequest.from_positions(rows_of(inputs, columns), columns)
        run(student, inputs, request)
        request.mean().square().sum().backward()
        for layer in student.model.model.language_model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                assert projection.weight.grad.abs().max() > 0
        gradients.append([p.grad for p in student.model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@families
def test_parts_cover_every_parameter_once(name):
    student = shared(name)
    parts = student.parts()
    named = [key for part in parts.values() for key, _ in part]
    assert list(parts) == ["vision", "merger", "llm"] and all(parts.values())
    assert sorted(named) == sorted(key for key, _ in student.model.named_parameters())
    text_side = (student.model.model.language_model, student.model.lm_head)
    llm = {id(p) for module in text_side for p in module.parameters()}
    assert {id(p) for _, p in parts["llm"]} == llm
    assert all("merger" in key or "projector" in key or "newline" in key for key, _ in parts["merger"])


@families
def test_an_export_has_the_trained_models_logits(name, tmp_path):
    student, clips = family_student(name), two_clips(name)
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.mul_(1.01)
    prompts = [student.prompt(text).text for text in ("Where?", "Where does it go?")]
    folder = export(student, tmp_path / "model")
    assert prove_export(student, folder, clips, prompts) == 0.0
    again = load_student(folder)
    assert type(again) is type(student) and again.prompt("Where?") == student.prompt("Where?")


@families
def test_half_precision_runs(name):
    student = load_student(family_folder(name), dtype=torch.bfloat16)
    inputs, columns = batch(name, student)
    request = CaptureRequest.from_positions(rows_of(inputs, columns), columns)
    assert run(student, inputs, request).loss.isfinite() and request.mean().dtype == torch.float32
