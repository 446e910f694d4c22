"""Every example runs, on the shipped small models, and what it adds to packages is taken away again."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import enhancer.sources
import vdm_priors.families
import vlm_hooks.adapters
import vlm_hooks.families

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
HELPERS = ("clips.py",)
EXTENDED = (enhancer.sources, vdm_priors.families, vlm_hooks.adapters, vlm_hooks.families)
SAYS = {  # of what each script prints
    "add_adapter.py": "saved and loaded: the same logits bit for bit",
    "add_source.py": "background        AUC 0.9",
    "add_student.py": "logits with the capture on: the same bit for bit",
    "add_teacher.py": "prediction with the harvest on: the same bit for bit",
    "align_in_your_loop.py": "16 of 16 words",
    "codec_motion.py": "origin: NATIVE",
    "prior_of_a_clip.py": "words × 3 frames × 8 × 8 cells",
}


@pytest.fixture
def examples_folder(monkeypatch, tmp_path):
    """As `python examples/x.py` would have it, with a folder for clips of its own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path.parent))  # the tests of this file share the clips
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in HELPERS:  # other tests have modules of these names
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    before, paths = set(sys.modules), [list(package.__path__) for package in EXTENDED]
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)
    for package, path in zip(EXTENDED, paths, strict=True):
        package.__path__[:] = path
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(EXAMPLES)):
            del sys.modules[name]


def test_every_script_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SAYS, *HELPERS}


@pytest.mark.parametrize("script", SAYS)
def test_a_script_runs_and_says_what_it_should(script, examples_folder, capsys):
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert SAYS[script] in capsys.readouterr().out


def test_nothing_that_an_example_adds_stays(examples_folder):
    assert "background" not in enhancer.sources.source_names()
    assert "pace" not in vlm_hooks.adapters.known_adapters()


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path.parent))
    root = str(EXAMPLES.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, str(EXAMPLES)]))
    notebook = nbformat.read(EXAMPLES / "walkthrough.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not kept: clear them before committing"
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "alignment loss" in said
