"""`enhancer compare RECIPE...`: whole experiments, one matrix after another, and one page of them all."""

from __future__ import annotations

from pathlib import Path

from enhancer.console import Console
from vdm_priors.errors import RecipeError

TOGETHER = "compare.html"  # in the output folder, the page of several matrices


def compare_matrices(
    names: list[str], overrides: list[str], fresh: bool, report_only: bool, console: Console
) -> list[Path]:
    """Runs the matrices and returns their folders. report_only: the pages are written from what is there."""
    from enhancer.experiment.page import write_page
    from enhancer.experiment.run import run_compare, show_results
    from enhancer.experiment.schema import CompareRecipe
    from enhancer.jobs import load_recipe
    from enhancer.processes import Process

    loaded = [load_recipe(name, overrides) for name in names]
    for one in loaded:
        if not isinstance(one.recipe, CompareRecipe):
            raise RecipeError(
                f"{one.path}: is a recipe of the job '{one.recipe.job}'. Whole experiments are recipes of the job "
                f"'compare' (`enhancer ls compare`); --priors-only compares the motion sources of this one."
            )
    folders = []
    for one in loaded:
        console.step(one.recipe.name)
        if report_only:
            show_results(one.recipe.folder, console)
            folders.append(one.recipe.folder)
        else:
            folders.append(run_compare(one.recipe, console, fresh))
    if len(folders) > 1 and Process.this().rank == 0:
        console.print(f"all of them: {write_page(Path(loaded[0].recipe.output) / TOGETHER, folders)}", markup=False)
    return folders
