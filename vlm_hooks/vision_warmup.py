"""First stage of the small student: its vision tower learns what is in each cell, before the language model reads it.

Public VLMs start from a pretrained vision tower; the small one has none, and trained through captions alone it stays
blind for a thousand steps. Shape legend: B clips, T tokens of a clip, K labels a token.
"""

from __future__ import annotations

import torch
from torch import nn


class CellLabels(nn.Module):
    """Binary labels per visual token, read linearly off what the language model will receive.

    Called with the processor's pixel_values_videos and video_grid_thw of B equal clips and labels [B, T, K] in [0, 1];
    gives the mean binary cross-entropy (nats). The linear head is thrown away afterwards.
    """

    def __init__(self, model, labels: int):
        super().__init__()
        self.model = model
        self.head = nn.Linear(model.config.get_text_config().hidden_size, labels)

    def forward(self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor, labels: torch.Tensor) -> dict:
        features = self.model.get_video_features(pixel_values_videos, video_grid_thw)
        tokens = torch.stack(list(getattr(features, "pooler_output", features)))
        logits = self.head(tokens.float())
        return {"loss": nn.functional.binary_cross_entropy_with_logits(logits, labels), "logits": logits.detach()}
