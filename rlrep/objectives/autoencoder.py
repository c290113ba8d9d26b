"""Autoencoders: features from which the observation can be drawn again."""

from __future__ import annotations

import math
from typing import cast

import torch
from gymnasium import spaces as gym_spaces
from gymnasium.spaces import Space
from torch import Tensor, nn
from torch.nn import functional as F

from rlrep import distributed, losses, nets, spaces
from rlrep.encoders import Encoder
from rlrep.objectives.base import Objective, objectives
from rlrep.types import Batch, Metrics, Tree, tree_map

SYMBOLS = 32
"""Classes of one symbol of a board; MiniGrid uses 11. Larger values count as the last class."""

BITS = 4
"""Of each colour channel, when counting how rare a colour is."""


class Rarity(nn.Module):
    """Weighs content by how rarely it is seen, so that a key of twenty pixels counts beside a floor of a thousand.

    A weight is frequency^-power, scaled so that the weights of all content seen average 1. Frequencies are counted over
    training batches.

    Args:
        n_codes: Content comes as integers below this.
        power: 0 weighs everything alike; 1 gives every code an equal share of the loss.
    """

    counts: Tensor

    def __init__(self, n_codes: int, power: float) -> None:
        super().__init__()
        self.power = power
        # A sliver of each: before anything is counted, all weigh alike.
        self.register_buffer("counts", torch.full((n_codes,), 1e-6))

    def forward(self, codes: Tensor) -> Tensor:
        """Integer codes of any shape -> weights of that shape."""
        if self.training:
            self.counts += distributed.total(losses.count(codes, len(self.counts)))
        # A code never seen weighs as much as one seen once, and does not enter the average.
        weight = self.counts.clamp(min=1).pow(-self.power)
        return (weight * self.counts.sum() / (self.counts * weight).sum())[codes]


class Reconstruction(nn.Module):
    """Draws one observation from features, and says how far off the drawing is.

    Pictures are compared by squared error of pixels in [0, 1], boards and words by cross-entropy of symbols, vectors by
    squared error of what `rlrep.spaces.Flatten` makes of them. A dict is the sum over its keys.

    Args:
        space: The observation space, or one leaf of it.
        features_dim: D.
        rarity: Power of the rarity weights on pictures and boards; 0 for none.
        width: Channels of the decoder.
    """

    def __init__(self, space: Space, features_dim: int, rarity: float, width: int = 32) -> None:
        super().__init__()
        self.space, self.kind = space, spaces.kind(space)
        self.decode: nn.Module
        match self.kind:
            case "dict":
                subspaces = cast(gym_spaces.Dict, space).spaces
                self.keys = list(subspaces)
                # A list, since a ModuleDict refuses keys such as "keys" or "arm.angle".
                self.parts = nn.ModuleList(Reconstruction(s, features_dim, rarity, width) for s in subspaces.values())
            case "picture":
                shape = spaces.picture_shape(space)
                self.channels = 3 if shape[0] % 3 == 0 else 1
                self.channels_last = spaces.channels_last(cast(gym_spaces.Box, space))
                self.decode = nets.PictureDecoder(features_dim, shape, width)
                self.rarity = Rarity(2 ** (BITS * self.channels), rarity)
            case "grid":
                self.shape = spaces.picture_shape(space)
                cells = self.shape[1] * self.shape[2]
                self.decode = nn.Sequential(
                    nn.Linear(features_dim, cells * width),
                    nn.ReLU(),
                    nn.Unflatten(1, (cells, width)),
                    nn.Linear(width, self.shape[0] * SYMBOLS),
                )
                self.rarity = Rarity(SYMBOLS**2, rarity)
            case "tokens":
                self.n_words = spaces.vocabulary_size(space)
                self.decode = nn.Linear(features_dim, cast(tuple[int, ...], space.shape)[0] * self.n_words)
            case "vector":
                self.flatten = spaces.Flatten(space)
                self.decode = nets.mlp([features_dim, 256, spaces.flat_dim(space)])

    def forward(self, features: Tensor, obs: Tree, where: Tree | None = None) -> Tensor:
        """Compares drawings with what they should show.

        Args:
            features: (N, D).
            obs: Raw (N, *obs_shape).
            where: What counts of each observation, all of it unless given: bool, (N, H, W) of a picture, (N, H * W) of
                a board, (N, L) of words, (N, flat_dim) of a vector, or a dict of these.

        Returns:
            (N,) mean error of each observation.
        """
        match self.kind:
            case "dict":
                masks = where if where is not None else dict.fromkeys(self.keys)
                parts = zip(self.keys, self.parts, strict=True)
                return torch.stack([part(features, obs[key], masks[key]) for key, part in parts]).sum(dim=0)
            case "picture":
                error = self._picture(features, obs)
            case "grid":
                error = self._board(features, obs)
            case "tokens":
                logits = self.decode(features).reshape(-1, self.n_words)
                error = F.cross_entropy(logits, obs.long().flatten(), reduction="none").reshape(obs.shape)
            case _:
                error = (self.decode(features) - self.flatten(obs)).square()
        if where is None:
            return error.flatten(1).mean(dim=1)
        return (error * where).flatten(1).sum(dim=1) / where.flatten(1).sum(dim=1).clamp(min=1)

    @torch.no_grad()
    def draw(self, features: Tensor) -> Tree:
        """Returns the likeliest raw observations (N, *obs_shape) for features (N, D), in the dtype of the space."""
        match self.kind:
            case "dict":
                parts = cast(list[Reconstruction], list(self.parts))
                return {key: part.draw(features) for key, part in zip(self.keys, parts, strict=True)}
            case "picture":
                x = (255 * self.decode(features)).round().clamp(0, 255).to(torch.uint8)
                return x.permute(0, 2, 3, 1) if self.channels_last else x
            case "grid":
                channels, height, width = self.shape
                symbols = self.decode(features).unflatten(2, (channels, SYMBOLS)).argmax(dim=-1)
                return symbols.to(torch.uint8).unflatten(1, (height, width))
            case "tokens":
                words = self.decode(features).unflatten(1, (-1, self.n_words)).argmax(dim=-1)
                return words.to(torch.from_numpy(spaces.zeros(self.space, ())).dtype)
            case _:
                return self.flatten.inverse(self.decode(features))

    def _picture(self, features: Tensor, obs: Tensor) -> Tensor:
        """(N, H, W) error of each pixel."""
        x = obs.permute(0, 3, 1, 2) if self.channels_last else obs
        error = (self.decode(features).float() - x / 255).square()
        # Each frame of a stack is weighed by itself.
        weight = self.rarity(picture_codes(x, self.channels))
        return (error.unflatten(1, (-1, self.channels)).mean(dim=2) * weight).mean(dim=1)

    def _board(self, features: Tensor, obs: Tensor) -> Tensor:
        """(N, cells) error of each cell."""
        channels = self.shape[0]
        symbols = obs.long().clamp(max=SYMBOLS - 1).flatten(1, 2)
        logits = self.decode(features).unflatten(2, (channels, SYMBOLS))
        error = F.cross_entropy(logits.flatten(0, 2), symbols.flatten(), reduction="none").reshape(symbols.shape)
        frames = error.reshape(*symbols.shape[:2], -1, spaces.SYMBOLS)
        return (frames.mean(dim=-1) * self.rarity(board_codes(obs))).mean(dim=2)


def picture_codes(x: Tensor, channels: int) -> Tensor:
    """(N, C, H, W) pixels in 0..255 -> (N, frames, H, W) integers below 2^(BITS * channels), for colours or greys."""
    frames = x.to(torch.uint8).unflatten(1, (-1, channels))
    code = torch.zeros_like(frames[:, :, 0], dtype=torch.int32)
    for channel in range(channels):
        code = (code << BITS) + (frames[:, :, channel] >> (8 - BITS))
    return code


def board_codes(obs: Tensor) -> Tensor:
    """(N, H, W, C) symbols -> (N, cells, frames) integers below SYMBOLS^2, for what a cell holds.

    That is its object and colour; its state may change every step.
    """
    symbols = obs.long().clamp(max=SYMBOLS - 1).flatten(1, 2).unflatten(2, (-1, spaces.SYMBOLS))
    return symbols[..., 0] + SYMBOLS * symbols[..., 1]


def check_rarity(name: str, rarity: float) -> None:
    """Raises unless `rarity` is a power between 0 and 1."""
    if not 0 <= rarity <= 1:
        raise ValueError(f"{name}: rarity must lie between 0 and 1, not {rarity}")


@objectives.register("ae")
class Autoencoder(Objective):
    """Reconstructs the observation from its features, rare content weighing more.

    Plain squared error is won by drawing walls and floor; the key is a few pixels. Weighing by rarity made frozen
    features solve DoorKey from pictures where the plain error did not.

    Args:
        encoder: The encoder to shape.
        action_space: Not used by the loss.
        rarity: Power of the weights: frequency^-rarity of a pixel's colour, or a cell's symbol; 0 for the plain error.
        width: Channels of the decoder.
    """

    paper = "Hinton & Salakhutdinov 2006, doi:10.1126/science.1127647"

    def __init__(self, encoder: Encoder, action_space: Space, rarity: float = 0.5, width: int = 32) -> None:
        super().__init__(encoder, action_space)
        check_rarity("ae", rarity)
        self.reconstruct = Reconstruction(encoder.observation_space, encoder.features_dim, rarity, width)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the mean error over the first observation of every segment."""
        obs = tree_map(lambda x: x[:, 0], batch.obs)
        return self.reconstruct(self.features(batch, 1)[:, 0], obs).mean(), {}


@objectives.register("vae")
class VAE(Objective):
    """Reconstructs the observation from a noisy code of its features that carries few nats.

    The code's mean and variance are linear in the features; what goes on to a policy is the features.

    Args:
        encoder: The encoder to shape.
        action_space: Not used by the loss.
        beta: Weight of the divergence from a standard normal code, in nats for each number of the observation; with 1
            and no rarity the loss bounds the likelihood of pixels with a variance of one half.
        latent_dim: Width of the code.
        rarity: As of `ae`.
        width: Channels of the decoder.
    """

    paper = "Kingma & Welling 2014, arXiv:1312.6114"

    def __init__(
        self,
        encoder: Encoder,
        action_space: Space,
        beta: float = 1.0,
        latent_dim: int = 64,
        rarity: float = 0.5,
        width: int = 32,
    ) -> None:
        super().__init__(encoder, action_space)
        check_rarity("vae", rarity)
        if beta < 0 or latent_dim < 1:
            raise ValueError(f"vae: beta must not be negative, and latent_dim at least 1, not {beta} and {latent_dim}")
        self.beta = beta
        self.n_numbers = sum(math.prod(leaf.shape or ()) for leaf in spaces.leaves(encoder.observation_space).values())
        self.code = nn.Linear(encoder.features_dim, 2 * latent_dim)
        self.reconstruct = Reconstruction(encoder.observation_space, latent_dim, rarity, width)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the mean error of drawing the first observations, plus the weighted divergence."""
        obs = tree_map(lambda x: x[:, 0], batch.obs)
        mean, log_variance = self.code(self.features(batch, 1)[:, 0]).float().chunk(2, dim=-1)
        # Without noise in evaluation: the held-out loss should not jump.
        code = mean
        if self.training:
            noise = distributed.rows(lambda n: torch.randn(n, mean.shape[1], device=mean.device), len(mean))
            code = mean + (0.5 * log_variance).exp() * noise
        error = self.reconstruct(code, obs).mean()
        divergence = losses.gaussian_kl(mean, log_variance).mean()
        loss = error + self.beta * divergence / self.n_numbers
        return loss, {"error": error.detach(), "nats": divergence.detach()}
