"""Agents that learn in dreams between their rollouts: of what they have earned, and at no rewarded step more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from belief_cases import CELLS, Corridor, CorridorModel, Ledger, Recall, venv_of
from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecNormalize

from rlrep import runs
from rlrep.collect import collect
from rlrep.dataset import Dataset
from rlrep.dreaming import Dreaming
from rlrep.finetune import finetune
from rlrep.latent import LatentVecEnv
from rlrep.pretrain import pretrain
from rlrep.registry import SpecError
from rlrep.types import RlrepError, SpaceError

MODEL = CorridorModel(Corridor.observation_space, Corridor.action_space)
OPTIONS: dict[str, Any] = {"every": 64, "updates": 300, "horizon": 8, "device": "cpu"}


def agent(cls: type[OnPolicyAlgorithm], dreaming: Dreaming, **settings: Any) -> OnPolicyAlgorithm:
    env = dreaming.wrap(venv_of(Corridor, 4, seed=3))
    settings = {"learning_rate": 3e-3, **settings}
    return cls("MlpPolicy", env, n_steps=16, gamma=0.9, seed=0, device="cpu", **settings)


@pytest.mark.parametrize(
    ("cls", "settings"), [(PPO, {"batch_size": 32, "n_epochs": 4}), (A2C, {"learning_rate": 5e-4})]
)
def test_few_real_steps_are_enough_with_dreams(
    cls: type[OnPolicyAlgorithm], settings: dict[str, Any], tmp_path: Path
) -> None:
    length = []
    for dreams in (False, True):
        dreaming = Dreaming(MODEL, tmp_path / str(dreams), ratio=16.0, **OPTIONS)
        model = agent(cls, dreaming, **settings)
        model.learn(192, callback=dreaming if dreams else None)
        dreaming.close()
        assert model.num_timesteps == 192, "a dreamt step is no rewarded step"
        lived = Dataset(tmp_path / str(dreams))
        assert lived.n_transitions == 192, "not everything was recorded"
        assert lived.column("reward").max() == 1
        # Dreams come before the rollouts from the second on, and take whole rollouts.
        assert dreaming.dreamt == (2 * 16 * 64 if dreams else 0)
        real = LatentVecEnv(venv_of(Corridor, 5, seed=50), MODEL, device="cpu")
        found = evaluate_policy(model, real, 50, deterministic=False, return_episode_rewards=True, warn=False)
        length.append(np.mean(found[1]))
    assert length[1] < 0.7 * length[0], length


class Log(BaseCallback):
    """Keeps what the rollouts of the agent see, and what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[np.ndarray] = []
        self.logged: dict[str, Any] = {}

    def _on_step(self) -> bool:
        self.seen.append(self.locals["new_obs"].copy())
        assert not self.model.policy.training, "real steps are taken as SB3 takes them"
        return True

    def _on_rollout_end(self) -> None:
        self.logged |= self.logger.name_to_value


def test_dreams_leave_nothing_of_theirs_in_the_rollouts(tmp_path: Path) -> None:
    """What the agent sees goes on where it was, and its settings are as they were."""
    dreaming, log = Dreaming(MODEL, tmp_path / "data", ratio=2.0, **OPTIONS), Log()
    model = agent(PPO, dreaming, batch_size=32)
    model.learning_rate = lambda progress: 1e-3 * progress
    model._setup_lr_schedule()
    env = model.get_env()
    model.learn(320, callback=[dreaming, log])
    assert model.get_env() is env
    assert model._n_updates == 5 * model.n_epochs
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * model._current_progress_remaining)
    ages = np.stack([np.round(100 * obs[:, CELLS]).astype(int) for obs in log.seen])
    going_on = np.diff(ages, axis=0)
    assert set(going_on[going_on > 0]) == {1}, "an episode was not gone on with after dreaming"
    assert log.logged["dream/steps"] == 128
    assert log.logged["dream/reward_explained"] > 0.5


def test_the_same_seed_dreams_the_same_and_learns_the_same(tmp_path: Path) -> None:
    weights = []
    for name in "ab":
        dreaming = Dreaming(MODEL, tmp_path / name, ratio=1.0, **OPTIONS)
        model = agent(PPO, dreaming, batch_size=32)
        model.learn(256, callback=dreaming)
        weights.append(torch.nn.utils.parameters_to_vector(model.policy.parameters()))
    assert torch.equal(*weights)


def test_what_was_done_is_on_disk_after_each_call_and_goes_on_in_other_environments(tmp_path: Path) -> None:
    dreaming = Dreaming(MODEL, tmp_path / "data", **OPTIONS)
    agent(PPO, dreaming, batch_size=32).learn(128, callback=dreaming)
    ended = Dataset(tmp_path / "data").n_transitions
    assert 64 < ended <= 128, "all but the episodes that are running"
    agent(PPO, dreaming, batch_size=32).learn(64, callback=dreaming)
    dreaming.close()
    assert Dataset(tmp_path / "data").n_transitions == 192


def test_where_nothing_is_paid_it_learns_as_without_dreams(tmp_path: Path) -> None:
    class Unpaid(Corridor):
        def step(self, action: np.int64) -> Any:
            obs, _, *rest = super().step(action)
            return obs, 0.0, *rest

    dreaming = Dreaming(MODEL, tmp_path / "data", **OPTIONS)
    model = PPO("MlpPolicy", dreaming.wrap(venv_of(Unpaid, 4)), n_steps=16, batch_size=32, device="cpu")
    model.learn(256, callback=dreaming)
    assert dreaming.dreamt == 0


def test_what_cannot_dream_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="remembers but cannot dream"):
        Dreaming(Ledger(Corridor.observation_space, Corridor.action_space), tmp_path / "data")
    with pytest.raises(ValueError, match="ratio=0"):
        Dreaming(MODEL, tmp_path / "data", ratio=0)
    with pytest.raises(ValueError, match="every must be at least 1"):
        Dreaming(MODEL, tmp_path / "data", every=0)
    with pytest.raises(ValueError, match=r"horizon is a whole number, not 2\.5"):
        Dreaming(MODEL, tmp_path / "data", horizon=2.5)  # type: ignore[arg-type]
    dreaming = Dreaming(MODEL, tmp_path / "data", device="cpu")
    with pytest.raises(SpaceError, match="made for observations"):
        dreaming.wrap(venv_of(Recall))
    assert not (tmp_path / "data").exists()
    env = LatentVecEnv(venv_of(Corridor), MODEL, device="cpu")
    with pytest.raises(RlrepError, match=r"dreaming\.wrap\(venv\)"):
        PPO("MlpPolicy", env, n_steps=16, batch_size=16, device="cpu").learn(16, callback=dreaming)
    env = dreaming.wrap(venv_of(Corridor))
    model = PPO("MlpPolicy", VecNormalize(env, norm_obs=False), n_steps=16, batch_size=16, device="cpu")
    with pytest.raises(RlrepError, match="rewards are normalised"):
        model.learn(16, callback=dreaming)
    with pytest.raises(ValueError, match="DQN does not learn from rollouts"):
        DQN("MlpPolicy", env, device="cpu", buffer_size=100).learn(16, callback=dreaming)
    with pytest.raises(ValueError, match="RecurrentPPO has a memory of its own"):
        RecurrentPPO("MlpLstmPolicy", env, n_steps=16, batch_size=16, device="cpu").learn(16, callback=dreaming)


def test_an_arm_that_dreams(tmp_path: Path) -> None:
    """Beside one that does not: the same rewarded steps, and its settings are checked before anything is trained."""
    spec = "rlrep/TinyGrid-v0:size=4"
    data = collect(spec, out=tmp_path / "data", steps=400, n_envs=4)
    pretrain(data, objectives=["gru:width=8,decoder_width=4"], updates=4, batch_size=4, out=tmp_path / "run")
    dream = {"name": "dream", "dream": {"ratio": 1, "every": 64, "updates": 5, "horizon": 4}}
    options: dict[str, Any] = {"steps": 256, "n_envs": 4, "eval_every": 128, "eval_episodes": 2, "seeds": [0]}
    settings = {"n_steps": 16, "batch_size": 32, "n_epochs": 1}
    for arm, message in (
        ({"name": "dream", "dream": {"horizn": 3}}, "no setting 'horizn'. Did you mean 'horizon'"),
        ({"name": "belief", "dream": {"ratio": 1}}, "which arms of kind 'dream' do"),
        ({"name": "dream", "dream": {"ratio": "4"}}, "arm 'dream': ratio is a number, not '4'"),
        ({"name": "dream", "dream": {"seed": 4}}, "no setting 'seed'"),
        ({"name": "dream", "dream": 4}, "is a mapping"),
        ({"name": "dream", "algorithm": "dqn"}, "does not learn from rollouts"),
        ({"name": "dream", "algorithm": "maskableppo"}, "asks which actions are possible"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(spec, encoder=tmp_path / "run", out=tmp_path / "bad", arms=[arm], **options)
    out = finetune(
        spec, encoder=tmp_path / "run", out=tmp_path / "out", arms=["belief", dream], settings=settings, **options
    )
    assert not list(out.glob("lived-*")), "what it recorded was left behind"
    rows = runs.read_jsonl(out / "scores.jsonl")
    assert {(row["arm"], row["steps"]) for row in rows} == {(a, s) for a in ("belief", "dream") for s in (128, 256)}
    assert not runs.read_jsonl(out / "failures.jsonl")
