"""The figures in the headers of recipes/teachers and in docs/teachers.md are those of the estimate."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.vdm_priors.real_configs import write_configs
from tests.vdm_priors.recipe_figures import FOLDER, MODELS, figures
from vdm_priors.estimate import estimate
from vdm_priors.families import load_skeleton
from vdm_priors.settings import MODES, ExtractionSettings

DOCS = Path(__file__).parents[2] / "docs" / "teachers.md"


def test_every_recipe_has_its_figures():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(MODELS)


@pytest.mark.parametrize("recipe", MODELS)
def test_header_and_table_are_the_estimates(recipe):
    lines = (FOLDER / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()
    for expected in figures(recipe).header():
        assert any(line.startswith(expected) for line in lines), expected
    assert figures(recipe).row(recipe) in DOCS.read_text(encoding="utf-8").splitlines()


def test_the_table_of_modes_has_each_with_its_cost(tmp_path):
    """| `mode` | stands for | N + … forwards | FLOP of CogVideoX-5B at N = 5 | gives |"""
    skeleton = load_skeleton(write_configs("cogvideox-5b", tmp_path))
    row = re.compile(r"^\| `(\w+)` \|[^|]*\| N( \+ \d?N)?[^|]*\| ([\d.e]+)", re.M)
    rows = row.findall(DOCS.read_text("utf-8"))
    found = {name: (flops, 5 * (1 + _times(denoising))) for name, denoising, flops in rows}
    expected = {}
    for name in MODES:
        cost = estimate(skeleton, ExtractionSettings(mode=name), count_vae=False)
        expected[name] = (f"{cost.network_flops:.1e}".replace("e+", "e"), cost.forwards)
    assert found == expected


def _times(denoising: str) -> int:
    """" + 3N" is 3, " + N" is 1, "" is 0."""
    return int(denoising.strip(" +N") or 1) if denoising else 0
