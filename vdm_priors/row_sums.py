"""Sums over whole rows of an attention map from its queries, its keys and the rows' log-sum-exp, without the map.

A row's probabilities are p_k = exp(q·k·scale − lse). So, with one more fused kernel call a sum (vdm_priors.kernels):

    mass    Σ_k p_k   = 1 − Σ_other p_k, of the few keys that are no cells, or exp(LSE_k(l) − lse) where they are many
    energy  Σ_k p_k²  = exp(LSE_k(2l) − 2·lse)

with l = q·k·scale. Energy inside the motion mask M and attention between the frames of a place need M's keys alone;
outside M is the rest, so that its error is a part of the whole row's energy: float32's rounding of the log-sum-exp,
1e-5 of it and less where that is below 100.

With a reference stream whose cells are added to the clip's (HarvestRequest.memory_columns), a cell has p + p', and
Σ (p + p')² = Σ p² + Σ p'² + 2 Σ p·p', where p·p' is again one exponential: exp(q·(k + k')·scale − 2·lse).

Legend: H heads, S vision tokens, R query rows, F frames, U places that have rows, n keys of a place's M, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdm_priors.grid import TokenGrid
from vdm_priors.kernels import probabilities, sharpened_lse
from vdm_priors.masks import BandMask, MotionMask

NARROW = 1 / 8  # of the cells: where M holds more, its keys are no fewer numbers than the rows' chunks
CHUNK_ELEMENTS = {"cpu": 2**20}  # gathered numbers at once: a CPU is fastest within its cache
MANY = 2**25  # elsewhere


@dataclass(frozen=True, eq=False)
class Neighbourhoods:
    """The keys of mask M of some rows, listed by place, since the frames of a place have most of them in common.

    rows [R]: the rows' tokens; of_row [R]: where each stands in cells [U, F], the tokens of the rows' places;
    keys [U, n]: tokens that M holds for at least one frame of a place, filled up with others; inside bool [U, F, n]:
    whether M does hold it. valid bool [S]: the grid's; None if all cells are valid. whole: whether the rows are all
    cells in order. narrow: whether M is small enough for this. Else keys and inside are empty.
    """

    rows: Tensor
    of_row: Tensor
    cells: Tensor
    keys: Tensor
    inside: Tensor
    valid: Tensor | None
    whole: bool
    narrow: bool

    @classmethod
    def of(cls, mask: MotionMask | BandMask, grid: TokenGrid, rows: Tensor) -> Neighbourhoods:
        """Of rows [R], valid cells of the grid, on their device."""
        device, places = rows.device, grid.rows * grid.columns
        used, of_place = (rows % places).unique(return_inverse=True)
        cells_uf = used[:, None] + torch.arange(grid.frames, device=device) * places
        most = int(NARROW * grid.num_tokens)
        lists, narrow = [], True
        for cells_cf in cells_uf.split(max(1, MANY // (grid.frames * grid.num_tokens))):
            inside_cfs = mask(cells_cf.flatten(), grid).unflatten(0, cells_cf.shape)
            held_cs = inside_cfs.any(dim=1)
            count = int(held_cs.sum(dim=1).max())
            if count > most:
                lists, narrow = [], False
                break
            keys_cn = held_cs.to(torch.uint8).topk(count, dim=1).indices.sort(dim=1).values
            lists.append((keys_cn, inside_cfs.gather(2, keys_cn[:, None].expand(-1, grid.frames, -1))))
        longest = max((keys.shape[1] for keys, _ in lists), default=0)
        keys_un = cells_uf[:, :1].repeat(1, longest)
        inside_ufn = torch.zeros(*cells_uf.shape, longest, dtype=torch.bool, device=device)
        for number, (keys_cn, inside_cfn) in enumerate(lists):
            part = slice(number * len(lists[0][0]), number * len(lists[0][0]) + len(keys_cn))
            keys_un[part, : keys_cn.shape[1]] = keys_cn
            inside_ufn[part, :, : keys_cn.shape[1]] = inside_cfn
        valid = None if grid.valid.all() else grid.valid.flatten().to(device)
        of_row = of_place * grid.frames + rows // places
        whole = torch.equal(rows, torch.arange(grid.num_tokens, device=device))
        return cls(rows, of_row, cells_uf, keys_un, inside_ufn, valid, whole, narrow)


def row_sums(
    q_hsd: Tensor,
    shown_hsd: Sequence[Tensor],
    lse_hs: Tensor,
    scale: float,
    near: Neighbourhoods,
    rest_hnd: Tensor | None = None,
    rest_bias_n: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Of A [H, R, S], the rows `near.rows`: ΣA, Σ_M A², Σ_notM A² over valid keys, float64 [3, H, R]; and A [H, R, F]
    between each row and its own place in every frame, float32, 0 at invalid keys.

    q: queries of all cells; lse: of their logits over everything that they see; shown: the keys of all cells, or those
    of the clip and of its reference, whose probabilities are added. rest: all other keys that the queries see, with
    what is added to their logits; None where they are too many to be of use.
    """
    q_hrd, lse_hr = (q_hsd, lse_hs) if near.whole else (q_hsd[:, near.rows], lse_hs[:, near.rows])
    cells = shown_hsd if near.valid is None else [k[:, near.valid] for k in shown_hsd]
    energy_hr = _power_sum(q_hrd, torch.cat(list(cells), dim=1) if len(cells) > 1 else cells[0], lse_hr, scale, 2)
    if len(cells) > 1:
        # of a cell's two keys, side by side for a query that is there twice: half-precision keys lose nothing, as a
        # sum of the two would
        twice = torch.cat([q_hrd, q_hrd], dim=-1), torch.cat(list(cells), dim=-1)
        energy_hr += 2 * _power_sum(*twice, 2 * lse_hr, scale, 1)
    mass_hr = _mass(q_hrd, shown_hsd, cells, lse_hr, scale, near.valid, rest_hnd, rest_bias_n)
    inside_hr, same_place_hrf = _near_sums(q_hsd, shown_hsd, lse_hs, scale, near)
    outside_hr = (energy_hr - inside_hr).clamp(min=0)
    return torch.stack([mass_hr, inside_hr, outside_hr]), same_place_hrf


def _mass(
    q_hrd: Tensor, shown_hsd: Sequence[Tensor], cells: Sequence[Tensor], lse_hr: Tensor, scale: float,
    valid_s: Tensor | None, rest_hnd: Tensor | None, rest_bias_n: Tensor | None,
) -> Tensor:
    """ΣA [H, R] over valid keys, from the smaller part of what the rows see."""
    if rest_hnd is None:
        return sum(_power_sum(q_hrd, k, lse_hr, scale, 1) for k in cells)
    if valid_s is not None:
        missing = [k[:, ~valid_s] for k in shown_hsd]
        rest_hnd = torch.cat([rest_hnd, *missing], dim=1)
        if rest_bias_n is not None:
            rest_bias_n = torch.cat([rest_bias_n, *(rest_bias_n.new_zeros(k.shape[1]) for k in missing)])
    if rest_hnd.shape[1] == 0:
        return torch.ones_like(lse_hr, dtype=torch.float64)
    return (1 - _power_sum(q_hrd, rest_hnd, lse_hr, scale, 1, rest_bias_n)).clamp(min=0)


def _power_sum(
    q_hrd: Tensor, k_hkd: Tensor, lse_hr: Tensor, scale: float, power: int, bias_k: Tensor | None = None
) -> Tensor:
    """Σ_k exp(l − lse)^power over all of these keys, float64 [H, R]."""
    bias = None if bias_k is None else bias_k[None, None, None]
    sharp_hr = sharpened_lse(q_hrd[None], k_hkd[None], scale, power, bias)[0]
    return (sharp_hr.double() - power * lse_hr.double()).exp()


def _near_sums(
    q_hsd: Tensor, shown_hsd: Sequence[Tensor], lse_hs: Tensor, scale: float, near: Neighbourhoods
) -> tuple[Tensor, Tensor]:
    """Σ_M A² float64 [H, R] and A at the own place [H, R, F], some places at a time."""
    (places, frames), heads = near.cells.shape, len(q_hsd)
    inside_huf = torch.empty(heads, places, frames, dtype=torch.float64, device=q_hsd.device)
    same_huff = torch.empty(heads, places, frames, frames, device=q_hsd.device)
    limit = CHUNK_ELEMENTS.get(q_hsd.device.type, MANY)
    step = max(1, limit // (heads * (frames + near.keys.shape[1]) * q_hsd.shape[-1]))
    for first in range(0, places, step):
        part = slice(first, first + step)
        cells_cf = near.cells[part]
        keys_ck = torch.cat([cells_cf, near.keys[part]], dim=1)
        p_hcfk = None
        for k_hsd in shown_hsd:
            p = probabilities(q_hsd[:, cells_cf], k_hsd[:, keys_ck], lse_hs[:, cells_cf, None], scale)
            p_hcfk = p if p_hcfk is None else p_hcfk.add_(p)
        same_huff[:, part] = p_hcfk[..., :frames]
        inside_huf[:, part] = p_hcfk[..., frames:].square_().mul_(near.inside[part]).double().sum(dim=-1)
    if near.valid is not None:
        same_huff.masked_fill_(~near.valid[near.cells][:, None], 0.0)
    return inside_huf.flatten(1)[:, near.of_row], same_huff.flatten(1, 2)[:, near.of_row]
