"""`Recorder`: every episode of N environments, raw and whole, as they go by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from rlrep import spaces
from rlrep.types import Episode, RlrepError, SpaceError, Tree, tree_leaves, tree_map


class Sink(Protocol):
    """What takes recorded episodes: a `DatasetWriter`, or anything else with its `add`."""

    def add(self, episode: Episode) -> object:
        """Takes one whole episode; its arrays are overwritten once this has returned."""


@dataclasses.dataclass(frozen=True)
class _Lanes:
    """Steps of the running episodes, a lane of `capacity` rows an environment, one after the other."""

    obs: Tree
    """(N * capacity, *obs_shape): what a row's action was taken on, and the last one that an episode led to."""
    action: np.ndarray
    """(N * capacity, *action_shape)"""
    reward: np.ndarray
    """(N * capacity,)"""
    factors: dict[str, np.ndarray]
    """(N * capacity,) each, of the state that `obs` shows."""


class Recorder(VecEnvWrapper):
    """Hands every episode of N environments to a sink, raw and whole, and changes nothing of what passes through.

    A step costs one copy of what N environments said, whatever N, and an episode is handed on without another.
    Steps are held in memory until then, so an episode that outgrows `memory` is cut in pieces, each recorded as
    truncated. So are the episodes that run when the recorder is reset or finished.

    Args:
        venv: Raw environments; one that ends an episode resets in the same step and leaves the last observation in
            `infos`, as all of Stable-Baselines3's do. Ground truth is taken from their attribute `factors`, as
            `rlrep_envs.SyncVecEnv` has it, or else from `factors` in their infos.
        sink: What takes the episodes.
        seed: Of the first environment, the next ones having the next numbers; recorded with the episodes.
        memory: Bytes that unfinished episodes may take, all environments together.
    """

    CAPACITY = 64
    """Rows of a lane at first; it doubles when an episode outgrows it."""

    def __init__(self, venv: VecEnv, sink: Sink, *, seed: int = -1, memory: int = 2**29) -> None:
        super().__init__(venv)
        self.sink, self.seeds = sink, [seed + i if seed >= 0 else -1 for i in range(venv.num_envs)]
        self.explorer_version = 0
        """How often the explorer has learnt so far; recorded with the episodes."""
        self.steps = 0
        """Steps taken since this was made, all environments together."""
        self.longest = self.CAPACITY
        """Steps after which an episode is cut; more where memory allows, which is known after the first reset."""
        self._memory = memory
        self._lanes: _Lanes | None = None
        self._capacity = self.CAPACITY
        self._length = np.zeros(venv.num_envs, np.int64)
        """Steps of each running episode."""
        self._rows = self._starts()
        """Where what each environment shows now lies in the lanes."""
        self._look_in = 0
        """Steps until an episode may have outgrown its lane, or memory."""

    def reset(self) -> VecEnvObs:
        """Resets the environments; episodes that were running are recorded as truncated."""
        self.finish()
        obs = self.venv.reset()
        factors = ground_truth(self.venv)
        if self._lanes is None:
            self._lanes = self._new_lanes({name: values.dtype for name, values in factors.items()})
            lanes = [getattr(self._lanes, field.name) for field in dataclasses.fields(_Lanes)]
            row = sum(leaf.nbytes for tree in lanes for leaf in tree_leaves(tree)) // self._capacity
            self.longest = max(self.CAPACITY, self._memory // row)
        self._put(obs, factors)
        self._make_room()
        return obs

    def step_async(self, actions: np.ndarray) -> None:
        """Notes the actions, and passes them on."""
        assert self._lanes is not None, "reset comes first"
        self._lanes.action[self._rows] = actions
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Notes what the environments say, and passes it on."""
        obs, rewards, dones, infos = self.venv.step_wait()
        assert self._lanes is not None
        self._lanes.reward[self._rows] = rewards
        self.steps += self.num_envs
        self._length += 1
        for i in np.flatnonzero(dones).tolist():
            truncated = bool(infos[i].get("TimeLimit.truncated", False))
            self._end(i, last_observation(infos[i]), infos[i].get("factors", {}), not truncated, truncated)
        self._put(obs, ground_truth(self.venv, infos, dones))
        self._look_in -= 1
        if self._look_in == 0:
            self._make_room()
        return obs, rewards, dones, infos

    def finish(self) -> None:
        """Records the episodes that are still running, as truncated."""
        for i in np.flatnonzero(self._length).tolist():
            self._cut(i)

    def _starts(self) -> np.ndarray:
        """Returns where each environment's lane begins, (N,)."""
        return np.arange(self.num_envs) * self._capacity

    def _put(self, obs: VecEnvObs, factors: Mapping[str, np.ndarray]) -> None:
        """Notes what is observed now, and its ground truth."""
        assert self._lanes is not None
        self._rows = rows = self._starts() + self._length

        def put(lanes: np.ndarray, values: np.ndarray) -> None:
            lanes[rows] = _fitting(values, lanes.dtype)

        tree_map(put, self._lanes.obs, obs)
        tree_map(put, self._lanes.factors, factors)

    def _cut(self, i: int) -> None:
        """Records what environment `i` did until now as an episode; it goes on with another."""
        assert self._lanes is not None
        row = self._rows[i]
        obs = tree_map(lambda lanes: lanes[row].copy(), self._lanes.obs)
        factors = {name: lanes[row] for name, lanes in self._lanes.factors.items()}
        self._end(i, obs, factors, False, True)

        def begin(lanes: np.ndarray, value: np.ndarray) -> None:
            lanes[i * self._capacity] = value

        tree_map(begin, self._lanes.obs, obs)
        tree_map(begin, self._lanes.factors, factors)
        self._rows[i] = i * self._capacity

    def _make_room(self) -> None:
        """Cuts the episodes that outgrew memory, and makes longer lanes if the longest is about to be full."""
        for i in np.flatnonzero(self._length >= self.longest).tolist():
            self._cut(i)
        longest = int(self._length.max())
        if longest + 1 == self._capacity:
            self._grow()
        self._look_in = min(self.longest, self._capacity - 1) - longest

    def _end(self, i: int, obs: Tree, factors: Mapping[str, Any], terminated: bool, truncated: bool) -> None:
        """Hands on the episode of environment `i`, which led to these; its lane is free again."""
        assert self._lanes is not None
        start, length = i * self._capacity, int(self._length[i])

        def close(lanes: np.ndarray, value: Any) -> np.ndarray:
            lanes[start + length] = _fitting(value, lanes.dtype)
            return lanes[start : start + length + 1]

        self.sink.add(
            Episode(
                obs=tree_map(close, self._lanes.obs, obs),
                action=self._lanes.action[start : start + length],
                reward=self._lanes.reward[start : start + length],
                terminated=terminated,
                truncated=truncated,
                factors=tree_map(close, self._lanes.factors, factors),
                info={"seed": self.seeds[i], "env_index": i, "explorer_version": self.explorer_version},
            )
        )
        self._length[i] = 0

    def _new_lanes(self, dtypes: Mapping[str, np.dtype]) -> _Lanes:
        rows = self.num_envs * self._capacity
        return _Lanes(
            obs=spaces.zeros(self.venv.observation_space, (rows,)),
            action=cast(np.ndarray, spaces.zeros(self.venv.action_space, (rows,))),
            reward=np.zeros(rows, np.float32),
            factors={name: np.zeros(rows, dtype) for name, dtype in dtypes.items()},
        )

    def _grow(self) -> None:
        """Makes lanes of twice as many rows, and moves what there is into them."""
        old, capacity = cast(_Lanes, self._lanes), self._capacity
        self._capacity = 2 * capacity
        self._rows = self._starts() + self._length
        self._lanes = self._new_lanes({name: lanes.dtype for name, lanes in old.factors.items()})

        def move(new: np.ndarray, lanes: np.ndarray) -> None:
            shape = (self.num_envs, -1, *lanes.shape[1:])
            new.reshape(shape)[:, :capacity] = lanes.reshape(shape)

        for field in dataclasses.fields(_Lanes):
            tree_map(move, getattr(self._lanes, field.name), getattr(old, field.name))


def _fitting(values: Any, dtype: np.dtype) -> np.ndarray:
    """Returns what an environment gave, where it can be kept as `dtype`: fractions cannot be kept as integers."""
    values = np.asarray(values)
    if values.dtype != dtype and not np.can_cast(values.dtype, dtype, "same_kind"):
        raise SpaceError(
            f"an environment gave {values.dtype} where {dtype} was expected, by its observation space or, of a factor, "
            "by what it gave first; convert it there"
        )
    return values


def ground_truth(
    venv: VecEnv, infos: Sequence[Mapping[str, Any]] = (), dones: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Returns the ground truth of what environments show now, (N,) arrays by name; empty where there is none.

    Args:
        venv: Environments that gather it in their attribute `factors`, or leave it in infos.
        infos: What the last step returned; nothing after a reset.
        dones: (N,) bool, as the last step returned them.
    """
    gathered = getattr(venv.unwrapped, "factors", None)
    if gathered is not None:
        return gathered
    now = [reset if dones is None or dones[i] else infos[i] for i, reset in enumerate(venv.unwrapped.reset_infos)]
    found = [info.get("factors", {}) for info in now]
    return {name: np.array([factors[name] for factors in found]) for name in found[0]}


def last_observation(info: Mapping[str, Any]) -> Tree:
    """Returns the observation that an episode ended on, out of the info of its last step."""
    if "terminal_observation" not in info:
        raise RlrepError(
            "an environment ended an episode without leaving its last observation in infos as 'terminal_observation'; "
            "use Stable-Baselines3's DummyVecEnv or SubprocVecEnv"
        )
    return info["terminal_observation"]
