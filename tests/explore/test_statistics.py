"""Running statistics against numpy on all the data at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlrep.explore import ReturnNormaliser, RunningMeanStd
from rlrep.explore.base import ObservationNormaliser


def test_running_mean_and_variance_are_those_of_all_rows() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.normal(3, 2, (n, 4, 2)) for n in (1, 7, 100, 2, 30)]
    statistics = RunningMeanStd((4, 2))
    for batch in batches:
        statistics.update(torch.from_numpy(batch))
    rows = np.concatenate(batches)
    np.testing.assert_allclose(statistics.mean.numpy(), rows.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(statistics.var.numpy(), rows.var(axis=0), rtol=1e-5)
    assert statistics.count == len(rows)


def test_returns_are_divided_by_the_deviation_of_their_discounted_sum() -> None:
    rng = np.random.default_rng(0)
    rewards, ended = rng.exponential(2.0, (200, 3)), rng.random((200, 3)) < 0.1
    normaliser = ReturnNormaliser(n_envs=3, gamma=0.9, clip=1e9)
    sums, running = [], np.zeros(3)
    for reward, end in zip(rewards, ended, strict=True):
        running = 0.9 * running + reward
        sums.append(running.copy())
        running[end] = 0
        normalised = normaliser(torch.from_numpy(reward), torch.from_numpy(end))
    np.testing.assert_allclose(normalised.numpy(), rewards[-1] / np.std(sums), rtol=1e-5)


def test_the_first_rewards_are_clipped() -> None:
    assert ReturnNormaliser(n_envs=4)(torch.ones(4), torch.zeros(4, dtype=torch.bool)).tolist() == [10.0] * 4


def test_observations_are_normalised_by_kind() -> None:
    rng = np.random.default_rng(0)
    space = spaces.Dict(
        {
            "picture": spaces.Box(0, 255, (40, 40, 3), np.uint8),
            "vector": spaces.Box(-1e3, 1e3, (2,), np.float32),
            "board": spaces.Box(0, 255, (7, 7, 3), np.uint8),
            "choice": spaces.Discrete(4),
        }
    )
    obs = {
        "picture": torch.from_numpy(rng.integers(0, 256, (500, 40, 40, 3), dtype=np.uint8)),
        "vector": torch.from_numpy(rng.normal([100.0, -3.0], [10.0, 0.1], (500, 2)).astype(np.float32)),
        "board": torch.from_numpy(rng.integers(0, 10, (500, 7, 7, 3), dtype=np.uint8)),
        "choice": torch.from_numpy(rng.integers(0, 4, 500)),
    }
    normalise = ObservationNormaliser(space)
    normalise.watch(obs)
    seen = normalise(obs)
    assert torch.equal(seen["board"], obs["board"])
    assert torch.equal(seen["choice"], obs["choice"])
    for values in (seen["picture"] / 255, seen["vector"]):
        assert values.mean(dim=0).abs().max() < 1e-3
        assert values.std(dim=0).sub(1).abs().max() < 0.01
    far = normalise({**obs, "vector": torch.full((500, 2), 999.0)})
    assert far["vector"].max() == 5.0
    assert normalise.space["vector"].low.min() == -np.inf
    assert normalise.space["picture"] == space["picture"]


def test_a_pixel_that_never_changed_is_no_surprise_until_it_does() -> None:
    normalise = ObservationNormaliser(spaces.Box(0, 255, (40, 40, 3), np.uint8))
    black = torch.zeros(50, 40, 40, 3, dtype=torch.uint8)
    normalise.watch(black)
    assert normalise(black).abs().max() == 0
    lit = black[:1].clone()
    lit[0, 3, 3, 0] = 1
    assert normalise(lit)[0, 3, 3, 0].item() == pytest.approx(5 * 255)
