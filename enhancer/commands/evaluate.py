"""`enhancer evaluate`: a model asked the questions of a benchmark or of any file, its protocol kept with the score."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enhancer.benchmarks import AUTO, Benchmark, find_benchmark, published
from enhancer.benchmarks.submissions import write_submission
from enhancer.commands.scores import print_summary
from enhancer.console import Console
from enhancer.data.samples import Problem, Sample, load_samples, split_options
from enhancer.evaluation.answering import PARTS, answer_all, read_parts
from enhancer.evaluation.generation import checkpoint_decoding
from enhancer.evaluation.protocol import FILE, PROTOCOLS, Protocol, example_of
from enhancer.evaluation.scores import summarise
from enhancer.processes import Process, ended_in_order
from enhancer.runfolder import writable_folder, write_json, write_lines
from enhancer.shipped import quiet_libraries, student_path, torch_device
from enhancer.together import Together
from enhancer.video.clip import FrameCache, Sampling
from enhancer.video.guard import clip_reader
from vdm_priors.errors import SampleError, UserError
from vdm_priors.fingerprint import fingerprint
from vdm_priors.store import file_digest
from vlm_hooks.student import LETTER_REQUEST


@dataclass
class Asking:
    """What `enhancer evaluate` was asked for; its options, in their order."""

    model: str
    data: Path
    root: Path | None = None
    benchmark: str = AUTO
    protocol: str = "option_text"
    request: str | None = None
    frames: int = 8
    fps: float | None = None
    batch_size: int = 32
    new_tokens: int = 64
    dtype: str = "float32"
    timeout: float | None = 60.0
    limit: int | None = None
    threads: int = 1
    out: Path | None = None
    submission: Path | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        self.request = None if self.protocol == "option_text" else self.request or LETTER_REQUEST


def evaluate_model(asking: Asking, console: Console) -> dict:
    """Asks the questions, prints accuracy per type with intervals, and returns the summary; its "complete" is false
    where a question could not be asked. Raises UserError where none could be scored."""
    process = Process.this()
    if asking.protocol not in PROTOCOLS:
        raise UserError(f"--protocol {asking.protocol!r} is unknown: choose one of {', '.join(PROTOCOLS)}.")
    if process.count > 1 and asking.out is None:
        raise UserError("Several processes put their answers together in a folder: give --out.")
    if process.rank > 0:
        console = Console(quiet=True)
    samples, problems = _questions(asking)
    benchmark = find_benchmark(
        asking.benchmark, _forms(asking.data), {sample.question_type for sample in samples} - {""}
    )
    if asking.out is not None and process.rank == 0:
        if asking.fresh:
            shutil.rmtree(asking.out / PARTS, ignore_errors=True)
            (asking.out / FILE).unlink(missing_ok=True)
        writable_folder(asking.out)  # told now, and not after the questions
    with ended_in_order(), Together.joined(process, torch_device("auto")) as together:
        rows = _rows(asking, samples, benchmark, process, together, console)
    if process.rank > 0:
        return {"complete": True}
    rows += [_unusable(problem) for problem in problems]
    summary = _summary(rows, benchmark, asking)
    _write(asking, benchmark, rows, summary, console)
    print_summary(summary, benchmark, asking, console)
    if summary["overall"]["n"] == 0 and any(sample.options for sample in samples):
        why = f"; the first: {summary['errors'][0]['reason']}" if summary["errors"] else ": their answers are hidden."
        raise UserError(f"None of {len(rows)} questions could be scored{why}")
    return summary


# ---- questions -----------------------------------------------------------------------------------


def _questions(asking: Asking) -> tuple[list[Sample], list[Problem]]:
    """What is asked, and what of the file cannot be (a missing video, say)."""
    samples, problems = load_samples(asking.data, asking.root)
    samples = [as_choice(sample) for sample in samples]
    if asking.protocol != "generate":
        samples = [sample for sample in samples if sample.options]
        if not samples:
            raise UserError(
                f"{asking.data}: no multiple-choice question in it; give rows with `options`, or --protocol generate, "
                f"which answers open questions too."
            )
    return samples[: asking.limit], [] if asking.limit else problems


def as_choice(sample: Sample) -> Sample:
    """A question that lists its options in its text (many training sets do) as one with options; others as they are."""
    if sample.options:
        return sample
    stem, options = split_options(sample.question)
    if len(options) < 2:
        return sample
    from enhancer.data.questions import make_sample

    try:
        return make_sample(sample.id, sample.video, stem, sample.answer, options, sample.question_type, sample.meta)
    except SampleError:
        return sample  # its answer is no option: an open question that happens to hold such lines


def _forms(data: Path) -> set[str]:
    """Names of the forms that the file's rows are written in."""
    from enhancer.data.formats import FORMS
    from enhancer.data.samples import read_rows

    return {next((name for name, form in FORMS.items() if form.key in row), "") for _, row in read_rows(data, [])}


# ---- answers -------------------------------------------------------------------------------------


def _rows(
    asking: Asking,
    samples: list[Sample],
    benchmark: Benchmark | None,
    process: Process,
    together: Together,
    console: Console,
) -> list[dict]:
    """The answers of all processes (process 0), in the samples' order."""
    import torch

    torch.set_num_threads(asking.threads)
    quiet_libraries()
    sampling = Sampling(frames=asking.frames, fps=asking.fps)
    cache = FrameCache(read=clip_reader(asking.timeout, asking.out))
    if asking.out is not None and process.rank == 0:
        _protocol(asking, benchmark, len(samples)).keep(asking.out)
    together.wait()  # what another protocol's answers are is known before any is read
    made: list[dict] = []
    with console.bar("evaluate", len(samples), "question") as bar:
        load = _loader(asking, benchmark, samples, sampling, cache, process)
        for row in answer_all(
            load,
            samples,
            asking.protocol,
            sampling,
            cache,
            asking.batch_size,
            asking.new_tokens,
            asking.out,
            process,
            bar,
            asking.request or LETTER_REQUEST,
        ):
            made.append(row)
    together.wait()
    by_id = {row["id"]: row for row in made} if asking.out is None else read_parts(asking.out)
    if asking.out is not None and len(made) < len(samples):
        console.note(
            f"{len(samples) - len(made)} of {len(samples)} answers were made by earlier calls or other processes"
        )
    return [by_id.get(sample.id) or _unanswered(sample) for sample in samples]


def _protocol(asking: Asking, benchmark: Benchmark | None, count: int) -> Protocol:
    return Protocol(
        benchmark=benchmark.name if benchmark else None,
        model={"name": asking.model, "fingerprint": fingerprint(student_path(asking.model))},
        data={"file": asking.data.name, "sha256": file_digest(asking.data), "questions": count},
        protocol=asking.protocol,
        request=asking.request,
        frames=asking.frames,
        fps=asking.fps,
        new_tokens=asking.new_tokens if asking.protocol == "generate" else None,
        dtype=asking.dtype,
        batch_size=asking.batch_size,
    )


def _loader(
    asking: Asking,
    benchmark: Benchmark | None,
    samples: list[Sample],
    sampling: Sampling,
    cache: FrameCache,
    process: Process,
) -> Callable[[], Any]:
    """Loads the student and, in process 0, adds to the protocol what it is shown."""

    def load() -> Any:
        import torch

        from vlm_hooks.families import load_student

        student = load_student(
            student_path(asking.model), getattr(torch, asking.dtype), process.device(torch_device("auto"))
        )
        if asking.out is not None and process.rank == 0:
            shown = example_of(student, samples, sampling, cache, asking.request)
            if shown is not None and asking.protocol == "generate":
                shown["checkpoint_decoding"] = checkpoint_decoding(student)
            dataclasses.replace(_protocol(asking, benchmark, len(samples)), example=shown).keep(asking.out)
        return student

    return load


def _unusable(problem: Problem) -> dict:
    return {
        "id": problem.id,
        "question_type": "",
        "options": [],
        "answer": "",
        "chosen": None,
        "correct": None,
        "error": problem.reason,
    }


def _unanswered(sample: Sample) -> dict:
    """Of a question whose process ended before it, or whose line in its part cannot be read."""
    lost = _unusable(Problem(sample.id, "its answer is not there; the same command asks it again"))
    return {**lost, "question_type": sample.question_type, "options": list(sample.options), "answer": sample.answer}


# ---- results -------------------------------------------------------------------------------------


def _summary(rows: list[dict], benchmark: Benchmark | None, asking: Asking) -> dict:
    if benchmark:
        rows = [{**row, "question_type": benchmark.short(row["question_type"])} for row in rows]
    summary = {
        **summarise(rows),
        "open": sum("response" in row and not row["options"] for row in rows),
    }
    expected = benchmark.size if benchmark else None
    summary["expected"] = expected
    summary["complete"] = summary["complete"] and asking.limit is None and expected in (None, summary["overall"]["n"])
    return summary


def _write(asking: Asking, benchmark: Benchmark | None, rows: list[dict], summary: dict, console: Console) -> None:
    if asking.out is not None:
        write_lines(asking.out / "answers.jsonl", rows)
        write_json(
            asking.out / "scores.json", {**summary, "published": published(benchmark.name) if benchmark else None}
        )
    if asking.submission is not None:
        asked = [row for row in rows if row.get("options")]
        left = write_submission(asking.submission, benchmark, asking.data, asked)
        console.print(
            f"{asking.submission}: {len(asked) - left} answers" + (f", {left} questions have none" if left else ""),
            markup=False,
        )
