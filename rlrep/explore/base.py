"""What an explorer is: an `Actor` that chooses actions itself, or a `Bonus` that rewards a policy for what is new."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import numpy as np
import torch
from gymnasium import spaces as gym_spaces
from gymnasium.spaces import Space
from torch import Tensor, nn

from rlrep import spaces
from rlrep.encoders import Encoder
from rlrep.objectives import Objective
from rlrep.registry import Registry, split_spec
from rlrep.types import Batch, Metrics, SpaceError, Transition, Tree


class Actor:
    """Chooses actions without learning.

    Args:
        observation_space: What the observations look like.
        action_space: What the actions look like.
        n_envs: N, how many environments are stepped together.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""

    def __init__(self, observation_space: Space, action_space: Space, n_envs: int) -> None:
        self.observation_space, self.action_space, self.n_envs = observation_space, action_space, n_envs

    def act(self, obs: Tree, first: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns an action for each environment.

        Args:
            obs: (N, *obs_shape) arrays.
            first: (N,) bool: `obs` begins an episode; nothing remembered from before may matter.
            rng: The only source of chance.

        Returns:
            (N, *action_shape).
        """
        raise NotImplementedError


class Bonus(Objective):
    """An intrinsic reward: scores transitions by how new they are. Its training loss, if it has one, is an objective.

    Once a step, `watch` is called and then `reward`, with the same transition; now and then the loss, `forward`, is
    minimised on recent segments. Episodic state belongs to an environment and starts anew where `step.first`. All
    state must be tensors in `state_dict` (state of varying size through `get_extra_state`), so that it can be saved
    without pickling; episodic state is left out, since whoever resumes resets the environments.

    Args:
        observation_space: What the observations look like.
        action_space: What the actions look like.
        n_envs: N, how many environments are stepped together.
        encoder: What the loss trains; None for a bonus that learns nothing.
    """

    learning_rate: float = 1e-4
    """Of Adam, on whatever parameters take a gradient."""
    batch_size: int = 256
    """Segments in a batch."""
    epochs: int = 1
    """How often each recent transition is learnt from."""
    warmup: int = 0
    """Random steps of each environment before the bonus is used, for running statistics to settle."""

    def __init__(
        self, observation_space: Space, action_space: Space, n_envs: int, encoder: Encoder | None = None
    ) -> None:
        super().__init__(cast(Encoder, encoder), action_space)
        self.observation_space, self.n_envs = observation_space, n_envs

    @property
    def learns(self) -> bool:
        """Whether there is anything to train."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def watch(self, step: Transition) -> None:
        """Takes note of a step: running statistics, counts, episodic state."""

    def reward(self, step: Transition) -> Tensor:
        """Returns how new `step` is, (N,), neither normalised nor attached to a graph; changes nothing."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the training loss (0-d) and metrics; only called on a bonus that learns."""
        raise NotImplementedError


explorers: Registry[type[Actor] | type[Bonus]] = Registry(
    "explorer", "rlrep.explore", given=("observation_space", "action_space", "n_envs")
)


def make_explorer(
    spec: str | Mapping[str, Any], observation_space: Space, action_space: Space, n_envs: int
) -> Actor | Bonus:
    """Builds an explorer.

    Args:
        spec: `"random"`, `"count:simhash=64"`, or a mapping. What follows `"policy:"` is a path, whatever is in it,
            unless it is written as options, `"policy:path=a.zip,deterministic=true"`.
        observation_space: What it will see.
        action_space: What it can do.
        n_envs: How many environments it acts in.

    Raises:
        SpecError: No such explorer or option.
        SpaceError: It cannot work in these spaces.
    """
    if isinstance(spec, str) and spec.startswith("policy:"):
        try:
            options = split_spec(spec)[1]
        except ValueError:
            options = {}
        if "path" not in options:
            spec = {"name": "policy", "path": spec.removeprefix("policy:")}
    return explorers.build(spec, observation_space=observation_space, action_space=action_space, n_envs=n_envs)


def sample_actions(space: Space, n: int, rng: np.random.Generator) -> np.ndarray:
    """Returns `n` uniform actions, (n, *action_shape).

    Raises:
        SpaceError: The space has no uniform distribution, or is not supported.
    """
    if isinstance(space, gym_spaces.Discrete):
        return space.start + rng.integers(space.n, size=n, dtype=np.int64)
    if isinstance(space, gym_spaces.MultiDiscrete):
        return (space.start + rng.integers(space.nvec, size=(n, *space.shape))).astype(space.dtype)
    if isinstance(space, gym_spaces.MultiBinary):
        return rng.integers(2, size=(n, *space.shape), dtype=np.int8)
    if isinstance(space, gym_spaces.Box):
        if not space.is_bounded():
            raise SpaceError(f"random actions need bounds, and the action space is {space}; rescale it to [-1, 1]")
        integers = np.issubdtype(space.dtype, np.integer)
        high = space.high.astype(np.float64) + integers
        drawn = rng.uniform(space.low, high, size=(n, *space.shape))
        return (np.floor(drawn) if integers else drawn).astype(space.dtype)
    raise SpaceError(f"action space {space} is not supported: use Discrete, MultiDiscrete, MultiBinary or Box")


class RunningMeanStd(nn.Module):
    """Mean and variance of all rows seen so far, merged batch by batch (Chan et al. 1979).

    Args:
        shape: Of one row.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        # In float32 a count stops growing at 16 million.
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Takes (N, *shape) rows into account."""
        var, mean = torch.var_mean(rows.float(), dim=0, correction=0)
        n = len(rows)
        total = self.count + n
        delta = mean.double() - self.mean
        squares = self.var * self.count + var.double() * n + delta.square() * self.count * n / total
        self.mean += delta * n / total
        self.var.copy_(squares / total)
        self.count.copy_(total)

    def normalise(self, rows: Tensor, clip: float) -> Tensor:
        """Returns (N, *shape) rows in standard deviations from the mean, clipped, as float32."""
        centred = rows.float() - self.mean.float()
        return (centred / (self.var + 1e-8).sqrt().float()).clamp(-clip, clip)


class ObservationNormaliser(nn.Module):
    """Measured numbers in standard deviations, clipped to +-5 (arXiv:1810.12894); symbols and words as they are.

    Pictures are normalised pixel by pixel and handed on 255 times as large, since encoders divide them by that.

    Args:
        observation_space: What raw observations look like.
        clip: Standard deviations.

    Attributes:
        space: What an encoder of normalised observations is to be made for.
    """

    def __init__(self, observation_space: Space, clip: float = 5.0) -> None:
        super().__init__()
        self.clip, self.scale = clip, 1.0
        self.space: Space = observation_space
        kind = spaces.kind(observation_space)
        if isinstance(observation_space, gym_spaces.Dict):
            self.parts = nn.ModuleDict(
                {key: ObservationNormaliser(sub, clip) for key, sub in observation_space.spaces.items()}
            )
            self.space = gym_spaces.Dict(
                {key: cast(ObservationNormaliser, part).space for key, part in self.parts.items()}
            )
        elif isinstance(observation_space, gym_spaces.Box) and kind in ("picture", "vector"):
            self.statistics = RunningMeanStd(observation_space.shape)
            if kind == "picture":
                self.scale = 255.0
            else:
                self.space = gym_spaces.Box(-np.inf, np.inf, observation_space.shape, np.float32)

    def watch(self, obs: Tree) -> None:
        """Takes (N, *obs_shape) observations into account."""
        if hasattr(self, "parts"):
            for key, part in self.parts.items():
                cast(ObservationNormaliser, part).watch(obs[key])
        elif hasattr(self, "statistics"):
            self.statistics.update(obs)

    def forward(self, obs: Tree) -> Tree:
        """(N, *obs_shape) raw -> the same, normalised."""
        if hasattr(self, "parts"):
            return {key: part(obs[key]) for key, part in self.parts.items()}
        if hasattr(self, "statistics"):
            return self.scale * self.statistics.normalise(obs, self.clip)
        return obs


class ReturnNormaliser(nn.Module):
    """Divides a reward by the running standard deviation of its discounted sum (arXiv:1810.12894, section 2.4).

    Args:
        n_envs: N.
        gamma: Discount, the learner's own.
        clip: Largest size of a normalised reward; it matters while the deviation is still that of a few steps.
    """

    returns: Tensor

    def __init__(self, n_envs: int, gamma: float = 0.99, clip: float = 10.0) -> None:
        super().__init__()
        self.gamma, self.clip = gamma, clip
        self.statistics = RunningMeanStd()
        self.register_buffer("returns", torch.zeros(n_envs, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, reward: Tensor, ended: Tensor) -> Tensor:
        """(N,) rewards -> (N,) float32 of a constant scale; sums start anew after steps where `ended` (N,) bool."""
        self.returns.mul_(self.gamma).add_(reward)
        self.statistics.update(self.returns)
        self.returns.masked_fill_(ended, 0.0)
        return (reward / (self.statistics.var + 1e-8).sqrt()).clamp(-self.clip, self.clip).float()
