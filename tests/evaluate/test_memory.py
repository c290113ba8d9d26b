"""The memory probe: what it asks, where, and of whom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rlrep.cli import main
from rlrep.dataset import Dataset, DatasetWriter
from rlrep.encoders import Encoder, State, make_encoder
from rlrep.encoders.recurrent import RecurrentEncoder
from rlrep.evaluate.memory import MemoryProbe, probe_memory
from rlrep.evaluate.probes import RequirementError, probe
from rlrep.pretrain import pretrain
from rlrep.registry import SpecError
from rlrep.types import DatasetError, Episode, SpaceError

BOARD = spaces.Box(0, 255, (3, 3, 3), np.uint8)
MOVES = spaces.Discrete(3)


def write(path: Path, lengths: tuple[int, ...] = (6, 40)) -> Dataset:
    """Boards on which one of two things lies in the corner at times 1 and 3 of every episode, and noise elsewhere.

    It is another thing at time 3 in every second episode: what counts is what was seen last.
    """
    rng = np.random.default_rng(0)
    with DatasetWriter(path, BOARD, MOVES, factor_names=["cue", "cue_seen", "time"]) as writer:
        for i in range(120):
            n = lengths[i % len(lengths)] + 1
            cue = np.full(n, rng.integers(5, 7))
            cue[3:] = 11 - cue[0] if i % 4 < 2 else cue[0]
            seen = np.isin(np.arange(n), (1, 3))
            obs = np.zeros((n, *BOARD.shape), np.uint8)
            obs[:, 1:, 1:, 1] = rng.integers(0, 5, (n, 2, 2))
            obs[:, 0, 0, 0] = np.where(seen, cue, 1)
            factors = {"cue": cue, "cue_seen": seen.astype(np.int64), "time": np.arange(n)}
            writer.add(
                Episode(obs, rng.integers(0, 3, n - 1), np.zeros(n - 1, np.float32), False, True, factors=factors)
            )
    return Dataset(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write(tmp_path_factory.mktemp("memory") / "data")


class Corner(Encoder):
    """Sees what is in the corner."""

    kinds = ("grid",)

    def __init__(self, observation_space: spaces.Space, features_dim: int = 2) -> None:
        super().__init__(observation_space, features_dim)
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, obs: Tensor) -> Tensor:
        """(N, 2)."""
        return torch.stack([obs[:, 0, 0, 0] == 5, obs[:, 0, 0, 0] == 6], dim=1).float() * self.weight


class Remembers(RecurrentEncoder):
    """Keeps what was in the corner last, for `lasts` steps."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, lasts: int = 100) -> None:
        super().__init__(observation_space, action_space, Corner(observation_space), 2)
        self.lasts = lasts

    def initial(self, n: int) -> State:
        """Nothing."""
        return {"embedding": torch.zeros(n, 2), "kept": torch.zeros(n, 2), "age": torch.zeros(n, 1)}

    def advance(self, embedding: Tensor, action: Tensor, state: State) -> State:
        """Takes what is seen."""
        seen = embedding.sum(dim=1, keepdim=True) > 0
        age = torch.where(seen, 0, state["age"] + 1)
        return {"embedding": embedding, "age": age, "kept": torch.where(seen, embedding, state["kept"])}

    def features(self, state: State) -> Tensor:
        """Nothing that is too old."""
        return torch.cat([state["embedding"], state["kept"] * (state["age"] <= self.lasts)], dim=-1)


def test_what_is_remembered_is_found_at_every_age_and_what_is_not_is_not(data: Dataset) -> None:
    found = probe_memory(Remembers(BOARD, MOVES), data, "cue")
    assert [row["age"] for row in found.rows] == ["1-2", "3-4", "5-8", "9-16", "17-32", "33-64", "all"]
    assert all(row["accuracy"] == 1 for row in found.rows)
    everything = found.rows[-1]
    assert everything["n"] == sum(row["n"] for row in found.rows[:-1])
    # The current observation alone tells nothing, and a corner cannot be untrained.
    assert everything["memoryless"] < everything["chance"] + 0.15
    assert everything["chance"] < 0.75
    assert found.unmet(["all>0.9", "33-64>0.9"]) == []
    assert "accuracy" in str(found.to_json())
    assert found.tables()[0].row_count == 7


def test_chance_is_the_share_of_the_commonest_value_that_is_scored_on(data: Dataset) -> None:
    for seed in range(3):
        rows = probe_memory(Remembers(BOARD, MOVES), data, "cue", n=60, held_out=0.05, seed=seed).rows
        # Of two values one has a half at least.
        assert all(0.5 <= row["chance"] <= 1 for row in rows)


def test_few_observations_are_marked_and_not_drawn() -> None:
    scores = dict.fromkeys(("chance", "untrained", "memoryless", "accuracy"), 0.5)
    rows = [{"age": age, "n": n, **scores} for age, n in (("1-2", 10), ("3-4", 9), ("all", 19))]
    found = MemoryProbe("cue", "", rows, 100)
    assert list(found.tables()[0].columns[1].cells) == ["10", "9 (few)", "19"]
    assert {len(line.get_xdata()) for line in found.draw().axes[0].lines} == {1}


def test_what_is_forgotten_is_seen_by_its_age(data: Dataset) -> None:
    rows = {row["age"]: row["accuracy"] for row in probe_memory(Remembers(BOARD, MOVES, lasts=8), data, "cue").rows}
    assert rows["1-2"] == rows["5-8"] == 1
    assert rows["17-32"] < 0.8
    unmet = probe_memory(Remembers(BOARD, MOVES, lasts=8), data, "cue").unmet(["5-8>0.9", "17-32>0.9"])
    assert len(unmet) == 1
    assert "17-32>0.9 is not met" in unmet[0]


def test_only_observations_of_the_episode_out_of_sight_and_that_meet_the_condition_count(data: Dataset) -> None:
    found = probe_memory(Remembers(BOARD, MOVES), data, "cue", where="time>20", cap=30)
    # Seen at time 3, looked for at 21 to 30.
    assert {row["age"] for row in found.rows} <= {"17-32", "all"}
    assert found.rows[-1]["accuracy"] == 1
    with pytest.raises(DatasetError, match=r"almost no observation, within 10 steps.*raise cap"):
        probe_memory(Remembers(BOARD, MOVES), data, "cue", where="time>20", cap=10)


def test_an_encoder_without_memory_is_a_control(data: Dataset) -> None:
    found = probe_memory(make_encoder("grid:features_dim=8", BOARD), data, "cue").rows[-1]
    assert found["accuracy"] == found["memoryless"] < 0.75


def test_of_a_run_it_is_the_encoder_that_remembers(data: Dataset, tmp_path: Path) -> None:
    encoder = make_encoder("recurrent:width=8,encoder=grid", BOARD, MOVES)
    assert isinstance(encoder, RecurrentEncoder)
    encoder.save_pretrained(tmp_path / "run" / "belief")
    encoder.encoder.save_pretrained(tmp_path / "run" / "encoder")
    found = {place: probe_memory(tmp_path / "run" / place, data, "cue", n=60) for place in ("", "belief", "encoder")}
    assert found[""] == found["belief"] != found["encoder"]


def test_it_scores_on_episodes_that_pretraining_held_out(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parted: list[tuple[Dataset, Dataset]] = []
    split = Dataset.split

    def spy(*args: Any) -> tuple[Dataset, Dataset]:
        parted.append(split(*args))
        return parted[-1]

    monkeypatch.setattr(Dataset, "split", spy)
    pretrain(data, out=tmp_path, objectives=["inverse"], updates=1, batch_size=4, held_out=0.2, seed=3)
    for share in (0.2, 0.1):
        probe_memory(Remembers(BOARD, MOVES), data, "cue", n=60, held_out=share, seed=3)
    held, same, fewer = ({episode.obs.tobytes() for episode in view} for _, view in parted)
    assert held == same > fewer
    with pytest.raises(ValueError, match="held_out is 0; it is a share"):
        probe_memory(Remembers(BOARD, MOVES), data, "cue", held_out=0)


def test_the_same_seed_finds_the_same(data: Dataset) -> None:
    encoder = make_encoder("recurrent:width=8,encoder=grid", BOARD, MOVES)
    assert probe_memory(encoder, data, "cue", n=60) == probe_memory(encoder, data, "cue", n=60)
    assert probe_memory(encoder, data, "cue", n=60).n_train == 60


def test_what_cannot_be_probed_is_said(data: Dataset, tmp_path: Path) -> None:
    encoder = Remembers(BOARD, MOVES)
    with pytest.raises(DatasetError, match=r"no factor 'cu'.*Did you mean 'cue'"):
        probe_memory(encoder, data, "cu")
    with pytest.raises(DatasetError, match=r"'time_seen'\. What.*in sight.*both: cue$"):
        probe_memory(encoder, data, "time")
    with pytest.raises(RequirementError, match=r"factor>number.*'tim>3'.*cue, cue_seen, time"):
        probe_memory(encoder, data, "cue", where="tim>3")
    with pytest.raises(RequirementError, match=r"factor>number.*'time>1.2.3'"):
        probe_memory(encoder, data, "cue", where="time>1.2.3")
    with pytest.raises(SpaceError, match="made for actions"):
        probe_memory(Remembers(BOARD, spaces.Discrete(5)), data, "cue")
    found = probe_memory(encoder, data, "cue")
    with pytest.raises(RequirementError, match="written age>number"):
        found.unmet(["cue"])
    with pytest.raises(RequirementError, match=r"written age>number.*'all>\.'"):
        found.unmet(["all>."])
    with pytest.raises(RequirementError, match=r"age '7'.*1-2, 3-4"):
        found.unmet(["7>0.5"])
    with pytest.raises(SpecError, match="probe_memory"):
        probe(encoder, data)


def test_the_command_is_a_gate(data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_encoder("recurrent:width=4,encoder=grid", BOARD, MOVES).save_pretrained(tmp_path / "belief")
    out = tmp_path / "memory.json"
    command = ["probe", str(tmp_path / "belief"), str(data.paths[0]), "--memory", "cue", "--where", "time>4"]
    assert main([*command, "--out", str(out), "--require", "all>0.01"]) == 0
    assert json.loads(out.read_text())["rows"][-1]["age"] == "all"
    assert main([*command, "--require", "all>0.99"]) == 1
    assert "all>0.99 is not met" in capsys.readouterr().err
    assert main(["probe", str(tmp_path / "belief"), str(data.paths[0]), "--where", "time>4"]) != 0
    assert "--memory" in capsys.readouterr().err
