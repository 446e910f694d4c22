"""The run folder: what a run has done so far, written so that a rerun continues.

recipe.yaml (resolved), run.json (versions, hashes, status, seconds a step, finished steps) and
skipped.jsonl. Every file is replaced whole; a full disk or a folder that cannot be written is a
UserError that names it.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from enhancer.console import Console
from enhancer.recipe import build, differences, to_plain, to_yaml
from enhancer.train_settings import UNCHANGING
from vdm_priors.errors import RecipeError, UserError

KEPT_WHEN_FRESH = ("priors",)  # keyed by content, so never out of date
NO_SPACE = ("No space left on device", "PytorchStreamWriter failed writing")  # how safetensors and torch say it
FREE_KEYS = ("output", "resume", "device", "threads", "parallel_arms", "report")  # change nothing in the results
SHOWN_PROBLEMS = 3  # left-out samples that are printed; all are in skipped.jsonl
PACKAGES = ("motion-enhancer", "torch", "transformers", "diffusers", "accelerate", "av", "numpy", "safetensors", "omegaconf")


TRAINED = ("arms/*/seed*/train.json", "arms/*/seed*/checkpoints/*/complete.json")
ASKED = ("base/scores.json", "arms/*/seed*/scores.json")
RESULTS_OF = {"student": TRAINED + ASKED, "teacher": TRAINED, "train": TRAINED, "test": ASKED}  # files an input went into


class OtherInputs(UserError):
    """A run was to be continued with other models or data than its results were made with."""


class RunFolder:
    """One run's folder and its record."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.record: dict[str, Any] = {}
        self._before: dict[str, str] = {}  # recipe.yaml and run.json of the run that is continued

    @classmethod
    def open(cls, folder: Path, recipe: Any, *, resume: bool = True, fresh: bool = False) -> RunFolder:
        """Starts the run's folder, or continues it where the same recipe was begun there.

        Raises UserError if another recipe's results are in it, saying what differs.
        """
        run = cls(folder)
        with readable_write_errors(run.folder):
            if fresh:
                run._clear()
            elif (run.folder / "run.json").is_file():
                if not resume:
                    raise UserError(f"{folder} already holds a run and `resume` is false. Give another `name`, or run with "
                                    f"--fresh to start it over (its priors are kept).")
                run._continue(recipe)
            elif run.folder.is_dir() and any(p.name not in KEPT_WHEN_FRESH for p in run.folder.iterdir()):
                raise UserError(f"{folder} exists and is not a run folder; choose another `name` or `output`.")
            run.folder.mkdir(parents=True, exist_ok=True)
            write_text(run.folder / "recipe.yaml", to_yaml(recipe))
        run.record.update(name=run.folder.name, command=" ".join(["enhancer", *sys.argv[1:]]), status="running",
                          finished=None, versions=versions(), machine=machine())
        run.record.setdefault("started", _now())
        run.record.setdefault("hashes", {})
        run.record.setdefault("seconds", {})
        run.record.setdefault("steps", {})
        run.save()
        return run

    @classmethod
    def existing(cls, folder: Path) -> RunFolder:
        """The folder of a run that was begun; UserError if it is none."""
        run = cls(folder)
        run.record = read_json(run.folder / "run.json", None)
        if run.record is None:
            raise UserError(f"{folder} is not a run folder: it has no run.json. `enhancer run` makes one.")
        return run

    def _clear(self) -> None:
        if not self.folder.exists():
            return
        if not (self.folder / "run.json").is_file() and any(p.name not in KEPT_WHEN_FRESH for p in self.folder.iterdir()):
            raise UserError(f"{self.folder} is not a run folder, so --fresh deletes nothing in it; choose another `name`.")
        for path in self.folder.iterdir():
            if path.name not in KEPT_WHEN_FRESH:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _continue(self, recipe: Any) -> None:
        self.record = read_json(self.folder / "run.json", {})
        for path in (self.folder / "recipe.yaml", self.folder / "run.json"):
            if path.is_file():
                self._before[path.name] = path.read_text(encoding="utf-8", errors="replace")
        try:
            old = yaml.safe_load((self.folder / "recipe.yaml").read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError):
            old = {}
        try:
            old = to_plain(build(type(recipe), old))  # with the defaults of keys that have come since
        except RecipeError:
            pass  # what differs is listed as it was written
        changed = changes(old, to_plain(recipe))
        if changed:
            listed = "\n".join(f"  - {line}" for line in changed)
            raise UserError(f"{self.folder} holds results of another recipe; what differs:\n{listed}\n"
                            f"Give this run another `name`, or start it over with --fresh (its priors are kept).")

    def take_inputs(self, hashes: dict[str, str], named: dict[str, str]) -> None:
        """Records what the run is made from.

        hashes: of `student`, `teacher`, `train` and `test`; named: what each is called in an error. Raises OtherInputs
        where results in the folder were made from other content, and leaves recipe.yaml and run.json as they were. An
        input that nothing was made from yet may change.
        """
        before = self.record["hashes"]
        changed = [name for name, value in hashes.items() if name in before and before[name] != value
                   and any(next(self.folder.glob(pattern), None) for pattern in RESULTS_OF[name])]
        if changed:
            for name, text in self._before.items():
                write_text(self.folder / name, text)
            listed = "\n".join(f"  - {named[name]}: {before[name][:12]} -> {hashes[name][:12]}" for name in changed)
            raise OtherInputs(f"{self.folder} holds results that were made from other content of:\n{listed}\n"
                              f"Continuing would mix the two in one table. Put back what was there, give this run "
                              f"another `name` or `output`, or start it over with --fresh (its priors are kept).")
        before.update(hashes)

    # ---- the record ------------------------------------------------------------------------

    def save(self) -> None:
        """Writes run.json."""
        self.record["peak_memory_mb"] = max(self.record.get("peak_memory_mb") or 0.0, peak_memory_mb())
        write_json(self.folder / "run.json", self.record)

    def is_done(self, step: str, state: Any = True) -> bool:
        """Whether a step was finished for this state of what it depends on."""
        return self.record["steps"].get(step) == state

    @contextmanager
    def step(self, name: str, state: Any = True) -> Iterator[None]:
        """Times a step and records it as finished if nothing is raised."""
        started = time.monotonic()
        try:
            yield
        finally:
            spent, before = time.monotonic() - started, self.record["seconds"].get(name, 0.0)
            # an interrupted step adds up; a finished one that was only looked through again does not
            spent = max(before, spent) if name in self.record["steps"] else before + spent
            self.record["seconds"][name] = round(spent, 2)
            self.save()
        self.record["steps"][name] = state
        self.save()

    def close(self, status: str) -> None:
        """The run ended: finished, interrupted or failed."""
        self.record.update(status=status, finished=_now())
        self.save()

    # ---- skipped samples -------------------------------------------------------------------

    def skip(self, stage: str, problems: list) -> None:
        """Lists a stage's left-out samples in skipped.jsonl, instead of what it listed before."""
        rows = [row for row in self.skipped() if row["stage"] != stage]
        rows += [{"stage": stage, "id": problem.id, "reason": problem.reason} for problem in problems]
        write_lines(self.folder / "skipped.jsonl", rows)

    def skipped(self) -> list[dict]:
        """All rows of skipped.jsonl."""
        return read_lines(self.folder / "skipped.jsonl")


def changes(old: dict, new: dict) -> list[str]:
    """Differences of two resolved recipes that would mix results. Adding arms or seeds is none."""
    old, new = (_without_free_training(recipe) for recipe in (old, new))
    lines = []
    if isinstance(old.get("arms"), list) and isinstance(new.get("arms"), list):
        before, after = ({arm["name"]: arm for arm in recipe.pop("arms")} for recipe in (old, new))
        for name in before.keys() & after.keys():
            lines += differences(before[name], after[name], f"arms.{name}.")
        old.pop("seeds", None), new.pop("seeds", None)
    for key in FREE_KEYS:
        old.pop(key, None), new.pop(key, None)
    return differences(old, new) + lines


def _without_free_training(recipe: dict) -> dict:
    training = recipe.get("training")
    if not isinstance(training, dict):
        return dict(recipe)
    return {**recipe, "training": {key: value for key, value in training.items() if key not in UNCHANGING}}


def report_skipped(run: RunFolder, stage: str, problems: list, console: Console) -> None:
    """Lists a stage's left-out samples in skipped.jsonl and prints the first of them."""
    run.skip(stage, problems)
    if problems:
        shown = "; ".join(f"{p.id}: {p.reason}" for p in problems[:SHOWN_PROBLEMS])
        more = f" and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        console.warn(f"{len(problems)} left out ({shown}{more}); listed in {run.folder / 'skipped.jsonl'}")


def finished_so_far(folder: Path, store: Path | None = None) -> str:
    """One sentence on what an interrupted run has done. store: of its priors, if not in the folder."""
    record = read_json(Path(folder) / "run.json", {})
    steps = ", ".join(record.get("steps", {})) or "nothing"
    priors = len(list(Path(store or Path(folder) / "priors").glob("*/*.safetensors")))
    students = len(list(Path(folder).glob("arms/*/seed*/train.json")))
    begun = len({path.parents[1] for path in Path(folder).glob("arms/*/seed*/checkpoints/*/complete.json")})
    return (f"Finished in {folder}: {steps}; {priors} priors and {students} trained students are on disk"
            + (f", and checkpoints of {begun} more" if begun else "") + ".")


# ---- files ---------------------------------------------------------------------------------------

@contextmanager
def readable_write_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system says about writing into a UserError with the remedy."""
    try:
        yield
    except (UserError, BrokenPipeError):  # a pipe is no file; who reads it has gone
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not any(sign in str(error) for sign in NO_SPACE):
            raise
        place = getattr(error, "filename", None) or path
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UserError(f"{place} cannot be written ({reason}). Free disk space, or choose a folder that you may write to (in a "
                        f"recipe: `output`), then run the same command again: what is finished is kept.") from error


def writable_folder(folder: Path) -> Path:
    """Makes the folder; UserError if nothing can be written there, before work is done for it."""
    with readable_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission, or mounted read-only", str(folder))
    return folder


def existing_folder(path: Path) -> Path:
    """The path, or the nearest of its parents that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def write_text(path: Path, text: str) -> None:
    """Replaces a file whole: a reader sees the old or the new content."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    with readable_write_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            error.filename = str(path)  # the name that the user knows
            _unlink_quietly(partial)
            raise


def _unlink_quietly(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # the error that led here says more


def write_json(path: Path, value: Any) -> None:
    """One JSON file."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_lines(path: Path, rows: list[dict]) -> None:
    """One JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path, default: Any) -> Any:
    """A JSON file's value; `default` where there is none. UserError for a damaged one."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}). Delete it and run the same command again.") from error


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSON lines file, none if there is no file."""
    if not Path(path).is_file():
        return []
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]


# ---- the machine ---------------------------------------------------------------------------------

def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """Cores, processor and memory in a few words."""
    return f"{os.cpu_count()} cores, {platform.machine()}, {machine_memory() / 2**30:.0f} GB, {platform.system()}"


def machine_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(used / (2**20 if sys.platform == "darwin" else 2**10), 1)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
