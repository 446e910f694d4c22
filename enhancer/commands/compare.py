"""`enhancer compare RECIPE --priors-only`: motion sources beside each other, before anything is trained."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import rich.table
from rich.markup import escape

from enhancer.agreement_run import EVERYTHING, compared_recipe, measure_sources, short_label
from enhancer.console import Console
from enhancer.recipe_schema import EnhanceRecipe
from vdm_priors.errors import RecipeError, UserError

HEADS = {"auc": "AUC", "nss": "NSS", "kl": "KL", "centre": "centre", "known": "known"}
DEFAULT_SOURCES = ("vdm", "codec", "residual", "flow", "frame_difference", "oracle", "uniform", "shuffled", "ensemble")


def compare_priors(name: str, overrides: list[str], sources: str | None, split: str, clips: int | None,
                   out: Path | None, console: Console) -> Path:
    """Fills the store with every source's priors of `clips` samples, measures them, prints the tables and writes
    agreement.json, .csv, .md and .png; returns their folder."""
    import torch

    from enhancer.agreement_picture import draw_sources
    from enhancer.arms import store_folder
    from enhancer.extraction import with_own_frames
    from enhancer.jobs import load_recipe
    from enhancer.run_data import prepare_data
    from enhancer.runfolder import readable_write_errors, write_json, write_text
    from enhancer.shipped import quiet_libraries

    loaded = load_recipe(name, overrides)
    if not isinstance(loaded.recipe, EnhanceRecipe):
        raise RecipeError(f"{loaded.path}: only recipes of the job 'enhance' have motion sources to compare.")
    recipe = with_own_frames(compared_recipe(loaded.recipe, _named(sources, loaded.recipe)), console)
    torch.set_num_threads(recipe.threads)
    quiet_libraries()
    run = Path(recipe.output) / recipe.name
    folder = out or run / "compare"
    data = prepare_data(recipe, console, asked=split == "test")
    samples = (data.test if split == "test" else data.train)[:clips]
    if data.problems:
        console.warn(f"{len(data.problems)} rows of the data cannot be used; the first: {data.problems[0].id}: "
                     f"{data.problems[0].reason}")
    with readable_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        measured = measure_sources(recipe, samples, data.truth, store_folder(run, recipe), console)
        document = {**measured.document, "split": split, "threads": recipe.threads}
        if not measured.cases:
            first = document["unreadable"][0]
            raise UserError(f"None of the {len(samples)} clips can be compared; the first: {first['id']}: "
                            f"{first['reason']}")
        write_json(folder / "agreement.json", document)
        write_text(folder / "agreement.csv", as_csv(document))
        tables = all_tables(document)
        write_text(folder / "agreement.md", "\n".join(_markdown(*table) for table in tables))
        shown = draw_sources(measured, recipe.teacher.sampling.sampling(), folder / "agreement.png")
    for title, heads, rows in tables:
        console.print(f"\n[bold]{escape(title)}[/bold]")
        console.print(_rich(heads, rows))
    _say_what_is_missing(document, console)
    console.note(f"{folder}: agreement.json, .csv, .md, and .png with {', '.join(shown)}")
    return folder


def _named(sources: str | None, recipe: EnhanceRecipe) -> list[str]:
    """The names to compare; by default all that the data allow."""
    if sources is not None:
        return [source.strip() for source in sources.split(",")]
    return [source for source in DEFAULT_SOURCES if source != "oracle" or recipe.world is not None]


def _say_what_is_missing(document: dict[str, Any], console: Console) -> None:
    for problem in document["unreadable"]:
        console.warn(f"{problem['id']} is left out everywhere: {problem['reason']}")
    for label, entry in document["sources"].items():
        if entry["without"]:
            listed = ", ".join(problem["id"] for problem in entry["without"][:8])
            more = f" and {len(entry['without']) - 8} more (agreement.json)" if len(entry["without"]) > 8 else ""
            console.warn(f"{short_label(label)} has no say in {len(entry['without'])} of {document['clips']} clips: "
                         f"{listed}{more}; the first: {entry['without'][0]['reason']}")


# ---- tables: (title, heads, rows of texts) ---------------------------------------------------------

Table = tuple[str, list[str], list[list[str]]]


def all_tables(document: dict[str, Any]) -> list[Table]:
    """What is printed: all clips; AUC and centre by group; source against source."""
    tables = [_overall(document)]
    if document["ground_truth"]:
        tables += [_by_group(document, "auc", "AUC by kind of clip"), _by_group(document, "kl", "KL by kind of clip"),
                   _by_group(document, "centre", "Centre of mass, error in fractions of the frame, by kind of clip")]
    return [*tables, _correlations(document)]


def _overall(document: dict[str, Any]) -> Table:
    rows = []
    for label, entry in document["sources"].items():
        of_all = entry["groups"].get(EVERYTHING, {})
        measures = [_interval(of_all.get(measure)) for measure in HEADS] if document["ground_truth"] else []
        kilobytes = "–" if entry["bytes"] is None else f"{entry['bytes'] / 1000:.1f}"
        rows.append([short_label(label), *measures, _number(entry["seconds"]), _number(entry["cpu_seconds"]), kilobytes,
                     str(len(entry["without"]))])
    measured = list(HEADS.values()) if document["ground_truth"] else []
    heads = ["source", *measured, "s/clip", "CPU s/clip", "kB/clip", "without"]
    return f"{document['clips']} clips, ± half a 95% interval over clips", heads, rows


def _by_group(document: dict[str, Any], measure: str, title: str) -> Table:
    sources = document["sources"]
    counts: dict[str, int] = {}
    for groups in document["groups"].values():
        for group in groups:
            counts[group] = counts.get(group, 0) + 1
    order = sorted(counts, key=lambda group: (group != EVERYTHING, group))
    rows = [[group, str(counts[group]),
             *(_interval(entry["groups"].get(group, {}).get(measure)) for entry in sources.values())] for group in order]
    return title, ["clips", "n", *map(short_label, sources)], rows


def _correlations(document: dict[str, Any]) -> Table:
    labels = list(document["sources"])
    pairs = {frozenset((pair["first"], pair["second"])): pair for pair in document["correlation"]}
    rows = [[short_label(first), *(_mean(pairs.get(frozenset((first, second)))) for second in labels)] for first in labels]
    return "Source against source: rank correlation of the maps", ["", *map(short_label, labels)], rows


def _interval(of: dict[str, Any] | None) -> str:
    """Mean ± half the 95% interval's width; its ends are in agreement.csv."""
    if not of or of["mean"] is None:
        return "–"
    return f"{of['mean']:.2f}" + ("" if of["low"] is None else f" ±{(of['high'] - of['low']) / 2:.2f}")


def _mean(of: dict[str, Any] | None) -> str:
    return "–" if of is None or of["mean"] is None else f"{of['mean']:.2f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _rich(heads: list[str], rows: list[list[str]]) -> rich.table.Table:
    table = rich.table.Table(box=None, padding=(0, 2, 0, 0))
    for number, head in enumerate(heads):
        table.add_column(escape(head), justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _markdown(title: str, heads: list[str], rows: list[list[str]]) -> str:
    lines = [f"**{title}**", "", "| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def as_csv(document: dict[str, Any]) -> str:
    """One line a source, group and measure: mean, 95% interval, number of clips."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["source", "group", "measure", "mean", "low", "high", "n"])
    for label, entry in document["sources"].items():
        for measure in ("seconds", "cpu_seconds", "bytes"):
            writer.writerow([label, EVERYTHING, measure, entry[measure], None, None, entry["made"] + entry["reused"]])
        for group, of in entry["groups"].items():
            for measure, found in of.items():
                writer.writerow([label, group, measure, *(found[part] for part in ("mean", "low", "high", "n"))])
    for pair in document["correlation"]:
        writer.writerow([f"{pair['first']} × {pair['second']}", EVERYTHING, "rank_correlation",
                         *(pair[part] for part in ("mean", "low", "high", "n"))])
    return text.getvalue()
