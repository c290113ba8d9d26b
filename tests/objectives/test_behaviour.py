"""What each family of objectives is for, seen on worlds small enough to train on in a second."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rlrep.encoders import Encoder, make_encoder
from rlrep.evaluate.collapse import effective_rank
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
        return explained_by(encoder.encode(obs), factor)


def explained_by(features: Tensor, factor: Tensor) -> float:
    """The same of features that are there."""
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
    short = {"steps": 4} if "recall" in objectives.options(name) else {}
    objective = make_objective({"name": name, **short}, encoder, MOVES)
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


BOARD = spaces.Box(0, 255, (4, 4, 3), np.uint8)


def stripes(n: int, rng: np.random.Generator) -> Tensor:
    """(n, 2, 4, 4, 3) boards whose rows are each of one of four kinds: a hidden cell can be told from its row."""
    kinds = rng.integers(1, 5, size=(n, 2, 4, 1, 1))
    return torch.from_numpy(np.broadcast_to(kinds, (n, 2, 4, 4, 3)).astype(np.uint8).copy())


def test_mae_tells_hidden_cells_from_those_beside_them() -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    encoder = make_encoder("grid:features_dim=64,width=16", BOARD)
    objective = objectives.build({"name": "mae", "ratio": 0.3, "width": 16}, encoder, MOVES)
    action = torch.zeros(64, 1, dtype=torch.long)
    fit(objective, [make_batch(stripes(64, rng), action) for _ in range(150)], 3e-3)
    obs = stripes(200, rng)[:, 0]
    with torch.no_grad():
        left, where = objective.hide(obs)
        drawn = objective.reconstruct.decode(encoder(left)).unflatten(2, (3, -1)).argmax(dim=-1)
    right = (drawn == obs.flatten(1, 2)).all(dim=-1)[where].float().mean()
    assert float(right) > 0.6, "the commonest kind is right in a quarter of the cells"


def test_vq_uses_many_codes() -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    encoder = make_encoder("grid:features_dim=64,width=16,spatial=true", BOARD)
    objective = objectives.build({"name": "vq", "n_codes": 32, "code_dim": 8, "width": 16}, encoder, MOVES)
    action = torch.zeros(32, 1, dtype=torch.long)
    before = float(objective(make_batch(stripes(32, rng), action))[0].detach())
    fit(objective, [make_batch(stripes(32, rng), action) for _ in range(150)], 3e-3)
    objective.eval()
    loss, metrics = objective(make_batch(stripes(200, rng), torch.zeros(200, 1, dtype=torch.long)))
    assert float(metrics["perplexity"]) > 8
    assert float(loss.detach()) < 0.5 * before


@pytest.mark.parametrize(
    "spec", ["curl:projection_dim=16", "cpc:hidden=32,projection_dim=16", "cpc:hidden=32,negatives=same"]
)
def test_contrast_picks_the_positive_far_above_chance(spec: str) -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    encoder = make_encoder({"name": "mlp", "features_dim": 16, "hidden": [64]}, VECTOR)
    objective = make_objective(spec, encoder, MOVES)
    name = spec.partition(":")[0]
    held_out = make_batch(*walks(32, objective.span, rng)[:2])
    fit(objective, [make_batch(*walks(32, objective.span, rng)[:2]) for _ in range(150)], 3e-3)
    accuracy = float(objective(held_out)[1][f"{name}/accuracy"])
    # 32 candidates; 4 moments of each segment for cpc, or of its own only, where a random walk can be told less well.
    assert accuracy > (0.35 if "same" in spec else {"curl": 8 / 32, "cpc": 8 / 128}[name])


@pytest.mark.parametrize("spec", ["byol:lag=1", "vicreg:projection_dim=32", "barlow:projection_dim=32", "forward"])
def test_without_negatives_the_features_do_not_collapse(spec: str) -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    encoder = make_encoder({"name": "mlp", "features_dim": 16, "hidden": [64]}, VECTOR)
    objective = make_objective(spec, encoder, MOVES)
    fit(objective, [make_batch(*walks(64, 1, rng)[:2]) for _ in range(150)], 1e-3)
    obs, _, mine, its = (x.flatten(0, 1) for x in walks(400, 1, rng))
    assert explained(encoder, obs, torch.cat([mine, its], dim=1)) > 0.7
    with torch.no_grad():
        assert effective_rank(encoder(obs)) > 4


def lines(n: int, steps: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Boards whose cells all hold a number from 0 to 3, which the actions move by -2, -1, 1 and 2 as far as it goes."""
    action, state = rng.integers(0, 4, size=(n, steps)), rng.integers(0, 4, size=(n, steps + 1))
    for t in range(steps):
        state[:, t + 1] = np.clip(state[:, t] + np.array([-2, -1, 1, 2])[action[:, t]], 0, 3)
    obs = np.broadcast_to(state[:, :, None, None, None], (n, steps + 1, *BOARD.shape)).astype(np.uint8).copy()
    return torch.from_numpy(obs), torch.from_numpy(action)


def test_gpt_knows_what_an_action_leads_to() -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    encoder = make_encoder("grid:features_dim=16,width=8", BOARD)
    spec = {"name": "gpt", "steps": 3, "width": 32, "layers": 1, "heads": 2, "decoder_width": 8}
    objective = objectives.build(spec, encoder, MOVES)
    fit(objective, [make_batch(*lines(32, 3, rng)) for _ in range(150)], 3e-3)
    obs, action = lines(100, 3, rng)
    with torch.no_grad():
        tokens = objective.trajectory.embed(encoder.encode(obs[:, :3]), action)
        _, context = objective.trajectory(*tokens, torch.ones(100, 3, dtype=torch.bool))
        drawn = objective.reconstruct.decode(context.flatten(0, 1)).unflatten(2, (3, -1)).argmax(dim=-1)
    right = (drawn == obs[:, 1:].flatten(0, 1).flatten(1, 2)).float().mean()
    assert float(right) > 0.9, "a quarter would be chance"


def test_gpt_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    encoder = make_encoder("grid:features_dim=16,width=8", BOARD)
    objective = objectives.build({"name": "gpt", "steps": 3, "width": 32, "heads": 2}, encoder, MOVES)
    obs, action = lines(6, 3, np.random.default_rng(0))
    there = torch.ones(6, 3, dtype=torch.bool)
    with torch.no_grad():
        observed, acted = objective.trajectory.embed(encoder.encode(obs[:, :3]), action)
        before = objective.trajectory(observed, acted, there)
        observed[:, 2] += torch.randn(32)
        acted[:, 1] += torch.randn(32)
        after = objective.trajectory(observed, acted, there)
    assert torch.equal(before[0][:, :2], after[0][:, :2])
    assert torch.equal(before[1][:, 0], after[1][:, 0])
    assert not torch.allclose(before[1][:, 1], after[1][:, 1])


def test_mtm_tells_hidden_actions_from_what_is_around_them() -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    encoder = make_encoder("grid:features_dim=16,width=8", BOARD)
    spec = {
        "name": "mtm",
        "steps": 3,
        "ratio": 0.3,
        "action_weight": 1.0,
        "width": 32,
        "layers": 1,
        "heads": 2,
        "decoder_width": 8,
    }
    objective = objectives.build(spec, encoder, MOVES)
    fit(objective, [make_batch(*lines(32, 3, rng)) for _ in range(250)], 3e-3)
    _, metrics = objective(make_batch(*lines(200, 3, rng)))
    # Both observations around an action are there in half of the cases, and do not always tell.
    assert float(metrics["action_loss"]) < 0.85 * np.log(4)


CORRIDOR, ACTS = spaces.Box(0, 255, (3, 3, 3), np.uint8), spaces.Discrete(2)


def corridor(n: int, rng: np.random.Generator) -> tuple[Batch, Tensor]:
    """Boards in which a thing in the corner is seen at the start only, and never matters again; which of two it was."""
    obs = np.zeros((n, 7, 3, 3, 3), np.uint8)
    thing = rng.integers(0, 2, n)
    obs[:, 0, ..., 0], obs[:, 1:, ..., 0] = 7, 8
    obs[:, 0, 0, 0, 0] = 5 + thing
    batch = make_batch(torch.as_tensor(obs), torch.as_tensor(rng.integers(0, 2, (n, 6))))
    return batch, torch.as_tensor(thing, dtype=torch.float32)


MODELS = {"gru": "gru:width=32", "rssm": "rssm:deter=32,groups=4,classes=4,hidden=32"}


@pytest.mark.parametrize(
    ("name", "updates", "asked", "remembered"),
    [
        ("gru", 30, "recall=1", True),
        ("gru", 30, "recall=0,contrast=1", True),
        ("gru", 30, "recall=0,kinds=10", True),
        ("gru", 30, "recall=0", False),
        ("rssm", 90, "recall=0,kinds=10", True),
        ("rssm", 90, "recall=0", False),
    ],
)
def test_what_is_asked_for_is_remembered(name: str, updates: int, asked: str, remembered: bool) -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    encoder = make_encoder("grid:features_dim=16,width=8,depth=0", CORRIDOR)
    objective = make_objective(f"{MODELS[name]},steps=6,decoder_width=8,{asked}", encoder, ACTS)
    fit(objective, [corridor(16, rng)[0] for _ in range(updates)], 5e-3)
    belief = objective.exports()["belief"].eval()
    batch, thing = corridor(200, rng)
    with torch.no_grad():
        features, _ = belief.scan(batch.obs, batch.action, batch.first)
    assert (explained_by(features[:, -1], thing[:, None]) > 0.9) == remembered
