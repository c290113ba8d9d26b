"""Coverage: how much of an environment was reached, in distinct observations and distinct ground-truth states."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlrep.dataset import Dataset
from rlrep.spaces import hash_rows
from rlrep.types import Episode

CHUNK = 2**14
"""Rows of ground truth that are taken together: those of many short episodes, or of a long one."""


class Distinct:
    """Counts distinct 64-bit values in 8 bytes each."""

    def __init__(self) -> None:
        self._known = np.empty(0, np.uint64)
        self._new: list[np.ndarray] = []

    def add(self, values: np.ndarray) -> None:
        """Takes (N,) uint64 values into account."""
        self._new.append(np.unique(values))
        # Sorting all that is known only once as many are new keeps the cost a value constant.
        if sum(map(len, self._new)) > len(self._known):
            self._merge()

    @property
    def values(self) -> np.ndarray:
        """(n,) uint64, sorted: those that were added, once each."""
        self._merge()
        return self._known

    def __len__(self) -> int:
        return len(self.values)

    def _merge(self) -> None:
        self._known = np.unique(np.concatenate([self._known, *self._new]))
        self._new = []


class Coverage:
    """What the episodes added so far reached.

    Observations are told apart by a hash of their bytes, states by their ground-truth factors all together. The goal
    counts as reached in an episode with a positive reward: evaluation only, no explorer sees it.
    """

    def __init__(self) -> None:
        self.steps = self.episodes = self.goals = 0
        self._observations, self._states = Distinct(), Distinct()
        self._factors: dict[str, Distinct] = {}
        self._pending: list[dict[str, np.ndarray]] = []
        self._n_pending = 0

    def add(self, *episodes: Episode) -> None:
        """Takes episodes into account; nothing of them is held on to."""
        for episode in episodes:
            self.steps += len(episode)
            self.episodes += 1
            self.goals += bool((episode.reward > 0).any())
            self._observations.add(hash_rows(episode.obs))
            if episode.factors:
                self._pending.append({name: values.copy() for name, values in sorted(episode.factors.items())})
                self._n_pending += len(episode) + 1
            if self._n_pending >= CHUNK:
                self._merge()

    def include(self, other: Coverage) -> None:
        """Takes into account what another one has."""
        self._merge()
        other._merge()
        self.steps += other.steps
        self.episodes += other.episodes
        self.goals += other.goals
        self._observations.add(other._observations.values)
        self._states.add(other._states.values)
        for name, values in other._factors.items():
            self._factors.setdefault(name, Distinct()).add(values.values)

    def figures(self) -> dict[str, Any]:
        """Returns plain JSON values: `steps`, `episodes`, `mean_length`, `goal_fraction`, `observations` and, where
        there is ground truth, `states` and `factors`, the number of values that each factor took."""
        self._merge()
        figures: dict[str, Any] = {
            "steps": self.steps,
            "episodes": self.episodes,
            "mean_length": round(self.steps / max(self.episodes, 1), 2),
            "goal_fraction": round(self.goals / max(self.episodes, 1), 5),
            "observations": len(self._observations),
        }
        if self._factors:
            figures["states"] = len(self._states)
            figures["factors"] = {name: len(values) for name, values in self._factors.items()}
        return figures

    def _merge(self) -> None:
        """Takes the ground truth that waits into account."""
        if not self._pending:
            return
        factors = {name: np.concatenate([part[name] for part in self._pending]) for name in self._pending[0]}
        self._pending, self._n_pending = [], 0
        self._states.add(hash_rows(factors))
        for name, values in factors.items():
            self._factors.setdefault(name, Distinct()).add(hash_rows(np.unique(values)))


def coverage(data: Dataset, points: int = 20) -> list[dict[str, Any]]:
    """Returns how coverage grew over a dataset, as `Coverage.figures` after about `points` equal numbers of steps.

    Args:
        data: Read once from start to end, a piece at a time.
        points: How many rows; the last one is of the whole dataset.
    """
    found, curve = Coverage(), []
    due = np.linspace(0, data.n_transitions, points + 1)[1:].tolist()
    for episode in data:
        found.add(episode)
        if found.steps >= due[0]:
            curve.append(found.figures())
            due = [steps for steps in due if steps > found.steps]
    return curve
