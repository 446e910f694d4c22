"""Networks between the student's rows and the prior's maps, trained with the student and discarded after it.

Legend: W words, F×H×W cells of a grid.
"""

from __future__ import annotations

from torch import Tensor, nn

from vdm_priors.errors import UserError

ALIGNERS = ("pointwise", "row", "conv3d", "identity")
WIDTHS = {"pointwise": 16, "row": 128, "conv3d": 8}  # a few ms for 32 samples on one CPU core


class Aligner(nn.Module):
    """A trainable map of rows [W, F, H, W] to rows of the same shape, discarded after training.

    `net` is a 3-layer network on values scaled by the number of cells (so that a uniform,
    normalised row is 1 everywhere). It is added to its input, and its last layer starts at
    zero: the aligner starts as the identity and the student's rows always keep a direct
    gradient. (The paper says "a 3-layer MLP"; the residual form is our decision.)
    """

    def __init__(self, net: nn.Module, cells: tuple[int, int, int] | None = None) -> None:
        super().__init__()
        self.net = net
        self.cells = cells
        last = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv3d)][-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, rows_wfhw: Tensor) -> Tensor:
        grid = tuple(rows_wfhw.shape[1:])
        if self.cells is not None and grid != self.cells:
            raise UserError(
                f'The aligner "row" was built for a grid of {self.cells} cells, but a prior has '
                f'{grid}: use aligner "pointwise" or "conv3d" for priors of several shapes.'
            )
        cells = rows_wfhw[0].numel() if len(rows_wfhw) else 1
        return rows_wfhw + self.net(rows_wfhw * cells) / cells


class _PerCell(nn.Sequential):
    def forward(self, rows_wfhw: Tensor) -> Tensor:
        return super().forward(rows_wfhw.unsqueeze(-1)).squeeze(-1)


class _PerRow(nn.Sequential):
    def forward(self, rows_wfhw: Tensor) -> Tensor:
        return super().forward(rows_wfhw.flatten(1)).reshape(rows_wfhw.shape)


class _Volume(nn.Sequential):
    def forward(self, rows_wfhw: Tensor) -> Tensor:
        return super().forward(rows_wfhw.unsqueeze(1)).squeeze(1)


def build_aligner(
    kind: str, grid_shape: tuple[int, int, int] | None = None, hidden: int | None = None
) -> nn.Module:
    """An aligner of METHOD.md: pointwise (each cell), row (whole row), conv3d, identity.

    grid_shape (F, H, W) of the priors: needed by "row" alone, whose size it fixes. `hidden`:
    width of the layers (channels of conv3d; default WIDTHS). Raises UserError for an unknown
    kind.
    """
    if kind == "identity":
        return nn.Identity()
    hidden = hidden or WIDTHS.get(kind)
    if kind == "pointwise":
        layers = [nn.Linear(1, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)]
        return Aligner(_PerCell(*_with_gelu(layers)))
    if kind == "conv3d":
        widths = [1, hidden, hidden, 1]
        layers = [nn.Conv3d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:])]
        return Aligner(_Volume(*_with_gelu(layers)))
    if kind == "row":
        if grid_shape is None:
            raise UserError('The aligner "row" needs the priors\' grid shape (F, H, W).')
        cells = grid_shape[0] * grid_shape[1] * grid_shape[2]
        layers = [nn.Linear(cells, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, cells)]
        return Aligner(_PerRow(*_with_gelu(layers)), tuple(grid_shape))
    raise UserError(f"Unknown aligner {kind!r}: choose one of {', '.join(ALIGNERS)}.")


def _with_gelu(layers: list[nn.Module]) -> list[nn.Module]:
    first, second, third = layers
    return [first, nn.GELU(), second, nn.GELU(), third]
