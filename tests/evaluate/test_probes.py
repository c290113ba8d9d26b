"""Probes: what they find, what they compare it with, and the gate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn import functional as F

from rlrep import runs
from rlrep.cli import main
from rlrep.dataset import Dataset, DatasetWriter
from rlrep.encoders import Encoder, make_encoder
from rlrep.evaluate import probes
from rlrep.evaluate.collapse import participation_ratio
from rlrep.evaluate.probes import Prober, RequirementError, describe, probe
from rlrep.pretrain import pretrain
from rlrep.types import DatasetError, Episode, SpaceError

SPACE = spaces.Box(0, 255, (4, 4, 3), np.uint8)
ACTIONS = spaces.Discrete(3)
FACTORS = ("far", "luck", "same", "x", "y")


def write(path: Path, factors: bool = True, actions: spaces.Space = ACTIONS, n_episodes: int = 30) -> Dataset:
    """Episodes of boards with an object in one of 16 cells; the colour of every cell is noise.

    The action is the column of the object where actions are discrete, but for the last column, where it is 0. A factor
    of chance and one that never changes are there too.
    """
    rng = np.random.default_rng(0)
    with DatasetWriter(path, SPACE, actions, factor_names=FACTORS if factors else []) as writer:
        for _ in range(n_episodes):
            x, y = rng.integers(0, 4, size=(2, 13))
            obs = np.zeros((13, *SPACE.shape), np.uint8)
            obs[..., 1] = rng.integers(0, 4, size=(13, 4, 4))
            obs[np.arange(13), y, x, 0] = 5
            action: np.ndarray = x[:-1] % 3
            if not isinstance(actions, spaces.Discrete):
                action = np.stack([x, y], axis=1)[:-1].astype(actions.dtype) % (4 if actions.dtype == np.float32 else 2)
            named = {"x": x, "y": y, "luck": rng.integers(0, 2, 13), "same": np.full(13, 7), "far": x + y / 10}
            zeros = np.zeros(12, np.float32)
            writer.add(Episode(obs, action, zeros, True, False, factors=named if factors else {}))
    return Dataset(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write(tmp_path_factory.mktemp("probes") / "data")


class Column(Encoder):
    """Sees the object's column and nothing else."""

    kinds = ("grid",)

    def __init__(self, observation_space: spaces.Space, features_dim: int = 4) -> None:
        super().__init__(observation_space, features_dim)
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, obs: Tensor) -> Tensor:
        return (obs[..., 0] == 5).any(dim=1).float()


def test_what_is_in_the_features_is_found_and_what_is_not_is_chance(data: Dataset) -> None:
    found = probe(Column(SPACE), data)
    assert set(found.scores) == {"x", "y", "luck", "far", "next_action"}
    for kind in ("linear", "knn"):
        assert found.scores["x"][kind] == found.scores["next_action"][kind] == 1
        assert abs(found.scores["y"][kind] - 0.25) < 0.2
        assert abs(found.scores["luck"][kind] - 0.5) < 0.2
    assert found.scores["x"]["metric"] == "accuracy"
    assert 0.1 < found.scores["x"]["chance"] < 0.4
    assert found.scores["x"]["raw_linear"] > 0.9
    # 288 rows are half of what there is; all of the other episodes are scored on.
    assert (found.n_train, found.n_test) == (24 * 12, 6 * 12)
    assert found.features["dead_units"] == 0
    json.dumps(found.to_json(), allow_nan=False)
    assert {"raw knn", "random linear"} <= {column.header for column in found.tables()[0].columns}


def test_fractions_are_regressed(data: Dataset) -> None:
    found = probe(Column(SPACE), data).scores["far"]
    assert found["metric"] == "r2"
    # The column is 1 to 3 of it, the row at most 0.3.
    assert 0.95 < found["linear"] < 1
    assert found["chance"] == pytest.approx(0, abs=0.05)


def test_continuous_actions_are_regressed(tmp_path: Path) -> None:
    found = probe(Column(SPACE), write(tmp_path / "data", actions=spaces.Box(0, 3, (2,), np.float32)))
    # Of two numbers, one is in the features.
    assert found.scores["next_action"]["linear"] == pytest.approx(0.5, abs=0.15)


def test_the_linear_probe_is_ridge_regression() -> None:
    rng = np.random.default_rng(0)
    for dim in (5, 60):
        x, y, test = rng.normal(size=(40, dim)) + 1, rng.normal(size=(40, 3)), rng.normal(size=(7, dim))
        given = [torch.from_numpy(a).float() for a in (x, y, test)]
        found = probes._ridge(given[0], [given[1]], given[2], [0.1])[0][0]
        expected = Ridge(alpha=0.1 * 40).fit(x, y).predict(test)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_neighbours_are_those_of_another_library(data: Dataset) -> None:
    prober = Prober(data, n=200)
    rng = np.random.default_rng(0)
    train, test = (torch.from_numpy(rng.normal(size=(n, 6))).float() for n in (200, len(prober.test)))
    mean, std = train.mean(dim=0), train.std(dim=0)
    rows = [F.normalize((x - mean) / std, dim=1).numpy() for x in (train, test)]
    label = prober.labels["luck"]
    theirs = KNeighborsClassifier(5).fit(rows[0], label.train.numpy()).score(rows[1], label.test.numpy())
    assert prober._knn(train, test, 5)["luck"] == pytest.approx(theirs)


def test_the_draw_is_of_held_out_episodes_and_the_seeds(data: Dataset) -> None:
    one, same, other = (Prober(data, n=64, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.train, same.train)
    assert not torch.equal(one.train, other.train)
    assert len(one.train) == 64
    assert len(one.test) == 32
    # Boards are noise: none is in both.
    assert not (one.train[:, None] == one.test).flatten(2).all(dim=2).any()


def test_an_encoder_is_left_as_it_was(data: Dataset) -> None:
    encoder = make_encoder("grid:features_dim=8,width=4", SPACE).train()
    before, state = encoder.digest(), torch.random.get_rng_state()
    probe(encoder, data, n=64)
    assert encoder.training
    assert encoder.digest() == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_statistics_of_features() -> None:
    torch.manual_seed(0)
    square = torch.cat([torch.eye(4), -torch.eye(4)])
    assert participation_ratio(square) == pytest.approx(4)
    assert participation_ratio(torch.randn(50, 1) * torch.ones(4)) == pytest.approx(1)
    variances = np.linalg.eigvalsh(
        np.cov((x := torch.randn(30, 3) * torch.tensor([1.0, 2.0, 3.0])).numpy(), rowvar=False)
    )
    assert participation_ratio(x) == pytest.approx(variances.sum() ** 2 / (variances**2).sum(), rel=1e-3)
    one, other = torch.randn(12, 3), torch.randn(12, 3)
    found = describe(one, other)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (one.numpy(), other.numpy()))
    assert found["alignment"] == pytest.approx(((a - b) ** 2).sum(axis=1).mean(), rel=1e-4)
    potentials = [np.exp(-2 * ((a[i] - a[j]) ** 2).sum()) for i in range(12) for j in range(i)]
    assert found["uniformity"] == pytest.approx(np.log(np.mean(potentials)), rel=1e-4)
    assert describe(torch.ones(9, 3), torch.ones(9, 3))["uniformity"] == pytest.approx(0)


def test_requirements(data: Dataset) -> None:
    found = probe(Column(SPACE), data, n=200)
    assert found.unmet(["x>0.9", "x.knn > 0.9", "x>chance", "y<raw", "dead_units<0.5"]) == []
    assert found.unmet(["x>random"]) == ["x>random is not met: x is 1.000, and random is 1.000"]
    (wanting,) = found.unmet(["x>0.9", "y>0.9"])
    assert wanting.startswith("y>0.9 is not met: y is 0.")
    for requirement, message in (
        ("x", "label>number"),
        ("x>=1", "label>number"),
        ("agent_x>0.8", "nothing called 'agent_x'.*There are: far, luck, x, y"),
        ("x>much", "not 'much'"),
        ("dead_units<raw", "not 'raw'"),
    ):
        with pytest.raises(RequirementError, match=message):
            found.unmet([requirement])


def test_data_with_nothing_to_probe_is_an_error(tmp_path: Path, data: Dataset) -> None:
    bare = write(tmp_path / "bare", factors=False, actions=spaces.MultiBinary(2))
    with pytest.raises(DatasetError, match="nothing to probe"):
        probe(Column(SPACE), bare)
    with pytest.raises(SpaceError, match="made for observations"):
        probe(make_encoder("grid", spaces.Box(0, 255, (5, 5, 3), np.uint8)), data)
    with pytest.raises(DatasetError, match="at least 2"):
        probe(Column(SPACE), data.select([0]))


def test_the_command_is_a_gate(data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_encoder("grid:features_dim=16,width=8", SPACE).save_pretrained(tmp_path / "encoder")
    call = ["probe", str(tmp_path / "encoder"), str(data.paths[0]), "--n", "100", "--out", str(tmp_path / "found.json")]
    assert main([*call, "--require", "x>0.1", "effective_rank>1"]) == 0
    assert "next_action" in capsys.readouterr().out
    assert set(runs.read_json(tmp_path / "found.json")) == {"scores", "features", "n_train", "n_test"}
    assert main([*call, "--require", "luck>0.95"]) == 1
    assert "luck>0.95 is not met" in capsys.readouterr().err
    assert main([*call, "--require", "lucky>0.95"]) == 1
    assert "Did you mean 'luck'" in capsys.readouterr().err
    # Nothing is probed for a requirement that cannot be read.
    call[1] = str(tmp_path / "nothing")
    assert main([*call, "--require", "luck=0.95"]) == 1
    assert "written label>number" in capsys.readouterr().err
    assert main([*call, "--memory", "cue", "--require", "all<0.95"]) == 1
    assert "written age>number" in capsys.readouterr().err


def test_pretraining_can_be_probed_as_it_goes(data: Dataset, tmp_path: Path) -> None:
    settings = {"updates": 30, "batch_size": 16, "log_every": 10, "encoder": "grid:features_dim=16,width=8"}
    plain = pretrain(data, out=tmp_path / "plain", **settings)
    probed = pretrain(data, out=tmp_path / "probed", probe_every=20, **settings)
    assert plain.digest() == probed.digest()
    rows = runs.read_jsonl(tmp_path / "probed" / "metrics.jsonl")
    assert ["probe/x" in row for row in rows] == [False, True, True]
    assert 0 <= rows[-1]["probe/next_action"] <= 1
    with pytest.raises(ValueError, match="probe_every must be a multiple of log_every=10"):
        pretrain(data, out=tmp_path / "odd", probe_every=15, **settings)
    assert not (tmp_path / "odd").exists()


def test_many_numbers_of_few_different_observations_can_be_probed() -> None:
    """MiniGrid's pictures: more pixels than rows, and hardly any two rows that differ."""
    rng = torch.Generator().manual_seed(0)
    pictures = (torch.rand(40, 147, generator=rng) < 0.3).float().repeat_interleave(64, dim=1) * 255
    rows, _ = probes._standardised(*[pictures[torch.randint(40, (600,), generator=rng)]] * 2)
    (found,) = probes._ridge(rows, [rows[:, :2]], rows[:5], [1e-4])
    torch.testing.assert_close(found[0], rows[:5, :2], rtol=1e-2, atol=1e-2)
