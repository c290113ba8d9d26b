"""An encoder for dict observations: one encoder a key, joined."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, cast

import torch
from gymnasium import spaces as gym_spaces
from gymnasium.spaces import Space
from torch import Tensor, nn

from rlrep import nets
from rlrep.encoders.base import Encoder, encoders, make_encoder
from rlrep.registry import SpecError, nearest
from rlrep.types import Tree


@encoders.register("dict")
class Dict(Encoder):
    """Encodes every key with its own encoder, joins the features and mixes them by a linear layer.

    Args:
        observation_space: A Dict, nested ones included.
        features_dim: D.
        keys: An encoder spec for some keys, `{"image": "nature:width=16"}`; `auto` for the others.
    """

    kinds = ("dict",)

    def __init__(
        self, observation_space: Space, features_dim: int = 256, keys: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(observation_space, features_dim)
        subspaces = cast(gym_spaces.Dict, observation_space).spaces
        for key in keys or {}:
            if key not in subspaces:
                raise SpecError(
                    f"the observation has no key {key!r}.{nearest(key, subspaces)} Its keys: {', '.join(subspaces)}"
                )
        specs: dict[str, Any] = dict(keys or {})
        self.keys = list(subspaces)
        # A list, since a ModuleDict refuses keys such as "keys" or "arm.angle".
        self.parts = nn.ModuleList(make_encoder(specs.get(key, "auto"), sub) for key, sub in subspaces.items())
        self.head = nets.head(sum(cast(Encoder, part).features_dim for part in self.parts), features_dim)

    def layer_groups(self) -> list[nn.Module]:
        """Returns the first layers of all keys together, then the second ones and so on, and the layer that mixes."""
        parts = [cast(Encoder, part).layer_groups() for part in self.parts]
        levels = itertools.zip_longest(*parts)
        return [*(nn.ModuleList(group for group in level if group is not None) for level in levels), self.head]

    def forward(self, obs: Tree) -> Tensor:
        """A dict of (N, *shape) -> (N, D)."""
        return self.head(
            torch.cat([part(obs[key]) for key, part in zip(self.keys, self.parts, strict=True)], dim=1).relu()
        )
