"""`LatentVecEnv` gives what a frozen encoder inside the policy gives, computed once a step."""

from __future__ import annotations

import copy
import pickle
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_cases import SETTINGS, SPACES, Noise, Rooms, build, encoder_of, extractors, state_of, venv_of
from sb3_contrib import RecurrentPPO
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)
from torch import nn

from rlrep.encoders import Encoder, make_encoder
from rlrep.latent import LatentVecEnv
from rlrep.sb3 import WeightsChangedError, policy_kwargs
from rlrep.types import RunError, SpaceError, tree_leaves, tree_map

over_spaces = pytest.mark.parametrize("space", SPACES)


def count_encoded(latent: LatentVecEnv) -> list[int]:
    """Returns a list to which the number of encoded observations is added at each call of the encoder."""
    rows: list[int] = []
    latent.encoder.register_forward_hook(lambda _, __, features: rows.append(len(features)))
    return rows


@over_spaces
def test_features_are_the_encoders(space: str) -> None:
    encoder, raw, latent = encoder_of(space), venv_of(space), LatentVecEnv(venv_of(space), encoder_of(space))
    assert latent.observation_space == spaces.Box(-np.inf, np.inf, (encoder.features_dim,), np.float32)
    obs, features = raw.reset(), latent.reset()
    for _ in range(12):
        assert features.dtype == np.float32
        with torch.no_grad():
            expected = encoder(tree_map(torch.as_tensor, obs))
        assert np.allclose(features, expected, atol=1e-5)
        actions = np.zeros(2, int)
        obs, features = raw.step(actions)[0], latent.step(actions)[0]


@over_spaces
def test_terminal_observations_are_encoded(space: str) -> None:
    """Those an episode ended on, not the ones the next began with, where some episodes end and others go on."""
    encoder = encoder_of(space)
    venv = venv_of(space)
    raw = copy.deepcopy(venv)
    latent = LatentVecEnv(venv, encoder)
    raw.reset(), latent.reset()
    n_ended = 0
    for _ in range(12):
        obs, _, dones, infos = raw.step(np.zeros(2, int))
        features, _, _, latent_infos = latent.step(np.zeros(2, int))
        for i in np.flatnonzero(dones):
            n_ended += 1
            last = infos[i]["terminal_observation"]
            with torch.no_grad():
                expected = encoder(tree_map(lambda x: torch.as_tensor(x)[None], last))[0]
            assert np.allclose(latent_infos[i]["terminal_observation"], expected, atol=1e-5)
            begun = tree_map(lambda x, i=i: x[i], obs)
            same = all(np.array_equal(x, y) for x, y in zip(tree_leaves(begun), tree_leaves(last), strict=True))
            assert np.allclose(features[i], expected, atol=1e-3) == same
    assert n_ended == 4


def test_the_environments_own_infos_stay_raw() -> None:
    """What a recorder below keeps of a step must not turn into features behind its back."""
    venv = venv_of("picture")
    latent = LatentVecEnv(venv, encoder_of("picture"))
    latent.reset()
    for _ in range(5):
        latent.step(np.zeros(2, int))
    assert venv.buf_infos[0]["terminal_observation"].shape == (36, 40, 3)


@pytest.mark.parametrize("space", ["picture", "dict"])
@pytest.mark.parametrize("cls", [PPO, DQN, SAC])
def test_equal_to_the_encoder_inside_the_policy(cls: type[BaseAlgorithm], space: str) -> None:
    """The same heads say the same, and learn the same from the same data."""
    encoder = encoder_of(space)
    inside = build(cls, venv_of(space, cls), policy_kwargs(encoder, cls, mode="frozen"))
    outside = build(cls, LatentVecEnv(venv_of(space, cls), encoder), {})
    heads = {name: x for name, x in state_of(inside.policy).items() if "fingerprint" not in name}
    assert set(heads) == set(outside.policy.state_dict())
    outside.policy.load_state_dict(heads)

    raw, latent = venv_of(space, cls), LatentVecEnv(venv_of(space, cls), encoder)
    one = inside.policy.obs_to_tensor(raw.reset())[0]
    other = outside.policy.obs_to_tensor(latent.reset())[0]
    for left, right in zip(outputs(inside, one), outputs(outside, other), strict=True):
        assert torch.allclose(left, right, atol=1e-5)

    for model in (inside, outside):
        model.set_random_seed(3)
        model.learn(64)
    assert inside._n_updates == outside._n_updates > 0
    after = outside.policy.state_dict()
    for name, x in inside.policy.state_dict().items():
        if "fingerprint" not in name:
            assert torch.allclose(x, after[name], atol=2e-4), name


def outputs(model: BaseAlgorithm, obs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        if isinstance(model, PPO):
            return [model.policy.get_distribution(obs).distribution.logits, model.policy.predict_values(obs)]
        if isinstance(model, DQN):
            return [model.q_net(obs), model.q_net_target(obs)]
        actions = model.actor(obs, deterministic=True)
        return [actions, *model.critic(obs, actions), *model.critic_target(obs, actions)]


def test_training_the_original_later_changes_nothing() -> None:
    encoder = encoder_of("picture").train()
    latent = LatentVecEnv(venv_of("picture"), encoder, memory=0)
    latent.reset()
    obs = [env.last for env in latent.venv.envs]
    before = latent._encode(np.stack(obs))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    assert np.array_equal(latent._encode(np.stack(obs)), before)
    assert encoder.training, "the original was touched"
    assert all(p.requires_grad for p in encoder.parameters()), "the original was touched"


def test_dropout_and_batch_norm_are_off() -> None:
    latent = LatentVecEnv(venv_of("vector"), make_encoder("sb3_cases:Shaky", SPACES["vector"]).train(), memory=0)
    before = latent.encoder.digest()
    obs = np.ones((2, 4), np.float32)
    assert np.array_equal(latent._encode(obs), latent._encode(obs))
    assert latent.encoder.digest() == before


def test_an_agent_goes_on_in_features_of_its_own_encoder_only(tmp_path: Path) -> None:
    latent, other = (LatentVecEnv(venv_of("vector"), encoder_of("vector", seed)) for seed in (7, 8))
    assert latent.observation_space != other.observation_space
    assert pickle.loads(pickle.dumps(latent.observation_space)) == copy.deepcopy(latent.observation_space)
    model = build(PPO, VecNormalize(latent, norm_obs=False), {})
    model.save(tmp_path / "agent")
    ours, theirs = (re.escape(venv.observation_space.encoder_digest[:12]) for venv in (latent, other))
    with pytest.raises(ValueError, match=f"spaces do not match: .* digest {ours} != .* digest {theirs}"):
        model.set_env(other)
    with pytest.raises(ValueError, match="spaces do not match"):
        PPO.load(tmp_path / "agent", env=other, device="cpu")
    PPO.load(tmp_path / "agent", env=latent, device="cpu").learn(32)
    # Agents saved when the space was a plain one with a digest, or none, are still told apart, or taken.
    for space in (spaces.Box(-np.inf, np.inf, (16,)), copy.deepcopy(latent.observation_space)):
        space.__class__ = spaces.Box
        assert space == latent.observation_space
        assert latent.observation_space == space
        assert (space == other.observation_space) is not hasattr(space, "encoder_digest")


def test_weights_that_something_changed_are_an_error_when_learning_starts() -> None:
    latent = LatentVecEnv(venv_of("vector"), encoder_of("vector"))
    model = build(PPO, latent, {}).learn(32)
    nn.init.zeros_(latent.encoder.layers[0].bias.data)
    with pytest.raises(WeightsChangedError, match=r"layers\.0\.bias, by .* an initialisation of every layer"):
        model.learn(32)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["picture", "discrete", "dict"])
def test_what_was_seen_is_not_encoded_again(space: str) -> None:
    venv, encoder = venv_of(space, env=Rooms, n=3), encoder_of(space)
    latent = LatentVecEnv(venv, encoder)
    encoded = count_encoded(latent)
    latent.reset()
    for _ in range(40):
        features = latent.step(np.zeros(3, int))[0]
        obs = stack([env.last for env in venv.envs])
        with torch.no_grad():
            assert np.allclose(features, encoder(tree_map(torch.as_tensor, obs)), atol=1e-5)
    assert sum(encoded) <= 4


def stack(observations: list[Any]) -> Any:
    return tree_map(lambda *leaves: np.stack(leaves), *observations)


def test_observations_of_a_dict_are_told_apart_by_every_key() -> None:
    latent = LatentVecEnv(venv_of("dict"), encoder_of("dict"))
    one = SPACES["dict"].sample()
    for key, sub in SPACES["dict"].spaces.items():
        other = {**one, key: one[key]}
        while np.array_equal(other[key], one[key]):
            other[key] = sub.sample()
        both = latent._features(stack([one, other]))
        assert not np.allclose(both[0], both[1], atol=1e-6), key
        assert np.allclose(both, latent._encode(stack([one, other])), atol=1e-5)


def test_a_row_is_the_same_whatever_the_layout_of_the_batch() -> None:
    latent = LatentVecEnv(venv_of("picture"), encoder_of("picture"))
    encoded = count_encoded(latent)
    obs = np.stack([SPACES["picture"].sample() for _ in range(4)])
    first = latent._features(obs)
    assert np.array_equal(latent._features(np.asfortranarray(obs)[::-1]), first[::-1])
    assert sum(encoded) == 4


@pytest.mark.parametrize("memory", [0, 1, 600, 900, 10_000])
def test_whatever_the_memory_the_features_are_right(memory: int) -> None:
    """Room for none, none, two, three and many observations."""
    encoder = encoder_of("vector")
    latent = LatentVecEnv(venv_of("vector", env=Rooms), encoder, memory=memory)
    rng = np.random.default_rng(0)
    rows = rng.uniform(-1, 1, (6, 4)).astype(np.float32)
    for _ in range(30):
        obs = rows[rng.integers(6, size=rng.integers(1, 5))]
        with torch.no_grad():
            assert np.allclose(latent._features(obs), encoder(torch.as_tensor(obs)), atol=1e-5)
    if latent._memory:
        assert len(latent._memory.slots) <= latent._memory.capacity


def test_memory_takes_no_more_than_it_is_given() -> None:
    latent = LatentVecEnv(venv_of("picture"), encoder_of("picture"), memory=100_000)
    rng = np.random.default_rng(0)
    tracemalloc.start()
    try:
        for _ in range(30):
            latent._features(rng.integers(256, size=(32, 36, 40, 3), dtype=np.uint8))
        assert len(latent._memory.slots) > 100
        assert tracemalloc.get_traced_memory()[0] < 130_000
    finally:
        tracemalloc.stop()


def test_memory_stops_where_nothing_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LatentVecEnv, "WINDOW", 64)
    never, often = (LatentVecEnv(venv_of("vector", env=env), encoder_of("vector")) for env in (Noise, Rooms))
    for latent in (never, often):
        latent.reset()
        for _ in range(100):
            latent.step(np.zeros(2, int))
    assert never._memory is None
    assert often._memory is not None


# --- among SB3's other parts -----------------------------------------------------------------------------------------


def test_seeds_reach_the_environments() -> None:
    firsts = []
    for seed in (5, 5, 6):
        latent = LatentVecEnv(venv_of("picture"), encoder_of("picture"))
        latent.seed(seed)
        firsts.append(latent.reset())
    assert np.array_equal(firsts[0], firsts[1])
    assert not np.array_equal(firsts[0], firsts[2])


def test_monitor_evaluation_and_callbacks(tmp_path: Any) -> None:
    encoder = encoder_of("picture")
    env = VecMonitor(LatentVecEnv(venv_of("picture"), encoder))
    evaluation = VecMonitor(LatentVecEnv(venv_of("picture"), encoder))
    callback = EvalCallback(evaluation, eval_freq=16, n_eval_episodes=2, best_model_save_path=str(tmp_path), verbose=0)
    model = PPO("MlpPolicy", env, **SETTINGS[PPO], device="cpu")
    model.learn(64, callback=callback)
    assert np.isfinite(callback.best_mean_reward)
    assert len(model.ep_info_buffer) > 0
    loaded = PPO.load(tmp_path / "best_model", env=env, device="cpu")
    assert np.isfinite(evaluate_policy(loaded, evaluation, n_eval_episodes=2)[0])


def test_recurrent_policies() -> None:
    env = LatentVecEnv(venv_of("grid"), encoder_of("grid"))
    RecurrentPPO("MlpLstmPolicy", env, n_steps=16, batch_size=16, device="cpu").learn(64)
    kwargs = policy_kwargs(encoder_of("grid"), "recurrentppo")
    RecurrentPPO("CnnLstmPolicy", venv_of("grid"), policy_kwargs=kwargs, n_steps=16, batch_size=16, device="cpu").learn(
        64
    )


def picture() -> Noise:
    return Noise("picture")


def test_environments_in_other_processes() -> None:
    latent = LatentVecEnv(SubprocVecEnv([picture, picture], start_method="fork"), encoder_of("picture"))
    try:
        latent.reset()
        for _ in range(5):
            features, _, dones, infos = latent.step(np.zeros(2, int))
        assert dones.all()
        assert infos[1]["terminal_observation"].shape == (16,)
        assert features.shape == (2, 16)
    finally:
        latent.close()


def test_the_transposed_view_of_an_environment_is_encoded_as_well() -> None:
    encoder = encoder_of("picture")
    straight = LatentVecEnv(venv_of("picture"), encoder)
    turned = LatentVecEnv(VecTransposeImage(venv_of("picture")), encoder)
    assert np.allclose(straight.reset(), turned.reset(), atol=1e-6)


@pytest.mark.parametrize("cls", [PPO, DQN, SAC])
def test_normalisation_goes_around_the_features(cls: type[BaseAlgorithm]) -> None:
    encoder = encoder_of("picture")
    for norm_obs in (False, True):
        with pytest.raises(SpaceError, match=r"VecNormalize\(LatentVecEnv"):
            LatentVecEnv(VecNormalize(venv_of("picture", cls), norm_obs=norm_obs), encoder)
        build(cls, VecNormalize(LatentVecEnv(venv_of("picture", cls), encoder), norm_obs=norm_obs), {}).learn(40)


def test_a_replay_buffer_holds_features_and_no_pictures() -> None:
    latent = LatentVecEnv(venv_of("picture"), encoder_of("picture"))
    model = DQN("MlpPolicy", latent, buffer_size=400, learning_starts=20, device="cpu", seed=0)
    model.learn(60)
    buffer = model.replay_buffer
    dim = latent.encoder.features_dim
    for column in (buffer.observations, buffer.next_observations):
        assert (column.shape, column.dtype) == ((200, 2, dim), np.float32)
    stored = [key for key, value in vars(buffer).items() if isinstance(value, np.ndarray) and value.ndim > 3]
    assert stored == [], "pictures beside the features"
    assert model._last_obs.shape == (2, dim)
    assert model._last_original_obs is None or model._last_original_obs.shape == (2, dim)


def test_bad_arguments(tmp_path: Any) -> None:
    with pytest.raises(SpaceError, match="made for observations"):
        LatentVecEnv(venv_of("grid"), encoder_of("picture"))
    with pytest.raises(TypeError, match="DummyVecEnv"):
        LatentVecEnv(Noise("picture"), encoder_of("picture"))  # type: ignore[arg-type]
    with pytest.raises(RunError, match="no encoder"):
        LatentVecEnv(venv_of("picture"), tmp_path)


def test_an_encoder_by_its_folder(tmp_path: Any) -> None:
    encoder: Encoder = encoder_of("picture")
    encoder.save_pretrained(tmp_path)
    latent = LatentVecEnv(DummyVecEnv([picture]), tmp_path)
    assert latent.encoder.digest() == encoder.digest()
    assert extractors(PPO("MlpPolicy", latent, device="cpu"))[0].features_dim == 16
