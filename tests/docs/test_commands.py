"""Every command that README.md and docs/ name exists as it is written: its options, its recipe, and the keys it changes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer.main

from enhancer.cli import app
from enhancer.jobs import load_recipe
from enhancer.recipe_files import list_recipes

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^ *```[a-z]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"^\| `(enhancer [^`]+)`", re.MULTILINE)
LAUNCHER = re.compile(r"^(?:torchrun|accelerate launch) .*?-m (?=enhancer )")
WANTS_RECIPE = {"run", "train", "validate", "compare", "extract", "cp"}


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every code block and table, launchers and remarks taken off, continued lines joined."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in FENCE.findall(text) for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
        for line in [*lines, *TABLE.findall(text)]:
            line = LAUNCHER.sub("", line.strip())
            if line.startswith("enhancer ") and "[--" not in line:  # not a synopsis with optional parts
                found.append((str(page.relative_to(ROOT)), line))
    return found


def told(line: str) -> tuple[click.Command, list[str]]:
    """The command that a line calls and its arguments. Raises AssertionError where there is no such command."""
    words = shlex.split(line, comments=True)[1:]
    command, names = typer.main.get_command(app), []
    while words and (below := getattr(command, "commands", {}).get(words[0])):
        command = below
        names.append(words.pop(0))
    assert not getattr(command, "commands", None), f"{line}: no such command"
    return command, words


def test_there_are_commands_to_check():
    assert len(commands()) > 40 and {page for page, _ in commands()} >= {"README.md", "docs/quickstart.md"}


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())), ids=lambda value: value[:60])
def test_a_command_is_as_it_is_written(page, line):
    command, words = told(line)
    command.make_context("enhancer", list(words))  # click refuses an unknown option, or a value of another type


RUNS = sorted({line for _, line in commands() if line.split()[1] in WANTS_RECIPE})


@pytest.mark.parametrize("line", RUNS, ids=lambda value: value[:60])
def test_its_recipes_and_keys_exist(line):
    """Shipped recipes by their names; keys are checked with the recipe, those of a user's own with quickstart's."""
    command, words = told(line)
    shipped = {recipe.name for recipe in list_recipes()}
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    names = [word for word in words if word in shipped]
    names += [str(path) for word in words if word.startswith("recipes/") for path in sorted(ROOT.glob(word))]
    own = [word for word in words if word.endswith(".yaml") or word == "RECIPE"]
    assert names or own or "--video" in words, f"{line}: no shipped recipe of that name"
    for name in names or ["quickstart"]:
        load_recipe(name, overrides)  # RecipeError for a key that does not exist
