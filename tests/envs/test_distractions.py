from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from rlrep_envs import make_env


def play(spec: str, seed: int, actions: list[int]) -> list[dict[str, Any]]:
    env = make_env(spec)
    obs, info = env.reset(seed=seed)
    record = [{"image": obs["image"] if isinstance(obs, dict) else obs, "factors": info["factors"]}]
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(action)
        image = obs["image"] if isinstance(obs, dict) else obs
        record.append({"image": image, "factors": info["factors"], "end": (reward, terminated, truncated)})
        if terminated or truncated:
            obs, info = env.reset()
            record.append({"image": obs["image"] if isinstance(obs, dict) else obs, "factors": info["factors"]})
    assert obs in env.observation_space
    return record


def with_option(spec: str, option: str) -> str:
    return f"{spec}{',' if ':' in spec else ':'}{option}"


TASKS = [
    "MiniGrid-DoorKey-6x6-v0:obs=grid,max_steps=40",
    "MiniGrid-DoorKey-6x6-v0:obs=rgb,max_steps=40",
    "MiniGrid-DoorKey-6x6-v0:obs=rgb_full,max_steps=40",
    "MiniGrid-Fetch-5x5-N2-v0:max_steps=40",
    "BabyAI-GoToLocal-v0:obs=rgb,agent_view_size=5,max_steps=40",
    "rlrep/TinyGrid-v0:max_steps=40",
    "rlrep/TinyGrid-v0:obs_type=rgb,max_steps=40",
]


@pytest.mark.parametrize("spec", TASKS)
def test_a_television_with_a_remote_control(spec: str) -> None:
    remote = make_env(spec).action_space.n - 1  # type: ignore[attr-defined]
    actions = np.random.default_rng(0).integers(remote + 1, size=100).tolist()
    noisy, plain = play(with_option(spec, "distraction=noisy_tv"), 3, actions), play(spec, 3, actions)
    height, width = (side // 3 for side in plain[0]["image"].shape[:2])
    channels = []
    for a, b in zip(noisy, plain, strict=True):
        assert {**a, "image": 0} == {**b, "image": 0}, "the task itself goes on as without the television"
        assert a["image"].dtype == np.uint8
        np.testing.assert_array_equal(a["image"][height:], b["image"][height:])
        np.testing.assert_array_equal(a["image"][:, width:], b["image"][:, width:])
        channels.append(a["image"][:height, :width])
    pressed = iter(actions)
    switched = 0
    for i in range(1, len(channels)):
        if "end" not in noisy[i]:
            continue
        action = next(pressed)
        if action == remote:
            switched += not np.array_equal(channels[i], channels[i - 1])
        else:
            np.testing.assert_array_equal(channels[i], channels[i - 1])
    assert switched >= 0.8 * actions.count(remote) > 5
    again, other = (play(with_option(spec, "distraction=noisy_tv"), seed, actions) for seed in (3, 4))
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(noisy, again, strict=True))
    assert not np.array_equal(noisy[0]["image"][:height, :width], other[0]["image"][:height, :width])


@pytest.mark.parametrize("spec", [task for task in TASKS if "rgb" in task])
def test_a_background_behind_the_floor(spec: str) -> None:
    env = make_env(spec)
    actions = np.random.default_rng(0).integers(env.action_space.n, size=100).tolist()  # type: ignore[attr-defined]
    busy, plain = play(with_option(spec, "distraction=background"), 3, actions), play(spec, 3, actions)
    shares = []
    for a, b in zip(busy, plain, strict=True):
        assert {**a, "image": 0} == {**b, "image": 0}
        floor = (b["image"] == b["image"][..., :1]).all(-1) & np.isin(b["image"][..., 0], [0, 76])
        np.testing.assert_array_equal(a["image"][~floor], b["image"][~floor])
        assert a["image"][floor].max() < 128
        shares.append((a["image"] != b["image"]).any(-1).mean())
    assert np.mean(shares) > 0.2
    episodes = [0] + [i for i, step in enumerate(busy) if "end" not in step]
    assert len({busy[i]["image"].tobytes() for i in episodes}) > 2, "each episode has its own"
    again, other = (play(with_option(spec, "distraction=background"), seed, actions) for seed in (3, 4))
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(busy, again, strict=True))
    assert not np.array_equal(busy[0]["image"], other[0]["image"])


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("CartPole-v1:distraction=noisy_tv", "distractions are for pictures and boards"),
        ("rlrep/TinyGrid-v0:obs_type=vector,distraction=background", "distractions are for pictures and boards"),
        ("MiniGrid-Empty-5x5-v0:obs=grid,distraction=background", "in MiniGrid, use obs=rgb or obs=rgb_full"),
        ("MiniGrid-Dynamic-Obstacles-5x5-v0:obs=grid,distraction=noisy_tv", "needs an action that does nothing"),
        ("CarTest-v0:distraction=noisy_tv", "needs discrete actions"),
    ],
)
def test_errors(spec: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make_env(spec)


class Car(gym.Env):
    observation_space = gym.spaces.Box(0, 255, (96, 96, 3), np.uint8)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)


gym.register("CarTest-v0", entry_point=Car)
