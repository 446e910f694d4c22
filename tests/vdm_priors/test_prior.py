"""MotionPrior and its file."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vdm_priors.confidence import confidence_report
from vdm_priors.errors import StoreError
from vdm_priors.grid import TokenGrid
from vdm_priors.heads import sample_rows
from vdm_priors.prior import MotionPrior
from vdm_priors.selection import TeacherText, choose_heads, choose_words
from vdm_priors.settings import ExtractionSettings
from vdm_priors.store import PriorStore
from vdm_priors.words import Word, split_words


def make_prior(text: str = "the red ball moves 漢字", seed: int = 0) -> MotionPrior:
    generator = torch.Generator().manual_seed(seed)
    words = split_words(text)
    valid = torch.rand(3, 4, 5, generator=generator) > 0.2
    grid = TokenGrid.regular([[0.0, 0.1], [0.1, 0.5], [0.5, 1.0]], 4, 5, valid=valid)
    maps = torch.rand(len(words), 3, 4, 5, generator=generator)
    weight = torch.rand(len(words), generator=generator)
    return MotionPrior(text, words, maps, grid, weight, {"source": "test", "seconds": [0.0, 0.3]})


def test_a_prior_survives_its_file(tmp_path):
    prior = make_prior()
    prior.save(tmp_path / "prior.safetensors")
    loaded = MotionPrior.load(tmp_path / "prior.safetensors")
    for name in ("text", "words", "provenance", "grid"):
        assert getattr(loaded, name) == getattr(prior, name)
    assert torch.equal(loaded.weight, prior.weight)
    assert loaded.maps.dtype == torch.float32
    torch.testing.assert_close(loaded.maps, prior.maps, rtol=2**-11, atol=0)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Or a power cut could leave an empty prior under a key."""
    done, flush, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.fstat(file).st_size) or flush(file))
    monkeypatch.setattr(os, "replace", lambda *names: done.append("renamed") or rename(*names))
    path = tmp_path / "prior.safetensors"
    make_prior().save(path)
    assert done == [path.stat().st_size, "renamed"]


@pytest.mark.parametrize("seed", range(6))
def test_saving_a_loaded_prior_changes_no_byte(tmp_path, seed):
    prior = make_prior(seed=seed)
    prior.maps[0, 0, 0, 0] = 2**-37  # among the smallest that a word whose peak is 1 can hold
    prior.maps[:, 1, 1, 1] = 1 - 2**-24  # rounds up to the next power of two
    prior.save(tmp_path / "a")
    MotionPrior.load(tmp_path / "a").save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("size", [1e-38, 1e-12, 1e-5, 1.0, 1e6, 3e38])
def test_masses_of_any_size_keep_their_precision(tmp_path, size):
    prior = make_prior()
    prior.maps[0] *= size
    prior.save(tmp_path / "prior")
    loaded = MotionPrior.load(tmp_path / "prior")
    torch.testing.assert_close(loaded.maps, prior.maps, rtol=2**-11, atol=0)


@pytest.mark.parametrize("text", ["", "still"])
def test_no_words_and_no_mass_are_fine(tmp_path, text):
    prior = make_prior(text)
    prior.maps.zero_()
    prior.save(tmp_path / "prior")
    loaded = MotionPrior.load(tmp_path / "prior")
    assert torch.equal(loaded.maps, prior.maps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": [Word("blue", 0, 4)] * 5}, "'blue' is not at characters 0:4"),
        ({"maps": torch.rand(5, 3, 4, 4)}, r"\[5, 3, 4, 5\]"),
        ({"maps": torch.rand(5, 3, 4, 5).half()}, "float16"),
        ({"maps": -torch.rand(5, 3, 4, 5)}, "not negative"),
        ({"maps": torch.full((5, 3, 4, 5), torch.nan)}, "finite"),
        ({"weight": torch.rand(4)}, r"weight must be \[N\]"),
        ({"weight": torch.full((5,), 1.5)}, "0..1"),
        ({"weight": torch.full((5,), torch.nan)}, "0..1"),
        ({"provenance": {"psnr": float("inf")}}, "provenance"),
        ({"provenance": {"path": object()}}, "provenance"),
    ],
)
def test_a_broken_prior_is_refused_and_not_written(tmp_path, change, message):
    prior = make_prior()
    for name, value in change.items():
        setattr(prior, name, value)
    with pytest.raises(ValueError, match=message):
        prior.validate()
    with pytest.raises(ValueError, match=message):
        prior.save(tmp_path / "prior")
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_kind_is_named(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(StoreError, match=r"other\.safetensors.*not a motion prior"):
        MotionPrior.load(path)
    with pytest.raises(StoreError, match=r"nowhere.*cannot be read"):
        MotionPrior.load(tmp_path / "nowhere")


RECORD = {
    "seconds": [n / 7 for n in range(81)],
    "head_scores": {
        "dfc": torch.rand(50).tolist(), "score": [0.1] * 50, "selected": [True, False] * 25, "rows": [512, 17550],
        "error": {"dfc": torch.rand(40).tolist(), "none": None}, "counts": list(range(-20, 20)), "mixed": [1, 0.5] * 40,
        "large": [2**70] * 40, "a/b": [0.5] * 40, "empty": [], "nested": [[0.5] * 40],
    },
}


def test_long_lists_stand_beside_the_maps_and_come_back_exactly(tmp_path):
    prior, path = make_prior(), tmp_path / "prior.safetensors"
    prior.provenance = RECORD
    prior.save(path)
    assert MotionPrior.load(path).provenance == RECORD
    stored = load_file(path)
    kinds = {name.removeprefix("provenance/head_scores/"): tensor.dtype for name, tensor in stored.items()
             if name.startswith("provenance")}
    assert kinds == {"dfc": torch.float32, "score": torch.float64, "selected": torch.bool, "counts": torch.int64,
                     "error/dfc": torch.float32}
    store = PriorStore(tmp_path)
    store.put("abcdef", prior)
    entry = store.entry("abcdef").provenance  # the header alone
    assert entry["seconds"] == RECORD["seconds"] and set(entry["head_scores"]) == set(RECORD["head_scores"]) - {
        "dfc", "score", "selected", "counts"}
    same = tmp_path / "again.safetensors"
    MotionPrior.load(path).save(same)
    assert same.read_bytes() == path.read_bytes()


def test_a_changed_list_is_noticed(tmp_path):
    prior, path = make_prior(), tmp_path / "prior.safetensors"
    prior.provenance = RECORD
    prior.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["provenance/head_scores/selected"][3] ^= True
    save_file(tensors, path, metadata)
    with pytest.raises(StoreError, match="checksum"):
        MotionPrior.load(path)


def test_files_of_the_first_version_are_read_and_those_of_a_later_one_refused(tmp_path, monkeypatch):
    prior, path = make_prior(), tmp_path / "prior.safetensors"
    prior.provenance = RECORD
    monkeypatch.setattr("vdm_priors.prior.VERSION", 1)
    monkeypatch.setattr("vdm_priors.prior.LONG", 10**9)  # version 1 had every list in the header
    prior.save(path)
    assert set(load_file(path)) == {"maps", "scale", "weight"}
    monkeypatch.undo()
    old = MotionPrior.load(path)
    assert old.provenance == RECORD and torch.equal(old.maps, MotionPrior.load(path).maps)
    monkeypatch.setattr("vdm_priors.prior.VERSION", 3)
    prior.save(path)
    with pytest.raises(StoreError, match="it has version 3; 1 and 2 can be read.*extract the prior again"):
        MotionPrior.load(path)


@pytest.mark.parametrize("heads", [48, 42 * 48])
def test_a_prior_of_a_5b_model_fits_its_file(tmp_path, heads):
    """30 words on CogVideoX-5B's 13×30×45 cells with the whole record; head_scope layer_head has 42 layers' heads."""
    generator = torch.Generator().manual_seed(0)
    settings = ExtractionSettings(token_ratio=1.0)
    text = " ".join(f"word{n}" for n in range(30))
    spans = torch.tensor([[0.0, 0.125]] + [[0.125 + f / 2, 0.625 + f / 2] for f in range(12)])
    grid = TokenGrid.regular(spans, 30, 45)
    maps = torch.rand(30, *grid.shape, generator=generator)
    read = TeacherText(text, split_words(text), [[n] for n in range(30)], 29)
    words, maps, word_scores = choose_words(maps, read, grid, settings)
    # the report of heads is as long for a small picture
    small = TokenGrid.regular(spans, 3, 4)
    rows = sample_rows(small, 52, 0)
    v2v = torch.randn(1, heads, 52, small.num_tokens, generator=generator).softmax(-1)
    harvested = SimpleNamespace(v2v=v2v, request=SimpleNamespace(row_taker=None))
    _, head_scores = choose_heads(harvested, rows, 0, small, settings)
    assert len(head_scores["error"]["score"]) == heads
    provenance = {
        "settings": settings.effective(),
        "seconds": [n / 8 for n in range(49)],
        "head_scores": head_scores,
        "word_scores": word_scores,
        "confidence": confidence_report(maps, grid),
        "scheduler": {f"a_setting_of_the_scheduler_{n}": 0.123456789 for n in range(25)},
    }
    prior = MotionPrior(text, words, maps, grid, torch.ones(30), provenance)
    prior.save(tmp_path / "prior.safetensors")
    size = (tmp_path / "prior.safetensors").stat().st_size
    assert 30 * grid.num_tokens * 2 < size <= 1_200_000
    assert MotionPrior.load(tmp_path / "prior.safetensors").provenance == provenance


def test_the_contract_loads_no_model_library():
    modules = "words grid prior store masks heads head_errors tokens confidence errors"
    code = (
        f"import sys\nfor name in {modules.split()}: __import__('vdm_priors.' + name)\n"
        "print([m for m in ('transformers', 'diffusers', 'peft') if m in sys.modules])"
    )
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"
