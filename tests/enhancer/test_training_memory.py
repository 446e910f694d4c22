"""The estimate of a training's memory against what autograd saves and what a process grows by."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from enhancer.recipe import build
from enhancer.train_settings import LoraSettings, TrainSettings
from enhancer.training_memory import skeleton_student, training_memory
from tests.vlm_hooks.tiny_families import save_internvl
from tests.vlm_hooks.tiny_student import make_clip, save_tiny_student
from vlm_hooks.families import load_student

SETTINGS = TrainSettings(batch_size=1)


def save_wide(folder: Path, hidden: int, mlp: int, layers: int) -> Path:
    """A student wide enough that norms and masks do not rule, with queries in groups of four."""
    half = hidden // 8 // 2  # of a head
    sections = [half - 2 * (3 * half // 8)] + 2 * [3 * half // 8]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    save_tiny_student(folder, hidden_size=hidden, intermediate_size=mlp, num_attention_heads=8, num_key_value_heads=2,
                      num_hidden_layers=layers, rope_parameters=rope)
    config = AutoConfig.from_pretrained(folder)
    config.vision_config.out_hidden_size = hidden
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_wide(tmp_path_factory.mktemp("wide"), 128, 256, 4)


def saved_bytes(folder: Path, checkpointing: bool) -> tuple[int, int, int]:
    """Bytes that autograd keeps of the decoder's layers in a forward, its tokens, and bytes of the model's weights."""
    student = load_student(folder)
    student.model.train()
    if checkpointing:
        student.model.gradient_checkpointing_enable({"use_reentrant": False})
    clip = make_clip(frames=8, height=64, width=64)
    inputs = student.encode([clip], [student.prompt("Where does it go?").text], ["left"]).inputs
    weights = {parameter.untyped_storage().data_ptr() for parameter in student.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    alive = []
    decoder = student.model.model.language_model
    embeds = student.model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state)
    return sum(kept.values()), inputs["input_ids"].shape[1], sum(p.nbytes for p in student.model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(folder, checkpointing):
    kept, tokens, weights = saved_bytes(folder, checkpointing)
    settings = replace(SETTINGS, gradient_checkpointing=checkpointing, learning_rate_vision=0.0)
    estimate = training_memory(skeleton_student(str(folder)), settings, "float32", tokens, 0)
    assert estimate.weights == weights and estimate.gradients == 4 * estimate.trained
    if not checkpointing:
        assert 0.8 < estimate.activations / kept < 1.2, (estimate.activations, kept)
    else:  # only layers' inputs are kept; a layer's own come while it is computed again
        last_norm = 12 * 128 * tokens  # which the estimate leaves out
        assert estimate.activations <= kept <= estimate.activations + last_norm
        assert estimate.passing > training_memory(skeleton_student(str(folder)), SETTINGS, "float32", tokens, 0).passing


def test_what_each_choice_saves(folder, tmp_path):
    def of(processes=1, **changes):
        student, settings = skeleton_student(str(folder)), replace(SETTINGS, **changes)
        return training_memory(student, settings, "float32", 500, 400, processes)

    plain = of()
    assert plain.optimizer == 2 * plain.gradients == 2 * plain.weights
    assert of(learning_rate_vision=0.0, learning_rate_merger=0.0).trained < plain.trained
    lora = of(lora=LoraSettings(rank=2), learning_rate_vision=0.0, learning_rate_merger=0.0)
    assert 0 < lora.trained < 0.2 * plain.trained and lora.parameters > plain.parameters
    saving = of(gradient_checkpointing=True)
    assert saving.activations + saving.passing < 0.5 * plain.activations
    assert of(batch_size=3).activations == 3 * plain.activations
    assert of(bf16=True).activations < plain.activations
    sharded = of(4, fsdp="launch/fsdp2.json")
    assert sharded.weights == plain.weights / 4 and sharded.optimizer == plain.optimizer / 4
    two = of(4, deepspeed="launch/zero2.json")
    assert two.weights == plain.weights and two.gradients == plain.gradients / 4
    own = tmp_path / "zero2-and-more.json"  # what is in the file counts, and not its name
    own.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert of(4, deepspeed=str(own)).weights == plain.weights / 4
    assert of(4, deepspeed="nowhere.json").total > 0  # preflight says that there is no such file
    assert of(4).total > plain.total  # DDP keeps whole copies and its buckets


FROZEN = {"learning_rate_vision": 0.0}
CHECKPOINTED = {**FROZEN, "batch_size": 4, "gradient_checkpointing": True}
LORA = {**FROZEN, "learning_rate_merger": 0.0, "batch_size": 2, "lora": {"rank": 8}}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "training"), [
    ("qwen2_5_vl", LORA), ("qwen2_5_vl", CHECKPOINTED), ("internvl", {"batch_size": 4}),
], ids=["lora", "checkpointing", "internvl-whole"])  # fmt: skip
def test_estimate_is_within_a_fifth_of_a_measured_run(tmp_path, family, training):
    """Real steps in a process of its own: how much its peak memory grows from before the student was loaded."""
    folder = tmp_path / "student"
    if family == "internvl":
        save_internvl(folder, "bytes", {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 8})
    else:
        save_wide(folder, 384, 1152, 5)
    child = Path(__file__).with_name("memory_child.py")
    # freed blocks go back at once: what a C library's allocator keeps of them is not the training's
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.update(dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536"))
    command = [sys.executable, str(child), str(folder), json.dumps(training)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    settings, student = build(TrainSettings, training), skeleton_student(str(folder))
    estimate = training_memory(student, settings, "float32", measured["tokens"], measured["visual"])
    assert 0.85 < estimate.total / measured["bytes"] < 1.15, (estimate, measured)
