"""Coverage: how much of an environment was reached, in distinct observations and distinct ground-truth states."""

from __future__ import annotations

from collections import Counter
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

    Attributes:
        occupancy: (W, H) visits of each place, where the ground truth has `agent_x` and `agent_y`, as MiniGrid's; else
            (0, 0).
        actions: How often each action was taken, where they are whole numbers.
    """

    def __init__(self) -> None:
        self.steps = self.episodes = self.goals = 0
        self.occupancy = np.zeros((0, 0), np.int64)
        self.actions: Counter[int] = Counter()
        self._lengths: Counter[int] = Counter()
        self._observations, self._states = Distinct(), Distinct()
        self._factors: dict[str, Distinct] = {}
        self._changed: Counter[str] = Counter()
        self._pending: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
        self._n_pending = 0

    def add(self, *episodes: Episode) -> None:
        """Takes episodes into account; nothing of them is held on to."""
        for episode in episodes:
            self.steps += len(episode)
            self.episodes += 1
            self.goals += bool((episode.reward > 0).any())
            self._lengths[len(episode)] += 1
            self._observations.add(hash_rows(episode.obs))
            factors = {name: values.copy() for name, values in sorted(episode.factors.items())}
            self._pending.append((episode.action.copy(), factors))
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
        self.actions += other.actions
        self._lengths += other._lengths
        self._changed += other._changed
        self._count(other.occupancy)
        self._observations.add(other._observations.values)
        self._states.add(other._states.values)
        for name, values in other._factors.items():
            self._factors.setdefault(name, Distinct()).add(values.values)

    def figures(self) -> dict[str, Any]:
        """Returns plain JSON values.

        `steps`, `episodes`, `mean_length`, `lengths` (of the shortest, the median and the longest episode),
        `goal_fraction`, `observations`; where actions are whole numbers, `action_entropy` in nats; and where there is
        ground truth, `states`, `factors` (the number of values that each factor took) and `changed` (the fraction of
        episodes in which it changed: a key taken, a door opened, another room entered).
        """
        self._merge()
        lengths = np.repeat(*map(np.array, zip(*sorted(self._lengths.items()), strict=True))) if self._lengths else None
        figures: dict[str, Any] = {
            "steps": self.steps,
            "episodes": self.episodes,
            "mean_length": round(self.steps / max(self.episodes, 1), 2),
            "lengths": [] if lengths is None else [int(lengths[0]), float(np.median(lengths)), int(lengths[-1])],
            "goal_fraction": round(self.goals / max(self.episodes, 1), 5),
            "observations": len(self._observations),
        }
        if self.actions:
            share = np.array(list(self.actions.values())) / self.actions.total()
            figures["action_entropy"] = round(float(-(share * np.log(share)).sum()) + 0.0, 4)
        if self._factors:
            figures["states"] = len(self._states)
            figures["factors"] = {name: len(values) for name, values in self._factors.items()}
            figures["changed"] = {name: round(self._changed[name] / self.episodes, 5) for name in self._factors}
        return figures

    def _merge(self) -> None:
        """Takes actions and ground truth that wait into account."""
        if not self._pending:
            return
        actions, parts = zip(*self._pending, strict=True)
        self._pending, self._n_pending = [], 0
        if actions[0].ndim == 1 and np.issubdtype(actions[0].dtype, np.integer):
            taken, times = np.unique(np.concatenate(actions), return_counts=True)
            self.actions.update(dict(zip(taken.tolist(), times.tolist(), strict=True)))
        if not parts[0]:
            return
        factors = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        self._states.add(hash_rows(factors))
        rows = np.array([len(action) + 1 for action in actions])
        starts = np.cumsum(rows) - rows
        for name, values in factors.items():
            self._factors.setdefault(name, Distinct()).add(hash_rows(np.unique(values)))
            moved = np.logical_or.reduceat(values != np.repeat(values[starts], rows), starts)
            self._changed[name] += int(moved.sum())
        if "agent_x" in factors and "agent_y" in factors:
            self._visit(factors["agent_x"], factors["agent_y"])

    def _visit(self, x: np.ndarray, y: np.ndarray) -> None:
        inside = (x >= 0) & (y >= 0)
        x, y = x[inside].astype(np.int64), y[inside].astype(np.int64)
        if not len(x):
            return
        width, height = int(x.max()) + 1, int(y.max()) + 1
        self._count(np.bincount(x * height + y, minlength=width * height).reshape(width, height))

    def _count(self, visits: np.ndarray) -> None:
        """Adds (w, h) visits to the occupancy, which grows to hold them."""
        size = tuple(map(max, self.occupancy.shape, visits.shape))
        grown = np.zeros(size, np.int64)
        for part in (self.occupancy, visits):
            grown[: part.shape[0], : part.shape[1]] += part
        self.occupancy = grown


def coverage(data: Dataset, points: int = 20, into: Coverage | None = None) -> list[dict[str, Any]]:
    """Returns how coverage grew over a dataset, as `Coverage.figures` after about `points` equal numbers of steps.

    Args:
        data: Read once from start to end, a piece at a time.
        points: How many rows; the last one is of the whole dataset.
        into: What counts, if it is to be looked at afterwards; a new one unless given.
    """
    found, curve = Coverage() if into is None else into, []
    due = np.linspace(0, data.n_transitions, points + 1)[1:].tolist()
    for episode in data:
        found.add(episode)
        if found.steps >= due[0]:
            curve.append(found.figures())
            due = [steps for steps in due if steps > found.steps]
    return curve
