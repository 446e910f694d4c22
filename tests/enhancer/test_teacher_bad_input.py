"""Bad input around the teacher, as a person at the command line meets it: one paragraph, and what to do.

Clips and rows are tested in test_bad_input.py; what validate says before a run in test_preflight.py.
"""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from enhancer.memory import is_out_of_memory
from enhancer.runfolder import read_json, read_lines
from tests.enhancer.test_bad_input import TEXT, call, check_paragraph, stored
from tests.enhancer.tiny_run import recipe_values, teacher_folder, write_data, write_video
from tests.vdm_priors.tiny_families import tiny_family
from vdm_priors.errors import ModelError
from vdm_priors.prior import MotionPrior

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LONG = TEXT + " And then, where does it go" * 60


def extract(video, out, *more, teacher=None, text=TEXT):
    return call("extract", "--video", video, "--text", text, "--teacher", teacher or teacher_folder(), "--out", out,
                "teacher.sampling.frames=9", "teacher.extraction.steps=2", *more)


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "clip.mp4")


@pytest.fixture
def teacher(tmp_path):
    """A copy of the small teacher to spoil."""
    return shutil.copytree(teacher_folder(), tmp_path / "spoilt")


@pytest.fixture
def recipe(tmp_path):
    """Three priors, two clips a batch."""
    write_data(tmp_path / "data", train=3, test=1)
    values = recipe_values(tmp_path, arms=[{"name": "vdm", "source": "vdm"}])
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def spoil(folder, change, file=WEIGHTS):
    """Rewrites a part's weights, the transformer's unless said; `change` gets them by name."""
    weights = load_file(folder / file)
    change(weights)
    save_file(weights, folder / file, metadata={"format": "pt"})


# ---- which teacher -------------------------------------------------------------------------------

def test_an_unknown_family_is_told_the_known_ones(video, teacher, tmp_path):
    index = json.loads((teacher / "model_index.json").read_text())
    (teacher / "model_index.json").write_text(json.dumps({**index, "_class_name": "OtherPipeline"}))
    code, _, stderr = extract(video, tmp_path / "priors", teacher=teacher)
    assert code == 1
    check_paragraph(stderr, "OtherPipeline", "Known families: cogvideox, hunyuan_video, ltx, mochi, wan", teacher)


def test_a_hub_that_cannot_be_reached_says_how_to_point_to_a_folder(video, tmp_path, recipe, monkeypatch):
    def refuse(*args, **how):
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    code, _, stderr = extract(video, tmp_path / "priors", teacher="owner/never-there")
    assert code == 1
    check_paragraph(stderr, "owner/never-there", "hf download owner/never-there --local-dir FOLDER")
    code, out, stderr = call("validate", recipe, "teacher.model=owner/never-there")
    said = " ".join((out + stderr).split())
    assert code == 0 and "hf download owner/never-there --local-dir FOLDER" in said, said


@pytest.mark.parametrize("layers, message", [
    ("[]", "teacher.extraction.layers names no layer. Name some; null takes all"),
    ("[0,7]", "teacher.extraction.layers names [7], but the teacher has attention layers 0 to 1")])
def test_layers_that_are_none_or_not_there_are_refused_before_anything_loads(recipe, layers, message):
    code, out, stderr = call("validate", recipe, f"teacher.extraction.layers={layers}")
    assert code != 0 and message in " ".join((out + stderr).split())


def test_steps_that_its_schedule_does_not_have_are_refused_before_anything_loads(recipe):
    given = [f"teacher.model={tiny_family('mochi').folder}", "teacher.sampling.frames=7", "teacher.size=[32,48]",
             "teacher.extraction.steps=1"]
    code, out, stderr = call("validate", recipe, *given)
    assert code == 1 and "teacher.extraction.steps: The teacher's scheduler takes 2 to 1000 steps, not 1" in out, stderr
    assert call("validate", recipe, *given, "teacher.extraction.mode=noise")[0] == 0  # which needs no way to noise


def truncate(teacher):
    path = teacher / WEIGHTS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop(teacher):
    spoil(teacher, lambda weights: weights.pop("proj_out.weight"))


def reshape(teacher):
    spoil(teacher, lambda weights: weights.update({"proj_out.weight": torch.zeros(3, 5)}))


@pytest.mark.parametrize("damage", [truncate, drop, reshape])
def test_weights_that_are_cut_short_missing_or_of_another_model(video, teacher, tmp_path, damage):
    damage(teacher)
    code, _, stderr = extract(video, tmp_path / "priors", teacher=teacher)
    assert code == 1 and not stored(tmp_path / "priors")
    check_paragraph(stderr, teacher, "could not be loaded", "as safetensors, and of one model")


# ---- which clip and text -------------------------------------------------------------------------

def test_a_clip_of_another_size_is_resized_or_refused(tmp_path):
    odd = write_video(tmp_path / "odd.mp4", size=(50, 70))
    code, out, _ = extract(odd, tmp_path / "priors")
    assert code == 0 and "stored" in out
    code, _, stderr = extract(odd, tmp_path / "others", "teacher.fit=refuse")
    assert code == 1 and not stored(tmp_path / "others")
    check_paragraph(stderr, odd, "50×70 pixels", "set teacher.size, or teacher.fit to resize")
    code, _, stderr = extract(odd, tmp_path / "others", "teacher.size=[30,32]")
    assert code == 1
    check_paragraph(stderr, "multiples of 8 pixels, not 30×32")


def test_a_refused_size_leaves_out_that_sample_alone(recipe, tmp_path):
    write_video(tmp_path / "data" / "videos" / "train1.mp4", size=(48, 32))
    code, out, stderr = call("extract", recipe, "teacher.fit=refuse", "teacher.size=[32,32]")
    assert code == 0, stderr
    run = tmp_path / "runs" / "tiny"
    assert [row["sample_id"] for row in read_json(run / "priors.json", [])] == ["train0", "train2"]
    (skipped,) = read_lines(run / "skipped.jsonl")
    assert skipped["id"] == "train1" and "48×32 pixels" in skipped["reason"]


def test_words_beyond_the_limit_are_noted_in_the_provenance_and_in_the_run(recipe, tmp_path):
    data = json.loads((tmp_path / "data" / "train.json").read_text())
    data[1]["conversations"][0]["value"] = f"<video>\n{LONG}"
    (tmp_path / "data" / "train.json").write_text(json.dumps(data))
    code, _, stderr = call("extract", recipe)
    assert code == 0, stderr
    rows = read_json(tmp_path / "runs" / "tiny" / "priors.json", [])
    noted = {row["sample_id"]: row.get("notes", []) for row in rows}
    (note,) = noted["train1"]
    assert note.startswith("beyond the teacher's text limit, so without a prior: ") and "where" in note
    assert noted["train0"] == noted["train2"] == []


# ---- numbers and memory --------------------------------------------------------------------------

def test_nan_in_the_attention_names_layer_and_step(video, teacher, tmp_path):
    spoil(teacher, lambda weights: weights["transformer_blocks.1.attn1.to_k.weight"].fill_(float("nan")))
    code, _, stderr = extract(video, tmp_path / "priors", "teacher.extraction.harvest_at=inversion", teacher=teacher)
    assert code == 1 and not stored(tmp_path / "priors")
    check_paragraph(stderr, "Inversion step 1 of 2", "transformer_blocks.1.attn1", "NaN or infinite")


INFINITE = [  # the file, a weight of it, and what is told
    (WEIGHTS, "proj_out.bias", "Inversion step 1 of 2 (t=499): the prediction, from proj_out on: 768 of 768 values"),
    ("vae/diffusion_pytorch_model.safetensors", "encoder.conv_in.conv.weight", "VAE made of the clip"),
    ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.conv.weight", "that the teacher's VAE decoded"),
    ("text_encoder/model.safetensors", "encoder.final_layer_norm.weight", "The embeddings of the text"),
]


@pytest.mark.parametrize("file, key, told", INFINITE)
def test_infinite_numbers_name_who_made_them(video, teacher, tmp_path, file, key, told):
    spoil(teacher, lambda weights: weights[key].fill_(float("inf")), file)
    code, _, stderr = extract(video, tmp_path / "priors", teacher=teacher)
    assert code == 1 and not stored(tmp_path / "priors")
    check_paragraph(stderr, told, "are NaN or infinite. Load the teacher in float32 or bfloat16")


OUT = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried "
                        "to "
                        "allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)"),
    "python": MemoryError(),
}


@pytest.mark.parametrize("kind", OUT)
def test_out_of_memory_says_which_setting_and_by_how_much(recipe, tmp_path, kind, monkeypatch):
    from vdm_priors.families.cogvideox import CogVideoX

    calls, predict = [], CogVideoX.predict

    def short(self, latents, *args):
        calls.append(len(latents))
        if len(calls) > 12:  # the first batch gets through: 2 steps up and 2 down
            raise OUT[kind]
        return predict(self, latents, *args)

    monkeypatch.setattr(CogVideoX, "predict", short)
    arguments = ["extract", recipe, "teacher.extraction.head_scope=layer_head", "teacher.batch_size=2"]
    code, _, stderr = call(*arguments, "teacher.extraction.steps=6")
    assert code == 1
    check_paragraph(stderr, "Out of memory", "one clip of 9 frames", "in float32", "teacher.dtype=bfloat16 (about",
                    "teacher.sampling.frames=5 (about", "What is finished is kept")
    needs = int(re.search(r"needs about ([\d,]+) MB", stderr)[1].replace(",", ""))
    saved = [int(number.replace(",", "")) for number in re.findall(r"\(about ([\d,]+) MB\)", stderr)]
    assert saved and all(number <= needs for number in saved)
    assert len(stored(tmp_path / "runs" / "tiny" / "priors")) == 2
    monkeypatch.undo()
    code, out, _ = call(*arguments, "teacher.extraction.steps=6")
    assert code == 0 and "vdm: 1 made, 2 reused" in out


def test_a_batch_that_is_too_large_is_told_the_batch_size(recipe, monkeypatch):
    def short(self, latents, *args):
        raise OUT["gpu"]

    monkeypatch.setattr("vdm_priors.families.cogvideox.CogVideoX.predict", short)
    code, _, stderr = call("extract", recipe)
    assert code == 1
    check_paragraph(stderr, "2 clips of 9 frames", "teacher.batch_size=1 (about")


def test_only_errors_of_memory_are_taken_for_such():
    assert all(is_out_of_memory(error) for error in OUT.values())
    assert not any(is_out_of_memory(error) for error in (RuntimeError("shapes differ"), ValueError("out of memory"),
                                                         ModelError("out of memory")))


# ---- the store -----------------------------------------------------------------------------------

@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"",
                                    lambda content: content[:-1] + bytes([content[-1] ^ 1])])
def test_a_damaged_prior_is_found_made_again_and_counted(recipe, tmp_path, damage):
    assert call("extract", recipe)[0] == 0
    first, *others = stored(tmp_path / "runs" / "tiny" / "priors")
    whole = MotionPrior.load(first)
    first.write_bytes(damage(first.read_bytes()))
    code, out, stderr = call("extract", recipe)
    assert code == 0, stderr
    assert "vdm: 1 made, 2 reused" in out and "1 damaged ones replaced" in out
    again = MotionPrior.load(first)  # in a batch of its own, so the same but for rounding
    assert len(others) == 2 and again.words == whole.words
    assert torch.allclose(again.maps, whole.maps, rtol=1e-2, atol=1e-4 * float(whole.maps.max()))
