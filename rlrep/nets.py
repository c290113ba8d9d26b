"""Small networks that several methods share."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


def trainable(layers: nn.Sequential) -> list[nn.Module]:
    """Returns the layers that have parameters."""
    return [layer for layer in layers if any(True for _ in layer.parameters())]


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


class Transformer(nn.Module):
    """Transformer blocks that normalise first, as in arXiv:2002.04745: (B, n, width) tokens -> the same."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.normalise = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, sees: Tensor | None = None) -> Tensor:
        """Args: tokens, and `sees`, bool (B, n, n) or what broadcasts to it: which (second) each token (first) sees."""
        for block in self.blocks:
            tokens = block(tokens, sees)
        return self.normalise(tokens)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.to_qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor, sees: Tensor | None) -> Tensor:
        q, k, v = self.to_qkv(self.norms[0](tokens)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if sees is None else sees[:, None]
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        tokens = tokens + self.out(found.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norms[1](tokens))


class SpatialHead(nn.Module):
    """The last layer of an encoder that keeps the places: linear at each, then layer normalisation over all.

    Args:
        shape: (C, H, W) of what comes in.
        channels: c, features of each place.
    """

    def __init__(self, shape: tuple[int, int, int], channels: int) -> None:
        super().__init__()
        self.shape = shape
        self.mix = nn.Conv2d(shape[0], channels, 1)
        self.normalise = nn.LayerNorm(shape[1] * shape[2] * channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C * H * W) -> (N, H * W * c), place by place."""
        return self.normalise(self.mix(x.unflatten(1, self.shape)).permute(0, 2, 3, 1).flatten(1))


def ema_copy(module: M) -> M:
    """Returns a copy without gradient, to be moved by `ema_update` only."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """Moves every parameter of `target` a fraction `tau` of the way to `online`; buffers are copied."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)
    for mine, other in zip(target.buffers(), online.buffers(), strict=True):
        mine.copy_(other)
