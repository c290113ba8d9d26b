from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from rlrep_envs import FrameStack, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack


def parts(obs: Any) -> dict[str, np.ndarray]:
    return obs if isinstance(obs, dict) else {"": obs}


@pytest.mark.parametrize(
    ("spec", "k", "stacked"),
    [
        ("MiniGrid-DoorKey-5x5-v0:obs=grid,max_steps=15", 4, {"": (7, 7, 12)}),
        ("MiniGrid-Fetch-5x5-N2-v0:max_steps=15", 3, {"image": (7, 7, 9)}),
        ("rlrep/TinyGrid-v0:obs_type=dict,max_steps=15", 2, {"image": (6, 6, 6), "vector": (14,)}),
        ("CartPole-v1", 5, {"": (20,)}),
    ],
)
def test_equals_a_queue_of_the_plain_observations(spec: str, k: int, stacked: dict[str, tuple[int, ...]]) -> None:
    n = 3
    venv = make_vec_env(f"{spec}{',' if ':' in spec else ':'}frame_stack={k}", n_envs=n, seed=1)
    plain = make_vec_env(spec, n_envs=n, seed=1)
    space, plain_space = venv.observation_space, plain.observation_space
    for key, shape in stacked.items():
        box, plain_box = (s[key] if isinstance(s, spaces.Dict) else s for s in (space, plain_space))
        assert isinstance(box, spaces.Box)
        assert (box.shape, box.dtype) == (shape, plain_box.dtype)
        np.testing.assert_array_equal(box.high, np.concatenate([plain_box.high] * k, axis=-1))
    obs, raw = parts(venv.reset()), parts(plain.reset())
    queues = {key: [deque([raw[key][i]] * k, maxlen=k) for i in range(n)] for key in stacked}

    def expected(key: str, i: int) -> np.ndarray:
        return np.concatenate(queues[key][i], axis=-1)

    rng = np.random.default_rng(0)
    ended, history = 0, []
    for _ in range(60):
        for key in raw:
            if key not in stacked:
                np.testing.assert_array_equal(obs[key], raw[key])
        for key in stacked:
            np.testing.assert_array_equal(obs[key], [expected(key, i) for i in range(n)])
        history.append((obs, {key: value.copy() for key, value in obs.items()}))
        actions = rng.integers(venv.action_space.n, size=n)  # type: ignore[attr-defined]
        stepped, _, dones, infos = venv.step(actions)
        obs = parts(stepped)
        stepped, _, plain_dones, plain_infos = plain.step(actions)
        raw = parts(stepped)
        np.testing.assert_array_equal(dones, plain_dones)
        for i in range(n):
            last = parts(plain_infos[i]["terminal_observation"] if dones[i] else {key: raw[key][i] for key in raw})
            for key in stacked:
                queues[key][i].append(last[key])
            if dones[i]:
                ended += 1
                terminal = parts(infos[i]["terminal_observation"])
                assert terminal.keys() == raw.keys()
                for key in raw:
                    np.testing.assert_array_equal(terminal[key], expected(key, i) if key in stacked else last[key])
                for key in stacked:
                    queues[key][i].extend([raw[key][i]] * k)
    assert ended >= 3
    for seen, copy in history:
        for key in seen:
            np.testing.assert_array_equal(seen[key], copy[key], err_msg="an earlier observation changed")


def test_stable_baselines_own_stack_is_the_trap_this_avoids() -> None:
    # (7, 7, 12): the first axis is not the longest, so a picture of 7 channels is assumed and never transposed.
    theirs = VecFrameStack(make_vec_env("MiniGrid-Empty-5x5-v0:obs=grid"), 4)
    assert not theirs.reset()[..., :9].any()
    ours = make_vec_env("MiniGrid-Empty-5x5-v0:obs=grid,frame_stack=4").reset()
    np.testing.assert_array_equal(ours[..., :3], ours[..., 9:])


def test_errors() -> None:
    with pytest.raises(ValueError, match="where there is a Box"):
        make_vec_env("FrozenLake-v1:frame_stack=2")
    with pytest.raises(ValueError, match="a stack of 0 frames"):
        FrameStack(make_vec_env("CartPole-v1"), 0)
