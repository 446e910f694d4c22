"""A pre-norm transformer that reads tokens into a few learnt queries (CoPE-VideoLM, section D), and its positions.

Legend: N sequences, S tokens, K queries, D width, h heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); the MLP is four times as wide. [N, S, D] -> [N, S, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"A transformer of width {width} cannot have {heads} heads: width must be a multiple.")
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens_nsd: Tensor) -> Tensor:
        heads = self.qkv(self.norm_attention(tokens_nsd)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        tokens_nsd = tokens_nsd + self.out(mixed)
        return tokens_nsd + self.mlp(self.norm_mlp(tokens_nsd))


class Transformer(nn.Module):
    """Layers of full attention over all tokens, and a last norm. [N, S, D] -> [N, S, D]."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens_nsd: Tensor) -> Tensor:
        for layer in self.layers:
            tokens_nsd = layer(tokens_nsd)
        return self.norm(tokens_nsd)


class QueryTransformer(nn.Module):
    """K learnt queries beside the tokens in the same full attention; the queries' outputs. [N, S, D] -> [N, K, D]."""

    def __init__(self, width: int, layers: int, heads: int, queries: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.transformer = Transformer(width, layers, heads)

    def forward(self, tokens_nsd: Tensor) -> Tensor:
        queries = self.queries.expand(len(tokens_nsd), -1, -1)
        return self.transformer(torch.cat([queries, tokens_nsd], dim=1))[:, : len(self.queries)]


def sine_positions(rows: int, columns: int, width: int) -> Tensor:
    """[rows · columns, width] float32: half of the features say the row's middle and half the column's, in the frame.

    Sines and cosines of the place in 0..1 (Vaswani et al., 2017, in two dimensions), so that a grid of another size
    says the same of the same place. Raises ValueError where width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sine_positions: width must be a multiple of 4, not {width}.")
    waves = torch.pi * 2.0 ** torch.linspace(0, 6, width // 4)

    def of(count: int) -> Tensor:
        angles = (torch.arange(count)[:, None] + 0.5) / count * waves
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, column = of(rows)[:, None].expand(-1, columns, -1), of(columns)[None].expand(rows, -1, -1)
    return torch.cat([row, column], dim=-1).reshape(rows * columns, width)
