"""The keys of `job: compare`: a base recipe, the axes along which it is changed, and the seeds of every cell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enhancer.recipe import option
from enhancer.recipe_schema import NAME

DESIGNS = ("product", "one_at_a_time")


@dataclass
class LevelSettings:
    """One value of an axis."""

    name: str = option(help="what rows and charts call it")
    set: dict[str, Any] = option(
        {},
        "keys of the base recipe that this level changes, dotted; `arm.` stands before "
        "those of the student's arm: arm.source, arm.weight, arm.base, arm.members; `adapter` names a recipe of "
        "`job: adapter`, and `adapter.` stands before its keys",
    )


@dataclass
class AxisSettings:
    """One thing that is varied."""

    name: str = option(help="what it is called: source, λ, steps, host")
    levels: list[LevelSettings] = option(help="its values; with design one_at_a_time the first is the default")


@dataclass
class CompareRecipe:
    """A matrix of students, each trained with every seed and held against λ = 0 on the same data."""

    job: str = option("compare", "which job the recipe describes", choices=("compare",))
    name: str = option(help="the matrix's name; its folder is <output>/<name>", pattern=NAME)
    output: str = option("runs", "folder that holds the matrix's folder")
    base: str = option(
        help="the recipe (a file, or a shipped one's name) that every cell is a change of; its arms are left out"
    )
    set: dict[str, Any] = option(
        {}, "keys of the base recipe that are changed in every cell, dotted; mappings are merged"
    )
    axes: list[AxisSettings] = option(help="what is varied")
    design: str = option(
        "product",
        "product: every combination of levels; one_at_a_time: the first level of every axis, and each "
        "other level alone",
        choices=DESIGNS,
    )
    seeds: list[int] = option([0, 1, 2, 3, 4], "training seeds of every cell; tests over seeds need several", min=0)
    parallel: int = option(1, "students trained at once, each in a process of its own", min=1, max=64)
    pool: str | None = option(
        None,
        "folder of priors and students, which matrices share: what is in it is not made again; null is <output>/shared",
    )
    reference: str | None = option(
        None, "name of a cell that every other is held against as well, beside its own λ = 0; null: none"
    )
    keep_students: bool = option(True, "false deletes a student's weights once it has answered; its answers stay")

    def check(self) -> list[str]:
        """Faults between keys, as sentences with the dotted path."""
        faults = []
        if not self.axes:
            faults.append("axes: at least one is needed")
        for name in _twice([axis.name for axis in self.axes]):
            faults.append(f"axes.{name}: the name is used twice")
        for axis in self.axes:
            if not axis.levels:
                faults.append(f"axes.{axis.name}.levels: at least one is needed")
            faults += [
                f"axes.{axis.name}.levels.{name}: the name is used twice"
                for name in _twice([v.name for v in axis.levels])
            ]
        if not self.seeds or _twice(self.seeds):
            faults.append(f"seeds: needs one or more different numbers, not {self.seeds}")
        if self.name in ("worlds", "shared"):
            faults.append(f"name: '{self.name}' is a folder that all runs share; choose another name")
        return faults

    @property
    def folder(self) -> Path:
        """Of the matrix: its record, table and report."""
        return Path(self.output) / self.name

    @property
    def shared(self) -> Path:
        """The pool."""
        return Path(self.pool) if self.pool else Path(self.output) / "shared"


def _twice(names: list) -> list:
    return sorted({name for name in names if names.count(name) > 1})
