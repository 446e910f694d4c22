"""The site builds without a warning or a network, and its reference says all that the code has."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import pytest

from enhancer.cli import app
from enhancer.recipe import describe
from enhancer.recipe_files import list_recipes

mkdocs_build = pytest.importorskip("mkdocs.commands.build", reason="the docs extra (mkdocs) is not installed")
ROOT = Path(__file__).resolve().parents[2]
LOADED = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(https?:)?//|<link[^>]*rel=["']?stylesheet[^>]*(https?:)?//""")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site's folder, and what mkdocs warned of."""
    from mkdocs.config import load_config

    warned: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record):
            warned.append(record.getMessage())

    handler, folder, path = Keep(logging.WARNING), tmp_path_factory.mktemp("site"), list(sys.path)
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
        config.plugins.on_startup(command="build", dirty=False)
        mkdocs_build.build(config)
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
        sys.path[:] = path
    return folder, warned


def text_of(site, page):
    return (site[0] / page).read_text(encoding="utf-8")


def test_it_builds_without_a_warning(site):
    assert site[1] == []


def test_no_page_loads_anything_from_a_server(site):
    pages = list(site[0].rglob("*.html"))
    assert len(pages) > 20
    assert [page.name for page in pages if LOADED.search(page.read_text(encoding="utf-8"))] == []


def test_every_recipe_key_is_in_the_reference(site):
    from enhancer.recipe_schema import EnhanceRecipe

    page = text_of(site, "reference/keys.html")
    keys = [row.path for row in describe(EnhanceRecipe)]
    assert [key for key in keys if key.replace("<", "&lt;").replace(">", "&gt;") not in page] == []


def test_every_recipe_and_every_command_is_in_the_reference(site):
    recipes, commands = text_of(site, "reference/recipes.html"), text_of(site, "reference/commands.html")
    assert [recipe.name for recipe in list_recipes() if recipe.name not in recipes] == []
    names = [command.name or command.callback.__name__.strip("_") for command in app.registered_commands]
    assert [name for name in names if f"enhancer {name}" not in commands] == []


def test_pages_take_in_the_examples_and_the_readme(site):
    assert "class PaceConfig" in re.sub(r"<[^>]+>", "", text_of(site, "extend/adapter.html"))
    results = text_of(site, "results.html")
    assert 'id="evidence"' in results and "README:" not in results


def test_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "docs" / "pictures").iterdir()}
    assert sizes and all(size < 300_000 for size in sizes.values()), sizes
