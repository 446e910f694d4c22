"""The rows of an adapter's table: frames alone, the adapter, and its controls, on the same questions.

- frames: the host on evenly spaced frames alone, at (about) the adapter's budget of visual tokens, trained by the same
  stages but for those that need the adapter's motion; `host` is the same before any training.
- adapter: as it is meant.
- still: the adapter with its motion zeroed; what it loses is what it owes to motion.
- exchanged: the adapter with another clip's motion (of the same question type), frames and text its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rich.table

from enhancer.adapters.reading import ClipReader, Exchanged, partners
from enhancer.data.samples import Sample
from enhancer.evaluation.answering import ask as answers
from enhancer.evaluation.scores import paired_difference, summarise
from enhancer.runfolder import read_json, read_lines, write_json, write_lines
from vdm_priors.errors import UserError
from vlm_hooks.adapters.model import AdapterModel

HOST, FRAMES, ADAPTER, STILL, EXCHANGED = "host", "frames", "adapter", "still", "exchanged"
ARMS = (HOST, FRAMES, ADAPTER, STILL, EXCHANGED)
TITLES = {
    HOST: "frames, host as it comes",
    FRAMES: "frames, trained alike",
    ADAPTER: "adapter",
    STILL: "adapter, motion zeroed",
    EXCHANGED: "adapter, another clip's motion",
}


def ask(
    model: AdapterModel,
    arm: str,
    samples: Sequence[Sample],
    reader: ClipReader,
    folder: Path,
    settings: Any,
    seed: int,
    progress: Callable | None = None,
) -> None:
    """Asks one arm all questions; <folder>/<arm>.jsonl and <arm>.json. A finished arm is not asked again."""
    if (folder / f"{arm}.json").is_file():
        return
    student, source, asked = model.student, reader, samples
    if arm == EXCHANGED:
        found = partners(samples, reader, seed)
        asked = [sample for sample in samples if sample.video in found]
        source = Exchanged(reader, model.adapter, found)
    student.still = arm == STILL
    try:
        rows = answers(student, asked, settings, cache=source, progress=progress) if asked else []
    finally:
        student.still = False
    write_lines(folder / f"{arm}.jsonl", rows)
    write_json(folder / f"{arm}.json", {**summarise(rows), "tokens": visual_tokens(model, asked[:1], reader)})


def visual_tokens(model: AdapterModel, samples: Sequence[Sample], reader: ClipReader) -> int | None:
    """Visual tokens of the first sample's clip; None where there is none to look at."""
    try:
        return model.student.visual_tokens(reader.get(samples[0].video)) if samples else None
    except UserError:
        return None


def results(folder: Path, seed: int) -> dict:
    """All arms that were asked: {arm: summary}, and how much accuracy the adapter has over each of the others."""
    found = {arm: read_json(folder / f"{arm}.json", None) for arm in ARMS}
    arms = {arm: summary for arm, summary in found.items() if summary}
    rows = {arm: read_lines(folder / f"{arm}.jsonl") for arm in arms}
    types = sorted({row["question_type"] for row in rows.get(ADAPTER, [])})
    gains = {}
    for arm in arms:
        if arm == ADAPTER or not rows[arm] or not rows.get(ADAPTER):
            continue
        gains[arm] = {"overall": paired_difference(rows[ADAPTER], rows[arm], seed)}
        for kind in types:
            mine, theirs = ([row for row in rows[a] if row["question_type"] == kind] for a in (ADAPTER, arm))
            if any(row["correct"] is not None for row in mine) and any(row["correct"] is not None for row in theirs):
                gains[arm][kind] = paired_difference(mine, theirs, seed)
    return {"arms": arms, "adapter_minus": gains}


def unused_motion(table: dict) -> str | None:
    """A sentence where zeroing the motion does not cost accuracy beyond the interval; None where it does."""
    gain = table["adapter_minus"].get(STILL, {}).get("overall")
    if gain is None or gain["low"] > 0:
        return None
    return (
        f"The adapter does not use its motion: zeroing it costs {100 * gain['difference']:.1f} points, with an "
        f"interval of {100 * gain['low']:.1f} to {100 * gain['high']:.1f} that has 0 in it. Train longer, or "
        "on questions that need it."
    )


def rich_table(table: dict) -> rich.table.Table:
    """Accuracy (%) by question type, and the difference to the adapter with its interval."""
    types = sorted({kind for summary in table["arms"].values() for kind in summary["types"]})
    shown = rich.table.Table(
        title="Accuracy in %, and how much the adapter has over each row (95% interval)", title_justify="left"
    )
    for column in ("", "tokens", *types, "all", "adapter over it"):
        shown.add_column(column, justify="left" if column == "" else "right")
    for arm, summary in table["arms"].items():
        by_type = [summary["types"].get(kind, {}).get("accuracy") for kind in types]
        gain = table["adapter_minus"].get(arm, {}).get("overall")
        text = (
            ""
            if gain is None
            else f"{100 * gain['difference']:+.1f} ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"
        )
        accuracy = summary["overall"]["accuracy"]
        shown.add_row(
            TITLES[arm],
            str(summary["tokens"] or ""),
            *("" if v is None else f"{100 * v:.1f}" for v in by_type),
            "" if accuracy is None else f"{100 * accuracy:.1f}",
            text,
        )
    return shown
