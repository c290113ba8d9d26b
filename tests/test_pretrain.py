"""The pre-training loop: resuming, collapse, bad input, and what it writes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlrep.dataset import Dataset, DatasetWriter
from rlrep.encoders import load_encoder, make_encoder
from rlrep.evaluate.collapse import collapse, effective_rank, has_collapsed
from rlrep.objectives import Objective, objectives
from rlrep.pretrain import CHECKPOINT, compiling_pays, pretrain
from rlrep.registry import SpecError
from rlrep.runs import read_json, read_jsonl
from rlrep.types import CollapseWarning, DatasetError, Episode, RunError

SPACE = spaces.Box(0, 255, (5, 5, 3), np.uint8)
ACTIONS = spaces.Discrete(4)


def write(path: Path, n_episodes: int = 12, length: int = 9, reward: float = 0.0, **options: Any) -> Path:
    """Writes episodes of boards whose cells all hold a number, to which each action adds itself, modulo 4."""
    rng = np.random.default_rng(0)
    with DatasetWriter(path, SPACE, ACTIONS, **options) as writer:
        for _ in range(n_episodes):
            action = rng.integers(0, 4, length)
            state = np.cumsum([rng.integers(0, 4), *action]) % 4
            obs = np.broadcast_to(state[:, None, None, None], (length + 1, *SPACE.shape)).astype(np.uint8)
            rewards = reward * rng.normal(size=length).astype(np.float32)
            writer.add(Episode(obs, action, rewards, terminated=True, truncated=False))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pretrain") / "data")


SMALL = {
    "updates": 30,
    "batch_size": 16,
    "log_every": 10,
    "checkpoint_every": 10,
    "encoder": "grid:features_dim=16",
}


def test_writes_an_encoder_with_where_it_came_from(data: Path, tmp_path: Path) -> None:
    encoder = pretrain(data, out=tmp_path / "run", **SMALL)
    loaded = load_encoder(tmp_path / "run")
    obs = torch.as_tensor(SPACE.sample())[None]
    assert torch.equal(loaded(obs), encoder(obs))
    config = read_json(tmp_path / "run" / "encoder" / "config.json")
    assert config["provenance"]["data_digest"] == Dataset(data).digest
    assert config["provenance"]["reward_free_steps"] == 12 * 9
    assert config["provenance"]["objectives"] == ["cpc"]
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["update"] for row in rows] == [10, 20, 30]
    assert {"loss", "held_out_loss", "effective_rank", "feature_std", "feature_norm", "dead_units"} <= set(rows[0])
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert not (tmp_path / "run" / CHECKPOINT).exists()


def test_one_encoder_for_several_tasks_says_of_which(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, env_spec=f"{name}-v0") for name in ("A", "B")]
    encoder = pretrain(paths, out=tmp_path / "run", **{**SMALL, "updates": 2})
    assert encoder.provenance["env_spec"] == ["A-v0", "B-v0"]
    assert encoder.provenance["reward_free_steps"] == 2 * 12 * 9
    assert load_encoder(tmp_path / "run").provenance["env_spec"] == ["A-v0", "B-v0"]


def test_a_world_model_is_saved_beside_the_encoder_it_shapes(data: Path, tmp_path: Path) -> None:
    """Together with an objective of single observations, which does not hinder it."""
    specs = ["ae", "gru:steps=3,width=8,decoder_width=4"]
    encoder = pretrain(data, out=tmp_path / "run", objectives=specs, **SMALL)
    belief = load_encoder(tmp_path / "run" / "belief")
    assert belief.recurrent
    assert not belief.training
    assert belief.encoder.digest() == encoder.digest()
    assert belief.provenance == encoder.provenance
    assert belief.provenance["objectives"] == specs
    found, _ = belief.step(torch.zeros(2, 5, 5, 3), torch.zeros(2), torch.ones(2, dtype=torch.bool), belief.initial(2))
    torch.testing.assert_close(found[:, :16], encoder(torch.zeros(2, 5, 5, 3)))


def test_an_encoder_with_a_memory_is_no_encoder_of_single_observations(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"'recurrent' has a memory.*'gru'.*belief/"):
        pretrain(data, out=tmp_path / "run", **{**SMALL, "encoder": "recurrent:encoder=grid"})
    assert not (tmp_path / "run").exists()


def test_learns(data: Path, tmp_path: Path) -> None:
    pretrain(data, out=tmp_path / "run", objectives="inverse", **{**SMALL, "updates": 200, "log_every": 50})
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["held_out_loss"] < 0.1 * np.log(4), "held-out actions are predicted far better than by chance"


@pytest.mark.parametrize("specs", [["ae", "inverse"], ["atc:lag=1"], ["spr:steps=2"]])
def test_resuming_equals_an_unbroken_run(data: Path, tmp_path: Path, specs: list[str], monkeypatch) -> None:
    whole = pretrain(data, out=tmp_path / "whole", objectives=specs, **SMALL)
    loop = sys.modules["rlrep.pretrain"]._Loop
    step = loop._step

    def stop_at_25(self, batch):
        if self.update == 25:
            raise OSError("the power went")
        return step(self, batch)

    monkeypatch.setattr(loop, "_step", stop_at_25)
    with pytest.raises(OSError, match="power"):
        pretrain(data, out=tmp_path / "broken", objectives=specs, **SMALL)
    monkeypatch.setattr(loop, "_step", step)
    resumed = pretrain(data, out=tmp_path / "broken", objectives=specs, **SMALL)
    assert resumed.digest() == whole.digest()
    logged = [
        [(row["update"], row["loss"]) for row in read_jsonl(tmp_path / run / "metrics.jsonl")]
        for run in ("whole", "broken")
    ]
    assert logged[0] == logged[1]


def test_killed_then_resumed_equals_an_unbroken_run(data: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "updates": 400, "checkpoint_every": 20}
    whole = pretrain(data, out=tmp_path / "whole", **settings)
    arguments = f"{str(data)!r}, out={str(tmp_path / 'killed')!r}, **{settings!r}"
    call = f"from rlrep.pretrain import pretrain; pretrain({arguments})"
    child = subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / CHECKPOINT).exists():
        assert child.poll() is None, "ended before its first checkpoint"
        os.sched_yield()
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert pretrain(data, out=tmp_path / "killed", **settings).digest() == whole.digest()


def test_ctrl_c_keeps_what_was_done(data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    loop = sys.modules["rlrep.pretrain"]._Loop
    step = loop._step

    def interrupt(self, batch):
        if self.update == 17:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(loop, "_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pretrain(data, out=tmp_path / "run", **SMALL)
    assert "same command" in capsys.readouterr().out
    monkeypatch.setattr(loop, "_step", step)
    assert (
        pretrain(data, out=tmp_path / "run", **SMALL).digest() == pretrain(data, out=tmp_path / "b", **SMALL).digest()
    )


def test_a_finished_run_is_not_run_again_and_other_settings_are_refused(data: Path, tmp_path: Path) -> None:
    first = pretrain(data, out=tmp_path / "run", **SMALL)
    before = (tmp_path / "run" / "encoder" / "model.safetensors").stat().st_mtime_ns
    assert pretrain(data, out=tmp_path / "run", **SMALL).digest() == first.digest()
    assert (tmp_path / "run" / "encoder" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RunError, match="batch_size is 16, asked for 8"):
        pretrain(data, out=tmp_path / "run", **{**SMALL, "batch_size": 8})
    pretrain(data, out=tmp_path / "run", **{**SMALL, "batch_size": 8}, overwrite=True)


def test_other_data_is_refused(data: Path, tmp_path: Path) -> None:
    pretrain(data, out=tmp_path / "run", **SMALL)
    other = write(tmp_path / "other", n_episodes=7)
    with pytest.raises(RunError, match="data_digest"):
        pretrain(other, out=tmp_path / "run", **SMALL)


def test_reward_changes_nothing(tmp_path: Path) -> None:
    # World models are slow at their usual length.
    specs = [f"{name}:steps=3" if "recall" in objectives.options(name) else name for name in objectives.names()]
    encoders = [
        pretrain(write(tmp_path / f"data{r}", reward=r), out=tmp_path / f"run{r}", objectives=specs, **SMALL)
        for r in (0.0, 100.0)
    ]
    assert encoders[0].digest() == encoders[1].digest()


def test_the_callers_random_numbers_are_left_alone(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    pretrain(data, out=tmp_path / "run", **SMALL)
    assert torch.equal(torch.rand(1), expected)


class Explode(Objective):
    """Gives a loss that is no number from the fifth batch on."""

    calls = 0

    def forward(self, batch):
        self.calls += self.training
        return self.features(batch, 1).mean() * (math.nan if self.calls > 4 else 1.0), {}


def test_collapse_is_seen_and_warned_of(data: Path, tmp_path: Path, monkeypatch) -> None:
    encoder = make_encoder("mlp:features_dim=16", SPACE)
    with torch.no_grad():
        assert not has_collapsed(collapse(encoder(torch.as_tensor(np.stack([SPACE.sample() for _ in range(64)])))))
    assert has_collapsed(collapse(torch.ones(64, 16)))
    line = torch.randn(64, 1) * torch.ones(1, 16)
    assert effective_rank(line) == pytest.approx(1, abs=0.01)
    assert effective_rank(torch.cat([torch.eye(16), -torch.eye(16)]) + 3.0) == pytest.approx(16, rel=0.01)
    from rlrep.encoders.grid import Grid

    monkeypatch.setattr(Grid, "forward", lambda self, obs: self.head[1].bias.expand(len(obs), -1) + 1.0)
    with pytest.warns(CollapseWarning, match="collapsed at update 10"):
        pretrain(data, out=tmp_path / "run", objectives="inverse", **SMALL)


def test_a_loss_that_is_no_number_stops_with_the_terms(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the loss is nan .* at update 4 .*learning_rate"):
        pretrain(data, out=tmp_path / "run", objectives=f"{__name__}:Explode", **SMALL)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"objectives": "inverze"}, SpecError, "Did you mean 'inverse'"),
        ({"objectives": ["ae:rarety=1"]}, SpecError, "Did you mean 'rarity'"),
        ({"objectives": []}, SpecError, "at least one objective"),
        ({"encoder": "nature"}, ValueError, "use 'grid' or 'auto'"),
        ({"encoder": "gridd"}, SpecError, "Did you mean 'grid'"),
        ({"updates": 0}, ValueError, "updates must be at least 1"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1"),
        ({"clip": 0}, ValueError, "clip must be positive"),
        ({"learning_rate": -1e-3}, ValueError, "learning_rate must be positive"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must not be negative"),
        ({"device": "gpu"}, RunError, "no device called 'gpu'"),
        ({"held_out": 1.5}, ValueError, "held_out is a fraction"),
    ],
)
def test_bad_settings_cost_nothing(data: Path, tmp_path: Path, settings: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        pretrain(data, out=tmp_path / "run", **{**SMALL, **settings})
    assert not (tmp_path / "run").exists()


def test_too_few_episodes_to_hold_any_out(tmp_path: Path) -> None:
    one = write(tmp_path / "one", n_episodes=1)
    with pytest.raises(DatasetError, match="1 episode"):
        pretrain(one, out=tmp_path / "run", **SMALL)
    pretrain(one, out=tmp_path / "run", held_out=0.0, **SMALL)


PICTURE = spaces.Box(0, 255, (64, 64, 3), np.uint8)

PEAK = """
import sys
from pathlib import Path
import torch
from rlrep.pretrain import pretrain

torch.set_num_threads(1)
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
settings = dict(objectives="inverse", encoder="mlp:features_dim=8,hidden=[8]", updates=30, batch_size=32, log_every=10)
pretrain("small", out="first", budget="8MB", **settings)
before = peak()
pretrain("large", out="second", budget="8MB", **settings)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_stays_near_the_budget_on_data_ten_times_as_large(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, n_episodes in (("small", 3), ("large", 64)):
        with DatasetWriter(tmp_path / name, PICTURE, ACTIONS) as writer:
            for _ in range(n_episodes):
                obs = np.repeat(rng.integers(0, 255, (101, 64, 1, 1), dtype=np.uint8), 64, 2) * np.ones(3, np.uint8)
                writer.add(Episode(obs, rng.integers(0, 4, 100), np.zeros(100, np.float32), True, False))
    # 80 MB of pictures, in a process that has pre-trained before. Beside the budget there are two batches (3 MB), the
    # held-out observations (12 MB) and what decodes them.
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64e6


def test_a_budget_too_small_for_the_batches_is_an_error(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"budget of 0.0 MB is too small: two batches of 16 segments"):
        pretrain(data, out=tmp_path / "run", budget=1000, **SMALL)
    assert not (tmp_path / "run").exists()


def test_episodes_shorter_than_a_burn_in_are_an_error(data: Path, tmp_path: Path) -> None:
    world = {"name": "gru", "steps": 4, "burn_in": 9, "width": 8}
    with pytest.raises(DatasetError, match=r"burn_in=9 .* the longest episode .* has 9: lower burn_in"):
        pretrain(data, out=tmp_path / "run", objectives=[world], **SMALL)
    assert not (tmp_path / "run").exists()


def test_a_view_is_stacked_as_its_environment_says(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "data", SPACE, ACTIONS, env_spec="CartPole-v1:frame_stack=2") as writer:
        for value in range(6):
            obs = np.full((5, *SPACE.shape), value, np.uint8)
            writer.add(Episode(obs, np.zeros(4, int), np.zeros(4, np.float32), True, False))
    encoder = pretrain(Dataset(tmp_path / "data").select([1, 2, 3]), out=tmp_path / "run", **SMALL)
    assert encoder.observation_space.shape == (5, 5, 6)
    assert encoder.provenance["reward_free_steps"] == 3 * 4, "not the episodes that were left out"


def test_episodes_of_one_step(tmp_path: Path) -> None:
    short = write(tmp_path / "short", n_episodes=20, length=1)
    encoder = pretrain(short, out=tmp_path / "run", objectives=["ae", "inverse", "atc:lag=3", "spr"], **SMALL)
    assert all(torch.isfinite(p).all() for p in encoder.parameters())


def test_an_existing_folder_of_somebody_elses_is_never_touched(data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("words")
    with pytest.raises(RunError, match="did not write"):
        pretrain(data, out=tmp_path / "thesis", overwrite=True, **SMALL)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "words"


def test_metrics_are_json(data: Path, tmp_path: Path) -> None:
    pretrain(data, out=tmp_path / "run", **SMALL)
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_compiled_it_learns_the_same(data: Path, tmp_path: Path) -> None:
    """Random numbers included: `mae` draws what it hides."""
    settings = SMALL | {"objectives": ["mae", "inverse"], "updates": 10, "precision": "float32"}
    found = {}
    for compiled in (False, True):
        out = tmp_path / str(compiled)
        pretrain(data, out=out, compile=compiled, device="cpu", **settings)
        assert read_json(out / "run.json")["results"]["compiled"] is compiled
        (found[compiled],) = read_jsonl(out / "metrics.jsonl")
    for name in ("loss", "mae/loss", "inverse/loss", "held_out_loss"):
        assert found[True][name] == pytest.approx(found[False][name], rel=1e-4)


def test_compiling_by_itself_is_for_long_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    assert compiling_pays(gpu, 100_000)
    assert not compiling_pays(gpu, 5_000)
    assert not compiling_pays(torch.device("cpu"), 100_000)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (6, 1))
    assert not compiling_pays(gpu, 100_000)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not compiling_pays(gpu, 100_000)


def test_compiling_without_a_compiler_is_refused_at_once(data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RunError, match="needs a C"):
        pretrain(data, out=tmp_path / "run", compile=True, device="cpu", **SMALL)
    assert not (tmp_path / "run").exists()
