"""A matrix's cells: for each combination of levels the recipe of one student, with λ = 0 on the same data beside it."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from enhancer.adapters.schema import AdapterRecipe
from enhancer.experiment.adapted import KEY as ADAPTER
from enhancer.experiment.adapted import adapter_recipe
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
    """One student of the matrix: what it is called, its level on every axis, and a recipe whose one arm it is.

    adapter: the codec adapter that it is, on that recipe's student; None is the student itself, on frames.
    """

    name: str
    levels: dict[str, str]
    recipe: EnhanceRecipe
    adapter: AdapterRecipe | None = None

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
            cells.append(_cell(recipe, base, name, levels, changes))
        except RecipeError as error:
            faults.setdefault(str(error).partition("\n")[2] or str(error), str(error))
    if faults:
        raise RecipeError("\n".join(faults.values()))
    if recipe.reference is not None and recipe.reference not in [cell.name for cell in cells]:
        raise RecipeError(
            f"reference: no cell is called '{recipe.reference}'; they are {', '.join(cell.name for cell in cells)}."
        )
    return cells


def control_of(cell: Cell) -> Cell:
    """λ = 0 on the cell's data, with its student and its training."""
    arm = ArmSettings(name="lambda0", source=CONTROL)
    return Cell("λ = 0", cell.levels, dataclasses.replace(cell.recipe, arms=[arm]), cell.adapter)


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


def _cell(
    matrix: CompareRecipe, base: dict, name: str, levels: dict[str, str], changes: list[dict[str, Any]]
) -> Cell:
    source = f"The recipe of the cell '{name}'"
    raw = {**copy.deepcopy(base), "arms": [{"name": "student"}]}
    adapter, of_adapter = None, []
    for key, value in (leaf for change in changes for leaf in _leaves(change)):
        if key.split(".")[0] in OWN_KEYS:
            raise RecipeError(f"{source} sets {key}, which the matrix decides itself.")
        if key == ADAPTER:
            adapter = value
        elif key.startswith(f"{ADAPTER}."):
            of_adapter.append(f"{key.removeprefix(f'{ADAPTER}.')}={json.dumps(value)}")
        else:
            dotted = f"arms.0.{key.removeprefix(ARM)}" if key.startswith(ARM) else key
            apply_override(raw, f"{dotted}={json.dumps(value)}")
    raw |= {"name": matrix.name, "output": matrix.output, "seeds": matrix.seeds, **REPLACED}
    teacher = raw.setdefault("teacher", {})
    teacher["store"] = teacher.get("store") or str(matrix.shared / "priors")
    recipe = build(EnhanceRecipe, raw, source)
    # the name of a training's folder, whoever shares it
    arm = "lambda0" if recipe.weight(recipe.arms[0]) == 0 else recipe.arms[0].source
    recipe = dataclasses.replace(recipe, arms=[dataclasses.replace(recipe.arms[0], name=arm)])
    if adapter is None and of_adapter:
        raise RecipeError(f"{source} sets {ADAPTER}.{of_adapter[0]}, but no `{ADAPTER}`: name the adapter's recipe.")
    made = None if adapter is None else adapter_recipe(adapter, of_adapter, recipe, source)
    return Cell(name, levels, recipe, made)


def _leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; mappings are walked through, so that they are merged and not replaced."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
