"""Coverage against sets of bytes and tuples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrep.collect import collect
from rlrep.dataset import Dataset
from rlrep.evaluate.coverage import Coverage, Distinct, coverage
from rlrep.types import Episode


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    spec = "rlrep/TinyGrid-v0:size=4,max_steps=20"
    return collect(spec, out=tmp_path_factory.mktemp("coverage") / "data", steps=6000, n_envs=4)


def brute_force(episodes: list[Episode]) -> dict[str, Any]:
    observations = {obs.tobytes() for e in episodes for obs in e.obs}
    names = sorted(episodes[0].factors)
    states = {row for e in episodes for row in zip(*(e.factors[n].tolist() for n in names), strict=True)}
    return {
        "steps": sum(map(len, episodes)),
        "episodes": len(episodes),
        "mean_length": pytest.approx(np.mean([len(e) for e in episodes]), abs=0.006),
        "goal_fraction": pytest.approx(np.mean([e.reward.max() > 0 for e in episodes]), abs=1e-5),
        "observations": len(observations),
        "states": len(states),
        "factors": {n: len({v for e in episodes for v in e.factors[n].tolist()}) for n in names},
    }


def test_figures_are_those_of_brute_force_at_every_point(data: Dataset) -> None:
    episodes = list(data)
    curve = coverage(data, points=5)
    assert len(curve) == 5
    assert curve[-1] == brute_force(episodes)
    for row, share in zip(curve, (0.2, 0.4, 0.6, 0.8), strict=False):
        assert 0 <= row["steps"] - share * data.n_transitions < 20
        assert row == brute_force(episodes[: row["episodes"]])


def test_the_order_of_factors_and_of_calls_does_not_matter(data: Dataset) -> None:
    one, other = Coverage(), Coverage()
    for episode in data:
        one.add(episode)
        turned = dict(reversed(episode.factors.items()))
        other.add(Episode(**{**vars(episode), "factors": turned}))
        other.figures()
    assert one.figures() == other.figures()


def test_without_ground_truth_there_are_observations_only() -> None:
    found = Coverage()
    found.add(Episode(np.zeros((3, 2)), np.zeros(2), np.zeros(2), True, False))
    expected = {"steps": 2, "episodes": 1, "mean_length": 2.0, "goal_fraction": 0.0, "observations": 1}
    assert found.figures() == expected


def test_nothing_added_is_nothing_covered() -> None:
    assert Coverage().figures()["observations"] == 0


def test_distinct_values_are_counted_in_whatever_portions() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 5000, 20_000).astype(np.uint64)
    distinct = Distinct()
    for portion in np.split(values, np.sort(rng.integers(0, len(values), 50))):
        distinct.add(portion)
    assert len(distinct) == len(set(values.tolist()))


def test_dict_observations(tmp_path: Path) -> None:
    data = collect("rlrep/TinyGrid-v0:size=4,obs_type=dict", out=tmp_path / "data", steps=400, n_envs=2)
    together = {a.tobytes() + b.tobytes() for e in data for a, b in zip(e.obs["image"], e.obs["vector"], strict=True)}
    assert coverage(data)[-1]["observations"] == len(together)
