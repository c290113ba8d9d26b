"""A multi-layer perceptron for vectors."""

from __future__ import annotations

from collections.abc import Sequence

from gymnasium.spaces import Space
from torch import Tensor, nn

from rlrep import nets, spaces
from rlrep.encoders.base import Encoder, encoders


@encoders.register("mlp")
class MLP(Encoder):
    """Flattened observation -> linear layers with ReLU -> features.

    Args:
        observation_space: A vector, integers (one-hot inside), or a small board or picture taken as numbers.
        features_dim: D.
        hidden: Widths of the hidden layers.
    """

    kinds = ("vector", "grid", "tokens", "picture")

    def __init__(self, observation_space: Space, features_dim: int = 128, hidden: Sequence[int] = (256,)) -> None:
        super().__init__(observation_space, features_dim)
        self.flatten = spaces.Flatten(observation_space)
        self.layers = nets.mlp([spaces.flat_dim(observation_space), *hidden])
        self.head = nets.head(hidden[-1] if hidden else spaces.flat_dim(observation_space), features_dim)

    def layer_groups(self) -> list[nn.Module]:
        """Returns every linear layer."""
        return [*nets.trainable(self.layers), self.head]

    def forward(self, obs: Tensor) -> Tensor:
        """(N, *shape) -> (N, D)."""
        return self.head(self.layers(self.flatten(obs)).relu())
