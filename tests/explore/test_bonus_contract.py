"""What every registered bonus must do, on every kind of observation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.torch import load_file, save_file

from rlrep.explore import Bonus, explorers, make_explorer
from rlrep.types import Batch, Transition, to_tensor, tree_leaves, tree_map

N = 4
BOARD = spaces.Box(0, 255, (5, 5, 3), np.uint8)
SPACES: dict[str, spaces.Space] = {
    "vector": spaces.Box(-np.inf, np.inf, (6,), np.float32),
    "discrete": spaces.Discrete(50),
    "board": BOARD,
    "picture": spaces.Box(0, 255, (36, 36, 3), np.uint8),
    "dict": spaces.Dict({"image": BOARD, "nested": spaces.Dict({"x": spaces.Box(-1, 1, (3,), np.float32)})}),
}
ACTIONS = spaces.Discrete(5)
BONUSES = [name for name, cls in explorers.items() if issubclass(cls, Bonus)]


def observations(space: spaces.Space, n: int, seed: int) -> Any:
    space.seed(seed)
    drawn = [space.sample() for _ in range(n)]
    return to_tensor(_stack(drawn))


def _stack(drawn: list[Any]) -> Any:
    if isinstance(drawn[0], dict):
        return {key: _stack([one[key] for one in drawn]) for key in drawn[0]}
    return np.stack([np.asarray(one) for one in drawn])


def step(obs: Any, next_obs: Any, first: bool = False) -> Transition:
    n = len(tree_leaves(obs)[0])
    no = torch.zeros(n, dtype=torch.bool)
    return Transition(obs, torch.arange(n) % 5, next_obs, no, no, torch.full((n,), first))


def build(name: str, space: spaces.Space, seed: int = 0, **options: Any) -> Bonus:
    torch.manual_seed(seed)
    bonus = make_explorer({"name": name, **options}, space, ACTIONS, N)
    assert isinstance(bonus, Bonus)
    return bonus


def fit(bonus: Bonus, steps: list[Transition], updates: int = 60) -> None:
    """Shows the steps again and again, and trains on them if there is anything to train."""
    optimizer = None
    if bonus.learns:
        optimizer = torch.optim.Adam([p for p in bonus.parameters() if p.requires_grad], lr=1e-3)
    for i in range(updates):
        transition = steps[i % len(steps)]
        bonus.watch(transition)
        if optimizer is not None:
            loss, _ = bonus(transition.as_batch())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bonus.after_step()


each_bonus = pytest.mark.parametrize("name", BONUSES)
each_space = pytest.mark.parametrize("kind", SPACES)


@each_bonus
@each_space
def test_reward_is_one_finite_number_an_environment_and_changes_nothing(name: str, kind: str) -> None:
    bonus = build(name, SPACES[kind])
    transition = step(observations(SPACES[kind], N, 0), observations(SPACES[kind], N, 1), first=True)
    bonus.watch(transition)
    reward = bonus.reward(transition)
    assert reward.shape == (N,)
    assert reward.dtype == torch.float32
    assert not reward.requires_grad
    assert torch.isfinite(reward).all()
    assert torch.equal(bonus.reward(transition), reward)


@each_bonus
@each_space
def test_what_is_new_pays_more_than_what_is_familiar(name: str, kind: str) -> None:
    bonus = build(name, SPACES[kind])
    familiar = step(observations(SPACES[kind], N, 0), observations(SPACES[kind], N, 1), first=True)
    new = step(observations(SPACES[kind], N, 2), observations(SPACES[kind], N, 3), first=True)
    fit(bonus, [familiar])
    bonus.watch(familiar)
    low = bonus.reward(familiar)
    bonus.watch(new)
    assert bonus.reward(new).mean() > 1.5 * low.mean()


@each_bonus
@each_space
def test_state_survives_the_disk_without_pickle(name: str, kind: str, tmp_path: Path) -> None:
    bonus = build(name, SPACES[kind])
    transition = step(observations(SPACES[kind], N, 0), observations(SPACES[kind], N, 1), first=True)
    fit(bonus, [transition], updates=5)
    save_file({key: value.contiguous() for key, value in bonus.state_dict().items()}, tmp_path / "bonus.safetensors")
    again = build(name, SPACES[kind], seed=1)
    again.load_state_dict(load_file(tmp_path / "bonus.safetensors"))
    # Whoever resumes resets the environments, so a comparison begins with an episode.
    rewards = []
    for each in (bonus, again):
        each.watch(transition)
        rewards.append(each.reward(transition))
    assert torch.equal(*rewards)


@each_bonus
def test_the_seed_decides(name: str) -> None:
    transition = step(observations(BOARD, N, 0), observations(BOARD, N, 1), first=True)
    rewards = []
    for _ in range(2):
        bonus = build(name, BOARD, seed=7)
        fit(bonus, [transition], updates=5)
        rewards.append(bonus.reward(transition))
    assert torch.equal(*rewards)


@each_bonus
@each_space
def test_the_loss_is_an_objective(name: str, kind: str) -> None:
    bonus = build(name, SPACES[kind])
    if not bonus.learns:
        assert bonus.encoder is None
        return
    transition = step(observations(SPACES[kind], N, 0), observations(SPACES[kind], N, 1), first=True)
    bonus.watch(transition)
    loss, metrics = bonus(transition.as_batch())
    assert loss.shape == ()
    assert torch.isfinite(loss)
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in bonus.encoder.parameters())
    assert all(p.grad is None for p in bonus.parameters() if not p.requires_grad)
    before = float(loss.detach())
    fit(bonus, [transition], updates=40)
    assert float(bonus(transition.as_batch())[0].detach()) < 0.7 * before


@each_bonus
def test_padding_does_not_matter_to_the_loss(name: str) -> None:
    bonus = build(name, BOARD)
    if not bonus.learns:
        return
    batch = step(observations(BOARD, 8, 0), observations(BOARD, 8, 1)).as_batch()
    mask = torch.arange(8)[:, None] < 5
    losses = []
    for seed in (2, 3):
        garbage = observations(BOARD, 8, seed)
        obs = tree_map(
            lambda x, g: torch.where(
                mask[:, 0].view(-1, 1, 1, 1, 1) | (torch.arange(2) == 0).view(1, 2, 1, 1, 1), x, g[:, None]
            ),
            batch.obs,
            garbage,
        )
        losses.append(bonus(Batch(obs, batch.action, batch.terminated, mask, batch.first))[0])
    assert torch.equal(*losses)


@each_bonus
def test_an_episode_begins_where_first_says_so_and_nowhere_else(name: str) -> None:
    """Where a new episode began, and only there, a visit pays as it would in a new episode."""
    bonus = build(name, BOARD)
    a, b = observations(BOARD, N, 0), observations(BOARD, N, 1)
    there = step(a, b, first=True)
    bonus.watch(there)
    bonus.watch(step(b, a))
    again = step(a, b)
    began = torch.tensor([True, False, True, False])
    mixed = Transition(a, again.action, b, again.terminated, again.truncated, began)
    all_new = build(name, BOARD)
    for transition in (there, step(b, a), step(a, b, first=True)):
        all_new.watch(transition)
    none_new = build(name, BOARD)
    for transition in (there, step(b, a), again):
        none_new.watch(transition)
    bonus.watch(mixed)
    expected = torch.where(began, all_new.reward(there), none_new.reward(again))
    assert torch.allclose(bonus.reward(mixed), expected, rtol=0.2, atol=1e-6)
