"""The paper's head metrics by plain loops over their definitions, on small grids."""

from __future__ import annotations

import torch

from vdm_priors.grid import TokenGrid
from vdm_priors.heads import HeadMetrics


def make_grid(frames: int, rows: int, columns: int, valid=None) -> TokenGrid:
    spans = [[float(f), f + 1.0] for f in range(frames)]
    return TokenGrid.regular(spans, rows, columns, valid=valid)


def place(index: int, grid: TokenGrid) -> tuple[int, int, int]:
    per_frame = grid.rows * grid.columns
    return index // per_frame, index % per_frame // grid.columns, index % grid.columns


def in_mask(query: int, key: int, grid: TokenGrid, radius: int, own_frame: bool) -> bool:
    valid = grid.valid.flatten()
    (qf, qr, qc), (kf, kr, kc) = place(query, grid), place(key, grid)
    near = abs(qr - kr) <= radius and abs(qc - kc) <= radius
    return bool(valid[query] and valid[key] and near and (own_frame or qf != kf))


def metrics_by_loops(attention, grid, rows, inside_mask, own_frame):
    """[(dfc, tcs, dsr)] of one head each, by the definitions; inside_mask(query, key) says what M is."""
    valid = grid.valid.flatten().tolist()
    rows = [(r, query) for r, query in enumerate(rows) if valid[query]]
    keys = [k for k in range(grid.num_tokens) if valid[k]]
    results = []
    for a in attention.tolist():
        everything = [a[r][k] for r, _ in rows for k in keys]
        tau = sum(everything) / len(everything)
        inside = outside = above = diagonal = 0.0
        for r, query in rows:
            for k in keys:
                if inside_mask(query, k):
                    inside += a[r][k] ** 2
                else:
                    outside += a[r][k] ** 2
                if in_mask(query, k, grid, 0, own_frame):
                    diagonal += 1
                    above += a[r][k] >= tau
        lengths: dict[tuple[int, int], list[int]] = {}
        for r, query in rows:
            _, row, column = place(query, grid)
            runs = lengths.setdefault((row, column), [])
            length = 0
            for frame in range(grid.frames):
                k = (frame * grid.rows + row) * grid.columns + column
                if valid[k] and a[r][k] > tau:
                    length += 1
                elif length:
                    runs.append(length)
                    length = 0
            if length:
                runs.append(length)
        per_place = [sum(runs) / len(runs) if runs else 0.0 for runs in lengths.values()]
        tcs = sum(per_place) / len(per_place)
        results.append((inside / outside, tcs, above / diagonal if diagonal else 0.0))
    return torch.tensor(results, dtype=torch.float64)


def assert_metrics(metrics: HeadMetrics, expected: torch.Tensor) -> None:
    found = torch.stack([metrics.dfc, metrics.tcs, metrics.dsr], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
