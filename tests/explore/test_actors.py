"""Explorers that choose actions themselves: random ones, and policies trained before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
from gymnasium import spaces
from rlrep_envs import make_vec_env
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.vec_env import DummyVecEnv

from rlrep.collect import collect
from rlrep.encoders import make_encoder
from rlrep.explore import Actor, explorers, make_explorer
from rlrep.explore.base import sample_actions
from rlrep.sb3 import algorithms, policy_kwargs
from rlrep.types import RlrepError, SpaceError

N = 1000
SPACE = spaces.Box(-1, 1, (3,), np.float32)
ACTIONS: dict[str, spaces.Space] = {
    "discrete": spaces.Discrete(5, start=2),
    "multidiscrete": spaces.MultiDiscrete([2, 7]),
    "multibinary": spaces.MultiBinary(3),
    "box": spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([1.0, 5.0], np.float32)),
    "integer box": spaces.Box(-1, 2, (2,), np.int32),
}
TINY = "rlrep/TinyGrid-v0:obs_type={}"
FIRST = np.zeros(4, bool)


@pytest.mark.parametrize("kind", ACTIONS)
def test_random_actions_are_uniform_in_their_space_and_decided_by_the_generator(kind: str) -> None:
    space = ACTIONS[kind]
    actions = [sample_actions(space, N, np.random.default_rng(3)) for _ in range(2)]
    assert np.array_equal(*actions)
    assert actions[0].shape == (N, *space.shape)
    assert actions[0].dtype == space.dtype
    assert all(space.contains(action) for action in actions[0])
    # Gymnasium's own samples are uniform too: means agree to 5 standard errors.
    space.seed(0)
    theirs = np.array([space.sample() for _ in range(N)])
    error = np.sqrt((actions[0].var(axis=0) + theirs.var(axis=0)) / N)
    assert np.all(np.abs(actions[0].mean(axis=0) - theirs.mean(axis=0)) < 5 * error)
    if kind != "box":
        assert np.array_equal(np.unique(actions[0]), np.unique(theirs))


def test_actions_without_bounds_cannot_be_drawn() -> None:
    with pytest.raises(SpaceError, match="bounds"):
        make_explorer("random", SPACE, spaces.Box(-np.inf, np.inf, (2,)), 4)


def test_sticky_actions_repeat_as_often_as_stated_but_not_into_an_episode() -> None:
    actor = make_explorer("random:sticky=0.5", SPACE, spaces.Discrete(1_000_000), N)
    assert isinstance(actor, Actor)
    rng, obs = np.random.default_rng(0), np.zeros((N, 3), np.float32)
    first = np.arange(N) < 200
    before = actor.act(obs, np.ones(N, bool), rng)
    after = actor.act(obs, first, rng)
    same = before == after
    assert not same[first].any()
    assert 0.4 < same[~first].mean() < 0.6
    with pytest.raises(ValueError, match="sticky"):
        make_explorer("random:sticky=1.0", SPACE, spaces.Discrete(2), N)


# -------------------------------------------------------------------------------------------------------- policies


def saved(cls: Any, env: str, path: Path, **options: Any) -> Any:
    venv = make_vec_env(env, 4, 0)
    if "dict" in env:
        # SB3's own network for a Dict takes boards for pictures, and finds them too small.
        options["policy_kwargs"] = policy_kwargs(make_encoder("auto", venv.observation_space), "ppo", mode="scratch")
    model = cls("MultiInputPolicy" if "dict" in env else "MlpPolicy", venv, seed=0, **options)
    model.save(path)
    return model


def test_a_policy_of_a_path_with_odd_characters_collects(tmp_path: Path) -> None:
    path = tmp_path / "a=b, c:d [1] é.zip"
    spec = TINY.format("vector")
    saved(PPO, spec, path, n_steps=8, batch_size=32)
    data = collect(spec, out=tmp_path / "data", explorer=f"policy:{path}", steps=40, n_envs=4)
    assert data.n_transitions == 40
    again = collect(spec, out=tmp_path / "again", explorer={"name": "policy", "path": str(path)}, steps=40, n_envs=4)
    assert again.digest == data.digest


def test_what_collect_saved_explores_again(tmp_path: Path) -> None:
    spec = TINY.format("grid")
    collect(spec, out=tmp_path / "one", explorer="count", steps=64, n_envs=4, settings={"n_steps": 8, "batch_size": 8})
    policy = f"policy:{tmp_path / 'one' / 'explorer' / 'policy'}"
    assert collect(spec, out=tmp_path / "two", explorer=policy, steps=40, n_envs=4).n_transitions == 40


@pytest.mark.parametrize("obs_type", ["grid", "rgb", "vector", "dict"])
def test_a_policy_acts_as_sb3_itself_would(obs_type: str, tmp_path: Path) -> None:
    spec = TINY.format(obs_type)
    model = saved(PPO, spec, tmp_path / "p.zip", n_steps=8, batch_size=32)
    env = make_vec_env(spec, 4, 0)
    obs = env.reset()
    best = make_explorer(
        {"name": "policy", "path": str(tmp_path / "p.zip"), "deterministic": True},
        env.observation_space,
        env.action_space,
        4,
    )
    assert best.act(obs, FIRST, np.random.default_rng(0)).tolist() == model.predict(obs, deterministic=True)[0].tolist()
    drawn = make_explorer(f"policy:{tmp_path / 'p.zip'}", env.observation_space, env.action_space, 4)
    before = torch.random.get_rng_state()
    one, other = (drawn.act(obs, FIRST, np.random.default_rng(5)) for _ in range(2))
    assert one.tolist() == other.tolist(), "the generator that is passed is the only source of chance"
    assert torch.equal(torch.random.get_rng_state(), before)
    many = {tuple(drawn.act(obs, FIRST, np.random.default_rng(i)).tolist()) for i in range(20)}
    assert len(many) > 1


class Continuous(gym.Env[Any, Any]):
    observation_space, action_space = SPACE, spaces.Box(-1, 1, (2,), np.float32)


@pytest.mark.parametrize("name", sorted(algorithms()))
def test_the_algorithm_is_told_from_the_zip(name: str, tmp_path: Path) -> None:
    cls = algorithms()[name]
    continuous = name in ("sac", "td3", "ddpg", "tqc", "crossq")
    env = DummyVecEnv([Continuous]) if continuous else make_vec_env(TINY.format("vector"), 1, 0)
    policy = "MlpLstmPolicy" if name == "recurrentppo" else "MlpPolicy"
    cls(policy, env).save(tmp_path / "p.zip")
    actor = make_explorer(f"policy:{tmp_path / 'p.zip'}", env.observation_space, env.action_space, 1)
    # DDPG is saved as what it is made of, a TD3.
    assert type(actor.model) is (TD3 if name == "ddpg" else cls) or isinstance(actor.model, cls)
    obs = np.zeros((1, *env.observation_space.shape), np.float32)
    assert env.action_space.contains(actor.act(obs, np.ones(1, bool), np.random.default_rng(0))[0])


def test_a_recurrent_policy_remembers_within_an_episode_only(tmp_path: Path) -> None:
    contrib = pytest.importorskip("sb3_contrib")
    env = make_vec_env(TINY.format("vector"), 2, 0)
    contrib.RecurrentPPO("MlpLstmPolicy", env, seed=0).save(tmp_path / "p.zip")
    actor = make_explorer(f"policy:{tmp_path / 'p.zip'}", env.observation_space, env.action_space, 2)
    obs = np.ones((2, 7), np.float32)
    for t in range(3):
        actor.act(obs, np.array([t == 0] * 2), np.random.default_rng(0))
    long = actor._state[0].copy()
    actor.act(obs, np.array([True, False]), np.random.default_rng(0))
    fresh = make_explorer(f"policy:{tmp_path / 'p.zip'}", env.observation_space, env.action_space, 2)
    fresh.act(obs, np.ones(2, bool), np.random.default_rng(0))
    np.testing.assert_allclose(actor._state[0][:, 0], fresh._state[0][:, 0], rtol=1e-5)
    assert not np.allclose(actor._state[0][:, 1], fresh._state[0][:, 1], rtol=1e-3)
    assert not np.allclose(long[:, 0], fresh._state[0][:, 0], rtol=1e-3)


@pytest.mark.parametrize(("cls", "given"), [(PPO, "A2C"), (A2C, "a2c"), (DQN, "dqn"), (SAC, "sac")])
def test_the_algorithm_may_be_named(cls: Any, given: str, tmp_path: Path) -> None:
    env = DummyVecEnv([Continuous]) if cls is SAC else make_vec_env(TINY.format("vector"), 1, 0)
    cls("MlpPolicy", env).save(tmp_path / "p.zip")
    spec = f'policy:path="{tmp_path / "p.zip"}",algorithm={given}'
    actor = make_explorer(spec, env.observation_space, env.action_space, 1)
    assert isinstance(actor.model, getattr(stable_baselines3, given.upper()))


def test_wrong_policies_are_refused_with_the_reason(tmp_path: Path) -> None:
    saved(PPO, TINY.format("vector"), tmp_path / "p.zip", n_steps=8, batch_size=32)
    (tmp_path / "no.zip").write_text("not a zip")

    def make(path: str, observation_space: Any = None, action_space: Any = None, **options: Any) -> Any:
        env = make_vec_env(TINY.format("vector"), 1, 0)
        spec = {"name": "policy", "path": str(tmp_path / path), **options}
        return make_explorer(spec, observation_space or env.observation_space, action_space or env.action_space, 1)

    make("p")
    with pytest.raises(SpaceError, match="trained on observations"):
        make("p.zip", observation_space=SPACE)
    with pytest.raises(SpaceError, match="trained with actions"):
        make("p.zip", action_space=spaces.Discrete(3))
    with pytest.raises(RlrepError, match="no file"):
        make("nowhere")
    with pytest.raises(RlrepError, match=r"no zip saved by Stable-Baselines3"):
        make("no.zip")
    with pytest.raises(RlrepError, match="cannot be loaded"):
        make("no.zip", algorithm="ppo")
    with pytest.raises(ValueError, match="Did you mean 'ppo'"):
        make("p.zip", algorithm="pp")


def test_explorers_are_actors_or_bonuses() -> None:
    assert {"random", "count", "rnd", "policy"} <= set(explorers.names())
    assert [name for name, cls in explorers.items() if issubclass(cls, Actor)] == ["policy", "random"]
