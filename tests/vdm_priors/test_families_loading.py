"""One contract for every family: how its folder is found and loaded, and which folders are refused.

Small random models of diffusers' real classes, saved and loaded as folders.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vdm_priors.family_contract import MODULES, every_family
from tests.vdm_priors.tiny_families import tiny_family
from vdm_priors.errors import ModelError
from vdm_priors.families import family_of, load_teacher, trained_frames


@every_family
def test_found_by_its_name_and_loaded_exactly(name):
    teacher = tiny_family(name)
    assert family_of(teacher.folder).__name__ == f"vdm_priors.families.{MODULES.get(name, name)}"
    assert trained_frames(teacher.folder) == teacher.trained_frames
    teacher.check_frames(teacher.trained_frames)
    assert not any(weight.requires_grad for weight in teacher.transformer.parameters())
    assert len({layer.name for layer in teacher.attention_layers}) == len(teacher.attention_layers) >= 2
    assert not teacher.transformer.training and not teacher.vae.training


def test_an_index_without_a_class_is_no_teachers(tmp_path):
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(ModelError, match="names no _class_name. Give a diffusers pipeline folder"):
        load_teacher(tmp_path)


def test_unknown_families_are_told_the_known_ones(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanImageToVideoPipeline"}')
    known = "cogvideox, hunyuan_video, ltx, mochi, wan"
    with pytest.raises(ModelError, match=f"'WanImageToVideoPipeline'.*Known families: {known}"):
        load_teacher(tmp_path)


@every_family
def test_truncated_weights_are_refused(name, tmp_path):
    folder = shutil.copytree(tiny_family(name).folder, tmp_path / "teacher")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="teacher .* could not be loaded"):
        load_teacher(folder)


@pytest.mark.parametrize("name, part, files", [
    ("ltx", "tokenizer", "spiece.model, tokenizer.json"),
    ("hunyuan", "tokenizer_2", "vocab.json, merges.txt, tokenizer.json"),
])
def test_a_tokenizer_without_its_vocabulary_is_refused(name, part, files, tmp_path):
    """transformers would make one to which every word is unknown."""
    folder = shutil.copytree(tiny_family(name).folder, tmp_path / "teacher")
    (folder / part / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=f"its {part} has no vocabulary: none of {files}"):
        load_teacher(folder)


def test_a_truncated_text_encoder_is_named(tmp_path):
    folder = shutil.copytree(tiny_family("ltx").folder, tmp_path / "teacher")
    weights = folder / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="its text_encoder: SafetensorError"):
        load_teacher(folder)


@pytest.mark.parametrize("part, key", [
    ("transformer", "proj_in.weight"), ("text_encoder", "encoder.block.0.layer.0.SelfAttention.k.weight"),
])
@pytest.mark.parametrize("shape, message", [(None, "lack 1 weights, of them"), ((3, 3), "[Mm]ismatch|expected shape")])
def test_weights_that_do_not_fit_are_refused(part, key, shape, message, tmp_path):
    folder = shutil.copytree(tiny_family("ltx").folder, tmp_path / "teacher")
    (path,) = (folder / part).glob("*.safetensors")
    weights = load_file(path)
    if shape is None:
        del weights[key]  # which diffusers leaves empty, and transformers draws at random
    else:
        weights[key] = torch.zeros(shape)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message) as error:
        load_teacher(folder)
    assert "\n" not in str(error.value)


UNSUPPORTED = [
    ("cogvideox", "scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "predicts 'epsilon'"),
    ("wan", "scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "UniPC.*'epsilon'.*no flow's"),
    ("wan", "model_index.json", {"boundary_ratio": 0.9}, "boundary_ratio 0.9 asks for"),
    ("mochi", "scheduler/scheduler_config.json", {"invert_sigmas": False}, "invert_sigmas to true"),
    ("hunyuan", "tokenizer/tokenizer_config.json", {"padding_side": "left"}, "pads on the left"),
]


@pytest.mark.parametrize("name, file, changes, message", UNSUPPORTED)
def test_unsupported_configurations_are_refused(name, file, changes, message, tmp_path):
    folder = shutil.copytree(tiny_family(name).folder, tmp_path / "teacher")
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelError, match=message) as error:
        load_teacher(folder)
    assert "\n" not in str(error.value)
