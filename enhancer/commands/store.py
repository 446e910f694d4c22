"""`enhancer store ls|verify|gc`: what is in a folder of priors, what is damaged, and what nobody uses."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import yaml

from enhancer.console import Console
from enhancer.recipe import build
from enhancer.recipe_schema import EnhanceRecipe
from enhancer.runfolder import read_json
from vdm_priors.errors import RecipeError, StoreError, UserError
from vdm_priors.store import PriorEntry, PriorStore

SHOWN = 20  # files that are listed by name
SHORT_KEY = 12
LEAST_TEXT = 20  # characters of the text that are shown however narrow the terminal is
COLUMNS = ("key", "source", "model", "text", "grid", "words", "size", "age")
AGES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


def open_store(folder: Path) -> PriorStore:
    """The store in a folder that exists; a typing error is no empty store."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. A run's priors are in <run folder>/priors, unless its recipe "
                        f"has teacher.store.")
    return PriorStore(folder)


# ---- ls ------------------------------------------------------------------------------------------

def list_store(folder: Path, source: str | None, model: str | None, text: str | None, as_json: bool,
               console: Console) -> int:
    """Prints the priors that fit, from their headers alone; returns how many. Headers that cannot be read are counted.

    source, model: the whole name; text: a part of it, in any case. as_json: one object a line.
    """
    store, unreadable, shown, total = open_store(folder), [], [], 0
    for entry in _entries(store, unreadable):
        named = source in (None, entry.source) and model in (None, entry.model)
        if named and (text or "").lower() in entry.text.lower():
            shown.append(entry)
            total += entry.bytes
    if as_json:
        for entry in shown:
            row = asdict(entry)
            row["grid"] = list(row.pop("shape"))
            row.pop("provenance")
            console.out.file.write(json.dumps(row, ensure_ascii=False) + "\n")
    else:
        for line in _lines(shown, console.out.width):
            console.out.file.write(line + "\n")
        console.print(f"{len(shown)} priors, {_size(total)}", markup=False, highlight=False)
        if unreadable:
            console.warn(f"{len(unreadable)} more are damaged; `enhancer store verify {folder}` lists them")
    return len(shown)


def _entries(store: PriorStore, unreadable: list[str]) -> Iterator[PriorEntry]:
    for key in store.keys():
        try:
            yield store.entry(key)
        except StoreError:
            unreadable.append(key)


def _lines(entries: list[PriorEntry], width: int) -> Iterator[str]:
    """A table as plain lines, of which the text is cut to fit; rich takes milliseconds a row."""
    now = time.time()
    rows = [COLUMNS] + [(entry.key[:SHORT_KEY], entry.source, entry.model, " ".join(entry.text.split()),
                         "×".join(map(str, entry.shape)), str(len(entry.words)), _size(entry.bytes),
                         _age(now - entry.modified)) for entry in entries]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = COLUMNS.index("text")
    widths[text] = max(LEAST_TEXT, min(widths[text], width - sum(widths) + widths[text] - 2 * len(widths)))
    for row in rows:
        cells = [cell if len(cell) <= room else cell[:room - 1] + "…" for cell, room in zip(row, widths, strict=True)]
        yield "  ".join(cell.ljust(room) for cell, room in zip(cells, widths, strict=True)).rstrip()


def _size(count: float) -> str:
    return f"{count / 2**20:.1f} MB" if count >= 2**20 else f"{count / 2**10:.1f} kB"


def _age(seconds: float) -> str:
    found = (f"{seconds / unit:.0f} {name}" for unit, name in AGES if seconds >= unit)
    return next(found, f"{max(seconds, 0.0):.0f} s")


# ---- verify --------------------------------------------------------------------------------------

def verify_store(folder: Path, delete: bool, console: Console) -> bool:
    """Holds every prior against its checksum and its key; True where none is damaged, or all that are have been deleted.

    Damaged is what a filling would make again.
    """
    from enhancer.filling import stored_prior

    store, damaged = open_store(folder), []
    keys = store.keys()
    with console.bar("verifying", len(keys), "prior") as bar:
        for done, key in enumerate(keys, 1):
            try:
                stored_prior(store, key)
            except StoreError as error:
                damaged.append(key)
                told = f"✗ {store.path(key)}: {error.__cause__ or error}"
                console.print(told, style="red", markup=False, soft_wrap=True)
            bar(done)
    if delete:
        for key in damaged:
            store.discard(key)
    told = " and deleted: the next extraction makes them again" if delete and damaged else ""
    whole = len(keys) - len(damaged)
    console.print(f"{whole} of {len(keys)} priors are whole, {len(damaged)} damaged{told}", markup=False,
                  highlight=False)
    return delete or not damaged


# ---- gc ------------------------------------------------------------------------------------------

def collect_garbage(folder: Path, runs: list[Path], recipes: list[str], delete: bool, console: Console) -> list[str]:
    """Deletes the priors that none of the named runs and recipes uses, and the temporary files of killed writes.

    Returns the keys of unused priors; delete=False only names them. Without a run or a recipe no prior counts as
    unused. Raises UserError where a run or recipe uses no prior of this store at all, most likely a wrong name.
    """
    store = open_store(folder)
    keys, used = store.keys(), set()
    named = [(str(run), _keys_of_run(run, store)) for run in runs]
    named += [(name, _keys_of_recipe(name, store)) for name in recipes]
    for name, its in named:
        if not its & set(keys):
            raise UserError(f"{name} uses none of the {len(keys)} priors in {folder}, so nothing is deleted; check the "
                            f"two names.")
        used |= its
        console.note(f"{name} uses {len(its & set(keys))} of {len(keys)} priors")
    unused = [key for key in keys if key not in used] if named else []
    leftovers = store.leftovers()
    files = [store.path(key) for key in unused] + leftovers
    size = sum(path.stat().st_size for path in files if path.exists())
    for path in files[:SHOWN]:
        console.print(f"{'deleted' if delete else 'unused'}: {path}", markup=False, soft_wrap=True, highlight=False)
    if len(files) > SHOWN:
        console.print(f"and {len(files) - SHOWN} more", highlight=False)
    if delete:
        for key in unused:
            store.discard(key)
        for path in leftovers:
            path.unlink(missing_ok=True)
    console.print(f"{len(unused)} unused priors and {len(leftovers)} left-over files, {_size(size)}"
                  + (" deleted" if delete else "; nothing is deleted yet: add --yes to delete them" if files else ""),
                  markup=False, highlight=False)
    if not named:
        console.note("which priors are used is known where --run or --recipe names who uses them")
    return unused


def _keys_of_run(run: Path, store: PriorStore) -> set[str]:
    """Of what it lists, and where it is still under way also of what its recipe will use."""
    record = read_json(run / "run.json", None)
    if record is None:
        raise UserError(f"{run} is not a run folder: it has no run.json.")
    listed = read_json(run / "priors.json", None)
    keys = {row["key"] for row in listed or []}
    if listed is None or record.get("status") != "finished":
        path = run / "recipe.yaml"
        keys |= planned_keys(build(EnhanceRecipe, yaml.safe_load(path.read_text(encoding="utf-8")), str(path)), store)
    return keys


def _keys_of_recipe(name: str, store: PriorStore) -> set[str]:
    from enhancer.jobs import load_recipe

    recipe = load_recipe(name).recipe
    if not isinstance(recipe, EnhanceRecipe):
        raise RecipeError(f"{name} is no recipe of the job 'enhance', which alone uses priors.")
    return planned_keys(recipe, store)


def planned_keys(recipe: EnhanceRecipe, store: PriorStore) -> set[str]:
    """Keys of all priors that a run of this recipe uses, as far as its data, models and the store tell them."""
    from enhancer.extraction import needed_sources, source_contexts, with_own_frames
    from enhancer.run_data import read_data
    from enhancer.sources import build_spec

    try:
        recipe = with_own_frames(recipe)
        data = read_data(recipe, asked=False)
        run, quiet = Path(recipe.output) / recipe.name, Console(quiet=True)
        contexts = source_contexts(run, recipe, data.train, data.truth, quiet, store.folder)
    except UserError as error:
        raise UserError(f"Which priors {recipe.name} uses cannot be told, so nothing is deleted: {error}") from error
    keys = set()
    for source in (build_spec(spec, contexts) for spec in needed_sources(recipe)):
        for sample in data.train:
            try:
                keys.add(source.key(sample))
            except UserError:
                continue  # it has no prior
    return keys
