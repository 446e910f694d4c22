"""`enhancer inspect --model DIR --video FILE --text TEXT`: tokens on the frames, words and their tokens."""

from __future__ import annotations

from pathlib import Path

import rich.table
from rich.markup import escape

from enhancer.console import Console
from enhancer.inspection import Inspection, inspect_clip, teacher_tokens, write_page
from enhancer.shipped import quiet_libraries, student_path, teacher_path, torch_device
from enhancer.video.clip import Sampling, read_clip
from vdm_priors.errors import UserError


def inspect_video(
    model: str, video: Path, text: str, teacher: str, frames: int, fps: float | None, attention: bool, out: Path,
    console: Console,
) -> Path:
    """Writes the page, prints the words' tokens, and returns the page's path."""
    from vlm_hooks.families import find_family, load_student

    if not text.strip():
        raise UserError("--text is empty; give the question whose words are looked for.")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}.")
    clip = read_clip(video, Sampling(frames=frames, fps=fps))  # a bad file is told before a model loads
    quiet_libraries()
    tokens = teacher_tokens(teacher_path(teacher), text.strip())
    path = student_path(model)
    if attention:
        student = load_student(path, device=torch_device("auto"))
    else:  # nothing is run: a large model's config and processor are enough
        student = find_family(path).Student.without_weights(path)
    inspection = inspect_clip(student, clip, text.strip(), tokens, attention)
    _describe(inspection, console)
    write_page(inspection, out)
    console.print(f"cells and words: {out}", markup=False, soft_wrap=True)
    return out


def _describe(shown: Inspection, console: Console) -> None:
    steps, rows, columns = shown.grid.shape
    console.print(f"{shown.family}: {len(shown.clip.times)} frames become {steps} steps × {rows} rows × {columns} "
                  f"columns = {len(shown.positions)} visual tokens of {shown.length}", markup=False, soft_wrap=True)
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
