from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from rlrep_envs import TinyGrid
from rlrep_envs.tinygrid import AGENT, GOAL, KEY

RIGHT, DOWN, LEFT, UP, STAY = range(5)


@pytest.mark.parametrize("obs_type", ["grid", "rgb", "vector", "dict"])
def test_obeys_gymnasium(obs_type: str) -> None:
    check_env(gym.make("rlrep/TinyGrid-v0", obs_type=obs_type, render_mode="rgb_array").unwrapped)


def path(env: TinyGrid, x: int, y: int, to: tuple[int, int]) -> list[int]:
    return [RIGHT if to[0] > x else LEFT] * abs(to[0] - x) + [DOWN if to[1] > y else UP] * abs(to[1] - y)


def test_the_key_then_the_goal_ends_the_episode_with_reward() -> None:
    env = TinyGrid(size=7, max_steps=100)
    for seed in range(20):
        _, info = env.reset(seed=seed)
        f = info["factors"]
        assert len({(f["agent_x"], f["agent_y"]), (f["key_x"], f["key_y"]), (f["goal_x"], f["goal_y"])}) == 3
        key, goal = (f["key_x"], f["key_y"]), (f["goal_x"], f["goal_y"])
        steps, rewards = path(env, f["agent_x"], f["agent_y"], key) + path(env, *key, goal), []
        for i, action in enumerate(steps):
            _, reward, terminated, truncated, info = env.step(np.int64(action))
            rewards.append(reward)
            assert not truncated
            assert terminated == (i == len(steps) - 1)
        assert info["factors"] | {"carrying": KEY, "key_x": -1, "key_y": -1} == info["factors"]
        assert rewards[:-1] == [0.0] * (len(steps) - 1)
        assert rewards[-1] == pytest.approx(1 - 0.9 * len(steps) / 100)


def test_the_goal_without_the_key_does_nothing_and_time_runs_out() -> None:
    env = TinyGrid(size=8, max_steps=30)
    for seed in range(10):
        _, info = env.reset(seed=seed)
        f = info["factors"]
        # Along the rows first: a walk that crosses the key is another story.
        steps = path(env, f["agent_x"], f["agent_y"], (f["goal_x"], f["goal_y"]))
        ends = [env.step(np.int64(action))[2:4] for action in steps + [STAY] * (30 - len(steps))]
        if env.step(np.int64(STAY))[4]["factors"]["carrying"]:
            continue
        assert ends == [(False, False)] * 29 + [(False, True)]
        return
    pytest.fail("every walk to the goal crossed the key")


def test_the_observations_show_the_factors() -> None:
    env, picture, vector = (gym.make("rlrep/TinyGrid-v0", obs_type=kind) for kind in ("grid", "rgb", "vector"))
    rng = np.random.default_rng(0)
    taken = 0
    for seed in range(10):
        board, info = env.reset(seed=seed)
        pixels, numbers = picture.reset(seed=seed)[0], vector.reset(seed=seed)[0]
        for _ in range(40):
            f = info["factors"]
            x, y = f["agent_x"], f["agent_y"]
            assert np.argwhere(board[..., 0] == AGENT).tolist() == [[x, y]]
            assert board[x, y, 2] == (f["carrying"] == KEY)
            assert (KEY in board[..., 0]) == (f["key_x"] >= 0) == (f["carrying"] == 0)
            if (x, y) != (f["goal_x"], f["goal_y"]):
                assert board[f["goal_x"], f["goal_y"], 0] == GOAL
            color = (255, 128, 0) if f["carrying"] else (255, 0, 0)
            assert (pixels[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] == color).all()
            scale = [5 if name == "carrying" else env.unwrapped.size - 1 for name in f]  # type: ignore[attr-defined]
            np.testing.assert_allclose(numbers * scale, list(f.values()), atol=1e-5)
            action = rng.integers(5)
            board, _, terminated, _, info = env.step(action)
            pixels, numbers = picture.step(action)[0], vector.step(action)[0]
            taken += info["factors"]["carrying"] > 0
            if terminated:
                break
    assert taken > 0


@pytest.mark.parametrize(
    ("kwargs", "complaint"),
    [
        ({"size": 3}, "size=3 has no room"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"obs_type": "grd"}, "Did you mean 'grid'"),
    ],
)
def test_errors(kwargs: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        TinyGrid(**kwargs)
