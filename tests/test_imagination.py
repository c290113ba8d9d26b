"""Dreams as environments: what they are made of, where they begin and end, and that policies learn in them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from belief_cases import CELLS, Corridor, CorridorModel, Ledger, Raw, Recall, venv_of
from gymnasium import spaces
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor

from rlrep import imagination
from rlrep.belief import BeliefPolicy
from rlrep.collect import collect
from rlrep.dataset import Dataset, DatasetWriter
from rlrep.encoders import WorldModel, make_encoder
from rlrep.evaluate.dreams import dream
from rlrep.imagination import DreamVecEnv, RewardHead, fit_reward
from rlrep.latent import LatentVecEnv
from rlrep.objectives import make_objective
from rlrep.registry import SpecError
from rlrep.types import DatasetError, Episode, RewardWarning, SpaceError

MODEL = CorridorModel(Corridor.observation_space, Corridor.action_space)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Random steps with reward."""
    return collect(venv_of(Corridor), out=tmp_path_factory.mktemp("corridor") / "data", steps=1_000)


@pytest.fixture(scope="module")
def reward(data: Dataset) -> RewardHead:
    with warnings.catch_warnings():
        # They are foretold well, of which there is nothing to be said.
        warnings.simplefilter("error", RewardWarning)
        return fit_reward(MODEL, data, updates=400, learning_rate=3e-3, device="cpu")


def cell(features: np.ndarray) -> np.ndarray:
    return features[:, :CELLS].argmax(axis=1)


def age(features: np.ndarray) -> np.ndarray:
    return np.round(100 * features[:, CELLS]).astype(int)


def test_rewards_are_foretold(data: Dataset, reward: RewardHead) -> None:
    """At the right end 1 is paid, elsewhere nothing; the head never promises more."""
    at = torch.cat([torch.eye(CELLS), torch.full((CELLS, 1), 0.05)], dim=1)
    assert torch.allclose(reward(at), torch.eye(CELLS)[-1], atol=0.1)
    assert reward.explained > 0.9
    assert float(reward.high) == 1
    assert float(reward(10 * at).max()) <= 1
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_the_same_seed_gives_the_same_head(data: Dataset) -> None:
    state = torch.get_rng_state()
    heads = [fit_reward(MODEL, data, updates=20, seed=seed, device="cpu") for seed in (0, 0, 1)]
    weights = [torch.nn.utils.parameters_to_vector(head.parameters()) for head in heads]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), state), "torch's generator is not as it was"


def test_what_is_seldom_paid_is_not_missed(data: Dataset) -> None:
    """One episode in forty is paid, and two of some 140 are looked at."""
    paid = [bool(episode.reward.any()) for episode in data]
    few = data.select([paid.index(True), *[paid.index(False)] * 39] * 4)
    steps = 2 * int(few.table["length"].max())
    for seed in range(3):
        assert float(fit_reward(MODEL, few, steps=steps, updates=2, seed=seed, device="cpu").high) == 1


@pytest.mark.parametrize("n", [1, 2])
def test_what_is_paid_in_few_episodes_is_learnt_from_and_where_it_can_be_held_out_too(data: Dataset, n: int) -> None:
    paid = [bool(episode.reward.any()) for episode in data]
    few = data.select([paid.index(True)] * n + [paid.index(False)] * 5)
    for seed in range(4):
        train, held = imagination._split(few, 0.5, np.random.default_rng(seed))
        assert [sum(bool(episode.reward.any()) for episode in part) for part in (train, held)] == [1, n - 1]
        assert train.n_episodes + held.n_episodes == 5 + n


def test_rewards_that_are_not_foretold_are_warned_of(data: Dataset) -> None:
    with pytest.warns(RewardWarning, match=r"hardly better than by their mean: -?\d.*raise updates"):
        fit_reward(MODEL, data, updates=1, learning_rate=1e-6, device="cpu")
    with pytest.raises(ValueError, match="held_out is 0; it is a share"):
        fit_reward(MODEL, data, held_out=0)


def test_dreams_begin_where_data_lead_and_go_where_actions_lead(data: Dataset, reward: RewardHead) -> None:
    dream = DreamVecEnv(MODEL, reward, data, 8, horizon=4, device="cpu")
    assert dream.observation_space == spaces.Box(-np.inf, np.inf, (CELLS + 1,), np.float32)
    obs, rng, steps = dream.reset(), np.random.default_rng(0), np.zeros(8, int)
    begun = [obs]
    for _ in range(40):
        assert (cell(obs) < CELLS - 1).all(), "a dream began after the end"
        actions = rng.integers(2, size=8)
        expected = np.clip(cell(obs) + 2 * actions - 1, 0, CELLS - 1)
        before, steps = obs, steps + 1
        obs, rewards, dones, infos = dream.step(actions)
        over = expected == CELLS - 1
        assert np.array_equal(dones, over | (steps == 4))
        assert np.allclose(rewards, over, atol=0.1)
        assert [info.get("TimeLimit.truncated", False) for info in infos] == list(dones & ~over)
        assert np.array_equal(cell(obs)[~dones], expected[~dones])
        assert np.array_equal(age(obs)[~dones], age(before)[~dones] + 1)
        for i in np.flatnonzero(dones):
            last = infos[i]["terminal_observation"]
            assert (cell(last[None])[0], age(last[None])[0]) == (expected[i], age(before)[i] + 1)
        begun.append(obs[dones])
        steps[dones] = 0
    ages = age(np.concatenate(begun))
    assert ages.min() == 1, "none began with an episode"
    assert ages.max() > 5, "none began within an episode"


def test_long_episodes_are_cut(data: Dataset, reward: RewardHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagination, "LONGEST", 4)
    assert age(DreamVecEnv(MODEL, reward, data, 200, device="cpu").reset()).max() == 4


def test_beliefs_are_those_of_the_episode(tmp_path: Path) -> None:
    """However many are walked side by side, and whichever are over first: one that remembers a sum is right."""

    class Sum(Ledger, WorldModel):
        """What `_beliefs` needs of a world model."""

    space, action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32), spaces.Discrete(2, start=3)
    rng, expected = np.random.default_rng(0), set()
    with DatasetWriter(tmp_path / "data", space, action_space) as writer:
        for length in (1, 2, 7, 4):
            obs = rng.normal(size=(length + 1, 1)).astype(np.float32)
            action = rng.integers(3, 5, size=length)
            writer.add(Episode(obs, action, np.zeros(length, np.float32), True, False))
            for t in range(length):
                parts = [obs[k, 0] + (0 if k == 0 else 100 * (action[k - 1] - 2)) for k in range(t + 1)]
                expected.add(round(float(sum(parts)), 2))
    model = Sum(space, action_space, keep=1.0)
    features = DreamVecEnv(model, RewardHead(2), Dataset(tmp_path / "data"), 200, device="cpu").reset()
    assert {round(float(x), 2) for x in features[:, 1]} == expected


def test_ends_are_drawn_or_likely(data: Dataset, reward: RewardHead) -> None:
    class Unsure(CorridorModel):
        """Never sure that an episode goes on."""

        def continues(self, features: torch.Tensor) -> torch.Tensor:
            return torch.full((len(features),), 0.7)

    model = Unsure(Corridor.observation_space, Corridor.action_space)
    for sample, low, high in ((True, 0.2, 0.4), (False, 0.0, 0.0)):
        dream = DreamVecEnv(model, reward, data, 200, horizon=100, sample_ends=sample, device="cpu")
        dream.reset()
        assert low <= np.mean([dream.step(np.zeros(200, int))[2] for _ in range(3)]) <= high


def test_the_same_seed_dreams_the_same(data: Dataset, reward: RewardHead) -> None:
    model = CorridorModel(Corridor.observation_space, Corridor.action_space, slip=0.5)

    def dreamt(seed: int, reseed: bool) -> np.ndarray:
        dream = DreamVecEnv(model, reward, data, 8, seed=0 if reseed else seed, device="cpu")
        if reseed:
            dream.reset()
            dream.seed(seed)
        found = [dream.reset()]
        for _ in range(20):
            torch.rand(3)
            found.append(dream.step(np.ones(8, int))[0])
        return np.stack(found)

    assert np.array_equal(dreamt(1, False), dreamt(1, True))
    assert not np.array_equal(dreamt(1, False), dreamt(2, False))


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (PPO, {"n_steps": 32, "batch_size": 128, "n_epochs": 4, "learning_rate": 3e-3}),
        (DQN, {"learning_starts": 200, "learning_rate": 3e-3, "target_update_interval": 100, "train_freq": 2,
               "exploration_fraction": 0.5, "buffer_size": 5_000}),
    ],
)  # fmt: skip
def test_what_is_learnt_in_dreams_holds_in_the_real_environments(
    cls: type[BaseAlgorithm], settings: dict[str, Any], data: Dataset, reward: RewardHead
) -> None:
    env = VecMonitor(DreamVecEnv(MODEL, reward, data, 16, horizon=8, device="cpu"))
    model = cls("MlpPolicy", env, seed=0, device="cpu", gamma=0.9, **settings)
    model.learn(4_096)
    real = LatentVecEnv(VecMonitor(venv_of(Corridor, 5, seed=50)), MODEL, device="cpu")
    returns, lengths = evaluate_policy(model, real, 30, return_episode_rewards=True)
    assert np.mean(returns) > 0.9
    assert max(lengths) <= CELLS, "it does not go straight there"


@pytest.mark.parametrize("spec", ["gru:width=8,decoder_width=4", "rssm:deter=8,groups=2,classes=3,hidden=8"])
def test_world_models_that_are_learnt_dream_of_any_observation(spec: str, tmp_path: Path) -> None:
    data = collect("rlrep/TinyGrid-v0:size=4,obs_type=dict", out=tmp_path / "data", steps=200, n_envs=4)
    encoder = make_encoder("dict:features_dim=8", data.observation_space)
    model = make_objective(spec, encoder, data.action_space).exports()["belief"].eval()
    env = DreamVecEnv(model, fit_reward(model, data, updates=2, device="cpu"), data, 4, horizon=3, device="cpu")
    PPO("MlpPolicy", env, n_steps=8, batch_size=16, n_epochs=1, device="cpu").learn(32)
    found = dream(model, data, context=2, horizon=3, segments=8, device="cpu")
    assert np.isfinite([found.dreamt, found.seen, found.uncertainty]).all()
    # A random state is not sure of what comes, a deterministic one always.
    assert (found.uncertainty.max() > 1e-6) == spec.startswith("rssm")


def test_what_cannot_be_dreamt_is_refused(data: Dataset, reward: RewardHead, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="'belief_cases:Raw' has no memory"):
        fit_reward(Raw(Corridor.observation_space), data)
    with pytest.raises(SpecError, match="remembers but cannot dream"):
        DreamVecEnv(Ledger(Corridor.observation_space, Corridor.action_space), reward, data)
    with pytest.raises(SpaceError, match="made for observations"):
        DreamVecEnv(CorridorModel(Recall.observation_space, Recall.action_space), reward, data)
    with pytest.raises(SpaceError, match=r"made for actions Discrete\(3\)"):
        DreamVecEnv(CorridorModel(Corridor.observation_space, spaces.Discrete(3)), reward, data)
    with pytest.raises(SpaceError, match="a reward of 9 features"):
        DreamVecEnv(MODEL, RewardHead(9), data)
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        DreamVecEnv(MODEL, reward, data, horizon=0)
    paid = [i for i, episode in enumerate(data) if episode.reward.sum() == 0]
    with pytest.raises(DatasetError, match="the reward is 0 at all"):
        fit_reward(MODEL, data.select([*paid, *paid]), held_out=0.5)
    # Whole episodes of 30 steps each: a third would be more than was asked for.
    with pytest.raises(DatasetError, match="at all 60 steps"):
        fit_reward(MODEL, data.select(paid * 6), steps=70, held_out=0.5)
    other = CorridorModel(Corridor.observation_space, Corridor.action_space)
    torch.nn.init.constant_(other.encoder.scale, 2.0)
    dreamt = PPO("MlpPolicy", DreamVecEnv(MODEL, reward, data, 2, device="cpu"), n_steps=8, batch_size=8, device="cpu")
    with pytest.raises(SpaceError, match="an encoder with digest"):
        BeliefPolicy(other, dreamt)
    with pytest.raises(AttributeError, match="no environments"):
        DreamVecEnv(MODEL, reward, data).env_method("render")
