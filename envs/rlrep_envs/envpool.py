"""The `envpool` backend: environments in C++, stepped all at once, behind Stable-Baselines3's rule of resetting."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from rlrep_envs.spec import THREADS, EnvSpec, nearest

_OURS = ("num_envs", "batch_size", "max_num_players", "seed", "env_seed", "base_path", "gym_reset_return_info")
"""Keywords of envpool's that are not for a spec to say."""

_LIMITED = ("atari", "box2d", "classic_control", "minigrid", "mujoco.gym", "toy_text")
"""Families of environments that use their step limit for nothing but to end an episode."""

_NO_LIMIT = 2**31 - 1


def make_pool(spec: EnvSpec, n_envs: int, factors: bool) -> EnvPoolVecEnv:
    """Makes `n_envs` of envpool's environments, frames unstacked.

    Raises:
        ImportError: envpool is not there, or cannot be loaded.
        ValueError: No such environment in envpool, or something that this backend cannot do.
    """
    ids = registry().list_all_envs()
    if spec.id not in ids:
        hint = nearest(spec.id, ids, n=3)
        raise ValueError(f"envpool has no environment called {spec.id!r}.{hint} Others need backend=python")
    if spec.distraction is not None:
        raise ValueError(f"distraction={spec.distraction} is not there with backend=envpool; use backend=python")
    if spec.is_minigrid:
        from rlrep_envs.envpool_minigrid import MiniGridPool

        return MiniGridPool(spec, n_envs, factors)
    if spec.obs != "native":
        raise ValueError(f"obs={spec.obs} is for MiniGrid and BabyAI; {spec.id} is neither, so use obs=native")
    if spec.mission is True:
        raise ValueError(f"mission=true is for MiniGrid and BabyAI; {spec.id} is neither and has no mission")
    return EnvPoolVecEnv(spec, n_envs)


class EnvPoolVecEnv(VecEnv):
    """N environments of envpool that behave as Stable-Baselines3's own do.

    envpool resets an environment on the step after its last; here that happens in the same step, and the last
    observation, `TimeLimit.truncated` and Monitor's `episode` are in its info. Where a step both ends an episode and
    reaches the step limit, envpool says only the latter; here the limit is kept outside the pool, and both are known.
    Pictures are channels-last. Infos of environments that did not end are empty.

    envpool fixes the seeds when a pool is made, so seeding makes another one at the next reset.

    Args:
        spec: With an id that envpool has; its keywords are envpool's.
        n_envs: How many.

    Raises:
        ValueError: Keywords that envpool does not take, or an environment that Stable-Baselines3 cannot use.
    """

    factors: dict[str, np.ndarray]
    """Ground truth of the observations returned last, (N,) int64 each; valid until the next step."""

    def __init__(self, spec: EnvSpec, n_envs: int = 1) -> None:
        self.spec, self.factors = spec, {}
        self._config = {THREADS: 1, **self._configure(spec)}
        made = _specify(spec.id, self._config)
        limit = made.config.max_episode_steps
        family = registry().specs[spec.id][0].removeprefix("envpool.")
        self._limit = limit if family in _LIMITED and 0 < limit < _NO_LIMIT else None
        if self._limit is not None:
            self._config["max_episode_steps"] = self._limit + 1
        self._at = {name: i for i, name in enumerate(made.state_array_spec)}
        *_, action = made.action_array_spec.values()
        if len(made.action_array_spec) != 3 or made.config.max_num_players != 1:
            raise ValueError(f"{spec.id} takes several actions at once, which Stable-Baselines3 does not know")
        self._action_type = action.dtype
        super().__init__(n_envs, *self._spaces(made))
        self._pool: Any = None
        self._ids = np.arange(n_envs, dtype=np.int32)
        self._waiting = False
        self._returns, self._lengths = np.zeros(n_envs), np.zeros(n_envs, np.int64)
        self._started = time.time()

    # ------------------------------------------------------------------------------------------- what is overridden

    def _configure(self, spec: EnvSpec) -> dict[str, Any]:
        """Returns envpool's keywords."""
        # Frames are stacked outside, and pictures channels-last, as everywhere in this package.
        return {**_defaults(spec.id), **spec.kwargs}

    def _spaces(self, made: Any) -> tuple[spaces.Space, spaces.Space]:
        """Returns the spaces of `_observe`'s observations and of the actions."""
        with warnings.catch_warnings():
            # It writes the bounds of single precision in double.
            warnings.filterwarnings("ignore", ".*precision lowered")
            native = made.observation_space
        keys = [name for name in self._at if name.startswith("obs")]
        parts = native.spaces if isinstance(native, spaces.Dict) else {"": native}
        adapted = {key: _adapt(part, self.spec.id) for key, part in parts.items()}
        self._parts: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
            key: (self._at[f"obs:{key}" if key else keys[0]], convert) for key, (_, convert) in adapted.items()
        }
        if not isinstance(native, spaces.Dict):
            return adapted[""][0], made.action_space
        return spaces.Dict({key: space for key, (space, _) in adapted.items()}), made.action_space

    def _observe(self, state: list[np.ndarray]) -> VecEnvObs:
        """Returns the observations in what the pool said."""
        obs = {key: convert(state[i]) for key, (i, convert) in self._parts.items()}
        return obs if isinstance(self.observation_space, spaces.Dict) else obs[""]

    def _rewards(self, state: list[np.ndarray]) -> np.ndarray:
        """Returns the rewards, (N,) float32."""
        return state[self._at["reward"]]

    def _ends(self, state: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Returns which episodes were terminated and which reached the step limit, (N,) bool each."""
        done = state[self._at["done"]]
        if self._limit is None:
            truncated = state[self._at["trunc"]]
            return done & ~truncated, truncated
        return done, state[self._at["elapsed_step"]] >= self._limit

    def _begin(self, ids: np.ndarray, state: list[np.ndarray]) -> None:
        """Takes note of the environments that have begun an episode."""

    def _advance(self, state: list[np.ndarray]) -> None:
        """Takes note of a step of all environments."""

    # ----------------------------------------------------------------------------------------------------- stepping

    def reset(self) -> VecEnvObs:
        """Resets every environment, with the seeds given since the last time if there are any."""
        if self._pool is None and self._seeds[0] is None:
            self.seed()
        if self._waiting:
            self._pool._recv()
            self._waiting = False
        if self._seeds[0] is not None:
            seeds = [int(seed or 0) % 2**31 for seed in self._seeds]
            self._pool = registry().make_gymnasium(self.spec.id, num_envs=self.num_envs, env_seed=seeds, **self._config)
        self._reset_seeds()
        self._reset_options()
        self._pool._reset(self._ids)
        state = self._pool._recv()
        self._returns[:], self._lengths[:] = 0, 0
        self._begin(self._ids, state)
        return self._observe(state)

    def step_async(self, actions: np.ndarray) -> None:
        """Has the pool begin the step.

        Raises:
            ValueError: An action that does not exist; envpool would end the process.
        """
        space = self.action_space
        self._actions = np.ascontiguousarray(actions, self._action_type)
        # Below the first action, an unsigned number is a large one.
        if isinstance(space, spaces.Discrete) and (self._actions - space.start).view(np.uint32).max() >= space.n:
            raise ValueError(f"actions of {self.spec.id} are in {space}, and these were {np.asarray(actions).tolist()}")
        # The underscored methods are what envpool's own wrappers call, which cost as much again as half a step.
        self._pool._send([self._ids, self._ids, self._actions])
        self._waiting = True

    def step_wait(self) -> VecEnvStepReturn:
        """Waits for the step, and resets the environments whose episodes ended."""
        state = self._pool._recv()
        self._waiting = False
        rewards = self._rewards(state)
        self._returns += state[self._at["info:reward"]] if "info:reward" in self._at else rewards
        self._lengths += 1
        self._advance(state)
        obs = self._observe(state)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        terminated, truncated = self._ends(state)
        dones = terminated | truncated
        if dones.any():
            self._end(state, obs, terminated, truncated, infos)
        return obs, rewards, dones, infos

    def _end(
        self,
        state: list[np.ndarray],
        obs: VecEnvObs,
        terminated: np.ndarray,
        truncated: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Fills the infos of the episodes that ended, and replaces their observations by the next episodes' first."""
        # Where Atari's episodes end with a life, Monitor's go on to the end of the game.
        over = state[self._at["info:terminated"]] | truncated if "info:terminated" in self._at else None
        seconds = round(time.time() - self._started, 6)
        ended = np.flatnonzero(terminated | truncated)
        for i in ended.tolist():
            info = infos[i]
            info["terminal_observation"] = _row(obs, i)
            info["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
            if self.factors:
                info["factors"] = {name: int(values[i]) for name, values in self.factors.items()}
            if over is None or over[i]:
                r, n = round(float(self._returns[i]), 6), int(self._lengths[i])
                info["episode"] = {"r": r, "l": n, "t": seconds}
                self._returns[i] = self._lengths[i] = 0
        done = state[self._at["done"]][ended]
        # What the pool ended begins anew on whatever action; what was cut here must be told to.
        if len(ids := ended[done].astype(np.int32)):
            self._pool._send([ids, ids, self._actions[ids]])
            self._replace(ids, obs)
        if len(ids := ended[~done].astype(np.int32)):
            self._pool._reset(ids)
            self._replace(ids, obs)

    def _replace(self, ids: np.ndarray, obs: VecEnvObs) -> None:
        """Receives the first observations of new episodes."""
        state = self._pool._recv()
        self._begin(ids, state)
        fresh = self._observe(state)
        if isinstance(obs, dict) and isinstance(fresh, dict):
            for key, part in obs.items():
                part[ids] = fresh[key]
        else:
            obs[ids] = fresh  # type: ignore[index, assignment]

    def close(self) -> None:
        """Ends the pool's threads."""
        self._pool = None

    # ------------------------------------------------------------------------------------ what there is none of here

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Returns `render_mode`, which is None; there are no single environments to have other attributes."""
        if attr_name != "render_mode":
            raise AttributeError(f"environments of envpool have no {attr_name!r} to read; use backend=python")
        return [None for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Raises an AttributeError: there are no single environments."""
        raise AttributeError(f"environments of envpool have no {attr_name!r} to set; use backend=python")

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Raises an AttributeError: there are no single environments."""
        raise AttributeError(f"environments of envpool have no method {method_name!r}; use backend=python")

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        """Says yes to Monitor, whose `episode` is in the infos, and no to everything else."""
        return [issubclass(Monitor, wrapper_class) for _ in self._get_indices(indices)]


def registry() -> Any:
    """Returns envpool's registry of environments.

    Raises:
        ImportError: envpool is not there, or cannot be loaded.
    """
    try:
        from envpool.registration import registry as found
    except ImportError as error:
        hint = "pip install 'rlrep[envpool]'"
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == "envpool"
        reason = "is not installed" if missing else f"cannot be loaded: {error}"
        raise ImportError(f"backend=envpool needs envpool, which {reason} ({hint})") from error
    return found


def _specify(id: str, config: Mapping[str, Any]) -> Any:
    """Returns envpool's own spec of an environment."""
    try:
        valid = registry().make_spec(id)._config_keys
    except ImportError as error:
        raise ImportError(f"envpool cannot load {id}: {error}") from error
    valid = [key for key in valid if key not in _OURS]
    if unknown := [key for key in config if key not in valid]:
        hint = nearest(unknown[0], [*valid, *EnvSpec.__dataclass_fields__])
        raise ValueError(f"envpool's {id} has no keyword {unknown[0]!r}.{hint} Its keywords: {', '.join(valid)}.")
    try:
        return registry().make_spec(id, **config)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"envpool's {id} cannot be made with {dict(config)}: {error}") from error


def _defaults(id: str) -> dict[str, Any]:
    """Returns the keywords that this package sets otherwise than envpool."""
    match registry().specs[id][0]:
        case "envpool.atari":
            return {"stack_num": 1}
        case "envpool.procgen":
            return {"channel_first": False}
        case _:
            return {}


def _adapt(space: spaces.Space, id: str) -> tuple[spaces.Space, Callable[[np.ndarray], np.ndarray]]:
    """Returns the space and the conversion of an observation, or of a part of it, as Stable-Baselines3 takes it."""
    if isinstance(space, spaces.Discrete):
        return spaces.Discrete(int(space.n), start=int(space.start)), lambda x: x.reshape(len(x)).astype(np.int64)
    if isinstance(space, spaces.MultiBinary):
        return space, lambda x: x.astype(np.int8)
    if not isinstance(space, spaces.Box):
        raise ValueError(f"{id} observes {space}, which Stable-Baselines3 does not take")
    if space.dtype == np.uint8 and len(space.shape) == 3 and int(np.argmin(space.shape)) == 0:
        channels_last = spaces.Box(np.moveaxis(space.low, 0, -1), np.moveaxis(space.high, 0, -1), dtype=np.uint8)
        return channels_last, lambda x: np.ascontiguousarray(np.moveaxis(x, 1, -1))
    if np.issubdtype(space.dtype, np.floating):
        # envpool gives the least positive and the greatest number where there is no bound.
        limits = np.finfo(space.dtype)
        low = np.where((space.low == limits.tiny) | (space.low == limits.min), -np.inf, space.low)
        high = np.where(space.high == limits.max, np.inf, space.high)
        space = spaces.Box(low, high, dtype=space.dtype.type)
    return space, lambda x: x


def _row(obs: VecEnvObs, i: int) -> Any:
    """Returns a copy of one environment's observation."""
    return {key: part[i].copy() for key, part in obs.items()} if isinstance(obs, dict) else obs[i].copy()
