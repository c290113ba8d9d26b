"""`LatentVecEnv`: the features a frozen encoder would give inside the policy, computed once a step."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from rlrep_envs import make_vec_env
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize
from torch import Tensor

from rlrep.encoders import Encoder, make_encoder
from rlrep.sb3 import LatentVecEnv, policy_kwargs
from rlrep.types import SpaceError, Tree, tree_map

GRID = "rlrep/TinyGrid-v0:size=5"
SPECS = {
    "grid": GRID,
    "rgb": f"{GRID},obs_type=rgb",
    "vector": f"{GRID},obs_type=vector",
    "dict": f"{GRID},obs_type=dict",
    "stacked": "MiniGrid-Empty-5x5-v0:obs=grid,frame_stack=4",
}
SMALL: dict[str, Any] = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "device": "cpu", "seed": 0}


def pretrained(spec: str) -> Encoder:
    torch.manual_seed(3)
    return make_encoder("auto:features_dim=16", make_vec_env(spec).observation_space).eval()


def encode(encoder: Encoder, obs: Tree) -> np.ndarray:
    with torch.no_grad():
        return encoder(tree_map(torch.as_tensor, obs)).numpy()


def rollout(venv: VecEnv, steps: int, seed: int = 0) -> list[tuple]:
    """What random actions give: (observation, reward, done, terminal observations by environment) a step."""
    rng = np.random.default_rng(seed)
    seen = [(venv.reset(), None, None, {})]
    for _ in range(steps):
        obs, rewards, dones, infos = venv.step(rng.integers(venv.action_space.n, size=venv.num_envs))
        last = {i: info["terminal_observation"] for i, info in enumerate(infos) if "terminal_observation" in info}
        assert set(last) == set(np.flatnonzero(dones))
        seen.append((copy.deepcopy(obs), rewards.copy(), dones.copy(), copy.deepcopy(last)))
    return seen


@pytest.mark.parametrize("memory", [0, 2**20])
@pytest.mark.parametrize("kind", SPECS)
def test_every_observation_is_encoded_terminal_ones_too(kind: str, memory: int) -> None:
    encoder = pretrained(SPECS[kind])
    raw = rollout(make_vec_env(SPECS[kind], 3, seed=1), 120)
    latent = rollout(LatentVecEnv(make_vec_env(SPECS[kind], 3, seed=1), encoder, memory=memory), 120)
    ended = 0
    for (obs, rewards, dones, last), (features, rewards_, dones_, last_) in zip(raw, latent, strict=True):
        assert features.dtype == np.float32
        np.testing.assert_allclose(features, encode(encoder, obs), atol=1e-5)
        np.testing.assert_array_equal(rewards_, rewards)
        np.testing.assert_array_equal(dones_, dones)
        assert last_.keys() == last.keys()
        for i in last:
            one = tree_map(lambda leaf: np.asarray(leaf)[None], last[i])
            np.testing.assert_allclose(last_[i], encode(encoder, one)[0], atol=1e-5)
            ended += 1
    assert ended


def test_what_is_below_keeps_its_raw_terminal_observation() -> None:
    venv = make_vec_env(GRID, 1)
    below: list[dict] = []
    step_wait = venv.step_wait

    def spy() -> Any:
        result = step_wait()
        below.extend(result[3])
        return result

    venv.step_wait = spy  # type: ignore[method-assign]
    rollout(LatentVecEnv(venv, pretrained(GRID)), 100)
    ends = [info["terminal_observation"] for info in below if "terminal_observation" in info]
    assert ends
    assert all(end.shape == venv.observation_space.shape for end in ends)


@pytest.mark.parametrize("kind", SPECS)
def test_a_policy_behind_it_equals_one_with_the_encoder_inside(kind: str) -> None:
    encoder = pretrained(SPECS[kind])
    venv = make_vec_env(SPECS[kind], 3, seed=1)
    policy = "MultiInputPolicy" if isinstance(venv.observation_space, spaces.Dict) else "MlpPolicy"
    inside = PPO(policy, venv, policy_kwargs=policy_kwargs(encoder, mode="frozen"), **SMALL)
    behind = PPO("MlpPolicy", LatentVecEnv(make_vec_env(SPECS[kind], 3, seed=1), encoder), **SMALL)
    heads = {k: v for k, v in inside.policy.state_dict().items() if "features_extractor" not in k}
    assert heads.keys() == behind.policy.state_dict().keys()
    behind.policy.load_state_dict(heads)
    obs, features = inside.env.reset(), behind.env.reset()
    for _ in range(5):
        with torch.no_grad():
            a, value_a, log_a = inside.policy(inside.policy.obs_to_tensor(obs)[0], deterministic=True)
            b, value_b, log_b = behind.policy(behind.policy.obs_to_tensor(features)[0], deterministic=True)
        assert torch.equal(a, b)
        torch.testing.assert_close(value_a, value_b, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(log_a, log_b, atol=1e-5, rtol=1e-5)
        step = np.array([0, 1, 2])
        obs, features = inside.env.step(step)[0], behind.env.step(step)[0]


def test_remembering_changes_nothing_that_is_learnt() -> None:
    encoder = pretrained(GRID)
    weights = []
    for memory in (0, 2**20):
        model = PPO("MlpPolicy", LatentVecEnv(make_vec_env(GRID, 4), encoder, memory=memory), **SMALL).learn(256)
        weights.append(model.policy.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=1e-4)


class Counting(torch.nn.Module):
    """Counts the rows the encoder is asked for."""

    def __init__(self, venv: LatentVecEnv) -> None:
        super().__init__()
        self.rows = 0
        venv.encoder.register_forward_pre_hook(self.count)

    def count(self, _: Any, inputs: tuple[Tensor]) -> None:
        self.rows += len(inputs[0])


def test_each_distinct_observation_is_encoded_once() -> None:
    venv = LatentVecEnv(make_vec_env(GRID, 4), pretrained(GRID))
    counting = Counting(venv)
    raw = rollout(make_vec_env(GRID, 4), 200)
    rollout(venv, 200)
    distinct = {row.tobytes() for obs, *_, last in raw for row in [*obs, *last.values()]}
    assert counting.rows == len(distinct) < 400


def test_it_keeps_within_its_memory() -> None:
    encoder = pretrained(GRID)
    room = 20
    venv = LatentVecEnv(make_vec_env(GRID, 4), encoder, memory=room * (4 * 16 + 216))
    counting = Counting(venv)
    rng = np.random.default_rng(0)
    plain = make_vec_env(GRID, 4)
    np.testing.assert_allclose(venv.reset(), encode(encoder, plain.reset()), atol=1e-5)
    for _ in range(300):
        actions = rng.integers(venv.action_space.n, size=4)
        np.testing.assert_allclose(venv.step(actions)[0], encode(encoder, plain.step(actions)[0]), atol=1e-5)
        assert len(venv._known) <= room
    assert counting.rows > room


def test_fewer_places_than_environments_still_give_right_features() -> None:
    encoder = pretrained(GRID)
    venv = LatentVecEnv(make_vec_env(GRID, 8), encoder, memory=3 * (4 * 16 + 216))
    for a, b in zip(rollout(venv, 60), rollout(make_vec_env(GRID, 8), 60), strict=True):
        np.testing.assert_allclose(a[0], encode(encoder, b[0]), atol=1e-5)
        assert len(venv._known) <= 3


def test_it_stops_remembering_what_never_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LatentVecEnv, "TRIED", 200)
    spec = "CartPole-v1"
    encoder = pretrained(spec)
    venv = LatentVecEnv(make_vec_env(spec, 4), encoder)
    repeating = LatentVecEnv(make_vec_env(GRID, 4), pretrained(GRID))
    for a, b in zip(rollout(venv, 100), rollout(make_vec_env(spec, 4), 100), strict=True):
        np.testing.assert_allclose(a[0], encode(encoder, b[0]), atol=1e-5)
    assert not venv._known
    rollout(repeating, 100)
    assert repeating._known


def test_training_the_original_afterwards_does_not_reach_it() -> None:
    encoder = pretrained(GRID)
    venv = LatentVecEnv(make_vec_env(GRID, 2), encoder, memory=0)
    venv.seed(0)
    before = venv.reset()
    encoder.train()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1.0)
    venv.seed(0)
    np.testing.assert_array_equal(venv.reset(), before)
    assert not venv.encoder.training
    assert all(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
@pytest.mark.parametrize("kind", ["grid", "dict"])
def test_monitors_callbacks_and_other_algorithms_work_on_it(kind: str) -> None:
    encoder = pretrained(SPECS[kind])
    venv = VecMonitor(LatentVecEnv(make_vec_env(SPECS[kind], 2), encoder))
    evaluation = VecMonitor(LatentVecEnv(make_vec_env(SPECS[kind], 1, seed=100), encoder))
    callback = EvalCallback(evaluation, n_eval_episodes=2, eval_freq=32, verbose=0)
    model = PPO("MlpPolicy", venv, **SMALL).learn(128, callback=callback)
    assert np.isfinite(callback.last_mean_reward)
    assert len(model.ep_info_buffer)

    model = DQN("MlpPolicy", venv, learning_starts=32, batch_size=16, buffer_size=500, device="cpu").learn(300)
    # What is bootstrapped from at an end is the features of the last observation, not of the next episode's first.
    ends = np.argwhere(model.replay_buffer.dones)
    assert len(ends)
    for at, i in ends:
        following = model.replay_buffer.observations[at + 1, i]
        assert not np.array_equal(model.replay_buffer.next_observations[at, i], following)


def test_recurrent_policies_work_on_it() -> None:
    contrib = pytest.importorskip("sb3_contrib")
    venv = LatentVecEnv(make_vec_env(GRID, 2), pretrained(GRID))
    contrib.RecurrentPPO("MlpLstmPolicy", venv, n_steps=16, batch_size=16, n_epochs=1, device="cpu").learn(32)


@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
def test_rewards_can_be_normalised_around_it(algorithm: str) -> None:
    encoder = pretrained(GRID)
    for norm_obs in (True, False):
        with pytest.raises(SpaceError, match=r"VecNormalize\(LatentVecEnv\(venv, encoder\), norm_obs=False\)"):
            LatentVecEnv(VecNormalize(make_vec_env(GRID, 2), norm_obs=norm_obs), encoder)
    venv = VecNormalize(LatentVecEnv(make_vec_env(GRID, 2), encoder), norm_obs=False)
    if algorithm == "ppo":
        PPO("MlpPolicy", venv, **SMALL).learn(64)
    else:
        DQN("MlpPolicy", venv, learning_starts=16, batch_size=16, buffer_size=100, device="cpu").learn(64)


def test_other_observations_are_refused() -> None:
    with pytest.raises(SpaceError, match="made for observations"):
        LatentVecEnv(make_vec_env(SPECS["rgb"]), pretrained(GRID))
