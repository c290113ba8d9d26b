"""Convolutional encoders for pictures."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn

from rlrep import nets, spaces
from rlrep.encoders.base import SMALLEST_PICTURE, Encoder, encoders
from rlrep.registry import SpecError
from rlrep.types import SpaceError


class Convolutional(Encoder):
    """What the encoders here share: pixels of either layout, scaled to 0..1, into convolutions, into the last layer.

    Args:
        observation_space: uint8 pictures, channels first or last, frame stacks included.
        features_dim: D.
    """

    kinds = ("picture",)

    convolutions: nn.Sequential
    head: nn.Module

    def __init__(self, observation_space: Space, features_dim: int) -> None:
        super().__init__(observation_space, features_dim)
        self._channels_last = spaces.channels_last(observation_space)  # type: ignore[arg-type]

    def layer_groups(self) -> list[nn.Module]:
        """Returns every convolution or residual block, and the last layer."""
        return [*nets.trainable(self.convolutions), self.head]

    def finish(self, convolutions: nn.Sequential, spatial: bool) -> None:
        """Sets the convolutions, and a head that suits the map they make."""
        self.convolutions = convolutions
        with torch.no_grad():
            made = convolutions(torch.zeros(1, *spaces.picture_shape(self.observation_space)))
        _, channels, height, width = made.shape
        self.head = self.head_over((channels, height, width), spatial)

    def forward(self, obs: Tensor) -> Tensor:
        """(N, H, W, C) or (N, C, H, W) pixels in 0..255 -> (N, D)."""
        # A permuted (N, H, W, C) already lies in memory as channels_last, the layout CPUs and GPUs convolve fastest.
        x = obs.permute(0, 3, 1, 2) if self._channels_last else obs
        return self.head(self.convolutions(x.float() / 255).flatten(1))


@encoders.register("nature")
class Nature(Convolutional):
    """The three convolutions of DQN, then a linear layer.

    Args:
        observation_space: uint8 pictures of at least 36x36, channels first or last, frame stacks included.
        features_dim: D.
        width: Channels of the first convolution; the others have twice as many.
        depth: Convolutions; those after the third are 3x3 and keep the size.
        spatial: Keep the places: one linear layer for each point of the map, instead of one over all of it.
    """

    paper = "Mnih et al. 2015, doi:10.1038/nature14236"

    def __init__(
        self,
        observation_space: Space,
        features_dim: int = 256,
        width: int = 32,
        depth: int = 3,
        spatial: bool = False,
    ) -> None:
        super().__init__(observation_space, features_dim)
        channels, height, width_px = spaces.picture_shape(observation_space)
        if min(height, width_px) < SMALLEST_PICTURE:
            raise SpaceError(
                f"encoder 'nature' needs pictures of at least {SMALLEST_PICTURE}x{SMALLEST_PICTURE}, "
                f"not {height}x{width_px}; use 'impala', 'vit' or 'mlp'"
            )
        if depth < 3:
            raise SpecError(f"encoder 'nature' has at least 3 convolutions, not {depth}")
        more = [nn.Conv2d(2 * width, 2 * width, 3, padding=1) for _ in range(3, depth)]
        convolutions = [
            nn.Conv2d(channels, width, 8, stride=4),
            nn.Conv2d(width, 2 * width, 4, stride=2),
            nn.Conv2d(2 * width, 2 * width, 3),
            *more,
        ]
        self.finish(nn.Sequential(*(layer for each in convolutions for layer in (each, nn.ReLU()))), spatial)


class Residual(nn.Module):
    """Two 3x3 convolutions whose result is added to what came in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        return x + self.layers(x)


@encoders.register("impala")
class Impala(Convolutional):
    """Three stages of a convolution, pooling by 2 and residual blocks, then a linear layer.

    Args:
        observation_space: uint8 pictures, channels first or last, frame stacks included.
        features_dim: D.
        width: Channels of the first stage; the others have twice as many.
        depth: Residual blocks of each stage.
        spatial: Keep the places: one linear layer for each point of the map, instead of one over all of it.
    """

    paper = "Espeholt et al. 2018, arXiv:1802.01561"

    def __init__(
        self,
        observation_space: Space,
        features_dim: int = 256,
        width: int = 16,
        depth: int = 2,
        spatial: bool = False,
    ) -> None:
        super().__init__(observation_space, features_dim)
        if depth < 0:
            raise SpecError(f"encoder 'impala' cannot have {depth} residual blocks in a stage")
        layers: list[nn.Module] = []
        n_in = spaces.picture_shape(observation_space)[0]
        for n_out in (width, 2 * width, 2 * width):
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1)]
            layers += [Residual(n_out) for _ in range(depth)]
            n_in = n_out
        self.finish(nn.Sequential(*layers, nn.ReLU()), spatial)
