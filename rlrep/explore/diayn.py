"""Skills that can be told apart by where they lead."""

from __future__ import annotations

import math

import torch
from gymnasium.spaces import Dict, Discrete, Space
from torch import Tensor, nn

from rlrep import losses
from rlrep.encoders import make_encoder
from rlrep.explore.base import Bonus, explorers
from rlrep.types import Batch, Metrics, Transition, Tree, tree_map

SKILL = "skill"


@explorers.register("diayn")
class DIAYN(Bonus):
    """How surely the next observation tells which skill the policy was given: log q(skill | next) - log p(skill).

    One of several skills is drawn at the start of each episode and shown to the policy beside the observation. It pays
    for being told apart, not for what is new, and has done little for MiniGrid.

    Args:
        observation_space: Any that has an encoder.
        action_space: Not used.
        n_envs: How many environments are stepped together.
        encoder: Spec of the encoder that looks at the next observation.
        learning_rate: The paper's.
        skills: How many; 16 is URLB's (arXiv:2110.15191), the paper's 50 are for longer training.
    """

    paper = "Eysenbach et al. 2019, arXiv:1802.06070"

    def __init__(
        self,
        observation_space: Space,
        action_space: Space,
        n_envs: int,
        encoder: str = "auto:features_dim=128",
        learning_rate: float = 3e-4,
        skills: int = 16,
    ) -> None:
        super().__init__(observation_space, action_space, n_envs, make_encoder(encoder, observation_space))
        if skills < 2:
            raise ValueError(f"diayn: it takes at least 2 skills to tell them apart, not {skills}")
        self.learning_rate, self.skills = learning_rate, skills
        self.context = {SKILL: Discrete(skills)}
        self.tell = nn.Linear(self.encoder.features_dim, skills)

    @torch.no_grad()
    def reward(self, step: Transition) -> Tensor:
        """Returns log q(skill | next observation) + log(number of skills), (N,)."""
        return math.log(self.skills) - _loss(self._logits(step.next_obs), step.next_obs)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the cross-entropy of telling the skill, and how often it is told rightly."""
        obs = tree_map(lambda x: x[:, 1], batch.obs)
        logits, mask = self._logits(obs), batch.mask[:, 0]
        correct = logits.argmax(dim=1) == obs[SKILL]
        return losses.masked_mean(_loss(logits, obs), mask), {"accuracy": losses.masked_mean(correct.float(), mask)}

    def _logits(self, obs: Tree) -> Tensor:
        if isinstance(self.observation_space, Dict):
            obs = {"obs": {key: obs[key] for key in self.observation_space.spaces}}
        return self.tell(self.encoder(obs["obs"]).relu())


def _loss(logits: Tensor, obs: Tree) -> Tensor:
    # Past the end of an episode the last observation is repeated, and its skill with it.
    return nn.functional.cross_entropy(logits, obs[SKILL].long(), reduction="none")
