from __future__ import annotations

import subprocess
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from rlrep_envs import EnvSpec, make_env, make_vec_env
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv


class PairEnv(gym.Env):
    """A Dict of observations of every kind, and an info with factors of its own."""

    observation_space = spaces.Dict({"camera": spaces.Box(0, 255, (40, 40, 3), np.uint8), "speed": spaces.Discrete(3)})
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {"factors": {"speed": 0}}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        return self.observation_space.sample(), self.scale, False, False, {"factors": {"speed": 1}}


gym.register("PairTest-v0", entry_point=PairEnv)


@pytest.mark.parametrize(
    "spec",
    [
        "CartPole-v1",
        "Pendulum-v1:g=9.81",
        "FrozenLake-v1:map_name=8x8,is_slippery=false",
        "Taxi-v4" if "Taxi-v4" in gym.registry else "Taxi-v3",
        "PairTest-v0:scale=2.0",
        "gymnasium.envs:Acrobot-v1",
    ],
)
def test_any_environment_keeps_its_spaces(spec: str) -> None:
    parsed = EnvSpec.parse(spec)
    theirs = gym.make(parsed.id, **parsed.kwargs)
    venv = make_vec_env(spec, n_envs=2)
    assert venv.observation_space == theirs.observation_space
    assert venv.action_space == theirs.action_space
    obs = venv.reset()
    theirs_obs, info = theirs.reset(seed=0)
    if isinstance(obs, dict):
        assert {key: part.dtype for key, part in obs.items()} == {"camera": np.uint8, "speed": np.int64}
        assert venv.reset_infos[0]["factors"] == {"speed": 0}
        assert venv.step(np.zeros((2, 2), np.float32))[3][1]["factors"] == {"speed": 1}
    else:
        np.testing.assert_array_equal(obs[0], theirs_obs)
        assert obs.dtype == theirs.observation_space.dtype
        assert ("factors" in venv.reset_infos[0]) == ("factors" in info)


def test_a_class_of_ones_own_and_a_keyword_of_lists() -> None:
    env = make_env("MiniGrid-Empty-8x8-v0:obs=grid,agent_start_pos=[3,4],agent_start_dir=2")
    factors = env.reset(seed=0)[1]["factors"]
    assert (factors["agent_x"], factors["agent_y"], factors["agent_dir"]) == (3, 4, 2)
    lake = make_env("FrozenLake-v1:desc=[SF,FG]")
    assert lake.observation_space.n == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("MiniGrid-DoorKey-6x6:obs=rgb", "Did you mean 'MiniGrid-DoorKey-6x6-v0'"),
        (
            "MiniGrid-DorKey-6x6-v0",
            "no environment called 'MiniGrid-DorKey-6x6-v0'. Did you mean 'MiniGrid-DoorKey-6x6-v0'",
        ),
        ("minigrid-doorkey-6x6-v0", "Did you mean 'MiniGrid-DoorKey-6x6-v0'"),
        ("cartpole", "Did you mean .*'CartPole-v1'"),
        ("CartPole-v9", "Did you mean .*'CartPole-v1'"),
        ("rlrep/TinyGird-v0", "Did you mean 'rlrep/TinyGrid-v0'"),
        ("no_such_module:CartPole-v1", "No module named 'no_such_module'"),
        ("Qqqq", "no environment called 'Qqqq'.$"),
        ("a b c", "no environment called 'a b c'"),
        ("CartPole-v1:obs=rgb", "obs=rgb is for MiniGrid and BabyAI; CartPole-v1 is neither, so use obs=native"),
        ("rlrep/TinyGrid-v0:obs=grid", "use obs=native"),
        ("CartPole-v1:mission=true", "CartPole-v1 is neither and has no mission"),
        (
            "MiniGrid-Empty-5x5-v0:agent_view=5",
            "unexpected keyword argument 'agent_view'. Did you mean 'agent_view_size'",
        ),
        ("MiniGrid-Empty-5x5-v0:frame_stak=4", "Did you mean 'frame_stack'"),
        ("MiniGrid-Empty-5x5-v0:agent_view_size=4", "assert agent_view_size % 2 == 1"),
        ("CartPole-v1:gravity=3", "Its keywords: sutton_barto_reward"),
        ("rlrep/TinyGrid-v0:size=2", "size=2 has no room"),
    ],
)
def test_errors_help(spec: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make_env(spec)


def test_n_envs_is_checked() -> None:
    with pytest.raises(ValueError, match="n_envs=0"):
        make_vec_env("CartPole-v1", n_envs=0)


@pytest.mark.parametrize(
    "spec",
    [
        "MiniGrid-DoorKey-5x5-v0",
        "BabyAI-GoToLocal-v0:obs=rgb",
        "MiniGrid-Fetch-5x5-N2-v0:obs=rgb_full",
        "rlrep/TinyGrid-v0",
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_stable_baselines_accepts_it(spec: str) -> None:
    check_env(make_env(spec), skip_render_check=True)


@pytest.mark.parametrize(
    ("spec", "policy"),
    [
        ("MiniGrid-DoorKey-5x5-v0:obs=grid", "MlpPolicy"),
        ("MiniGrid-DoorKey-5x5-v0:obs=rgb,frame_stack=2", "CnnPolicy"),
        ("BabyAI-GoToLocal-v0:obs=rgb", "MultiInputPolicy"),
        ("rlrep/TinyGrid-v0:obs_type=rgb,distraction=background", "CnnPolicy"),
    ],
)
def test_stable_baselines_learns_on_it(spec: str, policy: str) -> None:
    PPO(policy, make_vec_env(spec, n_envs=2), n_steps=8, batch_size=8, n_epochs=1).learn(16)


def test_off_policy_learns_on_the_tiny_grid() -> None:
    DQN("MlpPolicy", make_vec_env("rlrep/TinyGrid-v0:obs_type=vector"), learning_starts=10, buffer_size=100).learn(50)


def trajectory(spec: str, seed: int, steps: int = 120) -> list[Any]:
    venv = make_vec_env(spec, n_envs=2, seed=seed)
    rng = np.random.default_rng(0)
    record = [venv.reset(), [info["factors"] for info in venv.reset_infos]]
    for _ in range(steps):
        obs, rewards, dones, infos = venv.step(rng.integers(venv.action_space.n, size=2))  # type: ignore[attr-defined]
        record += [obs, rewards, dones, [info["factors"] for info in infos], [i["factors"] for i in venv.reset_infos]]
    return record


def same(a: list[Any], b: list[Any]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("spec", ["MiniGrid-DoorKey-6x6-v0:obs=rgb,max_steps=30", "rlrep/TinyGrid-v0:max_steps=30"])
def test_the_seed_decides_everything(spec: str) -> None:
    assert same(trajectory(spec, 5), trajectory(spec, 5))
    assert not same(trajectory(spec, 5), trajectory(spec, 6))


@pytest.mark.parametrize("spec", ["MiniGrid-DoorKey-5x5-v0:obs=grid,max_steps=20", "rlrep/TinyGrid-v0:max_steps=20"])
def test_members_are_seeded_one_after_the_other_and_factors_belong_to_their_observation(spec: str) -> None:
    venv = make_vec_env(spec, n_envs=3, seed=7)
    assert isinstance(venv, DummyVecEnv)
    assert venv.env_is_wrapped(Monitor) == [True] * 3
    singles = [make_env(spec) for _ in range(3)]
    obs = venv.reset()
    for i, env in enumerate(singles):
        single, info = env.reset(seed=7 + i)
        np.testing.assert_array_equal(obs[i], single)
        assert venv.reset_infos[i]["factors"] == info["factors"]
        assert {name: values[i] for name, values in venv.factors.items()} == info["factors"]
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(70):
        actions = rng.integers(venv.action_space.n, size=3)  # type: ignore[attr-defined]
        obs, _, dones, infos = venv.step(actions)
        for i, env in enumerate(singles):
            single, _, terminated, truncated, info = env.step(actions[i])
            assert infos[i]["factors"] == info["factors"]
            assert dones[i] == (terminated or truncated)
            if dones[i]:
                ended += 1
                np.testing.assert_array_equal(infos[i]["terminal_observation"], single)
                assert infos[i]["TimeLimit.truncated"] == (truncated and not terminated)
                single, info = env.reset()
                assert venv.reset_infos[i]["factors"] == info["factors"]
            np.testing.assert_array_equal(obs[i], single)
            assert {name: values[i] for name, values in venv.factors.items()} == info["factors"]
    assert ended >= 9


@pytest.mark.parametrize("spec", ["MiniGrid-DoorKey-5x5-v0:obs=rgb", "BabyAI-GoToLocal-v0:obs=rgb"])
def test_pictures_drawn_together_are_those_drawn_one_by_one(spec: str) -> None:
    spec += ",max_steps=9"
    venv, singles = make_vec_env(spec, n_envs=3, seed=7), [make_env(spec) for _ in range(3)]
    assert venv.observation_space == singles[0].observation_space

    def check(found: Any, expected: Any) -> None:
        parts = found if isinstance(found, dict) else {"image": found}
        for key, part in (expected if isinstance(expected, dict) else {"image": expected}).items():
            np.testing.assert_array_equal(parts[key], part)

    def row(obs: Any, i: int) -> Any:
        return {key: part[i] for key, part in obs.items()} if isinstance(obs, dict) else obs[i]

    obs = venv.reset()
    for i, env in enumerate(singles):
        check(row(obs, i), env.reset(seed=7 + i)[0])
    rng = np.random.default_rng(0)
    for step in range(1, 28):
        actions = rng.integers(3, size=3)
        obs, _, dones, infos = venv.step(actions)
        assert dones.any() or step % 9
        for i, env in enumerate(singles):
            single = env.step(actions[i])[0]
            if dones[i]:
                check(infos[i]["terminal_observation"], single)
                single = env.reset()[0]
            check(row(obs, i), single)


def test_minigrid_is_imported_only_where_it_is_used() -> None:
    script = """
import sys, rlrep_envs, gymnasium
rlrep_envs.make_vec_env("CartPole-v1")
assert not [name for name in sys.modules if name.partition(".")[0] in ("minigrid", "rlrep")]
gymnasium.make("rlrep/TinyGrid-v0")
rlrep_envs.make_env("MiniGrid-Empty-5x5-v0")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
