"""Change-based exploration: what is rarely seen, and what rarely changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Space
from torch import Tensor

from rlrep.explore.base import Bonus, Counts, explorers, hash_tensors
from rlrep.spaces import hash_rows
from rlrep.types import Transition, tree_map


@explorers.register("cbet")
class CBET(Bonus):
    """1 / (visits of the next observation + how often something changed in just this way).

    A change is the difference of the two observations, number by number. The paper takes it between panoramas, the four
    views in all directions, which turning does not change; an environment gives one view a step, so here turning and
    walking are changes too, the more alike the less there is to see. With views of the whole board (`grid_full`) a
    change is what the paper means. Counts begin anew at random times, so that the bonus never dries up.

    Args:
        observation_space: Any; observations are told apart by exact bytes.
        action_space: Not used.
        n_envs: How many environments are stepped together.
        reset_probability: That counts begin anew, each step of an environment, visits and changes independently.
    """

    paper = "Parisi et al. 2021, arXiv:2111.09119"
    scores_features = False

    def __init__(
        self, observation_space: Space, action_space: Space, n_envs: int, reset_probability: float = 0.001
    ) -> None:
        super().__init__(observation_space, action_space, n_envs)
        if not 0 <= reset_probability < 1:
            raise ValueError(f"cbet: reset_probability is a probability below 1, not {reset_probability}")
        self.reset_probability = 1 - (1 - reset_probability) ** n_envs
        self._visits, self._changes = Counts(), Counts()

    def watch(self, step: Transition) -> None:
        """Counts the next observations and the changes, those that episodes begin with too; now and then, anew."""
        for counts in (self._visits, self._changes):
            if torch.rand(()) < self.reset_probability:
                counts.clear()
        if step.first.any():
            self._visits.add(hash_tensors(tree_map(lambda x: x[step.first], step.obs)))
        self._visits.add(hash_tensors(step.next_obs))
        self._changes.add(_changes(step))

    def reward(self, step: Transition) -> Tensor:
        """Returns (N,) from the counts as they are after `watch`."""
        counts = self._visits.get(hash_tensors(step.next_obs)) + self._changes.get(_changes(step))
        return (1 / torch.from_numpy(counts).clamp(min=1)).float().to(step.first.device)

    def get_extra_state(self) -> Tensor:
        """Returns both counts, (M, 3): which one, key and count."""
        states = [self._visits.state(), self._changes.state()]
        return torch.cat([torch.nn.functional.pad(state, (1, 0), value=i) for i, state in enumerate(states)])

    def set_extra_state(self, state: Any) -> None:
        """Takes up the counts that `get_extra_state` returned."""
        for i, counts in enumerate((self._visits, self._changes)):
            counts.load(state[state[:, 0] == i, 1:])


def _changes(step: Transition) -> np.ndarray:
    """Returns the hash of each change, (N,) uint64."""

    def difference(now: Tensor, then: Tensor) -> np.ndarray:
        a, b = (x.view(np.uint8) if x.dtype == bool else x for x in (now.cpu().numpy(), then.cpu().numpy()))
        # Without a sign, bytes wrap around, which loses nothing.
        return b - a

    return hash_rows(tree_map(difference, step.obs, step.next_obs))
