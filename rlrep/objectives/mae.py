"""Masked autoencoding: the hidden part of an observation, from features of the rest."""

from __future__ import annotations

from typing import cast

import torch
from gymnasium import spaces as gym_spaces
from gymnasium.spaces import Space
from torch import Tensor, nn

from rlrep import distributed, spaces
from rlrep.augment import MASKED_PIXEL, MASKED_SYMBOL
from rlrep.encoders import Encoder
from rlrep.objectives.autoencoder import Reconstruction, check_rarity
from rlrep.objectives.base import Objective, objectives
from rlrep.types import Batch, Metrics, Tree, tree_map


class Masking(nn.Module):
    """Hides a random part of observations: patches of pictures, cells of boards, words, numbers of vectors.

    Patches turn grey, cells become a symbol that no board has, and words become padding. A vector has no value that
    means nothing, so its numbers are taken from another observation of the batch (SCARF, arXiv:2106.15147); which ones
    cannot be seen, so all of them are to be drawn.

    Args:
        space: The observation space.
        ratio: Chance of each patch, cell, word or number to be hidden.
        patch: Pixels, the size of a patch.
    """

    def __init__(self, space: Space, ratio: float, patch: int) -> None:
        super().__init__()
        self.kind, self.ratio, self.patch = spaces.kind(space), ratio, patch
        match self.kind:
            case "dict":
                subspaces = cast(gym_spaces.Dict, space).spaces
                self.keys = list(subspaces)
                self.parts = nn.ModuleList(Masking(sub, ratio, patch) for sub in subspaces.values())
            case "picture":
                _, self.height, self.width = spaces.picture_shape(space)
                self.channels_last = spaces.channels_last(cast(gym_spaces.Box, space))
            case "vector":
                self.flat_dim = spaces.flat_dim(space)

    def forward(self, obs: Tree) -> tuple[Tree, Tree]:
        """Raw (N, *obs_shape) -> the same with parts hidden, and where, as `Reconstruction` takes it."""
        match self.kind:
            case "dict":
                found = {key: part(obs[key]) for key, part in zip(self.keys, self.parts, strict=True)}
                return tuple({key: parts[i] for key, parts in found.items()} for i in range(2))  # type: ignore[return-value]
            case "picture":
                patches = self._drawn(obs, -(-self.height // self.patch), -(-self.width // self.patch))
                where = patches.repeat_interleave(self.patch, dim=1).repeat_interleave(self.patch, dim=2)
                where = where[:, : self.height, : self.width]
                return obs.masked_fill(where[..., None] if self.channels_last else where[:, None], MASKED_PIXEL), where
            case "grid":
                where = self._drawn(obs, *obs.shape[1:3])
                return obs.masked_fill(where[..., None], MASKED_SYMBOL), where.flatten(1)
            case "tokens":
                where = self._drawn(obs, obs.shape[1])
                return obs.masked_fill(where, 0), where
            case _:
                return self._swap(obs)

    def _drawn(self, obs: Tensor, *shape: int) -> Tensor:
        return distributed.rows(lambda n: torch.rand(n, *shape, device=obs.device), len(obs)) < self.ratio

    def _swap(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        numbers = obs.reshape(len(obs), -1)
        other = distributed.gather(numbers)[distributed.rows(lambda n: torch.randperm(n, device=obs.device), len(obs))]
        swapped = torch.where(self._drawn(obs, numbers.shape[1]), other, numbers).reshape(obs.shape)
        return swapped, torch.ones(len(obs), self.flat_dim, dtype=torch.bool, device=obs.device)


@objectives.register("mae")
class MAE(Objective):
    """Draws the hidden patches or cells of an observation from features of what is left of it.

    The encoder sees the hidden parts as hidden, so any encoder will do; a policy later shows it whole observations.

    Args:
        encoder: The encoder to shape.
        action_space: Not used by the loss.
        ratio: Chance of each patch, cell or word to be hidden.
        patch: Pixels, the size of a patch of a picture.
        rarity: As of `ae`.
        width: Channels of the decoder.
    """

    paper = "He et al. 2022, arXiv:2111.06377; masked input for any encoder: Xie et al. 2022, arXiv:2111.09886"

    def __init__(
        self,
        encoder: Encoder,
        action_space: Space,
        ratio: float = 0.5,
        patch: int = 8,
        rarity: float = 0.5,
        width: int = 32,
    ) -> None:
        super().__init__(encoder, action_space)
        check_rarity("mae", rarity)
        if not 0 < ratio < 1:
            raise ValueError(f"mae: ratio must lie between 0 and 1, not {ratio}")
        if patch < 1:
            raise ValueError(f"mae: patch must be at least 1, not {patch}")
        self.hide = Masking(encoder.observation_space, ratio, patch)
        self.reconstruct = Reconstruction(encoder.observation_space, encoder.features_dim, rarity, width)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the mean error over the hidden parts of the first observation of every segment."""
        obs = tree_map(lambda x: x[:, 0], batch.obs)
        left, where = self.hide(obs)
        return self.reconstruct(self.encoder(left), obs, where).mean(), {}
