"""envpool behind Stable-Baselines3's rules, against envpool itself."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from rlrep_envs import EnvSpec, make_env, make_vec_env
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

envpool = pytest.importorskip("envpool")

GRID = "MiniGrid-DoorKey-5x5-v0:obs=grid,backend=envpool"


def alone(id: str, seed: int, actions: np.ndarray, **config: Any) -> list[tuple[Any, ...]]:
    """Steps one of envpool's own environments: what was observed, the reward, whether it was done, and how long it was.

    envpool's transition from an episode's last observation to the next one's first is no step, and is left out.
    """
    pool = envpool.make_gymnasium(id, num_envs=1, env_seed=[seed], **config)
    record: list[tuple[Any, ...]] = [(first(pool.reset()[0]), 0.0, False, 0)]
    for action in actions:
        obs, reward, terminated, truncated, info = pool.step(action[None])
        done = bool(terminated[0] or truncated[0])
        record.append((first(obs), reward[0], done, info["elapsed_step"][0]))
        if done:
            record.append((first(pool.step(action[None])[0]), 0.0, False, 0))
    return record


def first(obs: Any) -> Any:
    return {key: part[0] for key, part in obs.items()} if isinstance(obs, dict) else obs[0]


@pytest.mark.parametrize(
    ("spec", "config", "n_steps"),
    [
        ("CartPole-v1", {}, 120),
        ("CartPole-v1:max_episode_steps=12", {"max_episode_steps": 12}, 120),
        ("Pendulum-v1:max_episode_steps=7", {"max_episode_steps": 7}, 30),
        ("FrozenLake-v1", {}, 60),
        ("Hopper-v4", {}, 60),
        ("WalkerWalk-v1:max_episode_steps=9", {"max_episode_steps": 9}, 20),
        ("Catch-v0", {}, 40),
    ],
)
@pytest.mark.filterwarnings("ignore:.*precision lowered")
def test_ended_environments_begin_anew_in_the_same_step(spec: str, config: dict[str, Any], n_steps: int) -> None:
    venv = make_vec_env(f"{spec}{',' if ':' in spec else ':'}backend=envpool", 3, seed=5)
    venv.action_space.seed(0)
    actions = np.array([[venv.action_space.sample() for _ in range(3)] for _ in range(n_steps)])
    records = [iter(alone(EnvSpec.parse(spec).id, 5 + i, actions[:, i], **config)) for i in range(3)]

    def check(obs: Any, i: int | None, expected: Any) -> None:
        if isinstance(expected, dict):
            for key in expected:
                np.testing.assert_array_equal(obs[key] if i is None else obs[key][i], expected[key])
        else:
            np.testing.assert_array_equal(obs if i is None else obs[i], expected)

    obs = venv.reset()
    for i in range(3):
        check(obs, i, next(records[i])[0])
    returns = np.zeros(3)
    ended = 0
    for each in actions:
        obs, rewards, dones, infos = venv.step(each)
        returns += rewards
        for i in range(3):
            expected, reward, done, length = next(records[i])
            assert (rewards[i], dones[i]) == (reward, done)
            if done:
                ended += 1
                check(infos[i]["terminal_observation"], None, expected)
                assert infos[i]["episode"]["l"] == length
                assert infos[i]["episode"]["r"] == pytest.approx(returns[i], abs=1e-5)
                returns[i] = 0
                expected = next(records[i])[0]
            else:
                assert infos[i] == {}
            check(obs, i, expected)
    assert ended


def test_a_step_may_both_end_an_episode_and_reach_the_limit() -> None:
    venv = make_vec_env("CartPole-v1:max_episode_steps=10,backend=envpool", 64)
    rng, met = np.random.default_rng(0), set()
    venv.reset()
    for _ in range(200):
        for info in venv.step(rng.integers(2, size=64))[3]:
            if info:
                x, _, angle, _ = info["terminal_observation"]
                fell = bool(abs(x) > 2.4 or abs(angle) > 12 * np.pi / 180)
                at_limit = info["episode"]["l"] == 10
                assert fell or at_limit
                assert info["TimeLimit.truncated"] == (at_limit and not fell)
                met.add((fell, at_limit))
    assert met == {(True, True), (True, False), (False, True)}


def trajectory(venv: Any, steps: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    record = [venv.reset()]
    for _ in range(steps):
        record += venv.step(rng.integers(venv.action_space.n, size=venv.num_envs))[:3]
    return record


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("spec", [f"{GRID},max_steps=15", "CartPole-v1:backend=envpool"])
def test_the_seed_decides_everything(spec: str) -> None:
    venv = make_vec_env(spec, 4, seed=7)
    before = trajectory(venv)
    assert same(before, trajectory(make_vec_env(spec, 4, seed=7)))
    assert same(before, trajectory(make_vec_env(f"{spec},num_threads=2", 4, seed=7)))
    assert not same(before, trajectory(make_vec_env(spec, 4, seed=8)))
    # Unseeded resets go on with other starts, and seeding begins again.
    assert not same(before, trajectory(venv))
    venv.seed(7)
    assert same(before, trajectory(venv))
    # Environment i has the seed + i, whatever stands beside it.
    assert np.array_equal(make_vec_env(spec, 1, seed=9).reset()[0], before[0][2])


def test_a_reset_may_come_while_a_step_is_under_way() -> None:
    venv = make_vec_env(GRID, 2)
    venv.reset()
    venv.step_async(np.zeros(2, int))
    assert venv.reset().shape == (2, 7, 7, 3)
    assert venv.step([0, 0])[0].shape == (2, 7, 7, 3)
    venv.close()


def test_an_action_that_does_not_exist_is_an_error() -> None:
    venv = make_vec_env(GRID, 2)
    venv.reset()
    with pytest.raises(ValueError, match=r"in Discrete\(7\), and these were \[0, 7\]"):
        venv.step([0, 7])


def test_what_was_returned_stays_as_it_was() -> None:
    venv = make_vec_env(f"{GRID},max_steps=3", 2)
    kept = [venv.reset()]
    copies = [kept[0].copy()]
    for _ in range(20):
        kept.append(venv.step([0, 1])[0])
        copies.append(kept[-1].copy())
    assert same(kept, copies)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        (
            "MiniGrid-DorKey-6x6-v0",
            "no environment called 'MiniGrid-DorKey-6x6-v0'. Did you mean 'MiniGrid-DoorKey-6x6",
        ),
        ("ALE/Pong-v5", "Did you mean 'Pong-v5'"),
        ("rlrep/TinyGrid-v0", "Others need backend=python"),
        ("MiniGrid-Dynamic-Obstacles-6x6-v0:obs=rgb_full", "rgb_full of .* needs backend=python"),
        ("MiniGrid-DoorKey-6x6-v0:distraction=noisy_tv", "distraction=noisy_tv is not there"),
        ("CartPole-v1:obs=grid", "use obs=native"),
        ("CartPole-v1:mission=true", "has no mission"),
        ("CartPole-v1:gravity=3", "envpool's CartPole-v1 has no keyword 'gravity'. .*max_episode_steps"),
        ("CartPole-v1:max_episode_steps=soon", "cannot be made with"),
        ("CartPole-v1:num_envs=3", "no keyword 'num_envs'"),
    ],
)
def test_errors_help(spec: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make_vec_env(f"{spec}{',' if ':' in spec else ':'}backend=envpool")


def test_there_are_no_single_environments() -> None:
    with pytest.raises(ValueError, match="make_vec_env makes them"):
        make_env(GRID)
    venv = make_vec_env(GRID, 2)
    assert venv.env_is_wrapped(Monitor) == [True, True]
    assert not venv.has_attr("grid")
    with pytest.raises(AttributeError, match="use backend=python"):
        venv.env_method("render")


def test_without_envpool_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("envpool", "envpool.registration"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"not installed \(pip install 'rlrep\[envpool\]'\)"):
        make_vec_env(GRID)


def test_the_backend_is_no_part_of_a_minigrid_task() -> None:
    spec = EnvSpec.parse("MiniGrid-DoorKey-6x6-v0:obs=rgb,backend=envpool,num_threads=2,max_steps=9")
    assert str(spec.task) == "MiniGrid-DoorKey-6x6-v0:obs=rgb,max_steps=9"
    assert EnvSpec.parse("Pong-v5:backend=envpool").task.backend == "envpool"
    with pytest.raises(ValueError, match="Did you mean 'envpool'"):
        EnvSpec.parse("CartPole-v1:backend=envpol")


def test_atari_is_grey_pictures_and_monitor_sees_whole_games() -> None:
    spec = "Breakout-v5:backend=envpool,episodic_life=true,reward_clip=true,frame_skip=12,frame_stack=4"
    venv = make_vec_env(spec, 1)
    assert venv.observation_space == spaces.Box(0, 255, (84, 84, 4), np.uint8)
    obs = venv.reset()
    rng = np.random.default_rng(0)
    lives = games = 0
    for _ in range(400):
        obs, _, dones, infos = venv.step(rng.integers(4, size=1))
        if dones[0]:
            lives += 1
            games += "episode" in infos[0]
            assert infos[0]["terminal_observation"].shape == (84, 84, 4)
            assert (obs[0, ..., 0] == obs[0, ..., 3]).all()
        if games:
            break
    assert (lives, games) == (5, 1)
    cut = make_vec_env("Breakout-v5:backend=envpool,max_episode_steps=3", 1)
    cut.reset()
    infos = [cut.step([0])[3][0] for _ in range(6)]
    assert [info.get("TimeLimit.truncated") for info in infos] == [None, None, True] * 2


def test_procgen_is_pictures_or_the_error_says_what_is_missing() -> None:
    try:
        venv = make_vec_env("CoinrunEasy-v0:backend=envpool", 2)
    except ImportError as error:
        assert "Qt" in str(error)  # noqa: PT017
        return
    assert venv.observation_space == spaces.Box(0, 255, (64, 64, 3), np.uint8)
    assert venv.reset().std() > 0
    assert venv.step([0, 0])[0].shape == (2, 64, 64, 3)


@pytest.mark.parametrize("policy", ["grid", "rgb"])
def test_stable_baselines_learns_and_evaluates(policy: str) -> None:
    spec = f"MiniGrid-Empty-5x5-v0:obs={policy},backend=envpool,frame_stack=2"
    venv = make_vec_env(spec, 8)
    model = PPO("CnnPolicy" if policy == "rgb" else "MlpPolicy", venv, n_steps=32, n_epochs=1, seed=0)
    model.learn(256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        returns, lengths = evaluate_policy(model, make_vec_env(spec, 4), 8, False, return_episode_rewards=True)
    assert len(returns) == len(lengths) == 8
    for value, length in zip(returns, lengths, strict=True):
        assert value == pytest.approx(1 - 0.9 * length / 100, abs=1e-5) or (value, length) == (0, 100)
