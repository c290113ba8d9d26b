"""Convolutional encoders for pictures."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn

from rlrep import nets, spaces
from rlrep.encoders.base import SMALLEST_PICTURE, Encoder, encoders
from rlrep.types import SpaceError


@encoders.register("nature")
class Nature(Encoder):
    """The three convolutions of DQN, then a linear layer.

    Args:
        observation_space: uint8 pictures of at least 36x36, channels first or last, frame stacks included.
        features_dim: D.
        width: Channels of the first convolution; the others have twice as many.
    """

    paper = "Mnih et al. 2015, doi:10.1038/nature14236"
    kinds = ("picture",)

    def __init__(self, observation_space: Space, features_dim: int = 256, width: int = 32) -> None:
        super().__init__(observation_space, features_dim)
        channels, height, width_px = spaces.picture_shape(observation_space)
        if min(height, width_px) < SMALLEST_PICTURE:
            raise SpaceError(
                f"encoder 'nature' needs pictures of at least {SMALLEST_PICTURE}x{SMALLEST_PICTURE}, "
                f"not {height}x{width_px}; use 'mlp'"
            )
        self._channels_last = spaces.channels_last(observation_space)  # type: ignore[arg-type]
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, width, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3),
            nn.ReLU(),
        )
        with torch.no_grad():
            n_flat = self.convolutions(torch.zeros(1, channels, height, width_px)).numel()
        self.head = nets.head(n_flat, features_dim)

    def forward(self, obs: Tensor) -> Tensor:
        """(N, H, W, C) or (N, C, H, W) pixels in 0..255 -> (N, D)."""
        # A permuted (N, H, W, C) already lies in memory as channels_last, the layout CPUs and GPUs convolve fastest.
        x = obs.permute(0, 3, 1, 2) if self._channels_last else obs
        return self.head(self.convolutions(x.float() / 255).flatten(1))
