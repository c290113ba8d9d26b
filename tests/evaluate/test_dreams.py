"""Dreams beside what happened: errors against ones worked out by hand, and pictures that show what they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from belief_cases import CELLS, Corridor, CorridorModel, Ledger, Raw, venv_of
from gymnasium import spaces
from PIL import Image
from rlrep_envs.minigrid import render_symbols

from rlrep.cli import main
from rlrep.collect import collect
from rlrep.dataset import Dataset
from rlrep.evaluate.dreams import curves, difference, dream, pictures
from rlrep.registry import SpecError
from rlrep.types import DatasetError, RunError, SpaceError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return collect(venv_of(Corridor), out=tmp_path_factory.mktemp("corridor") / "data", steps=800)


def model_of(slip: float = 0.0) -> CorridorModel:
    return CorridorModel(Corridor.observation_space, Corridor.action_space, slip=slip)


def test_a_perfect_model_dreams_what_happens(data: Dataset) -> None:
    found = dream(model_of(), data, context=2, horizon=10, segments=10_000, device="cpu")
    assert np.allclose(found.dreamt, 0)
    assert np.allclose(found.seen, 0)
    assert np.allclose(found.uncertainty, 0)
    lengths = data.table["length"]
    assert found.n.tolist() == [np.maximum(lengths - 1 - k, 0).sum() for k in range(1, 11)]
    # One step moves by one cell, but at the wall: two of the numbers differ by 1.
    assert 0 < found.repeated[0] <= 2 / CELLS


def test_the_error_of_repeating_is_that_of_the_data(data: Dataset) -> None:
    found = dream(model_of(), data, context=1, horizon=3, segments=10_000, device="cpu")
    for k in range(1, 4):
        errors = [
            np.square(episode.obs[t + 1 + k] - episode.obs[t + 1]).mean()
            for episode in data
            for t in range(len(episode) - k)
        ]
        assert np.isclose(found.repeated[k - 1], np.mean(errors))


def test_chance_makes_errors_grow_and_dreams_differ(data: Dataset) -> None:
    found = dream(model_of(slip=0.2), data, context=2, horizon=6, segments=10_000, dreams=8, device="cpu")
    # A first step goes wrong with the chance 0.2, unless it stays at the wall anyway; then two numbers are off by 1.
    assert 0.1 * 2 / CELLS < found.dreamt[0] < 0.2 * 2 / CELLS
    assert found.dreamt[0] < found.dreamt[2] < found.dreamt[5] < found.repeated[5]
    # Two dreams differ where one of them slips, not both.
    assert np.isclose(found.uncertainty[0], found.dreamt[0] * 2 * 0.8, rtol=0.15)
    again = dream(model_of(slip=0.2), data, context=2, horizon=6, segments=10_000, dreams=8, device="cpu")
    assert np.array_equal(again.dreamt, found.dreamt)


@pytest.mark.parametrize("animation", ["gif", "webp"])
def test_what_is_written(data: Dataset, tmp_path: Path, animation: Any) -> None:
    dream(model_of(), data, out=tmp_path, context=2, horizon=5, clips=3, animation=animation, device="cpu")
    numbers = json.loads((tmp_path / "dreams.json").read_text())
    assert len(numbers["dreamt"]) == len(numbers["n"]) == 5
    assert "command" in numbers["provenance"]
    for name in ("strips.png", "errors.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100
    with Image.open(tmp_path / f"dreams.{animation}") as film:
        assert film.format == animation.upper()
        # Frames that are the same are one, shown longer.
        assert 2 < film.n_frames <= 2 + 1 + 5


@pytest.mark.parametrize("slip", [0.0, 0.5])
def test_uncertainty_is_drawn_where_there_is_some(data: Dataset, slip: float) -> None:
    found = dream(model_of(slip), data, context=2, horizon=3, segments=20, device="cpu")
    drawn = " ".join(str(line.get_label()) for line in curves(found).axes[0].lines)
    assert ("uncertainty" in drawn) == (slip > 0)


class Freeze(CorridorModel):
    """Dreams that nothing happens, in a symbol of every kind."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        super(CorridorModel, self).__init__(observation_space, action_space, "belief_cases:Raw", 1)

    def initial(self, n: int) -> Any:
        return torch.zeros(n, self.features_dim)

    def advance(self, embedding: torch.Tensor, action: torch.Tensor, state: Any) -> Any:
        return torch.cat([embedding, state[:, :1]], dim=1)

    def imagine(self, state: Any, action: torch.Tensor) -> Any:
        return state

    def features(self, state: Any) -> torch.Tensor:
        return state

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, :-1].reshape(-1, *self.observation_space.shape).byte()


def test_minigrid_is_drawn_by_its_tiles(tmp_path: Path) -> None:
    spec = "MiniGrid-Empty-5x5-v0:obs=grid"
    data = collect(spec, out=tmp_path / "data", steps=400, n_envs=4)
    found = dream(Freeze(data.observation_space, data.action_space), data, context=3, horizon=4, device="cpu")
    assert np.allclose(found.dreamt, found.repeated)
    assert 0 < found.repeated[0] < 1
    assert np.allclose(found.seen, 0)
    truth, dreamt = found.clips[0]
    assert truth.shape == (8, 56, 56, 3)
    assert np.array_equal(truth[:4], dreamt[:4])
    assert all(np.array_equal(frame, truth[3]) for frame in dreamt[4:])
    obs = data.column("obs", np.arange(5))
    for specs in (data.env_specs, [spec, "BabyAI-GoToObj-v0"]):
        assert np.array_equal(pictures(data.observation_space, specs)(obs), render_symbols(obs))
    assert not np.array_equal(pictures(data.observation_space, [spec, "Other-v0"])(obs)[0], render_symbols(obs)[0])


@pytest.mark.parametrize(
    ("space", "shape"),
    [
        (spaces.Box(0, 255, (40, 50, 3), np.uint8), (40, 50, 3)),
        (spaces.Box(0, 255, (3, 40, 50), np.uint8), (40, 50, 3)),
        (spaces.Box(0, 255, (40, 50, 4), np.uint8), (40, 50, 3)),
        (spaces.Box(0, 255, (7, 5, 6), np.uint8), (40, 56, 3)),
        (spaces.Box(-np.inf, np.inf, (4,), np.float32), (32, 8, 3)),
        (spaces.Discrete(5), (40, 8, 3)),
        (spaces.Dict({"a": spaces.Discrete(3), "image": spaces.Box(0, 255, (9, 9, 3), np.uint8)}), (72, 72, 3)),
    ],
)
def test_any_observation_can_be_drawn(space: spaces.Space, shape: tuple[int, ...]) -> None:
    space.seed(0)
    one, other = space.sample(), space.sample()
    obs = (
        {key: np.stack([one[key], other[key]]) for key in one}
        if isinstance(one, dict)
        else np.stack([np.asarray(one), np.asarray(other)])
    )
    drawn = pictures(space)(obs)
    assert drawn.shape == (2, *shape)
    assert drawn.dtype == np.uint8
    flipped = {key: x[::-1] for key, x in obs.items()} if isinstance(obs, dict) else obs[::-1]
    assert (difference(space, obs, obs) == 0).all()
    assert (difference(space, obs, flipped) > 0).all()


def test_differences_by_hand() -> None:
    board = spaces.Box(0, 255, (2, 2, 3), np.uint8)
    one = np.zeros((1, 2, 2, 3), np.uint8)
    other = one.copy()
    other[0, 0, 1] = 1, 2, 3
    assert difference(board, one, other) == [0.25]
    picture = spaces.Box(0, 255, (32, 32, 3), np.uint8)
    grey = np.full((1, 32, 32, 3), 51, np.uint8)
    assert np.allclose(difference(picture, np.zeros_like(grey), grey), [0.04])
    assert np.allclose(difference(spaces.MultiDiscrete([3, 3]), np.array([[1, 2]]), np.array([[1, 0]])), [0.5])


def test_what_cannot_be_dreamt_is_an_error(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="has no memory"):
        dream(Raw(Corridor.observation_space), data)
    with pytest.raises(SpecError, match="cannot dream"):
        dream(Ledger(Corridor.observation_space, Corridor.action_space), data)
    longest = data.table["length"].max()
    with pytest.raises(DatasetError, match=f"context={longest} steps, and the longest episode of .* has {longest}"):
        dream(model_of(), data, context=int(longest))
    with pytest.raises(SpaceError, match="made for actions"):
        dream(CorridorModel(Corridor.observation_space, spaces.Discrete(3)), data)
    with pytest.raises(ValueError, match="dreams must be at least 2"):
        dream(model_of(), data, dreams=1)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file is a file, and dreams need a folder"):
        dream(tmp_path / "nothing", data, out=tmp_path / "file")


def test_on_the_command_line(data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_of().save_pretrained(tmp_path / "run" / "belief")
    model_of().encoder.save_pretrained(tmp_path / "run" / "encoder")
    call = ["dream", str(tmp_path / "run"), str(data.paths[0]), "--context", "2", "--horizon", "5"]
    assert main([*call, "--out", str(tmp_path / "dreams")]) == 0
    assert (tmp_path / "dreams" / "dreams.gif").exists()
    assert "steps ahead" in capsys.readouterr().out
    call[1] = str(tmp_path / "run" / "encoder")
    assert main([*call, "--out", str(tmp_path / "none")]) == 1
    assert "has no memory" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
