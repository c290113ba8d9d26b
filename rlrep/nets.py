"""Small networks that several methods share."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Returns linear layers of the given sizes, first the input's, with ReLU between them and none at the end."""
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.ReLU()] * (i > 0) + [nn.Linear(n_in, n_out)]
    return nn.Sequential(*layers)


def head(n_in: int, features_dim: int) -> nn.Sequential:
    """Returns the last layer of every encoder: linear, then layer normalisation.

    The normalisation gives features the scale a policy's first layer is initialised for, and an objective cannot shrink
    them to nothing.
    """
    return nn.Sequential(nn.Linear(n_in, features_dim), nn.LayerNorm(features_dim))


class PictureDecoder(nn.Module):
    """(N, D) features -> (N, C, H, W): a coarse map an eighth of the size, each of whose points draws 8x8 pixels.

    All convolutions run on the coarse map: transposed ones at full resolution cost ten times the encoder.
    """

    STRIDE = 8

    def __init__(self, features_dim: int, shape: tuple[int, int, int], width: int = 32) -> None:
        super().__init__()
        self.shape = shape
        channels, height, width_px = shape
        rows, columns = -(-height // self.STRIDE), -(-width_px // self.STRIDE)
        self.layers = nn.Sequential(
            nn.Linear(features_dim, width * rows * columns),
            nn.ReLU(),
            nn.Unflatten(1, (width, rows, columns)),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, channels * self.STRIDE**2, 1),
            nn.PixelShuffle(self.STRIDE),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Returns the picture, cropped to its height and width."""
        return self.layers(features)[:, :, : self.shape[1], : self.shape[2]]


def ema_copy(module: M) -> M:
    """Returns a copy without gradient, to be moved by `ema_update` only."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """Moves every parameter of `target` a fraction `tau` of the way to `online`; buffers are copied."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)
    for mine, other in zip(target.buffers(), online.buffers(), strict=True):
        mine.copy_(other)
