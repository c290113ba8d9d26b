"""`make_env` and `make_vec_env`: environments from their specs."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import load_env_creator
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from rlrep_envs.distractions import Background, NoisyTV
from rlrep_envs.frame_stack import FrameStack
from rlrep_envs.spec import EnvSpec, nearest
from rlrep_envs.vec_env import Draw, SyncVecEnv


def make_env(spec: str | Mapping[str, Any] | EnvSpec, factors: bool = True) -> gym.Env:
    """Makes one environment; stacking frames is left to `make_vec_env`.

    Args:
        spec: `"MiniGrid-DoorKey-6x6-v0:obs=rgb"`, a mapping, or an `EnvSpec`.
        factors: Whether MiniGrid's ground truth goes into `info["factors"]`.

    Raises:
        ValueError: An unknown environment, keywords that it does not take, or an observation mode or distraction that
            is not possible in it.
    """
    spec = EnvSpec.parse(spec)
    if spec.backend != "python":
        raise ValueError(
            f"backend={spec.backend} steps many environments at once; make_vec_env makes them, n_envs=1 too. "
            "For a single Gymnasium environment, use backend=python"
        )
    env = _make(spec)
    if _is_minigrid(env):
        from rlrep_envs.minigrid import Factors, MiniGridObservation

        if factors:
            env = Factors(env)
        env = MiniGridObservation(env, spec.obs, spec.mission)
    elif spec.obs != "native":
        raise ValueError(f"obs={spec.obs} is for MiniGrid and BabyAI; {spec.id} is neither, so use obs=native")
    elif spec.mission is True:
        raise ValueError(f"mission=true is for MiniGrid and BabyAI; {spec.id} is neither and has no mission")
    match spec.distraction:
        case "noisy_tv":
            if _is_minigrid(env) and env.action_space.n < 7:  # type: ignore[attr-defined]
                raise ValueError(f"distraction=noisy_tv needs an action that does nothing, and {spec.id} has none")
            env = NoisyTV(env)
        case "background":
            env = Background(env)
    return env


def make_vec_env(
    spec: str | Mapping[str, Any] | EnvSpec, n_envs: int = 1, seed: int = 0, factors: bool = True
) -> VecEnv:
    """Makes `n_envs` environments for Stable-Baselines3, stepped in this process by the spec's backend.

    Args:
        spec: As for `make_env`.
        n_envs: How many.
        seed: The first one's seed; the next have `seed + 1`, `seed + 2` and so on.
        factors: Whether MiniGrid's ground truth goes into the environments' `factors` and, under that name, into infos.

    Raises:
        ValueError: As `make_env`, or `n_envs` below 1.
        ImportError: The spec's backend is not installed.
    """
    spec = EnvSpec.parse(spec)
    if n_envs < 1:
        raise ValueError(f"n_envs={n_envs} is not at least 1")

    draw: Draw | None = None
    single = spec
    if spec.obs == "rgb" and spec.distraction is None:
        from rlrep_envs.minigrid import render_symbols

        # Symbols of all environments are drawn together.
        draw, single = render_symbols, dataclasses.replace(spec, obs="grid")

    def member(i: int) -> Callable[[], gym.Env]:
        def make() -> gym.Env:
            env = Monitor(make_env(single, factors))
            env.action_space.seed(seed + i)
            return env

        return make

    venv: VecEnv
    if spec.backend == "envpool":
        from rlrep_envs.envpool import make_pool

        venv = make_pool(spec, n_envs, factors)
        venv.action_space.seed(seed)
    else:
        venv = SyncVecEnv([member(i) for i in range(n_envs)], draw)
    if spec.frame_stack > 1:
        venv = FrameStack(venv, spec.frame_stack)
    venv.seed(seed)
    return venv


def _is_minigrid(env: gym.Env) -> bool:
    """Returns whether this is one of MiniGrid's, without importing MiniGrid for the others."""
    return any(
        f"{cls.__module__}.{cls.__name__}" == "minigrid.minigrid_env.MiniGridEnv" for cls in type(env.unwrapped).__mro__
    )


def _make(spec: EnvSpec) -> gym.Env:
    module, _, name = spec.id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        elif name not in gym.registry:
            # MiniGrid registers its environments when it is imported.
            importlib.import_module("minigrid")
        registered = gym.spec(name)
    except ImportError as error:
        raise ValueError(f"{spec.id} cannot be made: {error}") from error
    except gym.error.Error as error:
        raise ValueError(f"there is no environment called {name!r}.{nearest(name, gym.registry, n=3)}") from error
    try:
        return gym.make(spec.id, disable_env_checker=True, **spec.kwargs)
    except (TypeError, ValueError, AssertionError) as error:
        if not spec.kwargs:
            raise
        cause = error.__cause__ or error
        reason = str(cause) or traceback.extract_tb(cause.__traceback__)[-1].line
        valid = _keywords(registered.entry_point)
        unknown = [key for key in spec.kwargs if key not in valid]
        hint = nearest(unknown[0], [*valid, *EnvSpec.__dataclass_fields__]) if unknown else ""
        raise ValueError(
            f"{spec.id} cannot be made with {dict(spec.kwargs)}: {reason}.{hint} Its keywords: {', '.join(valid)}."
        ) from error


def _keywords(entry_point: Any) -> list[str]:
    """Returns the keywords of an environment's constructor, those it hands on to its base classes included."""
    creator = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
    constructors = [vars(cls)["__init__"] for cls in getattr(creator, "__mro__", ()) if "__init__" in vars(cls)] or [
        creator
    ]
    keywords: dict[str, None] = {}
    for constructor in constructors:
        parameters = inspect.signature(constructor).parameters.values()
        keywords |= {p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY or p.kind is p.POSITIONAL_OR_KEYWORD}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return [name for name in keywords if name not in ("self", "render_mode", "mission_space")]
