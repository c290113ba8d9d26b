"""What each family of objectives is for, seen on worlds small enough to train on in a second."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rlrep.encoders import Encoder, make_encoder
from rlrep.objectives import Objective, make_objective, objectives
from rlrep.types import Batch

FLOOR, WALL, KEY = (40, 40, 40), (120, 120, 120), (250, 220, 20)
SIZE = 36
PICTURE = spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
MOVES = spaces.Discrete(4)


def make_batch(obs: Tensor, action: Tensor) -> Batch:
    nothing = torch.zeros(action.shape[:2], dtype=torch.bool)
    return Batch(obs=obs, action=action, terminated=nothing, mask=~nothing, first=nothing)


def fit(objective: Objective, batches: list[Batch], learning_rate: float) -> None:
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], learning_rate)
    for batch in batches:
        optimizer.zero_grad()
        objective(batch)[0].backward()
        optimizer.step()
        objective.after_step()


def explained(encoder: Encoder, obs: Tensor, factor: Tensor) -> float:
    """R2, on the second half, of a linear probe fitted on the first half."""
    with torch.no_grad():
        features = encoder.encode(obs)
    x = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    y = factor.double()
    half = len(x) // 2
    ridge = 1e-3 * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(x[:half].T @ x[:half] + ridge, x[:half].T @ y[:half])
    error = (y[half:] - x[half:] @ weight).square().mean()
    return float(1 - error / y[half:].var(dim=0, correction=0).mean())


def rooms(n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Walled rooms with a block of 12x12 pixels and a key of 3x3: pictures, (row, column) of the key, its pixels."""
    pictures = np.full((n, SIZE, SIZE, 3), WALL, np.uint8)
    pictures[:, 2:-2, 2:-2] = FLOOR
    places = rng.integers(4, size=(n, 2))
    keys = np.zeros((n, SIZE, SIZE), bool)
    for i in range(n):
        row, column = rng.integers(2, SIZE - 13, size=2)
        pictures[i, row : row + 12, column : column + 12] = WALL
        row, column = 4 + 8 * places[i]
        keys[i, row : row + 3, column : column + 3] = True
    pictures[keys] = KEY
    return torch.from_numpy(pictures), torch.from_numpy(places), torch.from_numpy(keys)


@pytest.mark.parametrize("seed", [0, 1])
def test_rarity_keeps_a_small_object_that_the_plain_error_loses(seed: int) -> None:
    """At equal updates on equal batches, features and drawings of the weighted loss tell better where the key lies."""
    told, off = {}, {}
    for rarity in (0.0, 0.5):
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        encoder = make_encoder("nature:features_dim=32,width=8", PICTURE)
        objective = objectives.build({"name": "ae", "rarity": rarity, "width": 16}, encoder, MOVES)
        action = torch.zeros(32, 1, dtype=torch.long)
        batches = [make_batch(rooms(64, rng)[0].unflatten(0, (32, 2)), action) for _ in range(100)]
        fit(objective, batches, 3e-3)
        obs, places, keys = rooms(600, rng)
        with torch.no_grad():
            drawn = objective.reconstruct.decode(encoder(obs)).permute(0, 2, 3, 1)
        told[rarity] = explained(encoder, obs, places)
        off[rarity] = float((drawn - obs / 255)[keys].square().mean().sqrt())
    assert told[0.5] > told[0.0] + 0.15
    assert off[0.5] < 0.7 * off[0.0]


def walks(n: int, steps: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A world of which the action moves one half: observations (n, steps+1, 8), actions, and each half's state (.., 2).

    Two points move by the same four moves; one as the action says, the other by chance. Both are seen through a fixed
    random rotation, so that neither is an entry of the observation.
    """
    moves = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], np.float32) / 2
    rotation = np.linalg.qr(np.random.default_rng(99).normal(size=(8, 8)))[0].astype(np.float32)
    action = rng.integers(4, size=(n, steps))
    other = rng.integers(4, size=(n, steps))
    start = rng.normal(size=(2, n, 1, 2)).astype(np.float32)
    mine, its = (
        np.concatenate([s, s + moves[a].cumsum(axis=1)], axis=1) for s, a in zip(start, (action, other), strict=True)
    )
    seen = np.concatenate([mine, its, np.zeros((n, steps + 1, 4), np.float32)], axis=-1) @ rotation
    return tuple(torch.from_numpy(x) for x in (seen, action, mine, its))


VECTOR = spaces.Box(-np.inf, np.inf, (8,), np.float32)


def test_inverse_keeps_what_the_action_controls() -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    encoder = make_encoder({"name": "mlp", "features_dim": 4, "hidden": [64]}, VECTOR)
    objective = make_objective("inverse:hidden=64", encoder, MOVES)
    before = make_batch(*walks(256, 1, rng)[:2])
    chance = float(objective(before)[1]["inverse/accuracy"])
    fit(objective, [make_batch(*walks(128, 1, rng)[:2]) for _ in range(400)], 3e-3)
    after = float(objective(make_batch(*walks(256, 1, rng)[:2]))[1]["inverse/accuracy"])
    obs, _, mine, its = (x.flatten(0, 1) for x in walks(600, 1, rng))
    assert chance < 0.45
    assert after > 0.85
    assert explained(encoder, obs, mine) > explained(encoder, obs, its) + 0.2


@pytest.mark.parametrize("name", ["atc", "spr"])
def test_temporal_objectives_keep_where_things_are(name: str) -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    encoder = make_encoder({"name": "mlp", "features_dim": 16, "hidden": [64]}, VECTOR)
    objective = make_objective(name, encoder, MOVES)
    fit(objective, [make_batch(*walks(64, objective.span, rng)[:2]) for _ in range(150)], 1e-3)
    obs, _, mine, _ = (x.flatten(0, 1) for x in walks(400, 1, rng))
    assert explained(encoder, obs, mine) > 0.7
    with torch.no_grad():
        spread = encoder(obs).std(dim=0)
    assert float(spread.mean()) > 0.1


@pytest.mark.parametrize("name", objectives.names())
def test_targets_never_take_a_gradient_and_follow_slowly(name: str) -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    encoder = make_encoder({"name": "mlp", "features_dim": 8, "hidden": [16]}, VECTOR)
    objective = make_objective(name, encoder, MOVES)
    start = {key: value.clone() for key, value in objective.state_dict().items()}
    fit(objective, [make_batch(*walks(16, objective.span, rng)[:2]) for _ in range(10)], 1e-2)
    for key, parameter in objective.named_parameters():
        moved = float((parameter.detach() - start[key]).norm())
        if ".ema_" in key:
            online = objective.get_parameter(key.replace(".ema_", "."))
            assert parameter.grad is None
            assert not parameter.requires_grad
            assert 0 < moved < 0.2 * float((online.detach() - start[key]).norm())
        else:
            assert moved > 0
