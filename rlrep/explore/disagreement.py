"""Disagreement: where several models of the world foresee different things."""

from __future__ import annotations

import torch
from gymnasium.spaces import Box, Space
from torch import Tensor, nn

from rlrep import losses, nets, spaces
from rlrep.encoders import make_encoder
from rlrep.explore.base import Bonus, ObservationNormaliser, explorers
from rlrep.types import Batch, Metrics, SpaceError, Transition, tree_map


@explorers.register("disagreement")
class Disagreement(Bonus):
    """Variance of what an ensemble foresees of the next features, those of a random encoder.

    Noise does not draw it for good: all members come to foresee its mean. Each member has its own beginning, and learns
    from a half of every batch that is drawn for it. On the features of a world model, with `encoder=none`, it is the
    disagreement about latent dynamics of Plan2Explore (arXiv:2005.05960), paid for real steps, not for dreamt ones.

    Args:
        observation_space: Any that has an encoder; pictures and vectors are normalised by running statistics.
        action_space: Any that flattens to numbers.
        n_envs: How many environments are stepped together.
        encoder: Spec of the random encoder; none if what is observed are features already: numbers to be foreseen.
        learning_rate: Of the ensemble.
        members: How many models; 5 is the paper's.
        hidden: Width of their hidden layers.
    """

    paper = "Pathak et al. 2019, arXiv:1906.04161"
    warmup = 128

    def __init__(
        self,
        observation_space: Space,
        action_space: Space,
        n_envs: int,
        encoder: str | None = "auto:features_dim=128",
        learning_rate: float = 1e-3,
        members: int = 5,
        hidden: int = 256,
    ) -> None:
        super().__init__(observation_space, action_space, n_envs)
        if members < 2:
            raise ValueError(f"disagreement: it takes at least 2 members to disagree, not {members}")
        self.learning_rate = learning_rate
        self.normalise = ObservationNormaliser(observation_space)
        self.flatten = spaces.Flatten(action_space)
        self.embed: nn.Module
        if encoder is None:
            if not isinstance(self.normalise.space, Box) or spaces.kind(self.normalise.space) != "vector":
                raise SpaceError(
                    f"disagreement: encoder=none is for vectors, and what is observed is {observation_space}"
                )
            self.embed, d = nn.Flatten(), spaces.flat_dim(self.normalise.space)
        else:
            self.embed = embed = make_encoder(encoder, self.normalise.space).requires_grad_(False)
            d = embed.features_dim
        sizes = [d + spaces.flat_dim(action_space), hidden, d]
        self.members = nn.ModuleList(nets.mlp(sizes) for _ in range(members))

    def watch(self, step: Transition) -> None:
        """Takes the observations into the running statistics."""
        self.normalise.watch(step.next_obs)

    @torch.no_grad()
    def reward(self, step: Transition) -> Tensor:
        """Returns the variance over members, averaged over features, (N,)."""
        return self._foreseen(self.embed(self.normalise(step.obs)), step.action).var(dim=0).mean(dim=1)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the mean squared error of the members, each on its half of the batch."""
        with torch.no_grad():
            now, then = (self.embed(self.normalise(tree_map(lambda x, t=t: x[:, t], batch.obs))) for t in (0, 1))
        error = (self._foreseen(now, self.actions(batch)[:, 0]) - then).square().mean(dim=2)
        mine = torch.rand(error.shape, device=error.device) < 0.5
        return losses.masked_mean(error, mine & batch.mask[:, 0]), {}

    def _foreseen(self, features: Tensor, action: Tensor) -> Tensor:
        """(N, D) features and (N, ...) actions -> (K, N, D) next features, of each member."""
        given = torch.cat([features, self.flatten(action)], dim=1)
        return torch.stack([member(given) for member in self.members])
