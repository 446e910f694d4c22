"""The exported folder is stock: loadable without us, with the trained model's logits."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from tests.vlm_hooks.tiny_student import make_clip, tiny_student
from vdm_priors.errors import ModelError
from vlm_hooks.capture import CaptureRequest, capture
from vlm_hooks.export import export, prove_export, verify_export


def train_a_little(student):
    """Two aligned steps, as training does them."""
    optimizer = torch.optim.SGD(student.model.parameters(), lr=0.05)
    student.model.train()
    clips = [make_clip()]
    encoding = student.encode(clips, [student.prompt("Where?").text], ["up"])
    _, columns = student.grids(encoding.inputs, clips)
    for _ in range(2):
        request = CaptureRequest.from_positions([[int(columns[0][-1]) + 2]], columns)
        with capture(student.model):
            output = student.model(**encoding.inputs, motion_capture=request)
            (output.loss + request.mean().square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    student.model.eval()
    with torch.no_grad():
        return encoding.inputs, student.model(**encoding.inputs).logits


def test_exported_logits_are_the_trained_models(tmp_path):
    student = tiny_student()
    inputs, logits = train_a_little(student)
    with torch.no_grad():
        assert not torch.equal(logits, tiny_student().model(**inputs).logits)
    folder = export(student, tmp_path / "model")
    assert verify_export(folder, inputs, logits) == 0.0
    with pytest.raises(ModelError, match="not usable"):
        verify_export(folder, inputs, logits + 1)
    for path in folder.glob("*.json"):
        assert "motion_capture" not in path.read_text(encoding="utf-8")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert "auto_map" not in config


def test_an_export_is_proved_on_clips_and_a_rounded_one_is_refused(tmp_path):
    student = tiny_student()
    train_a_little(student)
    clips = [make_clip(), make_clip(5, 48, 32)]
    prompts = [student.prompt(text).text for text in ("Where?", "Where does it go?")]
    folder = export(student, tmp_path / "model")
    assert prove_export(student, folder, clips, prompts) == 0.0
    weights = load_file(folder / "model.safetensors")
    rounded = {name: value.bfloat16() for name, value in weights.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="differ by .* not usable"):
        prove_export(student, folder, clips, prompts)
    student.model.half()
    half = export(student, tmp_path / "half")
    assert prove_export(student, half, clips, prompts) < 0.1  # within its number type's rounding
    (half / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match="cannot be loaded with stock transformers"):
        prove_export(student, half, clips, prompts)


def test_stock_classes_load_and_run_the_folder(tmp_path):
    student = tiny_student()
    folder = export(student, tmp_path / "model")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    clip, prompt = make_clip(fps=24.0), student.prompt("Where?").text  # 24: stock's assumption
    stock = processor(text=[prompt], videos=[clip.frames], return_tensors="pt")
    with torch.no_grad():
        theirs = model(**stock).logits
        ours = student.model(**student.encode([clip], [prompt]).inputs).logits
    assert torch.equal(theirs, ours)


def test_export_inside_capture_stays_plain(tmp_path):
    student = tiny_student()
    with capture(student.model):
        folder = export(student, tmp_path)
    assert not any("motion_capture" in path.read_text() for path in folder.glob("*.json"))


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match="file.*Free some space or choose"):
        export(tiny_student(), tmp_path / "file")
