"""Explorers from their specs: one, a product of several bonuses, or a mixture that shares the environments."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from gymnasium.spaces import Space
from torch import Tensor, nn

from rlrep.explore.base import Actor, Bonus, explorers
from rlrep.registry import SpecError, split_spec
from rlrep.types import Batch, Metrics, Transition, Tree, tree_map


class Product(Bonus):
    """The product of several bonuses, `e3b*rnd`: high where all of them are (arXiv:2306.03236).

    Their scales do not matter, since a bonus is normalised before anyone learns from it. Each learns at its own rate,
    from the same batches, as often as the one that learns most.

    Args:
        factors: At least two, of the same environments.

    Raises:
        SpecError: One of them has to be shown something beside the observation, such as a skill.
    """

    def __init__(self, factors: Sequence[Bonus]) -> None:
        first = factors[0]
        super().__init__(first.observation_space, first.action_space, first.n_envs)
        self.name = "*".join(factor.name for factor in factors)  # type: ignore[misc]
        if guided := [factor.name for factor in factors if factor.context]:
            raise SpecError(f"bonus {guided[0]!r} pays for obeying, not for what is new, and cannot be a factor")
        self.factors = nn.ModuleList(factors)
        self.span = max(factor.span for factor in factors)
        self.batch_size = max(factor.batch_size for factor in factors)
        self.epochs = max(factor.epochs for factor in factors)
        self.warmup = max(factor.warmup for factor in factors)
        self.scores_features = all(factor.scores_features for factor in factors)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the groups of all factors."""
        return [group for factor in self._factors() for group in factor.parameter_groups()]

    def watch(self, step: Transition) -> None:
        """Lets every factor take note."""
        for factor in self._factors():
            factor.watch(step)

    def reward(self, step: Transition) -> Tensor:
        """Returns the product of what the factors pay, (N,)."""
        return torch.stack([factor.reward(step) for factor in self._factors()]).prod(dim=0)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the sum of the losses; their metrics are prefixed by the factors' names."""
        total, metrics = torch.zeros((), device=batch.mask.device), cast(Metrics, {})
        for factor in self._factors():
            if factor.learns:
                loss, found = factor(batch)
                total = total + loss
                metrics |= {f"{factor.name}/loss": loss.detach()} | {f"{factor.name}/{k}": v for k, v in found.items()}
        return total, metrics

    def after_step(self) -> None:
        """Moves the target networks of every factor."""
        for factor in self._factors():
            factor.after_step()

    def _factors(self) -> list[Bonus]:
        return list(cast(Any, self.factors))


class Mixture(Actor):
    """Explorers that share the environments, `random:0.2+noveld:0.8`.

    It acts for the actors among them, whose environments are the last ones, in the order named; the first ones are
    those of the bonus, for whose policy somebody else acts.

    Args:
        actors: Each for so many environments.
        bonus: For the first environments, or None.
    """

    name = "mixture"

    def __init__(self, actors: Sequence[Actor], bonus: Bonus | None = None) -> None:
        super().__init__(actors[0].observation_space, actors[0].action_space, sum(actor.n_envs for actor in actors))
        self.actors, self.bonus = list(actors), bonus

    def act(self, obs: Tree, first: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the actions of all actors, (N, *action_shape), N being the environments that are theirs."""
        actions, start = [], 0
        for actor in self.actors:
            mine = slice(start, start + actor.n_envs)
            actions.append(actor.act(tree_map(lambda x, mine=mine: x[mine], obs), first[mine], rng))
            start = mine.stop
        return np.concatenate(actions)


def make_explorer(
    spec: str | Mapping[str, Any], observation_space: Space, action_space: Space, n_envs: int
) -> Actor | Bonus:
    """Builds an explorer.

    Args:
        spec: `"random"`, `"count:simhash=64"`, or a mapping. `"e3b*rnd"` is the product of two bonuses, and
            `"random:0.2+noveld:0.8"` gives each its share of the environments. What follows `"policy:"` is a path,
            whatever is in it, unless it is written as options, `"policy:path=a.zip,deterministic=true"`.
        observation_space: What it will see.
        action_space: What it can do.
        n_envs: How many environments it acts in.

    Raises:
        SpecError: No such explorer or option, or a product or mixture that cannot be.
        SpaceError: It cannot work in these spaces.
    """
    if isinstance(spec, str) and (shares := _shares(spec)):
        return _mixture(spec, shares, observation_space, action_space, n_envs)
    if isinstance(spec, str) and spec.startswith("policy:"):
        try:
            options = split_spec(spec)[1]
        except ValueError:
            options = {}
        if "path" not in options:
            spec = {"name": "policy", "path": spec.removeprefix("policy:")}
    names = re.split(r"\*(?=[A-Za-z_])", spec) if isinstance(spec, str) and not spec.startswith("policy:") else [spec]
    built = [
        explorers.build(name, observation_space=observation_space, action_space=action_space, n_envs=n_envs)
        for name in names
    ]
    if len(built) == 1:
        return built[0]
    if actors := [one.name for one in built if isinstance(one, Actor)]:
        raise SpecError(f"explorer {spec!r}: bonuses are multiplied, and {actors[0]!r} is none; mix them with '+'")
    return Product(built)


def _shares(spec: str) -> list[tuple[str, float]]:
    """Returns the explorers of a mixture and their shares, or nothing if `spec` is none."""
    terms = re.split(r"\+(?=[A-Za-z_])", spec)
    found = [re.fullmatch(r"(.+):([0-9]*\.?[0-9]+)", term) for term in terms]
    if len(terms) == 1 or (spec.startswith("policy:") and not all(found)):
        return []
    if missing := [term for term, match in zip(terms, found, strict=True) if not match]:
        raise SpecError(
            f"explorer {spec!r}: {missing[0]!r} has no share of the environments; write it as 'random:0.2+noveld:0.8'"
        )
    return [(match[1], float(match[2])) for match in found if match]


def _mixture(
    spec: str, shares: list[tuple[str, float]], observation_space: Space, action_space: Space, n_envs: int
) -> Mixture:
    total = sum(share for _, share in shares)
    if not math.isclose(total, 1, abs_tol=1e-6) or min(share for _, share in shares) <= 0:
        raise SpecError(f"explorer {spec!r}: shares are above 0 and add up to 1, and these add up to {total:g}")
    if len(shares) > n_envs:
        raise SpecError(f"explorer {spec!r}: {len(shares)} explorers need as many environments, and there are {n_envs}")
    # Borders at the rounded sums; where that leaves one without, the largest gives.
    borders = np.round(np.cumsum([share for _, share in shares]) * n_envs).astype(int)
    counts = np.diff(borders, prepend=0)
    while counts.min() < 1:
        counts[counts.argmin()] += 1
        counts[counts.argmax()] -= 1
    built = [
        make_explorer(name, observation_space, action_space, n)
        for (name, _), n in zip(shares, counts.tolist(), strict=True)
    ]
    bonuses = [one for one in built if isinstance(one, Bonus)]
    actors = [one for one in built if isinstance(one, Actor)]
    if len(bonuses) > 1:
        raise SpecError(
            f"explorer {spec!r}: {' and '.join(one.name for one in bonuses)} each need a policy of their own, and one "
            "mixture trains one; collect twice and join the data with `rlrep data merge`"
        )
    return Mixture(actors, bonuses[0] if bonuses else None)
