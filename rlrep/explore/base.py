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
from rlrep.registry import Registry
from rlrep.types import Batch, Metrics, SpaceError, Transition, Tree, tree_leaves, tree_map


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

    Once a step, `watch` is called and then `reward`, with the same transition, so that either may do the work; now and
    then the loss, `forward`, is minimised on recent segments. Episodic state belongs to an environment and starts anew
    where `step.first`. All state must be tensors in `state_dict` (state of varying size through `get_extra_state`), so
    that it can be saved without pickling; episodic state is left out, since whoever resumes resets the environments.

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
    scores_features: bool = True
    """Whether it scores the features of a frozen encoder where the policy sees them. What counts exact observations
    scores raw ones: the last bits of a feature depend on how many observations were encoded together."""

    def __init__(
        self, observation_space: Space, action_space: Space, n_envs: int, encoder: Encoder | None = None
    ) -> None:
        super().__init__(cast(Encoder, encoder), action_space)
        self.observation_space, self.n_envs = observation_space, n_envs
        self.context: dict[str, Space] = {}
        """What is drawn at the start of each episode and shown to policy and bonus beside the observation, by key."""

    @property
    def observes(self) -> Space:
        """What the observations in its transitions look like: raw, with the context beside them if there is one."""
        return beside(self.observation_space, self.context) if self.context else self.observation_space

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns what there is to train, as groups of an optimiser."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"params": parameters, "lr": self.learning_rate}] if parameters else []

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


def beside(space: Space, context: Mapping[str, Space]) -> gym_spaces.Dict:
    """Returns the space of observations that have `context` beside them; one that is no Dict is under `obs`.

    Raises:
        SpaceError: A key of the context is taken.
    """
    parts = dict(space.spaces) if isinstance(space, gym_spaces.Dict) else {"obs": space}
    if taken := sorted(set(parts) & set(context)):
        raise SpaceError(f"observations have a key {taken[0]!r} already, which the explorer needs: {space}")
    return gym_spaces.Dict({**parts, **context})


explorers: Registry[type[Actor] | type[Bonus]] = Registry(
    "explorer", "rlrep.explore", given=("observation_space", "action_space", "n_envs"), bases=(Actor, Bonus)
)


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


class Counts:
    """How often each key was met, in several tables at once: open addressing with linear probing, in arrays.

    Args:
        n_tables: How many tables; they share nothing.
        capacity: Slots of each to begin with, a power of two; they grow as the fullest one needs.
    """

    def __init__(self, n_tables: int = 1, capacity: int = 256) -> None:
        self._keys = np.zeros((n_tables, capacity), np.uint64)
        self._counts = np.zeros((n_tables, capacity), np.int64)
        self._filled = np.zeros(n_tables, np.int64)

    def add(self, keys: np.ndarray, table: np.ndarray | int = 0, count: np.ndarray | int = 1) -> None:
        """Counts each of (N,) uint64 keys, hashes of what is counted, in its table, (N,)."""
        keys, table = self._plain(keys, table)
        # At most half full: chains stay short.
        while 2 * int((self._filled + np.bincount(table, minlength=len(self._filled))).max()) > self._keys.shape[1]:
            self._grow()
        slot = self._slot(keys, table, insert=True)
        fresh = self._counts[table, slot] == 0
        if fresh.any():
            capacity = self._keys.shape[1]
            cells = np.unique(table[fresh] * capacity + slot[fresh])
            self._filled += np.bincount(cells // capacity, minlength=len(self._filled))
        np.add.at(self._counts, (table, slot), count)

    def get(self, keys: np.ndarray, table: np.ndarray | int = 0) -> np.ndarray:
        """Returns how often each of (N,) keys was counted in its table, (N,) int64."""
        keys, table = self._plain(keys, table)
        slot = self._slot(keys, table, insert=False)
        return np.where(slot < 0, 0, self._counts[table, slot])

    def clear(self, table: np.ndarray | int = 0) -> None:
        """Forgets everything in these tables."""
        self._keys[table] = 0
        self._counts[table] = 0
        self._filled[table] = 0

    def items(self, table: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Returns the keys and counts of a table, (M,) uint64 and int64."""
        used = self._counts[table] > 0
        return self._keys[table, used], self._counts[table, used]

    def state(self) -> Tensor:
        """Returns the first table as a tensor, (M, 2) int64: key and count."""
        keys, counts = self.items()
        return torch.from_numpy(np.stack([keys.view(np.int64), counts], axis=1))

    def load(self, state: Tensor) -> None:
        """Takes up what `state` returned."""
        self.clear()
        pairs = state.cpu().numpy()
        self.add(pairs[:, 0].copy().view(np.uint64), 0, pairs[:, 1])

    @staticmethod
    def _plain(keys: np.ndarray, table: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        # 0 marks an empty slot.
        return np.maximum(keys, np.uint64(1)), np.broadcast_to(table, keys.shape)

    def _slot(self, keys: np.ndarray, table: np.ndarray, insert: bool) -> np.ndarray:
        """Returns where each key is in its table, (N,), or -1; with `insert` none is missing afterwards."""
        last = self._keys.shape[1] - 1
        slot = (keys & np.uint64(last)).astype(np.int64)
        found = np.full(len(keys), -1)
        left = np.arange(len(keys))
        while len(left):
            key, at = keys[left], (table[left], slot[left])
            if insert:
                # Of several keys that want one empty slot the last gets it, and the others look on.
                empty = self._keys[at] == 0
                self._keys[at[0][empty], at[1][empty]] = key[empty]
            there = self._keys[at]
            hit = there == key
            found[left[hit]] = at[1][hit]
            left = left[~hit & (there != 0)]
            slot[left] = (slot[left] + 1) & last
        return found

    def _grow(self) -> None:
        table, slot = np.nonzero(self._counts)
        keys, counts = self._keys[table, slot], self._counts[table, slot]
        n_tables, capacity = self._keys.shape
        self._keys = np.zeros((n_tables, 2 * capacity), np.uint64)
        self._counts = np.zeros((n_tables, 2 * capacity), np.int64)
        self._counts[table, self._slot(keys, table, insert=True)] = counts


class EpisodicCounts:
    """How often each environment met an observation in its running episode.

    Args:
        n_envs: N.
    """

    def __init__(self, n_envs: int) -> None:
        self._counts, self._env = Counts(n_envs), np.arange(n_envs)

    def watch(self, first: np.ndarray, begun: np.ndarray, keys: np.ndarray) -> None:
        """Counts a step.

        Args:
            first: (N,) bool: which environments began an episode.
            begun: Keys of the observations that those began with, as many as `first` has true.
            keys: (N,) of the next observations.
        """
        if first.any():
            self._counts.clear(self._env[first])
            self._counts.add(begun, self._env[first])
        self._counts.add(keys, self._env)

    def get(self, keys: np.ndarray) -> np.ndarray:
        """Returns the counts of (N,) keys, one an environment, (N,) int64."""
        return self._counts.get(keys, self._env)


def hash_tensors(obs: Tree) -> np.ndarray:
    """Returns `rlrep.spaces.hash_rows` of (N, ...) tensors, (N,) uint64."""
    return spaces.hash_rows(tree_map(lambda x: x.cpu().numpy(), obs))


class Memory(nn.Module):
    """A uniform sample of all observations ever added (Vitter 1985, algorithm R), or the latest of them.

    Args:
        space: Of one observation.
        capacity: M, how many are kept.
        latest: Whether the latest are kept.
    """

    seen: Tensor

    def __init__(self, space: Space, capacity: int, latest: bool = False) -> None:
        super().__init__()
        self.capacity, self.latest = capacity, latest
        rows = spaces.zeros(space, (capacity,))
        # Numbers of the leaves in the shape of the observation: names of buffers allow no dots, keys do.
        numbers = iter(range(len(tree_leaves(rows))))
        self._numbers: Tree = tree_map(lambda leaf: next(numbers), rows)
        for i, leaf in enumerate(tree_leaves(rows)):
            self.register_buffer(f"rows{i}", torch.from_numpy(leaf))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return min(self.capacity, int(self.seen))

    @torch.no_grad()
    def add(self, obs: Tree) -> Tensor:
        """Adds (n, ...) observations, and returns where each is kept, (n,), or -1."""
        n, device = len(tree_leaves(obs)[0]), self.seen.device
        order = self.seen + torch.arange(n, device=device)
        if self.latest:
            place = order % self.capacity
        else:
            drawn = (torch.rand(n, device=device, dtype=torch.float64) * (order + 1)).long()
            place = torch.where(order < self.capacity, order, drawn)
            place = torch.where(place < self.capacity, place, -1)
        self.seen += n
        kept = place >= 0

        def keep(i: int, leaf: Tensor) -> None:
            rows = getattr(self, f"rows{i}")
            rows[place[kept]] = leaf[kept].to(rows.dtype)

        # By key: an environment may give them in another order than its space.
        tree_map(keep, self._numbers, obs)
        return place

    def rows(self, index: Tensor | slice = slice(None)) -> Tree:
        """Returns what is kept at these places, all there is unless given, (n, ...)."""
        return tree_map(lambda i: getattr(self, f"rows{i}")[: len(self)][index], self._numbers)


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
            self.keys = list(observation_space.spaces)
            # A list, since a ModuleDict refuses keys such as "keys" or "arm.angle".
            self.parts = nn.ModuleList(ObservationNormaliser(sub, clip) for sub in observation_space.spaces.values())
            self.space = gym_spaces.Dict({key: part.space for key, part in self._parts()})
        elif isinstance(observation_space, gym_spaces.Box) and kind in ("picture", "vector"):
            self.statistics = RunningMeanStd(observation_space.shape)
            if kind == "picture":
                self.scale = 255.0
            else:
                self.space = gym_spaces.Box(-np.inf, np.inf, observation_space.shape, np.float32)

    def watch(self, obs: Tree) -> None:
        """Takes (N, *obs_shape) observations into account."""
        if hasattr(self, "parts"):
            for key, part in self._parts():
                part.watch(obs[key])
        elif hasattr(self, "statistics"):
            self.statistics.update(obs)

    def forward(self, obs: Tree) -> Tree:
        """(N, *obs_shape) raw -> the same, normalised."""
        if hasattr(self, "parts"):
            return {key: part(obs[key]) for key, part in self._parts()}
        if hasattr(self, "statistics"):
            return self.scale * self.statistics.normalise(obs, self.clip)
        return obs

    def _parts(self) -> list[tuple[str, ObservationNormaliser]]:
        return list(zip(self.keys, cast(Any, self.parts), strict=True))


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
