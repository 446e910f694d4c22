"""`enhancer inspect --model DIR [--adapter DIR] --video FILE --text TEXT`: tokens on frames, words and their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich.table
from rich.markup import escape

from enhancer.console import Console
from enhancer.inspection import Inspection, inspect_clip, teacher_tokens, write_page
from enhancer.shipped import quiet_libraries, student_path, teacher_path, torch_device
from enhancer.video.clip import Sampling, read_clip
from vdm_priors.errors import UserError


def inspect_video(
    model: str, adapter: Path | None, video: Path, text: str, teacher: str, frames: int, fps: float | None,
    attention: bool, out: Path, console: Console,
) -> Path:
    """Writes the page, prints the words' tokens, and returns the page's path. adapter: a codec adapter's folder, which
    itself says how clips are read."""
    if not text.strip():
        raise UserError("--text is empty; give the question whose words are looked for.")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}.")
    quiet_libraries()
    if adapter is None:
        clip = read_clip(video, Sampling(frames=frames, fps=fps))  # a bad file is told before a model loads
        student = _student(student_path(model), attention)
    else:
        clip, student = _adapted(model, adapter, video)
    tokens = teacher_tokens(teacher_path(teacher), text.strip())
    inspection = inspect_clip(student, video, clip, text.strip(), tokens, attention)
    _describe(inspection, console)
    write_page(inspection, out)
    console.print(f"cells and words: {out}", markup=False, soft_wrap=True)
    return out


def _student(path: str, attention: bool) -> Any:
    from vlm_hooks.families import find_family, load_student

    if attention:
        return load_student(path, device=torch_device("auto"))
    return find_family(path).Student.without_weights(path)  # of a large model its config and processor are enough


def _adapted(host: str, adapter: Path, video: Path) -> tuple[Any, Any]:
    """The clip as the adapter takes it, and its student."""
    from enhancer.adapters.opening import open_adapter

    model, reader = open_adapter(adapter, host, device=torch_device("auto"))
    return reader.get(video), model.student


def _describe(shown: Inspection, console: Console) -> None:
    steps, rows, columns = shown.grid.shape
    console.print(f"{shown.family}: {len(shown.clip.times)} frames become {steps} steps × {rows} rows × {columns} "
                  f"columns = {len(shown.positions)} visual tokens of {shown.length}", markup=False, soft_wrap=True)
    if shown.motion:
        console.print(f"and {shown.motion_tokens} motion tokens in {len(shown.motion)} runs", markup=False)
    for note in shown.clip.notes:
        console.warn(note)
    columns = ("word", "teacher's tokens", "student's tokens", "positions")
    table = rich.table.Table(*columns, box=None, padding=(0, 2, 0, 0))
    for row in shown.words:
        pieces, positions = [piece for _, piece in row.student], [str(position) for position, _ in row.student]
        table.add_row(escape(row.word.text), *(escape(" ".join(map(repr, tokens))) for tokens in (row.teacher, pieces)),
                      " ".join(positions), style="yellow" if row.missing else "")
    console.print(table)
    for side in ("teacher", "student"):
        missing = [row.word.text for row in shown.words if side in row.missing]
        if missing:
            console.warn(f"without a token of the {side}: {', '.join(missing)}")
