"""A matrix's cells: for each combination of levels the recipe of one student, with λ = 0 on the same data beside it."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from enhancer.experiment.schema import CompareRecipe
from enhancer.recipe import build
from enhancer.recipe_files import apply_override, find_recipe, read_raw
from enhancer.recipe_schema import CONTROL, ArmSettings, EnhanceRecipe
from vdm_priors.errors import RecipeError

ARM = "arm."  # begins the keys of a cell's arm
DEFAULT = "default"  # the cell of a one_at_a_time design in which nothing is changed
# keys of the base that the matrix decides
REPLACED = {"examples": 0, "report": False, "parallel_arms": 1}
OWN_KEYS = ("arms", "seeds", "name", "output", *REPLACED)


@dataclass(frozen=True)
class Cell:
    """One student of the matrix: what it is called, its level on every axis, and a recipe whose one arm it is."""

    name: str
    levels: dict[str, str]
    recipe: EnhanceRecipe

    @property
    def arm(self) -> ArmSettings:
        return self.recipe.arms[0]

    @property
    def is_control(self) -> bool:
        """Whether it is trained on the answers alone."""
        return self.recipe.weight(self.arm) == 0


def make_cells(recipe: CompareRecipe) -> list[Cell]:
    """All cells of a checked matrix; RecipeError with the faults of every cell whose recipe cannot be."""
    path = find_recipe(recipe.base)
    base = read_raw(path)
    if base.get("job", "enhance") != "enhance":
        raise RecipeError(
            f"base: {path} is a recipe of the job '{base['job']}'; a matrix varies one of the job 'enhance'."
        )
    for key in OWN_KEYS:
        base.pop(key, None)
    cells, faults = [], {}
    for name, levels, changes in _combinations(recipe):
        try:
            cells.append(Cell(name, levels, _cell_recipe(recipe, base, changes, f"The recipe of the cell '{name}'")))
        except RecipeError as error:
            faults.setdefault(str(error).partition("\n")[2] or str(error), str(error))
    if faults:
        raise RecipeError("\n".join(faults.values()))
    return cells


def control_of(cell: Cell) -> Cell:
    """λ = 0 on the cell's data, with its student and its training."""
    arm = ArmSettings(name="lambda0", source=CONTROL)
    return Cell("λ = 0", cell.levels, dataclasses.replace(cell.recipe, arms=[arm]))


def _combinations(recipe: CompareRecipe) -> Iterator[tuple[str, dict[str, str], list[dict[str, Any]]]]:
    """Name, levels by axis, and changes of every cell."""
    axes = {axis.name: {level.name: level.set for level in axis.levels} for axis in recipe.axes}

    def cell(name: str, chosen: tuple[str, ...]) -> tuple[str, dict[str, str], list[dict[str, Any]]]:
        levels = dict(zip(axes, chosen, strict=True))
        return name, levels, [recipe.set, *(axes[axis][level] for axis, level in levels.items())]

    if recipe.design == "product":
        for chosen in product(*axes.values()):
            yield cell(" · ".join(chosen), chosen)
        return
    first = tuple(next(iter(levels)) for levels in axes.values())
    yield cell(DEFAULT, first)
    for number, (axis, levels) in enumerate(axes.items()):
        for level in list(levels)[1:]:
            yield cell(f"{axis}: {level}", (*first[:number], level, *first[number + 1 :]))


def _cell_recipe(matrix: CompareRecipe, base: dict, changes: list[dict[str, Any]], source: str) -> EnhanceRecipe:
    raw = {**copy.deepcopy(base), "arms": [{"name": "student"}]}
    for change in changes:
        for key, value in _leaves(change):
            if key.split(".")[0] in OWN_KEYS:
                raise RecipeError(f"{source} sets {key}, which the matrix decides itself.")
            dotted = f"arms.0.{key.removeprefix(ARM)}" if key.startswith(ARM) else key
            apply_override(raw, f"{dotted}={json.dumps(value)}")
    raw |= {"name": matrix.name, "output": matrix.output, "seeds": matrix.seeds, **REPLACED}
    teacher = raw.setdefault("teacher", {})
    teacher["store"] = teacher.get("store") or str(matrix.shared / "priors")
    recipe = build(EnhanceRecipe, raw, source)
    name = (
        "lambda0" if recipe.weight(recipe.arms[0]) == 0 else recipe.arms[0].source
    )  # a training's folder, whoever shares it
    return dataclasses.replace(recipe, arms=[dataclasses.replace(recipe.arms[0], name=name)])


def _leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; mappings are walked through, so that they are merged and not replaced."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
