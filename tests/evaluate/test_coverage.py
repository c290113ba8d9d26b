"""Coverage against sets of bytes and tuples."""

from __future__ import annotations

import io
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rlrep.collect import collect
from rlrep.dataset import Dataset, DatasetWriter
from rlrep.evaluate.coverage import Coverage, Distinct, coverage
from rlrep.evaluate.exploration import draw, explored, table
from rlrep.types import Episode


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    spec = "rlrep/TinyGrid-v0:size=4,max_steps=20"
    return collect(spec, out=tmp_path_factory.mktemp("coverage") / "data", steps=6000, n_envs=4)


def brute_force(episodes: list[Episode]) -> dict[str, Any]:
    observations = {obs.tobytes() for e in episodes for obs in e.obs}
    names = sorted(episodes[0].factors)
    taken = Counter(action for e in episodes for action in e.action.tolist())
    shares = [n / taken.total() for n in taken.values()]
    states = {row for e in episodes for row in zip(*(e.factors[n].tolist() for n in names), strict=True)}
    return {
        "steps": sum(map(len, episodes)),
        "episodes": len(episodes),
        "mean_length": pytest.approx(np.mean([len(e) for e in episodes]), abs=0.006),
        "lengths": [f([len(e) for e in episodes]) for f in (min, np.median, max)],
        "goal_fraction": pytest.approx(np.mean([e.reward.max() > 0 for e in episodes]), abs=1e-5),
        "observations": len(observations),
        "action_entropy": pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-4),
        "states": len(states),
        "factors": {n: len({v for e in episodes for v in e.factors[n].tolist()}) for n in names},
        "changed": {
            n: pytest.approx(np.mean([len(set(e.factors[n].tolist())) > 1 for e in episodes]), abs=1e-5) for n in names
        },
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
    expected = {"steps": 2, "episodes": 1, "mean_length": 2.0, "lengths": [2, 2.0, 2], "goal_fraction": 0.0}
    assert found.figures() == {**expected, "observations": 1}


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


def test_places_are_counted_as_they_were_visited(data: Dataset) -> None:
    found = Coverage()
    expected: Counter[tuple[int, int]] = Counter()
    for episode in data:
        found.add(episode)
        expected.update(zip(episode.factors["agent_x"].tolist(), episode.factors["agent_y"].tolist(), strict=True))
    found.figures()
    assert found.occupancy.sum() == data.n_observations
    assert {(x, y): n for (x, y), n in np.ndenumerate(found.occupancy) if n} == dict(expected)
    assert found.actions.total() == data.n_transitions


def test_datasets_are_compared_in_a_table_and_a_picture(data: Dataset, tmp_path: Path) -> None:
    other = collect("rlrep/TinyGrid-v0:size=5", out=tmp_path / "count", explorer="count", steps=300, n_envs=4)
    plain = tmp_path / "plain"
    with DatasetWriter(plain, other.observation_space, other.action_space) as writer:
        for episode in other:
            writer.add(Episode(**{**vars(episode), "factors": {}}))
    found = explored([data.paths[0], tmp_path / "count", plain])
    assert [one.name for one in found] == ["random", "count", "plain"]
    shown = Console(width=200, file=io.StringIO())
    shown.print(table(found))
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert f"{found[0].curve[-1]['states']:,}" in text
    assert "carrying" in text
    assert "goal_x" not in text, "what never changes within an episode is not shown"
    figure = draw(found)
    figure.savefig(tmp_path / "coverage.png")
    assert [ax.get_title() for ax in figure.axes][3:] == ["random", "count"], "a map where places are known"
    assert [one.name for one in explored([plain, plain])] == [str(plain)] * 2
    lines = draw([found[0]] * 14).axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 14, "each is told from the others"


def test_what_two_found_is_what_one_would_have_found(data: Dataset) -> None:
    whole, one, other = Coverage(), Coverage(), Coverage()
    whole.add(*data)
    one.add(*(episode for i, episode in enumerate(data) if i % 3))
    other.add(*(episode for i, episode in enumerate(data) if not i % 3))
    one.include(other)
    assert one.figures() == whole.figures()
    assert one.actions == whole.actions
    assert np.array_equal(one.occupancy, whole.occupancy)
