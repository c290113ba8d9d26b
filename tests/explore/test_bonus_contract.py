"""What every registered bonus must do, on every kind of observation."""

from __future__ import annotations

import dataclasses
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
NOT_FOR_NOVELTY = {"diayn": "pays for obeying a skill that can be told"}


def observations(space: spaces.Space, n: int, seed: int) -> Any:
    space.seed(seed)
    drawn = [space.sample() for _ in range(n)]
    if space == SPACES["picture"]:
        # Blocks of one colour: to a convolution all pictures of independent pixels look alike.
        drawn = [picture[::9, ::9].repeat(9, axis=0).repeat(9, axis=1) for picture in drawn]
    return to_tensor(_stack(drawn))


def _stack(drawn: list[Any]) -> Any:
    if isinstance(drawn[0], dict):
        return {key: _stack([one[key] for one in drawn]) for key in drawn[0]}
    return np.stack([np.asarray(one) for one in drawn])


def step(obs: Any, next_obs: Any, first: bool = False) -> Transition:
    n = len(tree_leaves(obs)[0])
    no = torch.zeros(n, dtype=torch.bool)
    return Transition(obs, torch.arange(n) % 5, next_obs, no, no, torch.full((n,), first))


def shown(bonus: Bonus, seed: int, next_seed: int, first: bool = False, n: int = N) -> Transition:
    """Random observations of what the bonus observes; a skill stays the same through a step."""
    obs, next_obs = (observations(bonus.observes, n, s) for s in (seed, next_seed))
    for key in bonus.context:
        next_obs[key] = obs[key]
    return step(obs, next_obs, first)


def build(name: str, space: spaces.Space, seed: int = 0, **options: Any) -> Bonus:
    torch.manual_seed(seed)
    bonus = make_explorer({"name": name, **options}, space, ACTIONS, N)
    assert isinstance(bonus, Bonus)
    return bonus


def fit(bonus: Bonus, steps: list[Transition], updates: int) -> None:
    """Shows the steps again and again, and trains on them if there is anything to train."""
    optimizer = None
    if bonus.learns:
        optimizer = torch.optim.Adam([p for p in bonus.parameters() if p.requires_grad], lr=1e-3)
    together = tree_map(lambda *xs: torch.cat(xs), *(vars(transition) for transition in steps))
    for i in range(updates):
        bonus.watch(steps[i % len(steps)])
        if optimizer is not None:
            loss, _ = bonus(Transition(**together).as_batch())
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
    transition = shown(bonus, 0, 1, first=True)
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
    """Familiar from training, and from earlier in the episode."""
    if name in NOT_FOR_NOVELTY:
        pytest.skip(NOT_FOR_NOVELTY[name])
    bonus = build(name, SPACES[kind])
    familiar, back, new = shown(bonus, 0, 1), shown(bonus, 1, 0), shown(bonus, 2, 3)
    bonus.watch(shown(bonus, 1, 0, first=True))
    fit(bonus, [familiar, back], updates=80)
    bonus.watch(familiar)
    low = bonus.reward(familiar).mean()
    bonus.watch(new)
    assert bonus.reward(new).mean() > 1.2 * low


@each_bonus
@each_space
def test_state_survives_the_disk_without_pickle(name: str, kind: str, tmp_path: Path) -> None:
    bonus = build(name, SPACES[kind])
    transition = shown(bonus, 0, 1, first=True)
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


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in BONUSES), ("count", {"simhash": 16})])
def test_the_order_of_keys_does_not_matter(name: str, options: dict[str, Any]) -> None:
    """An environment may give them in another order than its space, as envpool's MiniGrid does."""

    def paid(turn: bool) -> torch.Tensor:
        bonus, found = build(name, SPACES["dict"], **options), []
        for k in range(3):
            step = shown(bonus, 10 + k, 11 + k, first=k == 0)
            if turn:
                step = dataclasses.replace(step, obs=_turned(step.obs), next_obs=_turned(step.next_obs))
            bonus.watch(step)
            found.append(bonus.reward(step))
            if bonus.learns:
                found.append(bonus(step.as_batch())[0].detach()[None])
        return torch.cat(found)

    assert torch.equal(paid(turn=True), paid(turn=False))


def _turned(tree: Any) -> Any:
    return {key: _turned(tree[key]) for key in reversed(tree)} if isinstance(tree, dict) else tree


@each_bonus
def test_the_seed_decides(name: str) -> None:
    rewards = []
    for _ in range(2):
        bonus = build(name, BOARD, seed=7)
        transition = shown(bonus, 0, 1, first=True)
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
    transition = shown(bonus, 0, 1, first=True)
    bonus.watch(transition)
    loss, metrics = bonus(transition.as_batch())
    assert loss.shape == ()
    assert torch.isfinite(loss)
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    loss.backward()
    trained = bonus if bonus.encoder is None else bonus.encoder
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.parameters())
    assert all(p.grad is None for p in bonus.parameters() if not p.requires_grad)
    before = float(loss.detach())
    fit(bonus, [transition], updates=60)
    after = [float(bonus(transition.as_batch())[0].detach()) for _ in range(4)]
    assert np.mean(after) < 0.8 * before


@each_bonus
def test_padding_does_not_matter_to_the_loss(name: str) -> None:
    bonus = build(name, BOARD)
    if not bonus.learns:
        return
    bonus.watch(shown(bonus, 4, 5))
    batch = shown(bonus, 0, 1, n=8).as_batch()
    mask = torch.arange(8)[:, None] < 5
    losses = []
    for seed in (2, 3):
        garbage = observations(bonus.observes, 8, seed)

        def spoilt(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[5:, 1] = g[5:]
            return x

        obs = tree_map(spoilt, batch.obs, garbage)
        torch.manual_seed(0)
        losses.append(bonus(Batch(obs, batch.action, batch.terminated, mask, batch.first))[0])
    assert torch.equal(*losses)


@each_bonus
def test_an_episode_begins_where_first_says_so_and_nowhere_else(name: str) -> None:
    """Where a new episode began, and only there, a visit pays as it would in a new episode."""
    bonus, all_new, none_new = (build(name, BOARD) for _ in range(3))
    there, back, again = shown(bonus, 0, 1, first=True), shown(bonus, 1, 0), shown(bonus, 0, 1)
    fresh = shown(bonus, 0, 1, first=True)
    began = torch.tensor([True, False, True, False])
    mixed = Transition(again.obs, again.action, again.next_obs, again.terminated, again.truncated, began)
    rewards = []
    for each, last in ((bonus, mixed), (all_new, fresh), (none_new, again)):
        torch.manual_seed(0)
        for transition in (there, back, last):
            each.watch(transition)
        rewards.append(each.reward(last))
    expected = torch.where(began, rewards[1], rewards[2])
    assert torch.allclose(rewards[0], expected, rtol=0.2, atol=1e-6)


def test_what_remembers_the_episode_pays_again_in_a_new_one() -> None:
    """The contract above would hold too if nothing ever began anew."""
    for name in ("count:lifelong=false", "ride", "noveld", "e3b", "deir"):
        torch.manual_seed(0)
        bonus = make_explorer(name, BOARD, ACTIONS, N)
        paid = []
        for first in (True, False, False, True):
            transition = shown(bonus, 0, 1, first)
            bonus.watch(transition)
            paid.append(float(bonus.reward(transition).mean()))
        assert paid[2] < 0.8 * paid[0], name
        assert paid[3] == pytest.approx(paid[0], rel=0.05), name
