"""Test clips kept for the report: what the teacher saw, its prior, and the students' attention to the same words.

Legend: N sampled frames, W words of the prior, F×H×W' cells of a grid.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from enhancer.arms import arm_folder, loaded_student
from enhancer.collate import match_prior
from enhancer.console import Console
from enhancer.data.samples import Problem, Sample
from enhancer.recipe_schema import EnhanceRecipe
from enhancer.runfolder import readable_write_errors
from enhancer.shipped import student_path
from enhancer.sources import build_source, shared_text
from enhancer.table import BASE
from enhancer.video.clip import Clip, FrameCache
from enhancer.video.footage import files_of
from enhancer.video.guard import clip_reader
from vdm_priors.errors import UserError
from vdm_priors.extract import extract_priors
from vdm_priors.grid import TokenGrid
from vdm_priors.prior import MotionPrior
from vlm_hooks.alignment import normalize_rows
from vlm_hooks.capture import CaptureRequest, capture


@dataclass
class _Example:
    sample: Sample
    prior: MotionPrior
    source: str
    tensors: dict[str, Tensor]
    times: list[float]
    grids: dict[str, dict] = field(default_factory=dict)


def write_examples(run: Path, recipe: EnhanceRecipe, data: Any, console: Console) -> list[Problem]:
    """examples/<n>.safetensors of a few test clips; returns those that could not be made."""
    chosen = choose(data.test, recipe.examples)
    students = [(BASE, student_path(recipe.student.model))]
    students += [(arm.name, str(arm_folder(run, arm.name, recipe.seeds[0]) / "model")) for arm in recipe.arms]
    with console.bar("examples", len(chosen) * (1 + len(students)), "map") as bar:
        examples, problems = _priors(run, recipe, data, chosen, bar)
        frames = FrameCache(read=clip_reader(recipe.data.timeout, run))
        for name, folder in students:  # one student in memory at a time
            student = loaded_student(folder, recipe)
            student.model.eval()
            for example in list(examples):
                try:
                    clip = frames.get(example.sample.video, recipe.student.sampling.sampling())
                    rows, grid = attention_rows(student, example.sample, clip, example.prior)
                except UserError as error:
                    examples.remove(example)
                    problems.append(Problem(example.sample.id, str(error)))
                    continue
                example.tensors[f"attention/{name}"] = rows
                example.grids["attention"] = grid.to_dict()
                if data.truth is not None and "truth" not in example.tensors:
                    example.tensors["truth"] = data.truth.evidence(
                        example.sample.video.name, example.prior.text, example.prior.words, grid).float()
                bar.advance()
            del student
            gc.collect()
    for n, example in enumerate(examples):
        _write(run / "examples" / f"{n}.safetensors", example, data.root)
    return problems


def choose(samples: list[Sample], count: int) -> list[Sample]:
    """The first samples of each question type in turn, every clip once."""
    by_type: dict[str, list[Sample]] = {}
    for sample in {sample.video: sample for sample in reversed(samples)}.values():
        by_type.setdefault(sample.question_type, []).insert(0, sample)
    queues = [by_type[kind] for kind in sorted(by_type)]
    picked = [queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue)]
    return picked[:count]


def _priors(run: Path, recipe: EnhanceRecipe, data: Any, chosen: list[Sample], bar: Any) -> tuple[list[_Example], list[Problem]]:
    """The teacher's priors and reconstructions, or the oracle's priors in a run without a teacher."""
    from enhancer.extraction import needed_sources, source_contexts

    sources = [spec.name for spec in needed_sources(recipe) if not spec.of and not spec.teacher]
    if not sources:
        return [], [Problem("all", "no arm uses a prior, so there are no words to look at")]
    examples, problems = [], []
    context = source_contexts(run, recipe, chosen, data.truth, Console(quiet=True))[""]
    teacher = context.load_teacher() if "vdm" in sources else None
    for sample in chosen:
        try:
            if teacher is not None:
                example = _from_teacher(teacher, recipe, context, sample)
            else:
                example = _from_source(sources[0], context, sample)
            examples.append(example)
        except UserError as error:
            problems.append(Problem(sample.id, str(error)))
        bar.advance()
    return examples, problems


def _from_teacher(teacher: Any, recipe: EnhanceRecipe, context: Any, sample: Sample) -> _Example:
    clip = context.frames.get(sample.video, context.sampling)
    size = tuple(recipe.teacher.size) if recipe.teacher.size else None
    settings = dataclasses.replace(recipe.teacher.extraction, reconstruction=True)  # the report shows it
    text = shared_text(sample, recipe.teacher.text)
    kept = extract_priors(teacher, [clip], [text], settings, keep=True, size=size)[0]
    tensors = {"frames": kept.frames, "prior/vdm": kept.prior.maps}
    if kept.inverted is not None:
        tensors["inverted"] = kept.inverted
    if kept.reconstruction is not None:
        tensors["reconstruction"] = kept.reconstruction
    return _Example(sample, kept.prior, "vdm", tensors, clip.times, {"prior": kept.prior.grid.to_dict()})


def _from_source(name: str, context: Any, sample: Sample) -> _Example:
    prior = next(result for _, result in build_source(name, context).extract([sample]))
    if isinstance(prior, Problem):
        raise UserError(prior.reason)
    clip = context.frames.get(sample.video, context.sampling)
    tensors = {"frames": torch.from_numpy(clip.frames), f"prior/{name}": prior.maps}
    return _Example(sample, prior, name, tensors, clip.times, {"prior": prior.grid.to_dict()})


@torch.no_grad()
def attention_layers(student: Any, sample: Sample, clip: Clip, prior: MotionPrior) -> tuple[dict[int, Tensor], TokenGrid]:
    """Each layer's attention [W, F, H, W'] of the prior's words over the student's visual tokens, mean over its heads.

    Not normalised; a word without a token in the prompt has rows of zeros. No layer is there if no word has a token.
    """
    prompt = student.prompt(sample.question)
    encoding = student.encode([clip], [prompt.text], [sample.answer], names=[sample.id])
    (grid,), columns = student.grids(encoding.inputs, [clip])
    match = match_prior(prior, (sample.question, prompt.question_start), (sample.answer, encoding.answer_starts[0]),
                        encoding.texts[0], encoding.offsets[0])
    if not match.pairs:
        return {}, grid
    request = CaptureRequest.from_positions([match.rows], columns)
    with capture(student.model):
        student.model(**encoding.inputs, motion_capture=request)
    layers = {}
    for layer in request.captured_layers:
        captured = request.layer(layer)[0].float().cpu()  # [R, C], the words' tokens one after another
        rows, start = torch.zeros(len(prior.words), *grid.shape), 0
        for word, positions in match.pairs:
            rows[word] = captured[start:start + len(positions)].mean(dim=0).reshape(grid.shape)
            start += len(positions)
        layers[layer] = rows
    return layers, grid


def attention_rows(student: Any, sample: Sample, clip: Clip, prior: MotionPrior) -> tuple[Tensor, TokenGrid]:
    """The student's attention [W, F, H, W'] of the prior's words, mean over layers and heads, each row of mass 1.

    A word without a token in the prompt has a row of zeros.
    """
    layers, grid = attention_layers(student, sample, clip, prior)
    if not layers:
        return torch.zeros(len(prior.words), *grid.shape), grid
    return normalize_rows(torch.stack(list(layers.values())).mean(dim=0)), grid


def _write(path: Path, example: _Example, root: Path) -> None:
    provenance = example.prior.provenance
    quality = provenance.get("reconstruction") or {}
    meta = {
        "sample_id": example.sample.id, "question": example.sample.question, "answer": example.sample.answer,
        "video": os.path.relpath(files_of(example.sample.video)[0], root), "times": [float(t) for t in example.times],
        "psnr_db": quality.get("psnr_db"), "latent_relative_l2": quality.get("latent_relative_l2"),
        "words": [word.text for word in example.prior.words], "grids": example.grids, "prior_provenance": provenance,
    }
    tensors = {name: tensor.contiguous() for name, tensor in example.tensors.items()}
    with readable_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(save(tensors, metadata={"meta": json.dumps(meta)}))
