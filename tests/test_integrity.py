"""Pre-trained weights that something changed are an error that says which, and what can have done it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sb3_cases import SPACES, build, encoder_of, extractors, venv_of
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn

from rlrep import make_encoder, policy_kwargs
from rlrep.sb3 import WeightsChangedError

HOW: dict[str, dict[str, Any]] = {
    "frozen": {"mode": "frozen"},
    "finetune": {"mode": "finetune"},
    "lowest layer frozen": {"mode": "finetune", "freeze": 1},
}

over = pytest.mark.parametrize("cls", [PPO, A2C, DQN, SAC])


def agent(cls: type[BaseAlgorithm], how: str = "finetune", space: str = "vector") -> BaseAlgorithm:
    return build(cls, venv_of(space, cls), policy_kwargs(encoder_of(space), cls, **HOW[how]))


def lowest(model: BaseAlgorithm) -> nn.Linear:
    """The lowest layer of the encoder, which no way of training above has moved before the first update."""
    return extractors(model)[0].encoder.layers[0]


@over
@pytest.mark.parametrize("how", HOW)
def test_nothing_is_said_where_nothing_happened(cls: type[BaseAlgorithm], how: str, tmp_path: Path) -> None:
    model = agent(cls, how)
    model.save(tmp_path / "untrained")
    model.learn(40)
    # Which reaches target networks too.
    model.policy.eval()
    model.policy.train()
    model.save(tmp_path / "agent")
    model.learn(40)
    cls.load(tmp_path / "agent", env=venv_of("vector", cls), device="cpu").learn(40).save(tmp_path / "again")


@over
@pytest.mark.parametrize("how", HOW)
def test_a_change_before_learning_is_found_when_learning_starts(cls: type[BaseAlgorithm], how: str) -> None:
    """Also one through `.data`, of which torch keeps no count."""
    model = agent(cls, how)
    nn.init.orthogonal_(lowest(model).weight.data)
    steps = model.num_timesteps
    with pytest.raises(WeightsChangedError, match=r"layers\.0\.weight, by 0\.\d+ at most.*an initialisation of every"):
        model.learn(40)
    assert model.num_timesteps == steps, "no step of the environment was paid for"


@over
def test_a_change_after_a_prediction_is_found_when_learning_starts(cls: type[BaseAlgorithm], tmp_path: Path) -> None:
    """And before, should the agent be saved."""
    model = agent(cls)
    model.predict(model.get_env().reset())
    nn.init.zeros_(lowest(model).bias)
    for use in (lambda: model.save(tmp_path / "agent"), lambda: model.learn(40)):
        with pytest.raises(WeightsChangedError, match=r"layers\.0\.bias.*an initialisation of every layer"):
            use()
    assert model.num_timesteps == 0, "no step of the environment was paid for"
    assert not (tmp_path / "agent.zip").exists()


@over
def test_a_change_that_torch_does_not_count_is_found_before_the_first_update(
    cls: type[BaseAlgorithm], tmp_path: Path
) -> None:
    model = agent(cls)
    model.predict(model.get_env().reset())
    before = {name: x.clone() for name, x in model.policy.state_dict().items() if "extractor" not in name}
    nn.init.zeros_(lowest(model).bias.data)
    with pytest.raises(WeightsChangedError, match=r"layers\.0\.bias.*an initialisation of every layer"):
        model.save(tmp_path / "agent")
    with pytest.raises(WeightsChangedError, match=r"layers\.0\.bias.*an initialisation of every layer"):
        model.learn(40)
    after = dict(model.policy.named_parameters())
    assert all(torch.equal(x, after[name]) for name, x in before.items() if name in after)


@over
@pytest.mark.parametrize("how", ["frozen", "lowest layer frozen"])
def test_a_change_of_what_is_frozen_is_found_at_save(cls: type[BaseAlgorithm], how: str, tmp_path: Path) -> None:
    model = agent(cls, how)
    model.learn(40)
    lowest(model).weight.data += 0.01
    with pytest.raises(WeightsChangedError, match="an optimiser that was given them, or a write to them in place"):
        model.save(tmp_path / "agent")
    assert not (tmp_path / "agent.zip").exists()


@pytest.mark.parametrize("how", ["frozen", "lowest layer frozen"])
def test_an_optimiser_that_got_hold_of_frozen_weights_is_found_as_it_goes(how: str) -> None:
    model = agent(PPO, how)
    stray = torch.optim.SGD(lowest(model).parameters(), lr=0.1)
    model.learn(32)
    for parameter in lowest(model).parameters():
        parameter.grad = torch.ones_like(parameter)
    stray.step()
    with pytest.raises(WeightsChangedError, match="an optimiser that was given them"):
        model.learn(32)


def test_statistics_that_moved_are_told_from_weights() -> None:
    encoder = make_encoder("sb3_cases:Shaky", SPACES["vector"]).eval()
    model = build(PPO, venv_of("vector"), policy_kwargs(encoder, mode="frozen"))
    extractors(model)[0].encoder.train()(torch.rand(8, 4))
    with pytest.raises(WeightsChangedError, match="running statistics, which batch normalisation moves"):
        model.learn(32)


def test_a_checkpoint_of_other_weights_is_meant_to_replace_them() -> None:
    model = agent(PPO, "lowest layer frozen")
    weights = {name: x.clone() for name, x in model.policy.state_dict().items()}
    for name in weights:
        if name.endswith("extractor.encoder.layers.0.weight"):
            weights[name] += 1
    model.policy.load_state_dict(weights)
    model.learn(32)
    lowest(model).weight.data -= 1
    with pytest.raises(WeightsChangedError):
        model.get_parameters()
