"""An encoder for boards of symbols, as MiniGrid gives them."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn

from rlrep import nets, spaces
from rlrep.encoders.base import Encoder, encoders


@encoders.register("grid")
class Grid(Encoder):
    """Every symbol's own embedding, summed in each cell, then two 3x3 convolutions and a linear layer.

    Args:
        observation_space: (H, W, 3k) uint8 boards: object, colour and state of each cell, k frames stacked.
        features_dim: D.
        width: Channels of the embedding and the convolutions.
    """

    paper = "cell embeddings as in BabyAI, arXiv:1810.08272"
    kinds = ("grid",)
    offset: Tensor

    def __init__(self, observation_space: Space, features_dim: int = 128, width: int = 32) -> None:
        super().__init__(observation_space, features_dim)
        channels, height, width_cells = spaces.picture_shape(observation_space)
        # A table of 256 rows a channel: no uint8 can fall outside it.
        self.embedding = nn.Embedding(256 * channels, width)
        self.register_buffer("offset", 256 * torch.arange(channels), persistent=False)
        self.convolutions = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nets.head(width * height * width_cells, features_dim)

    def forward(self, obs: Tensor) -> Tensor:
        """(N, H, W, 3k) symbols -> (N, D)."""
        cells = self.embedding(obs.long() + self.offset).sum(dim=-2)
        return self.head(self.convolutions(cells.permute(0, 3, 1, 2)).flatten(1))
