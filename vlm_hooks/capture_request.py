"""What attention one forward shall keep, and afterwards what it kept.

Legend: B batch, Hq query heads, R wanted rows (queries), C wanted columns (keys).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class CaptureError(RuntimeError):
    """Attention rows were asked for where they cannot be had; the message says why."""


class CaptureRequest:
    """Which attention to keep during one forward, and, afterwards, what was kept.

    rows [B, R], columns [B, C]: positions in the (padded) sequence, any value where row_mask
    [B, R] or column_mask [B, C] is False; layers: decoder layers to average (None: all);
    keep_layers: also keep every layer's heads, without gradient, in `layer_rows`
    {layer: [B, Hq, R, C]}. One request serves one forward.

    A plain class on purpose: DDP rebuilds dicts and FSDP2 rebuilds dataclasses among a
    forward's arguments, and what was captured in the copy would be lost.
    """

    def __init__(
        self,
        rows: Tensor,
        row_mask: Tensor,
        columns: Tensor,
        column_mask: Tensor,
        layers: Sequence[int] | None = None,
        keep_layers: bool = False,
    ) -> None:
        for name, positions, mask in (("row", rows, row_mask), ("column", columns, column_mask)):
            if positions.ndim != 2 or positions.shape != mask.shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"CaptureRequest: {name}s must be [B, n] positions with a bool {name}_mask of "
                    f"the same shape, got {list(positions.shape)} and {mask.dtype} "
                    f"{list(mask.shape)}."
                )
        if len(rows) != len(columns):
            raise ValueError(
                f"CaptureRequest: rows are of {len(rows)} samples, columns of {len(columns)}."
            )
        # masked positions must be safe to gather
        self.rows = rows.masked_fill(~row_mask, 0)
        self.columns = columns.masked_fill(~column_mask, 0)
        self.row_mask, self.column_mask = row_mask, column_mask
        self.layers = layers
        self.keep_layers = keep_layers
        self.layer_rows: dict[int, Tensor] = {}
        self.modules: dict[int, nn.Module] = {}  # the attention module of each captured layer
        self._means: dict[int, Tensor] = {}  # [B, R, C]
        self._grad: bool | None = None  # gradient mode of the forward that is served
        self._empty_because = (
            "the model was not called inside `with capture(model)` with motion_capture=request"
        )

    @classmethod
    def from_positions(
        cls,
        rows: Sequence[Sequence[int] | Tensor],
        columns: Sequence[Sequence[int] | Tensor],
        layers: Sequence[int] | None = None,
        keep_layers: bool = False,
        device: torch.device | str = "cpu",
    ) -> CaptureRequest:
        """A request from one list of row and of column positions a sample, of any lengths."""
        padded = (*_pad(rows, device), *_pad(columns, device))
        return cls(*padded, layers=layers, keep_layers=keep_layers)

    def to(self, device: torch.device | str, **how: Any) -> CaptureRequest:
        """Moves the positions to the model's device, once for all layers; itself."""
        for name in ("rows", "row_mask", "columns", "column_mask"):
            setattr(self, name, getattr(self, name).to(device, **how))
        return self

    @property
    def captured_layers(self) -> list[int]:
        """Indices of the layers whose rows were captured."""
        return sorted(self._means)

    def layer(self, index: int) -> Tensor:
        """Rows [B, R, C] of one layer, averaged over its heads."""
        if index not in self._means:
            raise CaptureError(
                f"Layer {index} was not captured; captured layers: {self.captured_layers}."
            )
        return self._means[index]

    def mean(self) -> Tensor:
        """Rows [B, R, C] float32, averaged over layers and heads; masked entries are 0.

        Raises CaptureError if no layer was captured. (METHOD.md step 4, A_VLM.)
        """
        if not self._means:
            raise CaptureError(f"No attention layer was captured: {self._empty_because}.")
        return torch.stack([self._means[i] for i in self.captured_layers]).mean(dim=0)

    # -- for capture.py ---------------------------------------------------------------

    def start(self, num_layers: int, batch: int | None, length: int | None) -> None:
        """Check the request against the forward that begins; raises CaptureError."""
        if self._grad is not None:
            raise CaptureError(
                "This CaptureRequest has already served a forward; make a new one for each."
            )
        strange = sorted(set(self.layers or ()) - set(range(num_layers)))
        if strange or (self.layers is not None and not self.layers):
            raise CaptureError(
                f"CaptureRequest.layers names {strange or 'no layer'}, but the model's decoder "
                f"layers are 0 to {num_layers - 1}."
            )
        if batch is not None and batch != len(self.rows):
            raise CaptureError(
                f"CaptureRequest is for {len(self.rows)} samples, but the model got {batch}."
            )
        for name in ("rows", "columns"):
            positions = getattr(self, name)
            if length is not None and positions.numel() and not (
                0 <= int(positions.min()) and int(positions.max()) < length
            ):
                raise CaptureError(
                    f"CaptureRequest.{name} holds position {int(positions.max())} (smallest "
                    f"{int(positions.min())}), but the sequence has {length} tokens."
                )
        self._grad = torch.is_grad_enabled()
        self._empty_because = "no captured attention module ran in the forward"

    def wants(self, module: nn.Module, query_length: int, key_length: int) -> bool:
        """Whether this call of a layer's attention is to be captured; raises CaptureError where it cannot be."""
        index = module.layer_idx
        if self.layers is not None and index not in self.layers:
            return False
        if index in self._means:
            return False  # gradient checkpointing runs the layer again in the backward pass
        if self._grad is None:
            raise CaptureError(
                "A motion_capture request reached the attention without passing the model that "
                "`capture` holds: call that model itself."
            )
        if query_length == 1:
            self._empty_because = "the forward had a single query (generation with a cache)"
            return False
        if self._grad and not torch.is_grad_enabled():
            raise CaptureError(
                "Reentrant gradient checkpointing would silently give the alignment loss a zero "
                "gradient: enable checkpointing with use_reentrant=False."
            )
        if key_length != query_length:
            raise CaptureError(
                f"Capture needs the whole sequence in one forward, but {query_length} queries "
                f"met {key_length} keys: call the model without past_key_values."
            )
        return True

    def keep(self, module: nn.Module, mean_brc: Tensor) -> None:
        """Keep one layer's rows."""
        self._means[module.layer_idx] = mean_brc
        self.modules[module.layer_idx] = module


def _pad(
    lists: Sequence[Sequence[int] | Tensor], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Positions [B, n] and mask [B, n] of lists of different lengths."""
    parts = [torch.as_tensor(one, dtype=torch.long) for one in lists]
    positions = nn.utils.rnn.pad_sequence(parts, batch_first=True)
    lengths = torch.tensor([len(part) for part in parts])
    mask = torch.arange(positions.shape[1])[None] < lengths[:, None]
    return positions.to(device), mask.to(device)
