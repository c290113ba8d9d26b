"""Random network distillation: what it learns, and what fools it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlrep.explore import make_explorer
from rlrep.types import Transition

BOARD = spaces.Box(0, 255, (7, 7, 3), np.uint8)


def step(next_obs: np.ndarray) -> Transition:
    obs = torch.from_numpy(next_obs)
    no = torch.zeros(len(obs), dtype=torch.bool)
    return Transition(obs, torch.zeros(len(obs), dtype=torch.int64), obs, no, no, no)


def test_a_noisy_television_stays_new() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    bonus = make_explorer("rnd", BOARD, spaces.Discrete(7), 32)
    optimizer = torch.optim.Adam([p for p in bonus.parameters() if p.requires_grad], lr=1e-3)
    rooms = rng.integers(0, 10, (32, 7, 7, 3), dtype=np.uint8)

    def television() -> np.ndarray:
        boards = rooms.copy()
        boards[:, :2, :2] = rng.integers(0, 10, (32, 2, 2, 3))
        return boards

    for i in range(200):
        loss, _ = bonus(step(rooms if i % 2 else television()).as_batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert bonus.reward(step(television())).mean() > 5 * bonus.reward(step(rooms)).mean()


def test_only_the_stated_proportion_is_learnt_from() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    bonus = make_explorer("rnd:update_proportion=0.25", BOARD, spaces.Discrete(7), 8)
    boards = rng.integers(0, 10, (8, 7, 7, 3), dtype=np.uint8)
    changed = boards.copy()
    changed[2:] = 0
    assert torch.equal(bonus(step(boards).as_batch())[0], bonus(step(changed).as_batch())[0])
    whole = make_explorer("rnd", BOARD, spaces.Discrete(7), 8)
    assert whole(step(boards).as_batch())[0] != whole(step(changed).as_batch())[0]


def test_the_loss_is_the_mean_reward() -> None:
    """Both are the squared distance of prediction and target, which one formula gives."""
    torch.manual_seed(0)
    bonus = make_explorer("rnd", BOARD, spaces.Discrete(7), 8)
    transition = step(np.random.default_rng(0).integers(0, 10, (8, 7, 7, 3), dtype=np.uint8))
    raw = transition.next_obs
    target = bonus.target(raw)
    prediction = bonus.predict(torch.relu(bonus.encoder(raw)))
    expected = ((prediction - target) ** 2).mean(dim=1)
    assert torch.allclose(bonus.reward(transition), expected)
    assert torch.allclose(bonus(transition.as_batch())[0], expected.mean())


@pytest.mark.parametrize("proportion", [0.0, 1.5])
def test_a_proportion_outside_0_to_1_is_refused(proportion: float) -> None:
    with pytest.raises(ValueError, match="update_proportion"):
        make_explorer({"name": "rnd", "update_proportion": proportion}, BOARD, spaces.Discrete(7), 8)
