"""What a page shows of one clip, as plain arrays; None and NaN stand for what is not known.

Maps are *densities*: times what a uniform map would have there (1 = uniform), so that grids of different cells share
one colour scale.

Legend: N frames, W words, F×H×W' cells of a grid, K steps, L layers, h heads, n places, S cells of the teacher's grid.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vdm_priors.grid import TokenGrid

METRICS = {"score": "sum", "dfc": "DFC", "tcs": "TCS", "dsr": "DSR"}
TRUTH, TEACHER, STUDENT, SOURCE = "truth", "teacher", "student", "source"  # kinds of maps


@dataclass
class WordView:
    """A word of the text. mean and fluctuation: the two terms of its motion score, in attention; curve [F]: its mean
    attention in each of the teacher's latent frames; None where the prior does not say."""

    text: str
    start: int
    end: int
    score: float | None = None
    mean: float | None = None
    fluctuation: float | None = None
    selected: bool = False
    curve: list[float] | None = None


@dataclass
class MapSet:
    """Maps of all words by one source. maps [W, F, H, W']; steps [K, W, F, H, W'], layers [L, W, F, H, W'] or None."""

    name: str
    kind: str
    grid: TokenGrid
    maps: np.ndarray
    steps: np.ndarray | None = None
    step_names: list[str] = field(default_factory=list)
    layers: np.ndarray | None = None
    layer_names: list[str] = field(default_factory=list)
    note: str = ""


@dataclass
class HeadMaps:
    """Vision-to-vision attention of some rows of the head map, at the same n places of every frame.

    rows: which rows of HeadsView; places [n] in raster order of a frame; attention float32 [rows·h, F·n, F·n], times
    uniform (A·S), NaN at invalid cells; threshold [rows·h]: τ·S; inside bool [F·n, F·n]: the motion mask.
    """

    rows: list[int]
    places: np.ndarray
    attention: np.ndarray
    threshold: np.ndarray
    inside: np.ndarray


@dataclass
class HeadsView:
    """Scores of heads. rows: names of the map's rows (layers, or the mean over layers); each metric [rows, h], NaN
    where not known; selected bool [rows, h]; judged: rows whose heads the prior chose among; note: of what the scores
    stand on.
    """

    rows: list[str]
    metrics: dict[str, np.ndarray]
    selected: np.ndarray
    judged: list[int]
    grid: TokenGrid
    maps: list[HeadMaps] = field(default_factory=list)
    note: str = ""


@dataclass
class InversionView:
    """frames, reconstruction uint8 [N, y, x, 3] at the teacher's size; latents [F, C, y', x'] of the inverted clip."""

    frames: np.ndarray
    latents: np.ndarray | None = None
    reconstruction: np.ndarray | None = None
    psnr_db: float | None = None
    relative_l2: float | None = None

    def frame_psnr(self) -> np.ndarray | None:
        """PSNR in dB [N] of each reconstructed frame, at most 100 (an exact one has no finite one)."""
        if self.reconstruction is None or self.reconstruction.shape != self.frames.shape:
            return None
        error = (self.frames.astype(np.float64) - self.reconstruction) / 255
        return -10 * np.log10(np.maximum(np.square(error).mean(axis=(1, 2, 3)), 1e-10))


@dataclass
class CodecView:
    """What the compressed stream says. T coded frames of the clip's span; M of them, `shown`, with maps of R×C cells.

    velocity float32 [M, R, C, 2] px/second (x to the right, y down), NaN where none; validity uint8 [M, R, C] of
    Validity; residual float32 [M, R, C]: root mean square prediction error in grey levels, NaN where not known.
    edges: of cells, 0 to 1; size: height and width of the frame in pixels.
    """

    times: np.ndarray
    duration: float
    kinds: list[str]
    keys: np.ndarray
    cuts: np.ndarray
    packet_bytes: np.ndarray
    speed: np.ndarray
    valid_share: np.ndarray
    shown: np.ndarray
    velocity: np.ndarray
    validity: np.ndarray
    residual: np.ndarray
    row_edges: np.ndarray
    column_edges: np.ndarray
    size: tuple[int, int] = (1, 1)
    facts: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class ClipView:
    """One clip with its text. times [N] seconds; frames uint8 [N, y, x, 3] or None; missing: (section, sentence)."""

    name: str
    text: str
    times: list[float]
    frames: np.ndarray | None
    words: list[WordView]
    maps: list[MapSet] = field(default_factory=list)
    heads: HeadsView | None = None
    inversion: InversionView | None = None
    codec: CodecView | None = None
    question: str = ""
    answer: str = ""
    video: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def lacks(self, section: str, sentence: str) -> None:
        """Notes, once, what a section cannot show."""
        if (section, sentence) not in self.missing:
            self.missing.append((section, sentence))


def density(values: np.ndarray, grid: TokenGrid) -> np.ndarray:
    """Mass [..., F, H, W'] → times uniform, NaN on invalid cells and for maps without any mass."""
    spans, rows, columns = grid.spans.numpy(), grid.row_edges.numpy(), grid.column_edges.numpy()
    valid = grid.valid.numpy()
    volume = (spans[:, 1] - spans[:, 0])[:, None, None] * np.diff(rows)[:, None] * np.diff(columns)
    uniform = np.where(valid, volume, 0) / volume[valid].sum()
    mass = np.where(valid, values.astype(np.float64), 0.0)
    total = mass.sum(axis=(-3, -2, -1), keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(total > 0, mass / total, np.nan)
        return np.where(valid, shares / np.where(valid, uniform, 1), np.nan).astype(np.float32)
