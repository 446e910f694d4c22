"""`enhancer motion`: what a video stream says of motion, as a table and as pictures."""

from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import rich.table
from rich.markup import escape

from enhancer.console import Console
from enhancer.video.codec import MotionField, Origin, Validity
from enhancer.video.codec.guarded import GuardedMotion, read_with_energy
from enhancer.video.codec.overlay import thinned, write_sheet, write_video
from enhancer.video.quarantine import Quarantine
from vdm_priors.errors import UserError


def show_motion(
    path: Path,
    start: float,
    end: float | None,
    references: str,
    fallback: str,
    picture: Path,
    video: Path | None,
    timeout: float,
    console: Console,
) -> None:
    """Prints the table; writes the picture, and the video where one is asked for. timeout: seconds that reading the
    motion may take, 0: any."""
    for target in filter(None, (picture, video)):
        if not target.absolute().parent.is_dir():
            raise UserError(f"{target}: its folder does not exist. Create it, or give another name.")
    reader = GuardedMotion(timeout, Quarantine(), limit="--timeout") if timeout else read_with_energy
    if timeout:
        reader.start()
    began = time.perf_counter()
    field, _ = reader(path, start, end, references=references, fallback=fallback, qp=True)
    console.print(_table(field, time.perf_counter() - began))
    for note in field.notes:
        console.warn(note)
    write_sheet(field, picture)
    sparse = thinned(field)
    console.print(f"  picture: {picture}{f' ({sparse})' if sparse else ''}", markup=False, soft_wrap=True)
    if video:
        write_video(field, video)
        console.print(f"  video: {video}", markup=False, soft_wrap=True)


def _table(field: MotionField, seconds: float) -> rich.table.Table:
    said = field.provenance
    table = rich.table.Table(
        box=None,
        padding=(0, 2, 0, 0),
        show_header=False,
        title=escape(str(field.path)),
        title_justify="left",
        title_style="bold",
    )
    table.add_column(style="dim")
    table.add_column()
    for name, value in (
        (
            "stream",
            f"{said['codec']} {said['profile']}, {said['width']}×{said['height']} at {float(Fraction(said['rate'])):g} frames a second, "
            f"in {said['container'].split(',')[0]}",
        ),
        (
            "frames",
            f"{len(field.times)} from {field.times[0]:.2f} s to {field.duration:.2f} s: {_counts(field.kinds.tolist())}",
        ),
        ("groups of pictures", _groups(field)),
        ("packets", _packets(field)),
        ("vectors", ", ".join(f"{_ORIGINS[name]} ({count} frames)" for name, count in said["origins"].items())),
        ("references", f"{said['references']}{_distances(field)}"),
        (
            "cells",
            ", ".join(
                f"{100 * (field.validity == kind).mean():.1f}% {kind.name.lower().replace('_', ' ')}"
                for kind in (Validity.INTER, *(k for k in Validity if k != Validity.INTER))
                if (field.validity == kind).any()
            )
            + f" of {field.validity.shape[1]}×{field.validity.shape[2]} of {said['cell']} px",
        ),
        ("motion", _motion(field)),
        ("scene cuts", f"{_cut_times(field)} (by {said['cuts']})"),
        (
            "quantisers",
            "not exported"
            if field.qp is None
            else f"QP {field.qp[field.qp >= 0].min()} to {field.qp.max()}, mean {field.qp[field.qp >= 0].mean():.1f}",
        ),
        ("reading took", f"{seconds:.2f} s, {len(field.times) / seconds:.0f} frames a second"),
    ):
        table.add_row(name, escape(value))
    return table


_ORIGINS = {
    Origin.NONE.name.lower(): "none",
    Origin.NATIVE.name.lower(): "the stream's own",
    Origin.REENCODED.name.lower(): "made here by an H.264 encoding of the decoded frames, not the stream's own",
    Origin.MESTIMATE.name.lower(): "made here by block matching of the decoded frames, not the stream's own",
}


def _counts(kinds: list[str]) -> str:
    return ", ".join(f"{kinds.count(kind)} {'lost' if kind == '-' else kind}" for kind in "IPBS?-" if kind in kinds)


def _groups(field: MotionField) -> str:
    keys = np.flatnonzero(field.keys)
    if not len(keys):
        return "no key frame here"
    lengths = np.diff(np.append(keys, len(field.times)))
    return (
        f"{len(keys)}, of {lengths.min()} to {lengths.max()} frames" if len(keys) > 1 else f"1, of {lengths[0]} frames"
    )


def _packets(field: MotionField) -> str:
    means = [
        f"{kind} {field.packet_bytes[field.kinds == kind].mean():.0f}" for kind in "IPB" if (field.kinds == kind).any()
    ]
    return f"{field.packet_bytes.sum() / 1000:.1f} kB; mean bytes a frame: {', '.join(means)}"


def _distances(field: MotionField) -> str:
    """How far away references are, of the vectors that move."""
    used = field.reference[field.reference != 0]
    if not len(used):
        return ""
    shares = [(int(d), 100 * float((np.abs(used) == d).mean())) for d in np.unique(np.abs(used))]
    shown = ", ".join(f"{d}: {share:.0f}%" for d, share in shares if share >= 0.5)
    sure = field.confidence[field.valid]
    mean = "" if np.isnan(sure).all() else f"; mean confidence {np.nanmean(sure):.2f}"
    return f"; frames away {shown}{mean}"


def _motion(field: MotionField) -> str:
    speed = field.magnitude[field.valid]
    if not len(speed):
        return "none is known"
    return (
        f"mean {speed.mean():.1f} px/second, 95% of cells under {np.percentile(speed, 95):.1f}; "
        f"{100 * (speed > 1).mean():.0f}% of valid cells move by more than 1"
    )


def _cut_times(field: MotionField) -> str:
    times = [f"{t:.2f} s" for t in field.times[field.cuts]]
    return (
        "none found"
        if not times
        else ", ".join(times[:12]) + (f" and {len(times) - 12} more" if len(times) > 12 else "")
    )
