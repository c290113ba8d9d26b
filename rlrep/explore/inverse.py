"""What bonuses share that look at features which an inverse dynamics model shapes: `e3b`, `apt`, `icm`, `ride`."""

from __future__ import annotations

from gymnasium.spaces import Space
from torch import Tensor

from rlrep import losses, nets, spaces
from rlrep.encoders import make_encoder
from rlrep.explore.base import Bonus
from rlrep.types import Batch, Metrics


class InverseBonus(Bonus):
    """A bonus whose encoder learns to tell which action led from one observation to the next (arXiv:1705.05363).

    The features keep what the agent has in its hands, and need not keep the rest.

    Args:
        observation_space: Any that has an encoder.
        action_space: Discrete actions are classified, continuous ones regressed.
        n_envs: How many environments are stepped together.
        encoder: Spec of the encoder.
        learning_rate: Of everything.
        hidden: Width of the hidden layer that looks at two features.
    """

    def __init__(
        self,
        observation_space: Space,
        action_space: Space,
        n_envs: int,
        encoder: str,
        learning_rate: float,
        hidden: int,
    ) -> None:
        super().__init__(observation_space, action_space, n_envs, make_encoder(encoder, observation_space))
        self.learning_rate = learning_rate
        self.action_loss = losses.ActionLoss(action_space)
        self.predict_action = nets.mlp([2 * self.encoder.features_dim, hidden, spaces.flat_dim(action_space)])

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns how badly the action is told, and how often it is told rightly."""
        return self.inverse_loss(batch, self.features(batch, 2))

    def inverse_loss(self, batch: Batch, features: Tensor) -> tuple[Tensor, Metrics]:
        """Returns the loss of the first step of each segment, 0-d, from its (B, 2, D) features, and metrics."""
        output = self.predict_action(features.flatten(1))
        action, mask = self.actions(batch)[:, 0], batch.mask[:, 0]
        loss = losses.masked_mean(self.action_loss(output, action), mask)
        correct = self.action_loss.correct(output, action)
        return loss, {} if correct is None else {"accuracy": losses.masked_mean(correct.float(), mask).detach()}
