"""The command line: `enhancer --help`.

Exit status: 0 done, 1 the job could not do its work, 2 the command or the recipe is wrong, 3 a score is
incomplete, 130 interrupted (the same command continues).
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import rich.console
import rich.padding
import rich.table
import typer
from rich.markup import escape

from enhancer.console import Console
from enhancer.recipe import nearest_name
from enhancer.recipe_files import find_recipe, list_recipes
from vdm_priors.errors import RecipeError, UserError

app = typer.Typer(
    name="enhancer", no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False,
    help="Teach a vision-language model to see motion, with the attention of a video diffusion model as the teacher.\n\n"
         "[bold]A first run[/bold], in minutes and without a download:\n\n"
         "  enhancer ls                             the recipes\n"
         "  enhancer validate quickstart            what it needs, before it loads\n"
         "  enhancer run quickstart                 table, report, exported models\n"
         "  enhancer run quickstart seeds=\\[0,1,2]   the same with a key changed\n"
         "  enhancer keys training                  the keys, with their effect\n"
         "  enhancer cp quickstart mine.yaml        a copy to edit\n\n"
         "[bold]Your own video[/bold]:\n\n"
         "  enhancer extract --video clip.mp4 --text 'Which way does the red ball roll?'")
world_app = typer.Typer(no_args_is_help=True, help="The embedded world: labelled motion clips with ground truth.")
app.add_typer(world_app, name="world")
store_app = typer.Typer(no_args_is_help=True, help="Folders of priors: what is in them, what is damaged, what nobody uses.")
app.add_typer(store_app, name="store")

Overrides = Annotated[Optional[list[str]], typer.Argument(metavar="KEY=VALUE", help="Recipe keys to change, e.g. "
                                                           "training.steps=200 or arms.vdm.weight=0.5", show_default=False)]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Results and warnings only, for logs.")]
Store = Annotated[Path, typer.Argument(metavar="FOLDER", help="A prior store, e.g. runs/quickstart/priors.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete the run folder's earlier results first (its priors are kept).")]


# ---- errors --------------------------------------------------------------------------------------

def guarded(command: Callable) -> Callable:
    """Turns exceptions of a command into one paragraph on stderr and the exit status."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            raise typer.Exit(_explain(error)) from None

    return run


def _explain(error: BaseException) -> int:
    """Says what ended the command, and returns the exit status."""
    if isinstance(error, KeyboardInterrupt) or _interrupted:
        _complain("Interrupted. What is finished is kept; the same command continues from there.", label="")
        return 130
    if isinstance(error, UserError):
        _complain(error)
        return 2 if isinstance(error, RecipeError) else 1
    if os.environ.get("ENHANCER_TRACEBACK") == "1":
        raise error
    what = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"[:600].rstrip(".")
    _complain(f"Unexpected: {what}. This is a fault of the program, or of a library; set ENHANCER_TRACEBACK=1 to see "
              f"where.")
    return 1


_interrupted = False  # by Ctrl-C, which a library may turn into an error of its own: "could not import module"


def _interrupt(*_: object) -> None:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def _complain(message: object, label: str = "error: ") -> None:
    if os.environ.get("ENHANCER_TRACEBACK") == "1" and isinstance(message, UserError):
        import traceback

        traceback.print_exc()
    rich.console.Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]{label}[/red]{escape(str(message))}")


# ---- recipes -------------------------------------------------------------------------------------

@app.command()
@guarded
def run(recipe: RecipeName, overrides: Overrides = None, fresh: Fresh = False, quiet: Quiet = False) -> None:
    """Run a recipe from beginning to end; run it again to continue after an interruption.

    enhancer run quickstart

    enhancer run mine.yaml seeds=[0,1,2] parallel_arms=2

    torchrun --nproc-per-node 8 -m enhancer run mine.yaml     (or: accelerate launch --multi_gpu --num_processes 8 -m enhancer ...)
    """
    _run(recipe, overrides, fresh, quiet)


@app.command()
@guarded
def train(recipe: RecipeName, overrides: Overrides = None, fresh: Fresh = False, quiet: Quiet = False) -> None:
    """Run a recipe up to the trained and exported students, without evaluation and report.

    enhancer train quickstart training.steps=200

    `enhancer run` with the same recipe continues from here.
    """
    _run(recipe, overrides, fresh, quiet, until="train")


def _run(name: str, overrides: list[str] | None, fresh: bool, quiet: bool, until: str | None = None) -> None:
    from enhancer.jobs import load_recipe
    from enhancer.processes import Process
    from enhancer.recipe_schema import EnhanceRecipe

    loaded = load_recipe(name, overrides or [])
    console = Console(quiet)
    stops = {} if until is None else {"until": until}
    if loaded.recipe.job not in ("enhance", "compare", "adapter") and Process.this().count > 1:
        raise RecipeError(f"{loaded.path}: only recipes of the jobs 'enhance', 'compare' and 'adapter' work in several "
                          f"processes; start this one without a launcher.")
    if stops and not isinstance(loaded.recipe, EnhanceRecipe):
        raise RecipeError(f"{loaded.path}: only recipes of the job 'enhance' can stop at '{until}'; use `enhancer run`.")
    try:
        loaded.job.run(loaded.recipe, console, fresh=fresh, **stops)
    except KeyboardInterrupt:
        if isinstance(loaded.recipe, EnhanceRecipe):
            from enhancer.arms import store_folder
            from enhancer.runfolder import finished_so_far

            folder = Path(loaded.recipe.output) / loaded.recipe.name
            _complain(finished_so_far(folder, store_folder(folder, loaded.recipe)), label="")
        raise


@app.command()
@guarded
def validate(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Check a recipe and say what it needs (tokens, memory, disk, files) before any model loads.

    enhancer validate quickstart training.batch_size=64
    """
    from enhancer.jobs import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if not loaded.job.validate(loaded.recipe, Console()):
        raise typer.Exit(1)


@app.command("ls")
@guarded
def list_(folder: Annotated[str, typer.Argument(metavar="PREFIX", help="Only recipes whose name begins like this.")] = "") -> None:
    """List the shipped recipes with their purpose."""
    recipes = list_recipes()
    found = [entry for entry in recipes if entry.name.startswith(folder)]
    if not found:
        raise RecipeError(f"No recipe's name begins with '{folder}'; there are: {', '.join(entry.name for entry in recipes)}.")
    table = rich.table.Table("recipe", "purpose", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for entry in found:
        table.add_row(entry.name, escape(entry.purpose))
    Console().print(table)


@app.command()
@guarded
def cp(recipe: RecipeName, to: Annotated[Path, typer.Argument(metavar="FILE", help="The new file.")]) -> None:
    """Copy a shipped recipe to a file of yours to edit.

    enhancer cp quickstart mine.yaml
    """
    source = find_recipe(recipe)
    target = to / source.name if to.is_dir() else to
    if target.exists():
        raise UserError(f"{target} exists already; give another name.")
    from enhancer.runfolder import write_text

    write_text(target, source.read_text(encoding="utf-8"))
    Console().print(f"{target}: edit it, then `enhancer validate {target}`.", markup=False, soft_wrap=True)


@app.command()
@guarded
def keys(prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Only keys that begin like this, e.g. teacher.extraction")] = "",
         job: Annotated[str, typer.Option(help="The job whose recipe keys are listed.")] = "enhance") -> None:
    """List the keys of a recipe: type, default, limits and effect.

    enhancer keys training.alignment
    """
    from enhancer.jobs import find_job
    from enhancer.recipe import describe

    rows = describe(find_job(job).schema)
    found = [row for row in rows if row.path.startswith(prefix)]
    if not found:
        groups = {row.path[:dot] for row in rows for dot in range(len(row.path)) if row.path[dot] == "."}
        nearest = nearest_name(prefix, sorted(groups) + [row.path for row in rows])
        raise RecipeError(f"No key begins with '{prefix}'." + (f" Did you mean '{nearest}'?" if nearest else ""))
    console = Console()
    for row in found:
        console.print(f"[bold]{escape(row.path)}[/bold] = {escape(row.default)}  [dim]{escape(row.limits or row.type)}[/dim]")
        console.print(rich.padding.Padding(escape(row.help), (0, 0, 0, 4)))


# ---- parts of the way ----------------------------------------------------------------------------

@app.command()
@guarded
def extract(
    arguments: Annotated[Optional[list[str]], typer.Argument(
        metavar="RECIPE KEY=VALUE", help="A recipe, or with --video only keys such as teacher.extraction.steps=10.",
        show_default=False)] = None,
    video: Annotated[Optional[Path], typer.Option(help="One video file instead of a recipe.")] = None,
    text: Annotated[Optional[str], typer.Option(help="The text whose words are looked for in --video.")] = None,
    teacher: Annotated[Optional[str], typer.Option(help="Teacher for --video: `world`, a diffusers folder or hub name.")] = None,
    out: Annotated[Path, typer.Option(help="Prior store for --video.")] = Path("priors"),
    fresh: Fresh = False, quiet: Quiet = False,
) -> None:
    """Take motion priors from the teacher: for a recipe's training data, or for one video.

    enhancer extract quickstart

    torchrun --nproc-per-node 4 -m enhancer extract mine.yaml     (or: accelerate launch --num_processes 4 -m enhancer ...)

    enhancer extract --video bikes.mp4 --text "Which way do the bikes go?" teacher.sampling.end=4
    """
    arguments = list(arguments or [])
    if video is None:
        if not arguments or "=" in arguments[0]:
            raise typer.BadParameter("give a RECIPE, or --video FILE with --text TEXT")
        _run(arguments[0], arguments[1:], fresh, quiet, until="priors")
        return
    if text is None:
        raise typer.BadParameter("--video needs --text: the words that are looked for")
    from enhancer.commands.extract import extract_video

    extract_video(video, text, teacher, out, arguments, Console(quiet))


@app.command()
@guarded
def evaluate(
    model: Annotated[str, typer.Option(help="Student: a model folder, hub name, or `world`.")],
    data: Annotated[Path, typer.Option(help="Questions (.json or .jsonl): a benchmark's, or in a form of training data.")],
    root: Annotated[Optional[Path], typer.Option(help="Folder of the videos; default: where --data is.")] = None,
    benchmark: Annotated[str, typer.Option(help="motionbench, favor, ema_motionbench, videomme or motionvid_qa; auto "
                                                "tells it by the rows.")] = "auto",
    protocol: Annotated[str, typer.Option(help="option_text or letter (likelihoods), or generate.")] = "option_text",
    request: Annotated[Optional[str], typer.Option(help="Last line of a prompt that lists the options, as another tool "
                                                        "writes it.",
                                                   show_default="Answer with the option's letter.")] = None,
    frames: Annotated[int, typer.Option(help="Frames a clip.", min=1)] = 8,
    fps: Annotated[Optional[float], typer.Option(help="Frames a second, at most --frames of them.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions asked together.", min=1)] = 32,
    new_tokens: Annotated[int, typer.Option(help="With generate: most tokens of an answer.", min=1)] = 64,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "float32",
    timeout: Annotated[float, typer.Option(help="Seconds that decoding a clip may take.", min=0.1)] = 60.0,
    limit: Annotated[Optional[int], typer.Option(help="Only the first questions.", min=1)] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    out: Annotated[Optional[Path], typer.Option(help="Folder for answers, scores and protocol; the same command "
                                                     "continues in it.")] = None,
    submission: Annotated[Optional[Path], typer.Option(help="File of answers as the benchmark takes them.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ask everything again.")] = False,
    quiet: Quiet = False,
) -> None:
    """Ask a model multiple-choice questions about videos, and keep how. Exit status 3: the score is incomplete.

    enhancer evaluate --model runs/quickstart/arms/vdm/seed0/model --data worlds/mine/test.json

    enhancer evaluate --model MODEL --data MotionBench/video_info.meta.jsonl --protocol generate --fps 1 --frames 64

    torchrun --nproc-per-node 8 -m enhancer evaluate --model MODEL --data FILE --out scores/mine
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"--dtype must be float32, bfloat16 or float16, not {dtype!r}")
    from enhancer.commands.evaluate import Asking, evaluate_model

    summary = evaluate_model(Asking(model, data, root, benchmark, protocol, request, frames, fps, batch_size, new_tokens,
                                    dtype, timeout, limit, threads, out, submission, fresh), Console(quiet))
    if not summary["complete"]:
        raise typer.Exit(3)


@app.command()
@guarded
def compare(
    arguments: Annotated[list[str], typer.Argument(metavar="RECIPE... KEY=VALUE...", show_default=False,
                                                   help="Recipes of matrices, and keys to change in all of them.")],
    priors_only: Annotated[bool, typer.Option("--priors-only", help="Compare the motion sources of one recipe; "
                                                                    "nothing is trained.")] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="Write table and page from what is there.")] = False,
    sources: Annotated[Optional[str], typer.Option(help="With --priors-only: motion sources, commas between; default: "
                                                        "all that the data allow.")] = None,
    split: Annotated[str, typer.Option(help="With --priors-only: clips of `test` or `train`.")] = "test",
    clips: Annotated[Optional[int], typer.Option(help="With --priors-only: only the first clips.", min=1)] = None,
    out: Annotated[Optional[Path], typer.Option(help="With --priors-only: folder of tables and picture; default: "
                                                     "<run folder>/compare.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train the matrix's students anew.")] = False,
    quiet: Quiet = False,
) -> None:
    """Run matrices of students to one table with paired tests; or compare motion sources alone.

    What is finished is kept, and shared by all matrices of one pool: the same command continues.

    enhancer compare compare/sources

    enhancer compare recipes/compare/*.yaml seeds=[0,1] parallel=2

    enhancer compare quickstart --priors-only --clips 60          (shuffled and uniform spoil the first source named; an
    ensemble has all named ones but the oracle as members)

    enhancer compare mine.yaml --priors-only --sources codec,flow --split train
    """
    names, overrides = [a for a in arguments if "=" not in a], [a for a in arguments if "=" in a]
    if not names:
        raise typer.BadParameter("give a RECIPE: `enhancer ls compare` lists the matrices")
    if not priors_only:
        from enhancer.commands.experiment import compare_matrices

        compare_matrices(names, overrides, fresh, report_only, Console(quiet))
        return
    if len(names) > 1:
        raise typer.BadParameter("--priors-only takes one RECIPE")
    if split not in ("test", "train"):
        raise typer.BadParameter(f"--split must be test or train, not {split!r}")
    from enhancer.commands.compare import compare_priors

    compare_priors(names[0], overrides, sources, split, clips, out, Console(quiet))


@app.command()
@guarded
def visualize(
    arguments: Annotated[Optional[list[str]], typer.Argument(
        metavar="PRIOR|RUN KEY=VALUE", help="A prior's file or a run folder; keys such as student.sampling.frames=16.",
        show_default=False)] = None,
    video: Annotated[Optional[Path], typer.Option(help="A video file, with --text; or the clip of PRIOR.")] = None,
    text: Annotated[Optional[str], typer.Option(help="The text whose words are looked for in --video.")] = None,
    teacher: Annotated[Optional[str], typer.Option(help="The teacher to ask: `world`, a diffusers folder or hub name; default: the "
                                                        "prior's own where it is on this machine.")] = None,
    student: Annotated[Optional[list[str]], typer.Option(help="A student, or a codec adapter's folder, whose maps are shown as well; may be repeated.")] = None,
    sample: Annotated[Optional[list[str]], typer.Option(help="A sample of RUN by its id; may be repeated.")] = None,
    clips: Annotated[int, typer.Option(help="Clips of RUN on the page, at most.", min=1)] = 4,
    ask: Annotated[bool, typer.Option("--ask/--stored", help="Ask the models at hand again, or show what the files hold.")] = True,
    word: Annotated[Optional[str], typer.Option(help="The word of pieces and figures; default: the prior's best.")] = None,
    figure: Annotated[Optional[int], typer.Option(help="Draw this figure of the paper's supplement instead of the page.", min=1, max=5)] = None,
    pieces: Annotated[Optional[Path], typer.Option(help="Folder for PNG, SVG and MP4 pieces as well.")] = None,
    out: Annotated[Path, typer.Option(help="The page, or the figure's name.")] = Path("visualize.html"),
    quiet: Quiet = False,
) -> None:
    """One interactive page, that works offline, of heads, words, maps, inversion and codec motion; or a figure of the paper.

    enhancer visualize runs/quickstart

    enhancer visualize --video clip.mp4 --text "Which way does the red ball roll?" --student world --pieces pictures

    enhancer visualize runs/quickstart --figure 4
    """
    from enhancer.commands.visualize import visualize_clips

    arguments = list(arguments or [])
    what = Path(arguments.pop(0)) if arguments and ("=" not in arguments[0] or Path(arguments[0]).exists()) else None
    visualize_clips(what, video, text, teacher, student or [], sample or [], clips, ask, word, figure, pieces, out, arguments,
                    Console(quiet))


@app.command("inspect")
@guarded
def inspect_(
    video: Annotated[Path, typer.Option(help="One video file.")],
    text: Annotated[str, typer.Option(help="A question; its words are looked up on both sides.")],
    model: Annotated[str, typer.Option(help="Student: a model folder, hub name, or `world`.")] = "world",
    adapter: Annotated[Optional[Path], typer.Option(help="A codec adapter's folder on that student; it says how clips are read.")] = None,
    teacher: Annotated[str, typer.Option(help="Whose tokens stand beside the student's: `world`, a diffusers folder or hub name.")] = "world",
    frames: Annotated[int, typer.Option(help="Frames of the clip.", min=1)] = 8,
    fps: Annotated[Optional[float], typer.Option(help="Frames a second, at most --frames of them.")] = None,
    attention: Annotated[bool, typer.Option("--attention", help="Draw the attention of each word over the cells as well.")] = False,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("inspect.html"),
    quiet: Quiet = False,
) -> None:
    """Draw where every visual token lies on a video's frames, and list the words' tokens of teacher and student.

    enhancer inspect --model world --video clip.mp4 --text "Which way does the red ball roll?" --attention
    """
    from enhancer.commands.inspect import inspect_video

    inspect_video(model, adapter, video, text, teacher, frames, fps, attention, out, Console(quiet))


@app.command()
@guarded
def export(run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
           to: Annotated[Path, typer.Argument(metavar="FOLDER", help="The new model folder.")],
           arm: Annotated[str, typer.Option(help="Which student.")] = "vdm",
           seed: Annotated[Optional[int], typer.Option(help="Which training seed; default: the first.")] = None) -> None:
    """Copy a trained student out of a run and prove the copy: stock transformers loads it, and its logits equal the arm's.

    enhancer export runs/quickstart my-model --arm vdm
    """
    from enhancer.commands.models import export_model

    export_model(run_folder, to, arm, seed, Console())


@app.command()
@guarded
def report(run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Write report.html of a run's or a matrix's folder again, from its files only."""
    from enhancer.experiment.results import PLAN

    if (run_folder / PLAN).is_file():
        from enhancer.experiment.page import write_page

        path = write_page(run_folder / "report.html", [run_folder])
    else:
        from enhancer.report import write_report

        path = write_report(run_folder)
    Console().print(f"report: {path}", markup=False)


@world_app.command("make")
@guarded
def world_make(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the clips go.")], overrides: Overrides = None,
               quiet: Quiet = False) -> None:
    """Make labelled motion clips with questions; the same settings give the same files.

    enhancer world make worlds/mine train_clips=200 test_clips=60 seed=3
    """
    from enhancer.commands.world import make

    make(folder, overrides or [], Console(quiet))


@world_app.command("baselines")
@guarded
def world_baselines(overrides: Overrides = None, questions: Annotated[int, typer.Option(help="Test questions of all six types.", min=60)] = 1800,
                    out: Annotated[Optional[Path], typer.Option(help="JSON file for the table.")] = None, quiet: Quiet = False) -> None:
    """Measure how far the questions can be answered without watching: from the text alone, or from one frame.

    A small network gets the question and the exact place of every thing in one frame; its accuracy bounds what a model can
    guess. Minutes: about 4 on one core.

    enhancer world baselines
    """
    from enhancer.commands.world import baselines

    baselines(overrides or [], questions, out, Console(quiet))


@world_app.command("measure")
@guarded
def world_measure(
    folder: Annotated[Path, typer.Argument(metavar="WORLD", help="A folder made by `enhancer world make`.")],
    teacher: Annotated[Optional[str], typer.Option(help="Measure this teacher: `world`, a diffusers folder or hub name.")] = None,
    student: Annotated[Optional[str], typer.Option(help="Measure this student: `world`, a model folder or hub name.")] = None,
    clips: Annotated[int, typer.Option(help="Test clips about things to measure on.", min=1)] = 48,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    out: Annotated[Optional[Path], typer.Option(help="JSON file for the figures, every head's among them.")] = None,
    quiet: Quiet = False,
) -> None:
    """Measure models against the world's ground truth.

    The teacher: reconstruction, and whether its attention finds the named thing. The student: does it see, does it read motion?

    enhancer world measure worlds/mine --teacher world --student world
    """
    if teacher is None and student is None:
        raise typer.BadParameter("give --teacher, --student, or both")
    from enhancer.commands.world import measure

    measure(folder, teacher, student, clips, threads, out, Console(quiet))


@world_app.command("fidelity")
@guarded
def world_fidelity(
    folder: Annotated[Path, typer.Argument(metavar="WORLD", help="A folder made by `enhancer world make`.")],
    out: Annotated[Path, typer.Option(help="JSON file for the figures; the table goes beside it as Markdown.")],
    teacher: Annotated[str, typer.Option(help="`world`, a diffusers folder or hub name.")] = "world",
    clips: Annotated[int, typer.Option(help="Test clips about things to measure on.", min=1)] = 48,
    steps: Annotated[str, typer.Option(help="Numbers of steps.")] = "2,5,10,25",
    guidance: Annotated[str, typer.Option(help="Strengths of guidance, for denoise.")] = "1,3,6",
    at: Annotated[str, typer.Option(help="Where it is harvested.")] = "noise,inversion,denoise",
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    quiet: Quiet = False,
) -> None:
    """Measure what each way of harvesting costs and gives: PSNR, localisation of words, seconds a clip.

    Every cell of the table is stored when it is done; the same command goes on with the rest.

    enhancer world fidelity worlds/mine --clips 48 --out fidelity.json

    enhancer world fidelity worlds/mine --steps 5 --at inversion,denoise --guidance 1 --out quick.json
    """
    from enhancer.commands.world import fidelity

    fidelity(folder, teacher, clips, out, _numbers(steps, int, "--steps"), _numbers(guidance, float, "--guidance"),
             at.split(","), threads, Console(quiet))


def _numbers(text: str, kind: Callable, name: str) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{name} must be numbers with commas between, like 2,5, not {text!r}") from None


@store_app.command("ls")
@guarded
def store_ls(folder: Store, source: Annotated[Optional[str], typer.Option(help="Only priors of this source, e.g. vdm.")] = None,
             model: Annotated[Optional[str], typer.Option(help="Only priors made with this model.")] = None,
             text: Annotated[Optional[str], typer.Option(help="Only priors whose text has this in it.")] = None,
             as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, with whole keys and all words.")] = False) -> None:
    """List the priors of a store from their headers, thousands a second.

    enhancer store ls runs/quickstart/priors --source vdm --text camera
    """
    from enhancer.commands.store import list_store

    list_store(folder, source, model, text, as_json, Console())


@store_app.command("verify")
@guarded
def store_verify(folder: Store, delete: Annotated[bool, typer.Option("--delete", help="Delete the damaged ones.")] = False,
                 quiet: Quiet = False) -> None:
    """Read every prior whole and check it; exit status 1 where a damaged one is left.

    enhancer store verify runs/quickstart/priors --delete
    """
    from enhancer.commands.store import verify_store

    if not verify_store(folder, delete, Console(quiet)):
        raise typer.Exit(1)


@store_app.command("gc")
@guarded
def store_gc(folder: Store, run: Annotated[Optional[list[Path]], typer.Option(help="A run folder whose priors are kept; may be repeated.")] = None,
             recipe: Annotated[Optional[list[str]], typer.Option(help="A recipe whose priors are kept; may be repeated.")] = None,
             yes: Annotated[bool, typer.Option("--yes", help="Delete; without it they are only listed.")] = False,
             quiet: Quiet = False) -> None:
    """Delete the priors that no named run or recipe uses, and what killed writes left over an hour ago.

    enhancer store gc priors --run runs/one --run runs/two --recipe mine.yaml
    """
    from enhancer.commands.store import collect_garbage

    collect_garbage(folder, run or [], recipe or [], yes, Console(quiet))


@app.command()
@guarded
def motion(
    video: Annotated[Path, typer.Argument(metavar="FILE", help="A video file.")],
    out: Annotated[Optional[Path], typer.Option(help="PNG with arrows, validity and groups of pictures; default: FILE's name "
                                                     "with .motion.png, in this folder.")] = None,
    film: Annotated[Optional[Path], typer.Option(help="A video of all frames with arrows and validity as well.")] = None,
    start: Annotated[float, typer.Option(help="Seconds after the first frame.", min=0)] = 0.0,
    end: Annotated[Optional[float], typer.Option(help="Seconds; default: the end.")] = None,
    references: Annotated[str, typer.Option(help="H.264: `match` finds how far away reference pictures are, `assume` takes 1.")] = "match",
    fallback: Annotated[str, typer.Option(help="Where a codec exports no vectors: `reencode`, `mestimate` or `none`.")] = "reencode",
    timeout: Annotated[float, typer.Option(help="Seconds that reading the motion may take; 0: any.", min=0)] = 600.0,
) -> None:
    """Show what a compressed video says of motion: its own vectors, frame types, groups of pictures, validity.

    enhancer motion bikes.mp4 --film bikes.motion.mp4
    """
    from enhancer.commands.motion import show_motion

    show_motion(video, start, end, references, fallback, out or Path(f"{video.stem}.motion.png"), film, timeout, Console())


@app.command()
@guarded
def doctor(output: Annotated[Path, typer.Option(help="Folder that runs shall be written to.")] = Path("runs")) -> None:
    """Check this machine: versions, memory, disk, video codecs, shipped models."""
    from enhancer.doctor import examine

    if not examine(output, Console()):
        raise typer.Exit(1)


def main() -> None:
    """The `enhancer` command."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job may have it ignored
        signal.signal(signal.SIGINT, _interrupt)
    # a closed pipe (`enhancer ls | head`) is no fault
    try:
        app()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
