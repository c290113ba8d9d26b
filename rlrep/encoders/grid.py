"""An encoder for boards of symbols, as MiniGrid gives them."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn

from rlrep import nets, spaces
from rlrep.encoders.base import Encoder, encoders
from rlrep.registry import SpecError


class CellEmbedding(nn.Embedding):
    """(N, H, W, C) symbols -> (N, H, W, width): every symbol's own embedding, summed in each cell.

    Args:
        channels: C, symbols in a cell.
        width: Of the embedding.
    """

    offset: Tensor

    def __init__(self, channels: int, width: int) -> None:
        # 256 rows a channel: no uint8 can fall outside.
        super().__init__(256 * channels, width)
        self.register_buffer("offset", 256 * torch.arange(channels), persistent=False)

    def forward(self, obs: Tensor) -> Tensor:
        """Embeds cells."""
        return super().forward(obs.long() + self.offset).sum(dim=-2)


@encoders.register("grid")
class Grid(Encoder):
    """Every symbol's own embedding, summed in each cell, then two 3x3 convolutions and a linear layer.

    Args:
        observation_space: (H, W, 3k) uint8 boards: object, colour and state of each cell, k frames stacked.
        features_dim: D.
        width: Channels of the embedding and the convolutions.
        depth: Convolutions.
        spatial: Keep the places: one linear layer for each cell, instead of one over all of them.
    """

    paper = "cell embeddings as in BabyAI, arXiv:1810.08272"
    kinds = ("grid",)

    def __init__(
        self,
        observation_space: Space,
        features_dim: int = 128,
        width: int = 32,
        depth: int = 2,
        spatial: bool = False,
    ) -> None:
        super().__init__(observation_space, features_dim)
        if depth < 0:
            raise SpecError(f"encoder 'grid' cannot have {depth} convolutions")
        channels, height, width_cells = spaces.picture_shape(observation_space)
        self.embedding = CellEmbedding(channels, width)
        convolutions = [nn.Conv2d(width, width, 3, padding=1) for _ in range(depth)]
        self.convolutions = nn.Sequential(*(layer for each in convolutions for layer in (each, nn.ReLU())))
        self.head = self.head_over((width, height, width_cells), spatial)

    def layer_groups(self) -> list[nn.Module]:
        """Returns the embedding, every convolution, and the last layer."""
        return [self.embedding, *nets.trainable(self.convolutions), self.head]

    def forward(self, obs: Tensor) -> Tensor:
        """(N, H, W, 3k) symbols -> (N, D)."""
        return self.head(self.convolutions(self.embedding(obs).permute(0, 3, 1, 2)).flatten(1))
