"""A small vision transformer, for pictures by patches and for boards by cells."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn
from torch.nn import functional as F

from rlrep import nets, spaces
from rlrep.encoders.base import Encoder, encoders
from rlrep.encoders.grid import CellEmbedding
from rlrep.registry import SpecError


@encoders.register("vit")
class ViT(Encoder):
    """A token for each patch of a picture or cell of a board, transformer blocks, then a linear layer over all.

    Args:
        observation_space: uint8 pictures, channels first or last, or (H, W, 3k) boards; frame stacks included.
        features_dim: D.
        width: Of the tokens.
        depth: Transformer blocks.
        heads: Of their attention.
        patch: Pixels, the size of a patch; a picture that does not divide is padded. Of a board, every cell is one.
        spatial: Keep the places: one linear layer for each token, instead of one over all of them.
    """

    paper = "Dosovitskiy et al. 2021, arXiv:2010.11929"
    kinds = ("picture", "grid")

    def __init__(
        self,
        observation_space: Space,
        features_dim: int = 256,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        patch: int = 8,
        spatial: bool = False,
    ) -> None:
        super().__init__(observation_space, features_dim)
        if min(depth, heads, patch) < 1 or width % heads:
            raise SpecError(
                f"encoder 'vit' needs depth, heads and patch of at least 1 and a width that is a multiple of heads, "
                f"not {depth}, {heads}, {patch} and {width}"
            )
        channels, height, width_px = spaces.picture_shape(observation_space)
        self._board = spaces.kind(observation_space) == "grid"
        if self._board:
            rows, columns = height, width_px
            self.embed: nn.Module = CellEmbedding(channels, width)
        else:
            rows, columns = -(-height // patch), -(-width_px // patch)
            self.embed = nn.Conv2d(channels, width, patch, stride=patch)
            self._channels_last = spaces.channels_last(observation_space)  # type: ignore[arg-type]
            self._missing = (0, columns * patch - width_px, 0, rows * patch - height)
        self.position = nn.Parameter(0.02 * torch.randn(rows * columns, width))
        self.transformer = nets.Transformer(depth, width, heads)
        self.head = self.head_over((width, rows, columns), spatial)

    def layer_groups(self) -> list[nn.Module]:
        """Returns the embeddings of patches and places, every block, and what stands over the blocks."""
        bottom = nn.ModuleList([self.embed, nn.ParameterList([self.position])])
        return [bottom, *self.transformer.blocks, nn.ModuleList([self.transformer.normalise, self.head])]

    def forward(self, obs: Tensor) -> Tensor:
        """(N, H, W, C) or (N, C, H, W) pixels in 0..255, or (N, H, W, 3k) symbols -> (N, D)."""
        if self._board:
            tokens = self.embed(obs).flatten(1, 2)
        else:
            x = obs.permute(0, 3, 1, 2) if self._channels_last else obs
            tokens = self.embed(F.pad(x.float() / 255, self._missing)).flatten(2).transpose(1, 2)
        tokens = self.transformer(tokens + self.position)
        return self.head(tokens.transpose(1, 2).flatten(1))
