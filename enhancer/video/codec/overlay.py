"""Pictures of a MotionField: arrows and validity on the frames, groups of pictures on a time line."""

from __future__ import annotations

import textwrap
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from enhancer.video.codec.field import MotionField, Origin, Validity
from enhancer.video.codec.pictures import pictures_of

TINTS = {
    Validity.INTRA: (255, 150, 0),
    Validity.OUT_OF_FRAME: (255, 0, 255),
    Validity.INVALID: (255, 0, 0),
    Validity.UNAVAILABLE: (110, 110, 110),
}  # RGB
KIND_COLOURS = {"I": "#d95f02", "P": "#1b9e77", "B": "#7570b3", "S": "#666666"}
ARROWS = 40  # along the longer side, at most
LEAST_SHOWN = 2.0  # drawn pixels; shorter arrows are left out
SHORTER_SIDE = 270  # pixels of a drawn frame, at least
PANELS = 6
ARROW_REACH = 0.9  # spacings that the fast arrows (90th percentile) are long


def drawn(picture: np.ndarray, field: MotionField, row: int, frames: float | None = None) -> np.ndarray:
    """uint8 [H', W', 3]: the frame, larger where small, with arrows `frames` frames of motion long (None: as fits) and
    tints."""
    factor = max(1, -(-SHORTER_SIDE // min(picture.shape[:2])))
    image = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    image = (image * 0.65 + 40).astype(np.uint8)
    row_pixels, column_pixels = (np.diff(edges).astype(int) * factor for edges in (field.row_edges, field.column_edges))
    validity = np.repeat(np.repeat(field.validity[row], row_pixels, axis=0), column_pixels, axis=1)
    for kind, colour in TINTS.items():
        image[validity == kind] = (0.6 * image[validity == kind] + 0.4 * np.array(colour)).astype(np.uint8)
    group = cells_an_arrow(field)
    frames = frames or arrow_frames(field, group)
    rows, columns = field.validity.shape[1:]
    for top in range(0, rows, group):
        for left in range(0, columns, group):
            cells = field.displacement[row, top : top + group, left : left + group].reshape(-1, 2)
            cells = cells[~np.isnan(cells[:, 0])]
            motion = np.median(cells, axis=0) if len(cells) else np.zeros(2)
            if np.hypot(*motion) * frames * factor >= LEAST_SHOWN:
                middle = (
                    np.array(
                        [
                            field.column_edges[left] + field.column_edges[min(left + group, columns)],
                            field.row_edges[top] + field.row_edges[min(top + group, rows)],
                        ]
                    )
                    / 2
                )
                _arrow(image, middle * factor, motion * frames * factor)
    return image


def cells_an_arrow(field: MotionField) -> int:
    """Rows and columns of cells that share an arrow, their median: 1 up to ARROWS along the longer side."""
    return max(1, -(-max(field.validity.shape[1:]) // ARROWS))


def thinned(field: MotionField) -> str:
    """What is said where not every cell has an arrow of its own; empty where each has."""
    group = cells_an_arrow(field)
    return f"one arrow for {group}×{group} cells, their median" if group > 1 else ""


def arrow_frames(field: MotionField, group: int = 1) -> float:
    """How many frames of motion an arrow shows, so that fast cells' arrows are about as long as their spacing."""
    speed = np.hypot(*np.moveaxis(field.displacement[field.valid], -1, 0))
    speed = speed[speed > 0]
    spacing = group * float(np.diff(field.row_edges).max())
    return ARROW_REACH * spacing / float(np.percentile(speed, 90)) if len(speed) else 1.0


def _arrow(image: np.ndarray, start: np.ndarray, motion: np.ndarray) -> None:
    """Hue tells the direction."""
    hue = int(np.degrees(np.arctan2(motion[1], motion[0])) % 360 / 2)
    colour = cv2.cvtColor(np.uint8([[[hue, 255, 255]]]), cv2.COLOR_HSV2RGB)[0, 0].tolist()
    ends = [tuple(int(v * 8) for v in point) for point in (start, start + motion)]
    cv2.arrowedLine(image, *ends, (0, 0, 0), 3, cv2.LINE_AA, 3, 0.3)
    cv2.arrowedLine(image, *ends, colour, 1, cv2.LINE_AA, 3, 0.3)


def write_sheet(field: MotionField, path: Path) -> None:
    """A PNG: frames spread over the clip, and a time line of packets, key frames, cuts, speed and validity."""
    from matplotlib.figure import Figure

    chosen = panel_rows(field)
    pictures = {row: picture for row, picture in pictures_of(field) if row in chosen}
    columns = min(3, len(pictures))
    lines = -(-len(pictures) // columns)
    height, width = field.size
    figure = Figure(figsize=(13, 13 / columns * lines * height / width + 4.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[13 / columns * lines * height / width + 0.3, 4.1])
    frames = arrow_frames(field, cells_an_arrow(field))
    for axis, (row, picture) in zip(
        np.ravel(above.subplots(lines, columns, squeeze=False)), pictures.items(), strict=False
    ):
        axis.imshow(drawn(picture, field, row, frames))
        axis.set_title(
            f"{field.times[row]:.2f} s  {field.kinds[row]}-frame  {100 * field.valid[row].mean():.0f}% valid"
            f"  {Origin(int(field.origin[row])).name.lower()}",
            fontsize=9,
        )
    for axis in above.axes:
        axis.set_axis_off()
    legend = "   ".join(
        f"{name}: {kind.name.lower().replace('_', ' ')}"
        for name, kind in (
            ("orange", Validity.INTRA),
            ("magenta", Validity.OUT_OF_FRAME),
            ("red", Validity.INVALID),
            ("grey", Validity.UNAVAILABLE),
        )
    )
    arrows = ", ".join(filter(None, (f"arrows: {frames:.1f} frames of motion, hue = direction", thinned(field))))
    below.suptitle(f"{arrows}      {legend}", fontsize=9)
    _draw_timeline(field, below)
    figure.savefig(path, dpi=110)


def panel_rows(field: MotionField) -> list[int]:
    """Up to PANELS rows, in the middle of equal parts of those that have a motion (of all, where none has)."""
    moving = np.flatnonzero(field.valid.any(axis=(1, 2)))
    rows = moving if len(moving) else np.flatnonzero(field.kinds != "-")
    middles = (np.arange(min(PANELS, len(rows))) + 0.5) * len(rows) / min(PANELS, len(rows))
    return rows[middles.astype(int)].tolist()


def _draw_timeline(field: MotionField, figure) -> None:
    packets, speed = figure.subplots(2, 1, sharex=True)
    width = np.diff(field.times, append=field.duration).clip(1e-3)
    for kind, colour in KIND_COLOURS.items():
        of_kind = field.kinds == kind
        if of_kind.any():
            packets.bar(
                field.times[of_kind],
                field.packet_bytes[of_kind] / 1000,
                width[of_kind],
                color=colour,
                align="edge",
                label=f"{kind} ({of_kind.sum()})",
            )
    for time in field.times[field.keys]:
        packets.axvline(time, color="black", linewidth=0.8)
    packets.set_yscale("log")
    packets.set_ylabel("packet, kB")
    packets.legend(
        fontsize=8, ncols=5, loc="upper right", title="black line: group of pictures begins", title_fontsize=8
    )
    with np.errstate(all="ignore"):
        means = np.array([np.nanmean(m) if np.isfinite(m).any() else np.nan for m in field.magnitude])
    speed.plot(field.times, means, color="black", linewidth=1, label="mean speed of valid cells")
    for n, time in enumerate(field.times[field.cuts]):
        speed.axvline(time, color="red", linewidth=1, label="scene cut" if n == 0 else None)
    speed.set_ylim(bottom=0)
    speed.set_ylabel("px/second")
    speed.set_xlabel("seconds\n" + textwrap.shorten("; ".join(field.notes), 160))
    share = speed.twinx()
    share.fill_between(field.times, 100 * field.valid.mean(axis=(1, 2)), step="post", color="#1b9e77", alpha=0.2)
    share.set_ylim(0, 105)
    share.set_ylabel("valid cells, %")
    speed.legend(fontsize=8, loc="upper right")


def write_video(field: MotionField, path: Path) -> None:
    """An H.264 film of all decoded frames with arrows and tints, at the clip's mean frame rate."""
    seconds = max(field.duration - float(field.times[0]), 1e-3)
    rate = Fraction(len(field.times) / seconds).limit_denominator(1001)
    frames = arrow_frames(field, cells_an_arrow(field))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "veryfast"})
        for row, picture in pictures_of(field):
            image = drawn(picture, field, row, frames)
            image = image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2]  # H.264's colours need even sides
            if not stream.codec_context.is_open:
                stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())
