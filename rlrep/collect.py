"""Collecting: an explorer acts in N environments, without their reward, and everything they say goes to disk.

    environments -> Recorder -> [FrameStack] -> [LatentVecEnv] -> explorer                                 policy
    environments -> Recorder -> [FrameStack] -> [LatentVecEnv] -> IntrinsicReward(bonus) -> SB3 algorithm  rnd, e3b, ...
    environments -> Recorder -> [FrameStack] -> IntrinsicReward(bonus) -> [LatentVecEnv] -> SB3 algorithm  count, cbet

The recorder lies below everything else, so the disk holds raw environment data whatever the explorer saw.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, Space
from rlrep_envs import EnvSpec, FrameStack, make_vec_env
from safetensors.torch import load_file, save_file
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from torch import Tensor
from tqdm import tqdm

from rlrep import runs, spaces
from rlrep.dataset import COMMIT, FORMAT_VERSION, META, PARTS, Dataset, DatasetWriter, check_ours
from rlrep.distributed import local_device
from rlrep.encoders import Encoder, load_encoder, make_encoder
from rlrep.evaluate.coverage import Coverage
from rlrep.explore import Actor, Bonus, Mixture, ReturnNormaliser, make_explorer
from rlrep.explore.base import beside, sample_actions
from rlrep.fanout import JobFailure, Send, map_jobs
from rlrep.registry import nearest
from rlrep.sb3 import LatentVecEnv, check_settings, get_algorithm, policy_kwargs
from rlrep.types import (
    Batch,
    Episode,
    RlrepError,
    RunError,
    SpaceError,
    Transition,
    Tree,
    to_tensor,
    tree_leaves,
    tree_map,
)

PPO_SETTINGS: dict[str, Any] = {
    "n_steps": 128,
    "batch_size": 256,
    "n_epochs": 4,
    "learning_rate": 1e-3,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "ent_coef": 0.01,
}
"""Of the policy that learns from a bonus, unless other `settings` are given; what is not here is SB3's default."""

OFF_POLICY_SETTINGS: dict[str, Any] = {"buffer_size": 20_000, "learning_starts": 1_000, "batch_size": 64}
"""A bonus in a replay buffer is that of its day: in a short one it is not yet out of date."""

SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": PPO_SETTINGS,
    "maskableppo": PPO_SETTINGS,
    "recurrentppo": PPO_SETTINGS,
    "a2c": {"n_steps": 16, "gae_lambda": 0.95, "ent_coef": 0.01},
    "dqn": OFF_POLICY_SETTINGS | {"learning_rate": 5e-4, "gradient_steps": 4, "target_update_interval": 1_000},
    "qrdqn": OFF_POLICY_SETTINGS | {"learning_rate": 5e-4, "gradient_steps": 4, "target_update_interval": 1_000},
}
"""The same for other algorithms; those that learn off-policy and are not here have `OFF_POLICY_SETTINGS`."""

TRAIN_EVERY = 128
"""Steps of each environment between trainings of the bonus, beside an algorithm that has no roll-outs."""

UNTIL = ("observations", "states", "episodes")
"""What coverage can be waited for."""

EXPLORER, POLICY, BONUS, RECORD = "explorer", "policy.zip", "bonus.safetensors", "explorer.json"
METRICS, COVERAGE = "metrics.jsonl", "coverage.json"


# ------------------------------------------------------------------------------------------------------- recording


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
            self._end(i, _last_observation(infos[i]), infos[i].get("factors", {}), not truncated, truncated)
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


def _last_observation(info: Mapping[str, Any]) -> Tree:
    """Returns the observation that an episode ended on, out of the info of its last step."""
    if "terminal_observation" not in info:
        raise RlrepError(
            "an environment ended an episode without leaving its last observation in infos as 'terminal_observation'; "
            "use Stable-Baselines3's DummyVecEnv or SubprocVecEnv"
        )
    return info["terminal_observation"]


# -------------------------------------------------------------------------------------------------------- rewarding


class IntrinsicReward(VecEnvWrapper):
    """Puts a bonus in the place of the reward, which it never looks at.

    The bonus is that of the true next observation, terminal where an episode ended, and is normalised once, here,
    before the learner estimates advantages: what will be new is then worth a detour. Unless `episodic`, the learner is
    told that no episode ever ends. A return that stops where the episode does makes ending it costly, and since
    reaching the goal ends it, the explorer learns to stay away: on DoorKey-6x6 from 15 % of episodes to 1 %.

    Args:
        venv: Environments; what they observe is what the bonus scores.
        bonus: What scores transitions.
        gamma: The learner's discount, for normalisation.
        episodic: Whether returns stop where episodes do.
        train_every: Steps of each environment between trainings of the bonus, on the transitions since the last.
        rng: Draws the batches.
        device: Where the bonus computes.
    """

    def __init__(
        self,
        venv: VecEnv,
        bonus: Bonus,
        *,
        rng: np.random.Generator,
        gamma: float = 0.99,
        episodic: bool = False,
        train_every: int = 128,
        device: str = "cpu",
    ) -> None:
        super().__init__(venv)
        self.bonus = bonus.to(device).eval()
        self.normaliser = ReturnNormaliser(venv.num_envs, gamma).to(device)
        self.episodic, self.train_every, self.device = episodic, train_every, device
        self.metrics: dict[str, float] = {}
        """Of the last training, and the mean bonus before normalisation since then."""
        self._rng = rng
        self._parameters = {name: p for name, p in bonus.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.Adam(bonus.parameter_groups()) if bonus.learns else None
        self._recent: list[Transition] = []
        self._rewards: list[Tensor] = []

    def reset(self) -> VecEnvObs:
        """Resets the environments."""
        self._obs = self.venv.reset()
        self._first = np.ones(self.num_envs, bool)
        return self._obs

    def step_async(self, actions: np.ndarray) -> None:
        """Notes the actions, and passes them on."""
        self._actions = actions
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Returns what the environments say, with the normalised bonus for the reward."""
        obs, _, dones, infos = self.venv.step_wait()
        truncated = np.zeros_like(dones)
        for i in np.flatnonzero(dones):
            truncated[i] = infos[i].get("TimeLimit.truncated", False)
        step = Transition(
            **{
                name: to_tensor(value, self.device)
                for name, value in {
                    "obs": self._obs,
                    "action": self._actions,
                    "next_obs": _true_next(obs, dones, infos),
                    "terminated": dones & ~truncated,
                    "truncated": truncated,
                    "first": self._first,
                }.items()
            }
        )
        self._obs, self._first = obs, dones
        self.bonus.watch(step)
        bonus = self.bonus.reward(step)
        ended = dones if self.episodic else np.zeros_like(dones)
        reward = self.normaliser(bonus, to_tensor(ended, self.device))
        self._rewards.append(bonus)
        if self._optimizer is not None:
            self._recent.append(step)
        if len(self._rewards) == self.train_every:
            self._learn()
        return obs, reward.cpu().numpy(), ended, infos

    def _learn(self) -> None:
        """Trains the bonus on the transitions since the last time."""
        self.metrics = {"bonus": float(torch.stack(self._rewards).mean())}
        self._rewards = []
        if self._optimizer is None:
            return
        losses = []
        self.bonus.train()
        for batch in _segments(self._recent, self.bonus.span, self.bonus.batch_size, self.bonus.epochs, self._rng):
            loss, _ = self.bonus(batch)
            if not torch.isfinite(loss):
                raise RunError(f"the loss of bonus {self.bonus.name!r} is {float(loss)}; try a lower learning_rate")
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
            self.bonus.after_step()
            losses.append(loss.detach())
        self.bonus.eval()
        self._recent = []
        self.metrics["bonus_loss"] = float(torch.stack(losses).mean())

    def state_dict(self) -> dict[str, Tensor]:
        """Returns everything learnt and counted, as tensors; `load_state_dict` takes it up again."""
        tensors = {f"bonus/{key}": value for key, value in self.bonus.state_dict().items()}
        tensors |= {f"normaliser/{key}": value for key, value in self.normaliser.state_dict().items()}
        if self._optimizer is not None:
            for name, parameter in self._parameters.items():
                for key, value in self._optimizer.state[parameter].items():
                    tensors[f"optimizer/{key}/{name}"] = value
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up the state that `state_dict` returned."""
        for head, module in (("bonus/", self.bonus), ("normaliser/", self.normaliser)):
            module.load_state_dict({k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)})
        if self._optimizer is not None:
            for name, parameter in self._parameters.items():
                found = {
                    k.split("/")[1]: v for k, v in tensors.items() if k.startswith("opt") and k.endswith(f"/{name}")
                }
                self._optimizer.state[parameter] = found


def _true_next(obs: VecEnvObs, dones: np.ndarray, infos: list[dict[str, Any]]) -> Tree:
    """Returns the observations that the actions led to: an episode's last one, not the next one's first."""
    ended = np.flatnonzero(dones)

    def put(reset: np.ndarray, *last: Any) -> np.ndarray:
        true = reset.copy()
        true[ended] = last
        return true

    return tree_map(put, obs, *(_last_observation(infos[i]) for i in ended)) if len(ended) else obs


def _segments(
    steps: list[Transition], span: int, batch_size: int, epochs: int, rng: np.random.Generator
) -> Iterator[Batch]:
    """Yields batches of segments of `span` transitions, every transition being the first of one segment an epoch."""

    def stacked(name: str) -> Tree:
        return tree_map(lambda *xs: torch.stack(xs), *(getattr(step, name) for step in steps))

    obs, action, next_obs, first = (stacked(name) for name in ("obs", "action", "next_obs", "first"))
    terminated, truncated = stacked("terminated"), stacked("truncated")
    t_end, n = terminated.shape
    done = terminated | truncated
    # Where the environments were reset, an episode was left without having ended.
    done[:-1] |= first[1:]
    for _ in range(epochs):
        order = torch.from_numpy(rng.permutation(t_end * n))
        for chosen in order.split(batch_size):
            t, env = (chosen // n)[:, None], (chosen % n)[:, None]
            at = t + torch.arange(span)
            inside = at < t_end
            at = at.clamp(max=t_end - 1)
            over = done[at, env].cpu().cumsum(dim=1) > 0
            mask = inside & ~torch.cat([torch.zeros_like(over[:, :1]), over[:, :-1]], dim=1)
            # Past the end the last true step stands, so that its observation is repeated.
            at = torch.minimum(at, t + mask.sum(dim=1, keepdim=True) - 1)
            yield Batch(
                obs=tree_map(
                    lambda now, then, t=t, env=env, at=at: torch.cat([now[t, env], then[at, env]], dim=1),
                    obs,
                    next_obs,
                ),
                action=action[at, env],
                terminated=terminated[at, env] & mask.to(terminated.device),
                mask=mask.to(terminated.device),
                first=first[at, env] & mask.to(first.device),
            )


class WithContext(VecEnvWrapper):
    """Shows something drawn at random beside the observation, anew for each episode: the skill a policy is to follow.

    Args:
        venv: Environments whose `dones` say when episodes end.
        context: What is shown, by key.
        rng: Draws it.
    """

    def __init__(self, venv: VecEnv, context: Mapping[str, Space], rng: np.random.Generator) -> None:
        super().__init__(venv, beside(venv.observation_space, context))
        self._context, self._rng = dict(context), rng

    def reset(self) -> VecEnvObs:
        """Resets the environments, and draws for all of them."""
        obs = self.venv.reset()
        self._now = self._draw(self.num_envs)
        return self._join(obs, self._now)

    def step_wait(self) -> VecEnvStepReturn:
        """Passes on what the environments say; a finished episode's last observation has its own context still."""
        obs, rewards, dones, infos = self.venv.step_wait()
        ended = np.flatnonzero(dones)
        if len(ended):
            infos = list(infos)
            for i in ended:
                last = self._join(_last_observation(infos[i]), {key: value[i] for key, value in self._now.items()})
                infos[i] = {**infos[i], "terminal_observation": last}
            drawn = self._draw(len(ended))
            self._now = {key: value.copy() for key, value in self._now.items()}
            for key, value in self._now.items():
                value[ended] = drawn[key]
        return self._join(obs, self._now), rewards, dones, infos

    def _draw(self, n: int) -> dict[str, np.ndarray]:
        return {key: sample_actions(space, n, self._rng) for key, space in self._context.items()}

    def _join(self, obs: Tree, context: Mapping[str, Any]) -> dict[str, Any]:
        return {**(obs if isinstance(obs, Mapping) else {"obs": obs}), **context}


class Alongside(VecEnvWrapper):
    """Shows the first environments only; in the others, actors act at the same time.

    Args:
        venv: All environments.
        actors: What acts in the last `actors.n_envs` of them.
        rng: What chance the actors have.
    """

    def __init__(self, venv: VecEnv, actors: Actor, rng: np.random.Generator) -> None:
        self._shown = venv.num_envs - actors.n_envs
        super().__init__(venv)
        self.num_envs = self._shown
        self._actors, self._rng = actors, rng

    def reset(self) -> VecEnvObs:
        """Resets all environments."""
        self._first = np.ones(self._actors.n_envs, bool)
        return self._split(self.venv.reset())

    def step_async(self, actions: np.ndarray) -> None:
        """Passes on the actions, with those of the actors."""
        theirs = self._actors.act(self._others, self._first, self._rng)
        self.venv.step_async(np.concatenate([actions, theirs]))

    def step_wait(self) -> VecEnvStepReturn:
        """Returns what the first environments say."""
        obs, rewards, dones, infos = self.venv.step_wait()
        self._first = dones[self._shown :]
        return self._split(obs), rewards[: self._shown], dones[: self._shown], infos[: self._shown]

    def _split(self, obs: VecEnvObs) -> VecEnvObs:
        self._others = tree_map(lambda x: x[self._shown :], obs)
        return tree_map(lambda x: x[: self._shown], obs)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Returns an attribute of the environments that are shown."""
        return self.venv.get_attr(attr_name, self._indices(indices))

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Calls a method of the environments that are shown."""
        return self.venv.env_method(method_name, *args, indices=self._indices(indices), **kwargs)

    def _indices(self, indices: Any) -> Any:
        return range(self._shown) if indices is None else indices


# ------------------------------------------------------------------------------------------------------- collecting


def collect(
    env: str | Mapping[str, Any] | EnvSpec | VecEnv,
    *,
    out: str | Path,
    explorer: str | Mapping[str, Any] = "random",
    steps: int = 100_000,
    n_envs: int = 16,
    seed: int = 0,
    episodic: bool = False,
    features: str | Path | Encoder | None = None,
    encoder: str | Mapping[str, Any] = "auto",
    algorithm: str = "ppo",
    settings: Mapping[str, Any] | None = None,
    until: str | None = None,
    device: str = "auto",
    checkpoint_every: int = 10_000,
    n_workers: int = 1,
    ray: str | None = None,
    overwrite: bool = False,
) -> Dataset:
    """Explores an environment without its reward, and records everything it says.

    The same call on a folder goes on from the last checkpoint until `steps` are there, and a larger `steps` adds to it;
    environments and chance then start anew, so the data differ from those of an unbroken run.

    Args:
        env: Environment spec; or environments you made, then `n_envs` is theirs.
        out: Dataset folder. `explorer/` in it has the coverage over time and, where a policy learnt, the policy.
        explorer: What acts, `random` or `policy:PATH`; or a bonus that rewards a policy for what is new, such as
            `noveld`; a product of bonuses, `e3b*rnd`; or a mixture that shares the environments,
            `random:0.2+noveld:0.8`.
        steps: Environment steps in the dataset, all environments together, rounded up to a multiple of `n_envs`.
        n_envs: Environments stepped together.
        seed: Of networks and actions; environment i has the seed `seed * n_envs + i`.
        episodic: Whether returns of a bonus stop where episodes do; see `IntrinsicReward` for why they do not.
        features: Pre-trained encoder, or its folder. The policy then sees its features, computed once a step, and so
            does the bonus, unless it counts exact observations. Raw observations are recorded all the same.
        encoder: Spec of the exploring policy's own network.
        algorithm: What learns from the bonus, by its name in SB3 or sb3-contrib. Off-policy ones learn from bonuses as
            they were when paid. A recurrent policy remembers across episodes unless `episodic`.
        settings: Arguments of the algorithm, over those in `SETTINGS`.
        until: Stop before `steps` once coverage reaches this, `states=5000` or `observations=20000`; looked at every
            `checkpoint_every` steps.
        device: Where policy and bonus compute; `auto` is a GPU if there is one.
        checkpoint_every: Steps between commits to disk, checkpoints of the explorer and rows of coverage. An episode is
            committed after it has ended.
        n_workers: Processes, a core each, that explore side by side with explorers, environments and seeds of their
            own. Each writes `out/worker-I`, and `out` is read as one dataset. One that dies is started again, and goes
            on from what it had committed.
        ray: Where the workers run: `local` or the address of a Ray cluster (`HOST:PORT`, `auto`), whose nodes have
            rlrep installed and share the file system that `out` lies on; on this machine, without Ray, unless given.
        overwrite: Start again, throwing away what is in `out`.

    Returns:
        The dataset.

    Raises:
        SpecError: Unknown explorer, encoder or option.
        SpaceError: Explorer, algorithm or features cannot work in this environment.
        RunError: `out` was collected with other settings or by another number of workers, or a worker failed.
        ClusterError: The Ray cluster cannot be reached.
        DatasetError: `out` holds something else, or cannot be written.
        ValueError: An unknown environment, or a number out of range.
    """
    call = {name: value for name, value in locals().items() if name not in ("n_workers", "ray")}
    if n_workers < 1:
        raise ValueError(f"n_workers must be at least 1, not {n_workers}")
    _check_layout(Path(out), n_workers, overwrite)
    if n_workers > 1 or ray is not None:
        return _side_by_side(call, Path(out), n_workers, ray)
    if overwrite and check_ours(Path(out)):
        _try_out(call)
        _throw_away(Path(out))
    return _collect(**call)[0]


def _collect(
    env: str | Mapping[str, Any] | EnvSpec | VecEnv,
    *,
    out: str | Path,
    explorer: str | Mapping[str, Any],
    steps: int,
    n_envs: int,
    seed: int,
    episodic: bool,
    features: str | Path | Encoder | None,
    encoder: str | Mapping[str, Any],
    algorithm: str,
    settings: Mapping[str, Any] | None,
    until: str | None,
    device: str,
    checkpoint_every: int,
    overwrite: bool,
    follow: Callable[[int], None] | None = None,
) -> tuple[Dataset, Coverage | None]:
    """Is `collect` with one worker; returns the coverage too, unless all was there.

    With `follow`, nothing is shown or printed: it is told instead, every now and then, how many steps there are.
    """
    for name, value in {"steps": steps, "n_envs": n_envs, "checkpoint_every": checkpoint_every}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, and it is {seed}")
    out, device = Path(out), str(local_device(device))
    goal = _goal(until)
    frozen = load_encoder(features) if features is not None else None
    spec = None if isinstance(env, VecEnv) else EnvSpec.parse(env)
    asked: dict[str, Any] = {
        "env": None if spec is None else str(spec),
        "explorer": explorer,
        "n_envs": env.num_envs if isinstance(env, VecEnv) else n_envs,
        "seed": seed,
        "episodic": episodic,
        "features": None if frozen is None else {"name": frozen.name, "digest": frozen.digest()},
        "encoder": encoder,
        "algorithm": algorithm,
        "settings": dict(settings or {}),
    }
    try:
        json.dumps(asked, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"what is collected with is recorded with the data, so it must be plain values: {error}"
        ) from error
    done = 0 if overwrite else _committed(out, asked)
    if done >= steps:
        if follow is None:
            print(f"{out} already holds {done:,} steps")
        return Dataset(out), None
    # Environments of different seeds have no layout in common, and whoever goes on does not begin with known ones.
    chance = np.random.SeedSequence([seed, done])
    first_seed = int(chance.generate_state(1)[0] >> 1) if done else seed * asked["n_envs"]
    with contextlib.ExitStack() as stack, torch.random.fork_rng(devices=[]):
        if isinstance(env, VecEnv):
            venv, n_stack = env, 1
        else:
            single = dataclasses.replace(cast(EnvSpec, spec), frame_stack=1)
            venv, n_stack = make_vec_env(single, n_envs, first_seed), cast(EnvSpec, spec).frame_stack
            stack.callback(venv.close)
        # All that can be wrong with what was asked is found before the folder is touched.
        seen = FrameStack(venv, n_stack).observation_space if n_stack > 1 else venv.observation_space
        shown = seen
        if frozen is not None:
            spaces.check_same(seen, frozen.observation_space, "the encoder for `features` was made for observations")
            shown = Box(-np.inf, np.inf, (frozen.features_dim,), np.float32)
        torch.manual_seed(first_seed)
        built = make_explorer(explorer, shown, venv.action_space, venv.num_envs)
        bonus = built.bonus if isinstance(built, Mixture) else built if isinstance(built, Bonus) else None
        if bonus is not None and not bonus.scores_features and frozen is not None:
            torch.manual_seed(first_seed)
            built = make_explorer(explorer, seen, venv.action_space, venv.num_envs)
            bonus = built.bonus if isinstance(built, Mixture) else cast(Bonus, built)
        learner = _settings(algorithm, settings, built, bonus, venv.action_space)
        network = None
        if bonus is not None:
            network = make_encoder(encoder, beside(shown, bonus.context) if bonus.context else shown)
        venv.seed(first_seed)
        venv.reset()
        factor_names = list(ground_truth(venv))
        venv.seed(first_seed)
        if "states" in goal and not factor_names:
            raise ValueError("until: this environment tells no ground truth, and so no states; wait for observations")
        interrupted = stack.enter_context(runs.deferred_interrupt())
        writer = stack.enter_context(
            DatasetWriter(
                out,
                venv.observation_space,
                venv.action_space,
                env_spec=None if spec is None else str(spec.task),
                factor_names=factor_names,
                collector=asked,
                overwrite=overwrite,
                flush_every=checkpoint_every,
            )
        )
        session = _Session(out, writer, steps, checkpoint_every, interrupted, goal, follow)
        recorder = session.recorder = Recorder(venv, session, seed=first_seed)
        top: VecEnv = FrameStack(recorder, n_stack) if n_stack > 1 else recorder
        rng = np.random.default_rng(chance)
        if frozen is not None and (bonus is None or bonus.scores_features):
            top = LatentVecEnv(top, frozen, device=device)
        if isinstance(built, Mixture) and bonus is not None:
            top = Alongside(top, built, np.random.default_rng([first_seed, 2]))
        with session:
            if session.reached:
                pass
            elif bonus is None:
                _act(session, cast(Actor, built), top, rng)
            else:
                if bonus.context:
                    top = WithContext(top, bonus.context, np.random.default_rng([first_seed, 3]))
                rewarded = top = IntrinsicReward(
                    top,
                    bonus,
                    rng=rng,
                    gamma=learner["gamma"],
                    episodic=episodic,
                    train_every=_roll_out(algorithm, learner),
                    device=device,
                )
                if frozen is not None and not bonus.scores_features:
                    top = LatentVecEnv(top, frozen, device=device)
                _learn(session, top, rewarded, cast(Encoder, network), algorithm, learner, first_seed)
            recorder.finish()
    session.summarise(asked["explorer"])
    return Dataset(out), session.coverage


def _check_layout(out: Path, n_workers: int, overwrite: bool) -> None:
    """Checks that `out` holds nothing but a dataset, and, unless that is to go, one of as many workers."""
    check_ours(out)
    if overwrite:
        return
    found = n_workers
    if (out / PARTS).exists():
        found = len(runs.read_json(out / PARTS)["parts"])
    elif (out / META).exists():
        found = 1
    if found != n_workers:
        raise RunError(
            f"{out} was collected with n_workers={found}, asked for {n_workers}. "
            "Keep the number, choose another folder, or pass overwrite to start again."
        )


def _try_out(call: Mapping[str, Any]) -> None:
    """Collects a step into a folder of its own, so that all that can be wrong is found before anything is touched."""
    with tempfile.TemporaryDirectory(prefix="rlrep-") as folder:
        _collect(**{**call, "out": Path(folder) / "data", "steps": 1, "overwrite": False}, follow=lambda steps: None)


def _throw_away(out: Path) -> None:
    """Empties a folder that holds a dataset, of one worker or several; one of anything else is an error."""
    with runs.lock(out):
        left = check_ours(out)
        # What says that it is ours goes last, and what says that there is something to read first.
        for name in sorted(left, key=lambda name: (name in (META, PARTS), name != COMMIT)):
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()


def _side_by_side(call: dict[str, Any], out: Path, n_workers: int, ray: str | None) -> Dataset:
    """Lets several workers collect a share of the steps each, and says what they reached together."""
    if isinstance(call["env"], VecEnv):
        raise ValueError("several workers make their environments themselves: pass an environment spec, not a VecEnv")
    if call["until"] is not None and n_workers > 1:
        raise ValueError("until cannot be looked at by several workers, who see their own coverage only: leave it out")
    steps = call["steps"]
    if steps < n_workers:
        raise ValueError(f"steps must be at least 1 for each of the {n_workers} workers, not {steps} in all")
    _try_out(call)
    if call["overwrite"]:
        _throw_away(out)
    names = [f"worker-{i}" for i in range(n_workers)]
    jobs = [
        call
        | {
            "env": str(EnvSpec.parse(call["env"])),
            "out": str((out / name if n_workers > 1 else out).resolve()),
            "steps": steps // n_workers + (i < steps % n_workers),
            "seed": call["seed"] * n_workers + i,
            # One that starts again must find what it wrote.
            "overwrite": False,
        }
        for i, name in enumerate(names)
    ]
    reached: dict[str, int] = {}
    failures: list[str] = []
    coverage = Coverage()
    with contextlib.ExitStack() as stack:
        if n_workers > 1:
            stack.enter_context(runs.lock(out))
            runs.write_json(out / PARTS, {"format_version": FORMAT_VERSION, "parts": names})
        workers = f"collect ({n_workers} workers)"
        bar = stack.enter_context(tqdm(total=steps, desc=workers, unit="step", unit_scale=True, mininterval=0.5))

        def receive(job: Mapping[str, Any], steps: int) -> None:
            reached[job["out"]] = steps
            bar.update(sum(reached.values()) - bar.n)

        try:
            for job, found in map_jobs(_collect_share, jobs, n_workers, ray=ray, receive=receive):
                if isinstance(found, JobFailure):
                    failures.append(f"{Path(job['out']).name}: {found.error}")
                else:
                    coverage.include(found)
        except KeyboardInterrupt:
            print(f"stopped at about {sum(reached.values()):,} steps; the same command goes on from what is on disk")
            raise
    if failures:
        raise RunError(
            f"{len(failures)} of {n_workers} workers failed; {failures[0]}. What was committed is there, and the same "
            "command goes on from it."
        )
    figures = coverage.figures()
    runs.write_json(out / EXPLORER / COVERAGE, figures)
    print(f"{call['explorer']}: {describe(figures)}")
    return Dataset(out)


def _collect_share(job: Mapping[str, Any], send: Send) -> Coverage:
    """What one of several workers does."""
    data, coverage = _collect(**job, follow=send)
    if coverage is None:
        coverage = Coverage()
        # One at a time: all together may not fit memory.
        for episode in data:
            coverage.add(episode)
    return coverage


def _committed(out: Path, asked: Mapping[str, Any]) -> int:
    """Returns how many steps are in `out`, once it is clear that they were collected with the settings asked for."""
    if not (out / COMMIT).exists():
        return 0
    found = runs.read_json(out / META)["writers"][-1]["collector"]
    if not isinstance(found, Mapping):
        raise RunError(f"{out} holds a dataset that was not collected but written by {found!r}; choose another folder")
    if changed := runs.differences(json.loads(json.dumps(asked)), found):
        raise RunError(
            f"{out} was collected with other settings: {'; '.join(changed)}. "
            "Choose another folder, or pass overwrite to start again."
        )
    record = runs.read_json(out / COMMIT)
    return record["rows"] - record["episodes"]


def _settings(
    algorithm: str,
    settings: Mapping[str, Any] | None,
    explorer: Actor | Bonus,
    bonus: Bonus | None,
    action_space: Space,
) -> dict[str, Any]:
    """Returns the settings of what learns from `bonus`, with the discount among them.

    Raises:
        SpecError: There is no such algorithm.
        ValueError: It has no such setting, or nothing learns.
        SpaceError: It cannot take these actions.
    """
    cls, name = get_algorithm(algorithm), algorithm.lower()
    if settings and bonus is None:
        raise ValueError(f"explorer {explorer.name!r} learns nothing, and `settings` are for the policy that does")
    check_settings(cls, settings or {})
    off_policy = issubclass(cls, OffPolicyAlgorithm)
    suitable = Discrete if name in ("dqn", "qrdqn") else Box
    if bonus is not None and off_policy and not isinstance(action_space, suitable):
        raise SpaceError(f"{cls.__name__} takes {suitable.__name__} actions, and these are {action_space}; use PPO")
    default = SETTINGS.get(name, OFF_POLICY_SETTINGS if off_policy else {})
    gamma = inspect.signature(cls).parameters["gamma"].default
    return {"gamma": gamma} | default | dict(settings or {})


def _roll_out(algorithm: str, settings: Mapping[str, Any]) -> int:
    """Returns the steps of each environment between trainings of the bonus: a roll-out, if there are any."""
    # Off-policy, `n_steps` is how far a return looks ahead.
    off_policy = issubclass(get_algorithm(algorithm), OffPolicyAlgorithm)
    return TRAIN_EVERY if off_policy else settings.get("n_steps", TRAIN_EVERY)


def _goal(until: str | None) -> dict[str, int]:
    """Returns what `until` waits for, `{"states": 5000}`.

    Raises:
        ValueError: It is not written so, or there is nothing of the kind.
    """
    goal = {}
    for part in until.split(",") if until else []:
        name, _, number = part.strip().partition("=")
        if name not in UNTIL or not number.isdigit() or int(number) < 1:
            raise ValueError(
                f"until={until!r} is not understood: write states=5000; it waits for {', '.join(UNTIL)}."
                f"{nearest(name, UNTIL)}"
            )
        goal[name] = int(number)
    return goal


def _act(session: _Session, actor: Actor, env: VecEnv, rng: np.random.Generator) -> None:
    """Lets an actor act until the session ends."""
    obs, first, more = env.reset(), np.ones(env.num_envs, bool), True
    while more:
        obs, _, first, _ = env.step(actor.act(obs, first, rng))
        more = session.step()


def _learn(
    session: _Session,
    env: VecEnv,
    rewarded: IntrinsicReward,
    network: Encoder,
    algorithm: str,
    settings: dict[str, Any],
    seed: int,
) -> None:
    """Lets an algorithm learn from the bonus until the session ends; first, random steps settle the statistics."""
    extra = dict(settings.pop("policy_kwargs", {}))
    cls = get_algorithm(algorithm)
    head = "MultiInput" if spaces.kind(env.observation_space) == "dict" else "Mlp"
    try:
        model = cls(
            f"{head}LstmPolicy" if algorithm.lower() == "recurrentppo" else f"{head}Policy",
            env,
            policy_kwargs=policy_kwargs(network, algorithm, mode="scratch", **extra),
            seed=seed,
            device=rewarded.device,
            **settings,
        )
    except (AssertionError, TypeError) as error:
        raise ValueError(f"{cls.__name__} cannot be made with {settings}: {error}") from error
    masks, options = _masks(algorithm, env)
    rng = np.random.default_rng([seed, 1])
    if not session.restore(rewarded, model):
        obs = env.reset()
        for _ in range(rewarded.bonus.warmup):
            if masks is None:
                actions = sample_actions(env.action_space, env.num_envs, rng)
            else:
                # Untrained, it draws evenly among the actions that are allowed.
                actions = cast(Any, model).predict(obs, action_masks=masks(env))[0]
            obs = env.step(actions)[0]
            if not session.step():
                return
    model.learn(session.steps, callback=_Callback(session), **options)


def _masks(algorithm: str, env: VecEnv) -> tuple[Callable[[VecEnv], np.ndarray] | None, dict[str, Any]]:
    """Returns what gives the actions that are allowed, if environments and algorithm know of it, and options to learn.

    MaskablePPO wants masks of environments that have none, unless it is told not to.
    """
    if algorithm.lower() != "maskableppo":
        return None, {}
    from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported

    supported = is_masking_supported(env)
    return get_action_masks if supported else None, {"use_masking": supported}


class _Session:
    """One call of `collect`: how far it got, what it reached, and what it saves as it goes."""

    def __init__(
        self,
        out: Path,
        writer: DatasetWriter,
        steps: int,
        checkpoint_every: int,
        interrupted: threading.Event,
        goal: Mapping[str, int],
        follow: Callable[[int], None] | None = None,
    ) -> None:
        self.writer, self.steps, self.checkpoint_every = writer, steps, checkpoint_every
        self._goal = goal
        self.folder = out / EXPLORER
        self.folder.mkdir(exist_ok=True)
        for left in self.folder.glob(".*"):
            # What a writer that was killed had not renamed yet.
            shutil.rmtree(left)
        self.recorder: Recorder
        self.env: IntrinsicReward | None = None
        self.model: BaseAlgorithm | None = None
        self.coverage = Coverage()
        self.before = writer.n_transitions
        if self.before:
            for episode in Dataset(out):
                self.coverage.add(episode)
            runs.trim_jsonl(self.folder / METRICS, lambda row: row["steps"] <= self.before)
        self._next = self.checkpoint_every
        self.quiet = follow is not None
        bar: dict[str, Any] = {"total": steps, "initial": self.before, "desc": "collect", "mininterval": 0.5}
        bar |= {"unit": "step", "unit_scale": True}
        self._bar = tqdm(**bar) if follow is None else _ToldBar(follow, **bar)
        self._interrupted = interrupted
        self._started = time.perf_counter()

    def add(self, episode: Episode) -> None:
        """Takes an episode from the recorder."""
        self.writer.add(episode)
        self.coverage.add(episode)

    def step(self) -> bool:
        """Called after every step of the environments; returns whether there is one more to take."""
        self._bar.update(self.recorder.num_envs)
        if self._interrupted.is_set():
            self.recorder.finish()
            raise KeyboardInterrupt
        if self.before + self.recorder.steps >= self.steps:
            return False
        if self.recorder.steps >= self._next:
            self._next += self.checkpoint_every
            self.checkpoint()
            return not self.reached
        return True

    @property
    def reached(self) -> bool:
        """Whether coverage has reached what was to be waited for."""
        figures = self.coverage.figures() if self._goal else {}
        return bool(self._goal) and all(figures.get(name, 0) >= number for name, number in self._goal.items())

    def checkpoint(self) -> None:
        """Saves the explorer, and logs a row of coverage; the writer commits what was recorded by itself."""
        row = self.coverage.figures() | {"seconds": round(time.perf_counter() - self._started, 3)}
        if self.env is not None and self.model is not None:
            row |= self.env.metrics
            tensors = {key: value.detach().cpu().contiguous() for key, value in self.env.state_dict().items()}
            runs.write_atomically(self.folder / BONUS, lambda path: save_file(tensors, path))
            runs.write_json(self.folder / RECORD, {"explorer_version": self.recorder.explorer_version})
            runs.write_atomically(self.folder / POLICY, self.model.save)
        runs.append_jsonl(self.folder / METRICS, row)
        self._bar.set_postfix({name: row[name] for name in ("observations", "states") if name in row})

    def restore(self, env: IntrinsicReward, model: BaseAlgorithm) -> bool:
        """Takes up policy and bonus as they were last saved; returns whether there were any."""
        self.env, self.model = env, model
        if not (self.folder / POLICY).exists():
            return False
        env.load_state_dict(load_file(self.folder / BONUS, device=str(env.device)))
        # Unlike `load`, this unpickles nothing.
        model.set_parameters(str(self.folder / POLICY), device=env.device)
        self.recorder.explorer_version = runs.read_json(self.folder / RECORD)["explorer_version"]
        return True

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        try:
            if kind is None or kind is KeyboardInterrupt:
                self.writer.flush()
                self.checkpoint()
        finally:
            self._bar.close()
        if kind is KeyboardInterrupt and not self.quiet:
            print(f"stopped with {self.writer.n_transitions:,} steps on disk; the same command goes on from there")

    def summarise(self, explorer: Any) -> None:
        """Prints what was reached, and saves it."""
        figures = self.coverage.figures()
        runs.write_json(self.folder / COVERAGE, figures)
        if not self.quiet:
            print(f"{explorer}: {describe(figures)}")


class _ToldBar(tqdm):
    """A progress bar that somebody else shows."""

    def __init__(self, follow: Callable[[int], None], **options: Any) -> None:
        self.follow = follow
        super().__init__(file=io.StringIO(), **options)

    def display(self, *args: Any, **options: Any) -> None:
        """Says how far it got."""
        self.follow(int(self.n))


def describe(figures: Mapping[str, Any]) -> str:
    """Returns the figures of `Coverage` in words."""
    text = (
        f"{figures['steps']:,} steps in {figures['episodes']:,} episodes of {figures['mean_length']:g} on average, "
        f"{figures['observations']:,} distinct observations"
    )
    if "states" in figures:
        values = ", ".join(f"{name} {n}" for name, n in figures["factors"].items())
        text += f", {figures['states']:,} distinct states (values of each factor: {values})"
    return (
        f"{text}. The goal was reached in {figures['goal_fraction']:.1%} of episodes, which the explorer is never told."
    )


class _Callback(BaseCallback):
    """Tells the session of every step, and the recorder of every update."""

    def __init__(self, session: _Session) -> None:
        super().__init__()
        self.session = session

    def _on_step(self) -> bool:
        return self.session.step()

    def _on_rollout_end(self) -> None:
        # Algorithms learn from a roll-out as soon as it has ended.
        self.session.recorder.explorer_version += 1
