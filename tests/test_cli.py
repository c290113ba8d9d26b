"""Every sub-command, from a shell's arguments; test_readme.py calls them by the installed script."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from rlrep.cli import main

SPEC = "rlrep/TinyGrid-v0:size=5"
PRETRAIN = (
    "--updates 20 --batch-size 16 --log-every 10 --objectives ae inverse:weight=0.5 --encoder grid:features_dim=16"
)
FINETUNE = "--arms scratch frozen --seeds 0 --steps 128 --n-envs 2 --eval-every 64 --eval-episodes 2"
PPO = "{n_steps: 16, batch_size: 16, n_epochs: 1}"


def rlrep(*args: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Calls what the console script calls, without the seconds in which a process of its own imports everything."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ, COLUMNS="160"),
    ):
        try:
            status: Any = main(list(map(str, args)))
        except SystemExit as end:
            status = end.code or 0
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four commands of the README, small."""
    root = tmp_path_factory.mktemp("cli")
    for command in (
        ["collect", SPEC, "--steps", "600", "--n-envs", "4", "--out", "data"],
        ["pretrain", "data", *PRETRAIN.split(), "--out", "encoder"],
        ["finetune", SPEC, "--encoder", "encoder", *FINETUNE.split(), "--settings", PPO, "--out", "finetune"],
        ["report", "finetune", "--threshold", "0.5", "--out", "report"],
    ):
        done = rlrep(*command, cwd=root)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    return root


def test_the_chain_leaves_what_it_says(chain: Path) -> None:
    assert (chain / "data" / "meta.json").exists()
    assert (chain / "encoder" / "encoder" / "model.safetensors").exists()
    assert (chain / "finetune" / "scores.jsonl").exists()
    assert "frozen" in (chain / "report" / "report.md").read_text()
    assert (chain / "report" / "curves.png").stat().st_size > 1000


def test_collect_again_adds_nothing_and_more_steps_add(chain: Path, tmp_path: Path) -> None:
    from rlrep.dataset import Dataset

    for steps, expected in ((200, 200), (200, 200), (400, 400)):
        done = rlrep("collect", SPEC, "--steps", steps, "--n-envs", "4", "--out", tmp_path / "data")
        assert done.returncode == 0, done.stderr
        assert Dataset(tmp_path / "data").n_transitions == expected


def test_data_commands(chain: Path, tmp_path: Path) -> None:
    data = chain / "data"
    assert "600" in rlrep("data", "info", data).stdout
    assert rlrep("data", "verify", data).returncode == 0
    for extra in ([], ["--overwrite"]):
        assert rlrep("data", "merge", data, data, "--out", tmp_path / "twice", *extra).returncode == 0
    again = rlrep("data", "merge", data, data, "--out", tmp_path / "twice")
    assert again.returncode == 1
    assert "exists; choose another folder" in again.stderr
    assert "1200" in rlrep("data", "info", tmp_path / "twice").stdout.replace(",", "")
    assert rlrep("data", "export", data, "--format", "npz", "--out", tmp_path / "all.npz").returncode == 0
    back = rlrep("data", "import", tmp_path / "all.npz", "--format", "npz", "--out", tmp_path / "back")
    assert back.returncode == 0, back.stderr
    assert "600" in rlrep("data", "info", tmp_path / "back").stdout


def test_verify_finds_damage(chain: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(chain / "data", tmp_path / "data")
    shard = max((p for p in (tmp_path / "data" / "obs").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    shard.write_bytes(bytes(raw))
    done = rlrep("data", "verify", tmp_path / "data")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_run_with_overrides(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"env: {SPEC}\ncollect: {{steps: 4_000_000, n_envs: 4}}\npretrain: {{updates: 20, batch_size: 16}}\n"
        "finetune: {arms: [random-frozen], seeds: [0], steps: 64, n_envs: 2, eval_every: 64, eval_episodes: 2, "
        f"settings: {PPO}}}\n"
    )
    done = rlrep("run", tmp_path, "--collect.steps", "300", "--pretrain.objectives", "inverse")
    assert done.returncode == 0, done.stderr
    assert "random-frozen" in done.stdout
    assert (tmp_path / "out" / "report.md").exists()


def test_list_shows_every_registered_name_with_its_paper() -> None:
    from rlrep.encoders import encoders
    from rlrep.explore import explorers
    from rlrep.objectives import objectives
    from rlrep.sb3 import algorithms

    shown = rlrep("list").stdout
    for name in [*encoders.names(), *objectives.names(), *explorers.names(), *algorithms()]:
        assert name in shown
    assert "arXiv:2007.05929" in shown
    only = rlrep("list", "objectives").stdout
    assert "spr" in only
    assert "nature" not in only


@pytest.mark.parametrize(
    "command", ["collect", "pretrain", "probe", "finetune", "report", "export", "run", "list", "data"]
)
def test_help_is_worth_reading(command: str) -> None:
    done = rlrep(command, "--help")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) > 5
    if command == "pretrain":
        assert "Gradient steps" in done.stdout
        assert "--learning-rate" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["collect", "MiniGrid-DoorKey-66-v0", "--out", "x"], "DoorKey"),
        (["collect", SPEC, "--explorer", "randon", "--out", "x"], "Did you mean 'random'"),
        (["pretrain", "nowhere", "--out", "x"], "nowhere"),
        (["finetune", SPEC, "--encoder", "nowhere", "--out", "x"], "nowhere"),
        (["probe", "nowhere", "data"], "nowhere"),
        (["dream", "nowhere", "data", "--out", "x"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["run", "nowhere"], "no recipe"),
        (["run", "--overwrite", "nowhere"], "name the recipe first"),
        (["run", "--env", SPEC, "nowhere"], "name the recipe first"),
        (["data", "info", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line_for_people(args: list[str], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(args) == 1
    error = capsys.readouterr().err
    assert error.startswith("rlrep: ")
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "x").exists()


def test_what_the_system_refuses_is_one_line_too(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(chain / "finetune"), "--out", str(chain / "data" / "meta.json")]) == 1
    assert "meta.json" in capsys.readouterr().err.splitlines()[-1]


def test_no_arguments_shows_help() -> None:
    script = Path(sys.executable).parent / "rlrep"
    done = subprocess.run([script], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(
        command in done.stdout for command in ("collect", "pretrain", "finetune", "report", "run", "list", "data")
    )


def test_both_encoders_of_a_pretraining_are_named(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--objectives gru:steps=2,width=4,decoder_width=4 --updates 1 --batch-size 2 --held-out 0"
    assert main(["pretrain", str(chain / "data"), *options.split(), "--out", str(tmp_path / "run")]) == 0
    named = [line.rpartition(" ")[2] for line in capsys.readouterr().out.splitlines()]
    assert named[-2:] == [str(tmp_path / "run" / "encoder"), str(tmp_path / "run" / "belief")]


def test_coverage_compares_datasets_and_features_explore(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(chain)
    options = "--explorer e3b --steps 4000 --n-envs 4 --until states=20 --checkpoint-every 80 --algorithm a2c"
    assert main(["collect", SPEC, *options.split(), "--features", "encoder", "--out", str(tmp_path / "e3b")]) == 0
    picture = tmp_path / "coverage.png"
    assert main(["data", "coverage", "data", str(tmp_path / "e3b"), "--out", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "random" in printed
    assert "e3b" in printed
    assert picture.stat().st_size > 10_000
