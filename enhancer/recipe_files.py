"""Recipe files: finding them by path or name, reading their YAML, applying overrides.

Shipped recipes lie in `recipes/` of the repository, and in `enhancer/_recipes` once installed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from enhancer.recipe import nearest_name
from vdm_priors.errors import RecipeError

REPOSITORY_RECIPES = Path(__file__).resolve().parent.parent / "recipes"
INSTALLED_RECIPES = Path(__file__).resolve().parent / "_recipes"


# ---- finding recipes ---------------------------------------------------------------------------

@dataclass(frozen=True)
class RecipeFile:
    """A shipped recipe: the name to call it by, its purpose line and its file."""

    name: str
    purpose: str
    path: Path


def recipes_folder() -> Path:
    """The shipped recipes: the repository's folder while developing, else the installed copy."""
    return REPOSITORY_RECIPES if REPOSITORY_RECIPES.is_dir() else INSTALLED_RECIPES


def list_recipes(folder: Path | None = None) -> list[RecipeFile]:
    """All shipped recipes by name, with the first comment line of each as its purpose."""
    folder = folder or recipes_folder()
    return [RecipeFile(path.relative_to(folder).with_suffix("").as_posix(), _purpose(path), path)
            for path in sorted(folder.rglob("*.yaml"))]


def _purpose(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and line.strip("# "):
            return re.sub(r"^(purpose:)\s*", "", line.strip("# "), flags=re.IGNORECASE)
    return ""


def find_recipe(name: str, folder: Path | None = None) -> Path:
    """The file of a recipe given by path or by shipped name; RecipeError with the nearest name."""
    path = Path(name)
    if path.is_file():
        return path
    known = {recipe.name: recipe.path for recipe in list_recipes(folder)}
    wanted = path.with_suffix("").as_posix() if path.suffix in (".yaml", ".yml") else path.as_posix()
    wanted = wanted.removeprefix("recipes/")
    if wanted in known:
        return known[wanted]
    nearest = nearest_name(wanted, list(known))
    hint = f" Did you mean '{nearest}'?" if nearest else ""
    raise RecipeError(f"There is no recipe '{name}': no such file, and no shipped recipe of that name.{hint} "
                      f"`enhancer ls` lists the shipped recipes.")


# ---- reading: YAML and overrides ---------------------------------------------------------------

def read_raw(path: Path, overrides: list[str] = ()) -> dict:
    """The recipe's plain nested values with dotted overrides applied, not yet checked."""
    try:
        loaded = OmegaConf.load(path)
        raw = OmegaConf.to_container(loaded, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not a readable recipe: {_one_line(error)}. Correct the YAML at that place.") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} is not a recipe: it must hold `key: value` lines, but holds a {type(raw).__name__}.")
    for override in overrides:
        apply_override(raw, override)
    return raw


def apply_override(raw: dict, override: str) -> None:
    """Sets one dotted key of plain values; a list's element is addressed by its number or its `name`.

    Of the extraction's `mode` and the keys that it stands for, the later word counts.
    """
    dotted, equals, text = override.partition("=")
    if not equals or not dotted.strip():
        raise RecipeError(f"The override '{override}' is not of the form key.subkey=value.")
    try:
        value = OmegaConf.to_container(OmegaConf.create(f"value: {text}" if text else "value: ''"))["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(f"The value of the override '{override}' is not readable YAML: {_one_line(error)}.") from error
    node: Any = raw
    *parents, last = dotted.strip().split(".")
    for i, key in enumerate(parents):
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[_element(node, key, override)]
        if not isinstance(node, (dict, list)):
            raise RecipeError(f"The override '{override}' goes below '{'.'.join(parents[:i + 1])}', which is a single value.")
    if parents and parents[-1] == "extraction" and isinstance(node, dict):
        from vdm_priors.settings import ExtractionSettings  # here: it loads torch, which the commands' help need not wait for

        ExtractionSettings.set_key(node, last, value)
    else:
        node[_element(node, last, override)] = value


def _element(node: Any, key: str, override: str) -> Any:
    if isinstance(node, dict):
        return key
    names = [item.get("name") for item in node if isinstance(item, dict)]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(node):
        return int(key)
    known = ", ".join(str(name) for name in names if name) or f"0 to {len(node) - 1}"
    raise RecipeError(f"The override '{override}': the list has no element '{key}' (it has {known}).")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
