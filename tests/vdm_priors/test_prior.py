"""MotionPrior and its file."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vdm_priors.errors import StoreError
from vdm_priors.grid import TokenGrid
from vdm_priors.prior import MotionPrior
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
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(StoreError, match=r"other\.safetensors.*not a motion prior"):
        MotionPrior.load(path)
    with pytest.raises(StoreError, match=r"nowhere.*cannot be read"):
        MotionPrior.load(tmp_path / "nowhere")


def test_the_contract_loads_no_model_library():
    modules = "words grid prior store heads tokens errors"
    code = (
        f"import sys\nfor name in {modules.split()}: __import__('vdm_priors.' + name)\n"
        "print([m for m in ('transformers', 'diffusers', 'peft') if m in sys.modules])"
    )
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"
