"""The nouns that travel between modules: `Batch`, `Transition`, `Episode`, and trees of arrays.

Shape letters used everywhere: B batch, T time, N environments, D features, A actions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Leaf = TypeVar("Leaf")
Tree = Any
"""An array or tensor, or a plain dict of them: one observation of any space."""

Metrics = dict[str, Tensor]
"""Detached 0-d tensors an objective reports beside its loss."""


class RlrepError(Exception):
    """Something the user can put right; the message says what was wrong, what was seen and what would be right."""


class SpaceError(RlrepError, ValueError):
    """An observation or action space is not the one an encoder, dataset or objective was made for."""


class DatasetError(RlrepError):
    """A dataset folder is missing, empty, damaged, or not what was asked for."""


class RunError(RlrepError):
    """A run folder cannot be used: taken, locked, or made with other settings."""


class ClusterError(RlrepError):
    """A Ray cluster cannot be reached or used."""


class RewardWarning(UserWarning):
    """Rewards are foretold hardly better than by their mean."""


class CollapseWarning(UserWarning):
    """The features being learnt carry almost no information."""


def tree_map(function: Callable[..., Leaf], tree: Tree, *rest: Tree) -> Tree:
    """Applies `function` to every leaf of plain dicts, whose keys must agree; anything else is a leaf."""
    if isinstance(tree, Mapping):
        return {key: tree_map(function, value, *(other[key] for other in rest)) for key, value in tree.items()}
    return function(tree, *rest)


def tree_leaves(tree: Tree) -> list[Any]:
    """Returns the leaves in key order."""
    if isinstance(tree, Mapping):
        return [leaf for value in tree.values() for leaf in tree_leaves(value)]
    return [tree]


def to_tensor(tree: Tree, device: torch.device | str = "cpu") -> Tree:
    """Turns arrays into tensors on `device`, keeping their dtypes; memory is shared on the CPU."""
    return tree_map(lambda leaf: torch.as_tensor(leaf).to(device), tree)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Trajectory segments of T transitions; `obs` has one step more than every other field.

    There is no reward field: pre-training is reward-free, and what is not here cannot leak into a loss.
    """

    obs: Tree
    """(B, T+1, *obs_shape) raw observations; past the end of an episode the last one is repeated."""
    action: Tensor
    """(B, T, *action_shape)"""
    terminated: Tensor
    """(B, T) bool: the environment ended the episode with this transition."""
    mask: Tensor
    """(B, T) bool: false past the end of an episode, where nothing may be learnt."""
    first: Tensor
    """(B, T) bool: this transition starts from the first observation of an episode."""
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    """Work that several objectives on one batch share, such as the encoder's features."""

    def __post_init__(self) -> None:
        b, t = self.mask.shape
        for name in ("action", "terminated", "first"):
            shape = tuple(getattr(self, name).shape)
            if shape[:2] != (b, t):
                raise ValueError(f"Batch.{name} has shape {shape}, but mask says (B, T) = {(b, t)}")
        for leaf in tree_leaves(self.obs):
            if tuple(leaf.shape[:2]) != (b, t + 1):
                raise ValueError(
                    f"Batch.obs has leading shape {tuple(leaf.shape[:2])}; it needs (B, T+1) = {(b, t + 1)}"
                )

    @property
    def obs_mask(self) -> Tensor:
        """(B, T+1) bool: observations that belong to the episode, not to the padding after it."""
        return torch.cat([torch.ones_like(self.mask[:, :1]), self.mask], dim=1)

    def to(self, device: torch.device | str) -> Batch:
        """Returns this batch on `device`, with a fresh memo; to a GPU it travels while the caller goes on."""
        to_gpu = torch.device(device).type == "cuda"

        def move(leaf: Tensor) -> Tensor:
            # Only page-locked memory is copied in the background.
            leaf = leaf.pin_memory() if to_gpu and leaf.device.type == "cpu" else leaf
            return leaf.to(device, non_blocking=True)

        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "memo"}
        return Batch(**{name: tree_map(move, value) for name, value in fields.items()})


@dataclasses.dataclass(frozen=True)
class Transition:
    """One step of N environments, as an exploration bonus sees it: raw, and without the reward."""

    obs: Tree
    """(N, *obs_shape)"""
    action: Tensor
    """(N, *action_shape)"""
    next_obs: Tree
    """(N, *obs_shape): the true next observation, terminal where the episode ended, never the reset one."""
    terminated: Tensor
    """(N,) bool"""
    truncated: Tensor
    """(N,) bool"""
    first: Tensor
    """(N,) bool: `obs` is the first observation of an episode."""

    def as_batch(self) -> Batch:
        """Returns the N transitions as N segments of one step."""
        return Batch(
            obs=tree_map(lambda a, b: torch.stack([a, b], dim=1), self.obs, self.next_obs),
            action=self.action[:, None],
            terminated=self.terminated[:, None],
            mask=torch.ones_like(self.terminated)[:, None],
            first=self.first[:, None],
        )


@dataclasses.dataclass(frozen=True)
class Episode:
    """One whole episode of T transitions, as arrays, with everything the environment said."""

    obs: Tree
    """(T+1, *obs_shape): the last one is the observation the episode ended on."""
    action: np.ndarray
    """(T, *action_shape)"""
    reward: np.ndarray
    """(T,) float32: recorded for evaluation and export; never part of a `Batch`."""
    terminated: bool
    truncated: bool
    """True also where the collector itself cut the episode."""
    factors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Ground truth for probes and coverage, (T+1,) each."""
    info: dict[str, int] = dataclasses.field(default_factory=dict)
    """Where it came from: `seed`, `env_index`, `explorer_version`."""

    def __post_init__(self) -> None:
        t = len(self.action)
        if t < 1:
            raise ValueError("an Episode needs at least one transition, and this one has none")
        if len(self.reward) != t:
            raise ValueError(f"Episode.reward has {len(self.reward)} steps, but there are {t} actions")
        for name, leaf in [("obs", leaf) for leaf in tree_leaves(self.obs)] + list(self.factors.items()):
            if len(leaf) != t + 1:
                raise ValueError(f"Episode.{name} has {len(leaf)} rows; {t} transitions need {t + 1}")

    def __len__(self) -> int:
        return len(self.action)
