"""The reference's pages, written from the code at every build: recipe keys, shipped recipes, commands, the API.

    python docs/tools/reference.py keys        # one page's Markdown

Nothing here is kept in a file, so nothing of it can be out of date.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import typer.main

from enhancer.cli import app
from enhancer.jobs import JOB_MODULES
from enhancer.recipe import KeyHelp, describe
from enhancer.recipe_files import list_recipes, recipes_folder

CODE_AND_TEXT = {
    "priors": (
        "Priors and grids",
        "What a prior is, where its cells lie, and how it is kept. These modules load no model library.",
        ["vdm_priors.grid", "vdm_priors.prior", "vdm_priors.store", "vdm_priors.words", "vdm_priors.heads",
         "vdm_priors.masks", "vdm_priors.tokens", "vdm_priors.confidence"],
    ),
    "teacher": (
        "The teacher",
        "From a clip and a text to priors: inversion, harvest, selection; and what a family of models must offer.",
        ["vdm_priors.extract", "vdm_priors.settings", "vdm_priors.harvest", "vdm_priors.harvest_request",
         "vdm_priors.inversion", "vdm_priors.schedules", "vdm_priors.families", "vdm_priors.attention",
         "vdm_priors.estimate"],
    ),
    "student": (
        "The student",
        "Batches, where visual tokens lie, capture of attention rows, words, alignment, export.",
        ["vlm_hooks.families", "vlm_hooks.student", "vlm_hooks.loading", "vlm_hooks.capture",
         "vlm_hooks.capture_request", "vlm_hooks.words", "vlm_hooks.alignment", "vlm_hooks.aligners", "vlm_hooks.export"],
    ),
    "data": (
        "Sources, clips and data",
        "Clips of video files, motion from the codec, samples, motion sources, and how priors are compared.",
        ["enhancer.video.clip", "enhancer.video.sampling", "enhancer.video.codec.reading", "enhancer.video.codec.field",
         "enhancer.video.codec.accumulate", "enhancer.data.samples", "enhancer.sources", "enhancer.spatial_prior",
         "enhancer.agreement"],
    ),
    "adapters": (
        "Codec adapters",
        "What an adapter is, and the host with an adapter's tokens in its sequence.",
        ["vlm_hooks.adapters", "vlm_hooks.adapters.base", "vlm_hooks.adapters.model", "vlm_hooks.adapters.inputs",
         "vlm_hooks.streams"],
    ),
    "errors": (
        "Errors",
        "Every error that a user can cause is one of these. Its message says what was wrong, where, and what to do.",
        ["vdm_priors.errors"],
    ),
}


def pages() -> dict[str, str]:
    """Markdown by the page's name."""
    written = {name: api_page(*parts) for name, parts in CODE_AND_TEXT.items()}
    return written | {"keys": keys_page(), "recipes": recipes_page(), "commands": commands_page()}


# ---- recipes ---------------------------------------------------------------------------------------

def keys_page() -> str:
    """All keys of all jobs, grouped by their first parts."""
    lines = ["# Recipe keys", "",
             "Written from the code that checks recipes. `enhancer keys PREFIX` prints the same in a terminal, and any key "
             "can be changed on the command line: `enhancer run quickstart training.steps=200`. A key that is not here is "
             "refused, with the nearest one that is.", ""]
    for job, schema in jobs():
        purpose = (schema.__doc__ or "").strip().splitlines()[0]
        lines += [f"## job: {job}", "", cell(purpose), ""]
        tables: dict[str, list[KeyHelp]] = {}
        for row in describe(schema):
            tables.setdefault(group_of(row), []).append(row)
        for group, rows in tables.items():
            anchor = re.sub(r"\W+", "-", f"{job} {group}").strip("-")
            lines += ["", f"### {cell(group) or 'the recipe itself'} {{ #{anchor} }}", "",
                      "| key | default | values | effect |", "|---|---|---|---|"]
            lines += [f"| `{row.path}` | {code(row.default)} | {cell(row.limits or row.type)} | {cell(row.help)} |"
                      for row in rows]
        lines.append("")
    return "\n".join(lines)


def jobs() -> Iterator[tuple[str, type]]:
    """Every job's name and the dataclass of its recipe."""
    for module in JOB_MODULES:
        yield from ((name, job.schema) for name, job in importlib.import_module(module).JOBS.items())


def group_of(row: KeyHelp) -> str:
    """Which table a key stands in: that of the mapping it belongs to."""
    return row.path.rpartition(".")[0]


def recipes_page() -> str:
    """The shipped recipes with their headers."""
    lines = ["# Shipped recipes", "",
             "`enhancer cp NAME mine.yaml` copies one to edit, `enhancer validate NAME` says what it needs, `enhancer run NAME` "
             "runs it. What a recipe's keys do is in [Recipe keys](keys.md).", ""]
    for recipe in list_recipes():
        header = [line.removeprefix("#").rstrip() for line in recipe.path.read_text(encoding="utf-8").splitlines()
                  if line.startswith("#")]
        lines += [f"## {recipe.name}", "", "```text", *(line.removeprefix(" ") for line in header), "```", ""]
    launch = sorted(path.relative_to(recipes_folder()).as_posix() for path in recipes_folder().rglob("*.json"))
    lines += ["## Launch files", "", "For `training.fsdp` and `training.deepspeed`: " + ", ".join(f"`{name}`" for name in launch)
              + ".", ""]
    return "\n".join(lines)


# ---- commands --------------------------------------------------------------------------------------

def commands_page() -> str:
    """Every command with its help, arguments and options."""
    root = typer.main.get_command(app)
    lines = ["# Commands", "", "`enhancer COMMAND --help` says the same. Exit status: 0 done, 1 the job could not do its work, "
             "2 the command or the recipe is wrong, 3 a score is incomplete, 130 interrupted.", ""]
    for path, command in leaves(root, ()):
        lines += [f"## enhancer {' '.join(path)}", "", *help_text(command.help or ""), ""]
        rows = [parameter for parameter in command.params if parameter.name != "help"]
        if rows:
            lines += ["| argument or option | effect |", "|---|---|"]
            lines += [f"| {written(parameter)} | {cell(parameter.help or '')} |" for parameter in rows]
        lines.append("")
    return "\n".join(lines)


def leaves(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Commands below `command`, groups opened."""
    for name, below in getattr(command, "commands", {}).items():
        if getattr(below, "commands", None):
            yield from leaves(below, (*path, name))
        else:
            yield (*path, name), below


def help_text(text: str) -> list[str]:
    """A command's help as Markdown: paragraphs that are command lines become code."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        joined = paragraph.replace("\n", " ").replace("\\[", "[").strip()
        starts = ("enhancer ", "torchrun ", "accelerate ")
        lines += [f"```\n{joined}\n```" if joined.startswith(starts) else cell(joined), ""]
    return lines


def written(parameter: click.Parameter) -> str:
    """An argument or option as it is written on the command line, with its default."""
    if not getattr(parameter, "opts", None) or isinstance(parameter, click.Argument):
        return code(parameter.metavar or parameter.name.upper())
    name = ", ".join(sorted(parameter.opts, key=len, reverse=True)[:1] + parameter.secondary_opts)
    default = parameter.default
    shown = default is not None and default is not False and not callable(default) and str(default) not in ("", "()")
    return f"{code(name)} ({code(str(default))})" if shown else code(name)


# ---- the API ---------------------------------------------------------------------------------------

def api_page(title: str, introduction: str, modules: list[str]) -> str:
    """A page of modules, whose docstrings mkdocstrings takes in."""
    lines = [f"# {title}", "", introduction, ""]
    for name in modules:
        lines += [f"::: {name}", ""]
    return "\n".join(lines)


# ---- Markdown --------------------------------------------------------------------------------------

def cell(text: str) -> str:
    """Plain text inside a table or a paragraph: nothing in it is Markdown or HTML."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    for character in "\\`*_[]":
        escaped = escaped.replace(character, f"\\{character}")
    return escaped.replace("\n", " ")


def code(text: str) -> str:
    """Text as code, breakable nowhere, with table bars kept from splitting it."""
    return f"`{text.replace('`', chr(39)).replace('|', '¦')}`"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    print(pages()[sys.argv[1]])
