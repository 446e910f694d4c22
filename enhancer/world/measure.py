"""How good the shipped small models are, measured against the world's ground truth.

Teacher: PSNR of its VAE and of inversion-reconstruction, and how well its text-vision attention finds the named thing
(area under the ROC curve of the map over cells, against the cells that the thing covers; 0.5 is chance).
Student: accuracy on questions that one frame answers, and on the six motion types.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from enhancer.data.samples import load_samples
from enhancer.evaluation.multiple_choice import evaluate
from enhancer.evaluation.scores import summarise
from enhancer.video.clip import FrameCache, Sampling, read_clip
from enhancer.world.static import static_samples
from enhancer.world.truth import WorldTruth
from vdm_priors.extract import ExtractionSettings, extract_priors, run_teacher
from vdm_priors.grid import TokenGrid
from vdm_priors.harvest import HarvestRequest
from vdm_priors.prior import MotionPrior
from vdm_priors.selection import read_text
from vdm_priors.words import Word

HARVESTS = ("denoise", "inversion", "noise")
COVERED = 0.25  # a cell is the thing's if its evidence is at least this share of the clip's largest


def auc(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """Area under the ROC curve of scores against a mask of the same shape (ties count half); NaN without both classes."""
    scores, positive = scores.flatten().double(), positive.flatten().bool()
    wins, losses = scores[positive], scores[~positive]
    if not len(wins) or not len(losses):
        return float("nan")
    ordered = losses.sort().values
    below = torch.searchsorted(ordered, wins)
    ties = torch.searchsorted(ordered, wins, right=True) - below
    return float((below + 0.5 * ties).sum() / (len(wins) * len(losses)))


def covered(evidence: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """Bool mask of the cells that evidence (mass [F, H, W]) covers; a cell of a shorter span needs less mass."""
    density = evidence / grid.volumes.to(evidence)
    return density >= COVERED * density.max().clamp_min(1e-12)


def word_aucs(prior: MotionPrior, video: str, truth: WorldTruth) -> dict[str, list[float]]:
    """AUC of each of the prior's words that has evidence: {"nouns" | "motion": [a word's, ...]}; NaN without both classes."""
    found: dict[str, list[float]] = {"nouns": [], "motion": []}
    evidence = truth.evidence(video, prior.text, prior.words, prior.grid)
    for word, scores, true in zip(prior.words, prior.maps, evidence, strict=True):
        mention = _mention(truth, video, prior.text, word)
        if mention is not None and mention.thing >= 0:
            found["motion" if mention.moving else "nouns"].append(
                auc(scores / prior.grid.volumes.to(scores), covered(true, prior.grid)))
    return found


def localisation(priors: Sequence[MotionPrior], videos: Sequence[str], truth: WorldTruth) -> dict[str, dict]:
    """Mean AUC of the priors' words that have evidence: {"nouns" | "motion": {"auc", "n"}}."""
    of_clips = [word_aucs(prior, video, truth) for prior, video in zip(priors, videos, strict=True)]
    found = {kind: [value for of_clip in of_clips for value in of_clip[kind]] for kind in ("nouns", "motion")}
    return {kind: {"auc": float(np.nanmean(v)) if v else None, "n": len(v)} for kind, v in found.items()}


def _mention(truth: WorldTruth, video: str, text: str, word: Word):
    return next((m for m in truth.mentions(video, text) if m.start < word.end and word.start < m.end), None)


@torch.no_grad()
def head_localisation(teacher, rows: list[dict], root: Path, truth: WorldTruth,
                      settings: ExtractionSettings | None = None) -> dict:
    """AUC of the named thing's words per layer and head, harvested as priors with these settings are.

    rows: the world's conversation rows. settings: of the extraction; those of inversion and denoising are used (steps,
    guidance, memory, memory_columns, harvest_at). Returns {"t2v": [layer][head], "v2t": [layer][head], "clips": n}: text
    rows over vision (the paper's corner of the map) and vision rows over text.
    """
    settings = replace(settings or ExtractionSettings(), reconstruction=False)  # which measures nothing here
    frames = teacher.trained_frames
    texts = [row["conversations"][0]["value"].removeprefix("<video>\n") for row in rows]
    clips = [read_clip(root / row["video"], Sampling(frames=frames)) for row in rows]
    embeds, offsets = teacher.encode_text(texts)
    read = [read_text(text, spans) for text, spans in zip(texts, offsets, strict=True)]
    grids = [teacher.token_grid(clip.times, clip.duration, clip.box) for clip in clips]
    latents = teacher.encode_video(torch.cat([teacher.prepare_frames(clip.frames) for clip in clips]))
    request = HarvestRequest(max(r.last_token for r in read) + 1, direction="both", head_scope="layer_head",
                             batch_index=range(len(clips)), memory_columns=settings.memory_columns)
    harvested, _, _ = run_teacher(teacher, latents, embeds, request, settings)
    layers = len(harvested.layers)
    result: dict = {"clips": len(clips)}
    for corner in ("t2v", "v2t"):
        per_clip = []
        for n, row in enumerate(rows):
            evidence = truth.evidence(row["video"], texts[n], read[n].words, grids[n])
            for word, tokens, true in zip(read[n].words, read[n].tokens, evidence, strict=True):
                mention = _mention(truth, row["video"], texts[n], word)
                if mention is None or mention.thing < 0 or mention.moving or not tokens:
                    continue
                maps = getattr(harvested, corner)[n][:, tokens].mean(dim=1)  # [layer and head, S]
                positive = covered(true, grids[n])
                per_clip.append([auc(scores, positive) for scores in maps])
        result[corner] = np.nanmean(per_clip, axis=0).reshape(layers, -1).round(3).tolist()
    return result


@torch.no_grad()
def teacher_quality(teacher, rows: list[dict], root: Path) -> dict:
    """PSNR in dB of the VAE alone over clips, mean."""
    frames = teacher.trained_frames
    pixels = torch.cat([teacher.prepare_frames(read_clip(root / row["video"], Sampling(frames=frames)).frames) for row in rows])
    decoded = teacher.decode(teacher.encode_video(pixels)).clamp(-1, 1)
    error = ((decoded - pixels) / 2).square().mean(dim=(1, 2, 3, 4))
    return {"vae_psnr_db": round(float((-10 * error.log10()).mean()), 2), "clips": len(rows)}


def teacher_report(teacher, world: Path, truth: WorldTruth, count: int = 48, settings: ExtractionSettings | None = None,
                   progress=None) -> dict:
    """All of the teacher's figures on the first `count` test clips about things (types MR, LM, AO, RC)."""
    rows = [row for row in json.loads((world / "test.json").read_text(encoding="utf-8"))
            if row["question_type"] in ("MR", "LM", "AO", "RC")][:count]
    settings = settings or ExtractionSettings(token_selection=False)
    report = {**teacher_quality(teacher, rows, world)}
    for at in HARVESTS:
        report[f"heads_{at}"] = head_localisation(teacher, rows, world, truth, replace(settings, harvest_at=at))
    ways = [(direction, at) for direction in ("t2v", "v2t") for at in HARVESTS]
    for number, (direction, at) in enumerate(ways):
        priors = []
        for start in range(0, len(rows), 16):
            if progress:
                progress(number * len(rows) + start, len(ways) * len(rows), f"priors, {direction}, {at}")
            part = rows[start : start + 16]
            clips = [read_clip(world / row["video"], Sampling(frames=teacher.trained_frames)) for row in part]
            texts = [row["conversations"][0]["value"].removeprefix("<video>\n") for row in part]
            chosen = replace(settings, direction=direction, harvest_at=at, reconstruction=number == 0)
            priors += extract_priors(teacher, clips, texts, chosen)
        report[f"prior_{direction}_{at}"] = localisation(priors, [row["video"] for row in rows], truth)
        if number == 0:
            measured = [prior.provenance["reconstruction"] for prior in priors]
            for key in ("psnr_db", "latent_relative_l2"):
                report[f"reconstruction_{key}"] = round(float(np.mean([m[key] for m in measured])), 3)
    return report


def student_report(student, world: Path, truth: WorldTruth, frames: int = 8, progress=None) -> dict:
    """Accuracy with Wilson intervals per type, static and motion, on the test split: {type: {n, accuracy, low, high, chance}}."""
    moving, _ = load_samples(world / "test.json", world)
    samples = static_samples(world, truth) + list(moving)
    answers = evaluate(student, samples, Sampling(frames=frames), FrameCache(), progress=progress)
    report = summarise(answers)["types"]
    for kind, entry in report.items():
        of_kind = [1 / len(sample.options) for sample in samples if sample.question_type == kind]
        entry["chance"] = sum(of_kind) / len(of_kind)
    return report
