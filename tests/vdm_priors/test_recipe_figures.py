"""The figures in the headers of recipes/teachers and in docs/teachers.md are those of the estimate."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vdm_priors.recipe_figures import FOLDER, MODELS, figures


def test_every_recipe_has_its_figures():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(MODELS)


@pytest.mark.parametrize("recipe", MODELS)
def test_header_and_table_are_the_estimates(recipe):
    lines = (FOLDER / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()
    for expected in figures(recipe).header():
        assert any(line.startswith(expected) for line in lines), expected
    docs = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text(encoding="utf-8").splitlines()
    assert figures(recipe).row(recipe) in docs
