"""Active pre-training: state entropy, in features that are learnt."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rlrep.explore.base import Memory, explorers
from rlrep.explore.inverse import InverseBonus
from rlrep.explore.re3 import neighbours
from rlrep.types import Transition, Tree


@explorers.register("apt")
class APT(InverseBonus):
    """log(1 + mean distance) to the k nearest of what was seen before, in features learnt along.

    The features are those of an inverse dynamics model, as in URLB (arXiv:2110.15191), behind layer normalisation and
    tanh; the paper's own are contrastive.

    Args:
        observation_space: Any that has an encoder.
        action_space: Discrete actions are classified, continuous ones regressed.
        n_envs: How many environments are stepped together.
        encoder: Spec of the encoder.
        learning_rate: Of the encoder.
        k: How many neighbours; 12 is URLB's.
        memory: Observations to compare with: a uniform sample of all that were seen, as large as URLB's batches. They
            are encoded anew whenever the encoder has learnt.
        hidden: Width of the hidden layer of the inverse dynamics model.
    """

    paper = "Liu & Abbeel 2021, arXiv:2103.04551"

    def __init__(
        self,
        observation_space: Space,
        action_space: Space,
        n_envs: int,
        encoder: str = "auto:features_dim=64",
        learning_rate: float = 1e-3,
        k: int = 12,
        memory: int = 1024,
        hidden: int = 256,
    ) -> None:
        super().__init__(observation_space, action_space, n_envs, encoder, learning_rate, hidden)
        if not 1 <= k < memory:
            raise ValueError(f"apt: k must be at least 1 and below memory, and they are {k} and {memory}")
        self.k = k
        self.memory = Memory(observation_space, memory)
        self._place = torch.full((n_envs,), -1)
        self._features: Tensor | None = None

    @torch.no_grad()
    def watch(self, step: Transition) -> None:
        """Takes the next observations into the memory."""
        self._place = self.memory.add(step.next_obs)
        if self._features is not None:
            # One row more for each place that was filled first now.
            kept = self._place >= 0
            missing = len(self.memory) - len(self._features)
            self._features = torch.cat([self._features, self._features.new_zeros(missing, self._features.shape[1])])
            self._features[self._place[kept]] = self._embed(step.next_obs)[kept]

    @torch.no_grad()
    def reward(self, step: Transition) -> Tensor:
        """Returns log(1 + mean distance to the k nearest), (N,); 0 while there is none."""
        if self._features is None:
            self._features = self._embed(self.memory.rows())
        distance = neighbours(self._embed(step.next_obs), self._features, self._place, self.k)
        if distance.shape[1] == 0:
            return torch.zeros(len(distance), device=distance.device)
        return torch.log1p(distance.mean(dim=1))

    def after_step(self) -> None:
        """Notes that what was encoded before is out of date."""
        self._features = None

    def _embed(self, obs: Tree) -> Tensor:
        return self.encoder(obs).tanh()
