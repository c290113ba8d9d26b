"""The scripts of `runs/` that make evidence, on plans that take seconds: they report, and go on where they were."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_cases import NEVER, write_run

from rlrep import runs
from rlrep.evaluate.comparison import read_task, relabel

RUNS = Path(__file__).parents[1] / "runs"
TINY = "rlrep/TinyGrid-v0:size=4"
PPO = {"n_steps": 16, "batch_size": 32, "n_epochs": 1}


def script(path: str, plan: dict[str, object], tmp_path: Path) -> str:
    (tmp_path / "plan.yaml").write_text(yaml.dump(plan))
    command = [sys.executable, RUNS / path, "--plan-file", tmp_path / "plan.yaml"]
    command += ["--out", tmp_path / "out", "--results", tmp_path / "results"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr
    return done.stdout


def module(path: str) -> Any:
    """A script as a module."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, RUNS / path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.usefixtures("one_process")
def test_objectives_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = {
        "tasks": {TINY: {"steps": 128, "threshold": 0.8}},
        "collect": {"explorer": "random", "steps": 300},
        "pretrain": {"encoder": "mlp:features_dim=8", "updates": 4, "batch_size": 8},
        "pretrain_seeds": [0, 1],
        "finetune": {
            "seeds": [0, 1],
            "n_envs": 4,
            "settings": PPO,
            "eval_every": 64,
            "eval_episodes": 2,
        },
        "arms": {
            "scratch": {},
            "inverse": {"objectives": ["inverse"]},
            "inverse, all tasks": {"objectives": ["inverse"], "data": "all"},
            "explored": {
                "objectives": ["inverse"],
                "kind": "warm-actor",
                "explore": {"explorer": "count", "steps": 128, "n_envs": 4, "settings": PPO},
            },
        },
    }
    (tmp_path / "plan.yaml").write_text(yaml.dump(plan))
    module("objectives/compare.py").main(tmp_path / "plan.yaml", tmp_path / "out", tmp_path / "results")
    text = capsys.readouterr().out
    cells = runs.read_jsonl(tmp_path / "results" / "cells.jsonl")
    # A baseline has a cell a seed; encoders share the seeds out.
    arms = ("explored", "inverse", "inverse, all tasks", "scratch")
    assert sorted((cell["arm"], *cell["seeds"]) for cell in cells) == [(arm, seed) for arm in arms for seed in (0, 1)]
    assert [cell["pretrain_seed"] for cell in cells if cell["arm"] == "scratch"] == [None, None]
    assert all([steps for steps, _ in curve] == [64, 128] for cell in cells for curve in cell["curves"].values())
    own, mixed = ({c["encoder_digest"] for c in cells if c["arm"] == arm} for arm in arms[1:3])
    assert own == mixed, "of one task, all tasks are the same data"
    assert "8 of 8 cells" in text
    assert "300 of each task, and 128 more before those of explored." in text
    (tmp_path / "results" / "cells.jsonl").write_text("".join(f"{line}\n" for line in _lines(tmp_path)[:-1]))
    assert "[1/1]" in script("objectives/compare.py", plan, tmp_path), "it did not go on with what was missing"


def test_objectives_are_reported_as_worked_out_by_hand() -> None:
    """Quicker by 2 on one task and by 8 on another is quicker by 4; what is not solved counts its whole budget."""
    compare = module("objectives/compare.py")
    tasks = {"one": compare.Task(100, 0.5), "other": compare.Task(1_000, 0.9)}
    arms: dict[str, dict[str, object]] = {
        "scratch": {},
        "augment": {},
        "random-frozen": {},
        **{name: {"objectives": [name]} for name in ("ae", "vae", "half")},
    }
    plan = compare.Plan(tasks, {"steps": 7}, {"encoder": "mlp"}, [0], {"seeds": [0, 1, 2, 3]}, arms)
    # Rewarded steps of every run, by arm and task; None: not solved.
    steps: dict[str, tuple[list[int | None], list[int | None]]] = {
        "scratch": ([40, 40, 40, 101], [800, 800, 800, 800]),
        "augment": ([50, 50, 50, 50], [900, 900, 900, 900]),
        "random-frozen": ([None] * 4, [None] * 4),
        "ae": ([20, 20, 20, 20], [100, 100, 100, 100]),
        "vae": ([30, 30, 30, 30], [None] * 4),
        "half": ([10, 10, 10, 10], []),
    }
    done = []
    for arm, columns in steps.items():
        for (task, asked), column in zip(tasks.items(), columns, strict=True):
            for seed, at in enumerate(column):
                curve = [[1, 0.0], *([[at, asked.threshold]] if at else []), [asked.steps + 9, 0.0]]
                cell = {"task": task, "arm": arm, "pretrain_seed": None, "seeds": [seed], "curves": {str(seed): curve}}
                if "objectives" in arms[arm]:
                    features = {"effective_rank": 100.0 / (at or 1_000), "participation_ratio": 1.0, "uniformity": 1.0}
                    scores = {"x": {"chance": 0.5, "linear": 0.9}, "next_action": {"chance": 0.1, "linear": 0.1}}
                    cell |= {"features": {**features, "alignment": 1.0}, "scores": scores, "pretrain_seconds": 9.0}
                done.append(cell | {"rl_seconds": 2.0, "processor": "cpu"})
    text = compare.report(plan, done, 48)
    table = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in text.splitlines()}
    overall = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    first = {row[0]: row for row in overall[1 : 1 + len(steps)]}
    assert list(first) == ["ae", "scratch", "augment", "vae", "random-frozen", "half"]
    # Steps: sqrt(0.2 x 0.1). Of scratch: sqrt(0.4 x 0.8), its slowest run left out; one resample in twenty has that run
    # three times or more, and is sqrt(1 x 0.8).
    assert first["ae"][1:5] == ["8/8", "0.14", "4.0x 4.0 to 6.3", "7.1x 7.1 to 7.1"]
    assert first["scratch"][1:4] == ["8/8", "0.57", "1.0x 0.63 to 1.6"]
    assert first["vae"][1:3] == ["4/8", "> 0.55"]
    assert first["vae"][3].startswith("1.0x"), "sqrt(0.4 x 0.8 / (0.3 x 1))"
    assert first["half"][1:5] == ["4/4", "-", "-", "-"], "an arm that has not been everywhere is not ranked"
    assert first["ae"][5:7] == ["3.0", "0.80"]
    assert table["scratch"][1:] == ["55*, 4/4", "800*, 4/4"], "the second table is of steps"
    assert "- effective rank: 1.00" in text
    assert "participation" not in text, "it is the same for all"


@pytest.mark.usefixtures("one_process")
def test_memory_is_probed_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As for a script there: one imports the other, and both what explores.
    monkeypatch.syspath_prepend(RUNS / "memory")
    task = "MiniGrid-MemoryS7-v0"
    plan: dict[str, Any] = {
        "tasks": {f"{task}:obs=grid,backend=envpool,max_steps=32": "agent_x>3"},
        "collect": {"explorer": "wander:Wander", "steps": 2_000, "n_envs": 16},
        "arms": {"gru": {"objectives": ["gru:width=16,decoder_width=8"]}},
        "pretrain": {"encoder": "grid:features_dim=16,width=8,depth=0", "updates": 4, "batch_size": 4},
        "seeds": [0],
        "policies": {
            "tasks": [task],
            "model": "gru",
            "remembers": 0.0,
            "seeds": [0, 1],
            "finetune": {
                "steps": 128,
                "n_envs": 4,
                "eval_every": 64,
                "eval_episodes": 2,
                "threshold": 0.9,
                "settings": PPO,
            },
            "arms": {
                "belief": {"kind": "belief"},
                "stack": {"kind": "scratch", "frame_stack": 2},
                "RecurrentPPO": {
                    "kind": "scratch",
                    "algorithm": "recurrentppo",
                    "policy_kwargs": {"lstm_hidden_size": 8},
                    "steps": 64,
                },
            },
            "tuning": {
                "task": task,
                "seeds": [100],
                "arms": ["belief"],
                "candidates": {"a": {}, "b": {"n_epochs": 2, "policy_kwargs": {"net_arch": [8]}}},
            },
        },
    }
    where = tmp_path / "plan.yaml", tmp_path / "out", tmp_path / "results"
    where[0].write_text(yaml.dump(plan))
    # One command does all, and probes what it uses.
    policies = module("memory/policies.py")
    policies.main(*where)
    module("memory/probe.py").main(*where)
    assert "1 of 1 cells" in capsys.readouterr().out
    rows = runs.read_jsonl(tmp_path / "results" / "policies.jsonl")
    counted = sorted((row["arm"], row["seed"], row["model_seed"]) for row in rows if row["tried"] is None)
    assert counted == [(arm, seed, 0) for arm in ("RecurrentPPO", "belief", "stack") for seed in (0, 1)]
    assert sorted(row["tried"] for row in rows if row["tried"]) == ["a", "b"]
    text = (tmp_path / "results" / "policies.md").read_text()
    assert "6 of 6 runs" in text
    assert f"| {task} | stack | 0/2 | > 128; > 128 | - |" in text
    assert f"| {task} | RecurrentPPO | 0/2 | > 64; > 64 | - |" in text
    shown = re.findall(r"\]\((.*)\)", text)
    assert [name.partition("-")[0] for name in shown] == ["memory", "dreams", "errors"]
    assert all((tmp_path / "results" / name).stat().st_size > 1_000 for name in shown)

    # A model that remembers too little has no policies; the others are trained, the world model's twin among them.
    plan["policies"]["remembers"] = 1.0
    where[0].write_text(yaml.dump(plan))
    runs.trim_jsonl(tmp_path / "results" / "policies.jsonl", lambda row: row["arm"] == "belief" and row["tried"])
    policies.main(*where)
    assert "is left out: gru remembers with accuracy" in capsys.readouterr().out
    rows = runs.read_jsonl(tmp_path / "results" / "policies.jsonl")
    assert {row["arm"] for row in rows if row["tried"] is None} == {"stack", "RecurrentPPO"}


def _lines(tmp_path: Path) -> list[str]:
    return (tmp_path / "results" / "cells.jsonl").read_text().splitlines()


def test_speed_ups_over_all_tasks_count_runs_that_are_not_there_at_their_last_step(tmp_path: Path) -> None:
    suite = module("suite/suite.py")
    cases = [(10_000, 100_000), (NEVER[0], NEVER[0]), (60_000, NEVER[0]), (NEVER[0], 30_000), (40_000, 80_000)]
    pairs = []
    for i, case in enumerate(cases):
        # As pairs are made: ours first.
        arms = {name: dict.fromkeys(range(5), at) for name, at in zip((suite.OURS, suite.BASELINE), case, strict=True)}
        pairs.append(relabel(read_task(write_run(tmp_path / str(i), arms)), str(i)))
    # 10, 1, 2, 0.25 and 2 times as fast; the slowest and the fastest are left out. All runs of an arm are alike.
    mean, median = suite._over_tasks(pairs)
    assert mean.point == mean.low == mean.high == pytest.approx((1 + 2 + 2) / 3)
    assert median == 2


@pytest.mark.usefixtures("one_process")
def test_the_suite_says_whether_it_helps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = {"env": TINY, "steps": 128, "threshold": 0.8}
    common = {
        "collect": {"explorer": "random", "steps": 300, "n_envs": 4},
        "finetune": {"n_envs": 4, "settings": PPO, "eval_every": 64, "eval_episodes": 2},
        "candidates": {"a": {"learning_rate": 1e-3}, "b": {"learning_rate": 1e-4}},
    }
    settings = {"n_steps": 16, "batch_size": 32, "n_epochs": 1}
    plan = {
        "seeds": [0, 1],
        "tuning_seeds": [100],
        "small": {"tasks": ["one"], "seeds": [0], "tuning_seeds": [], "candidates": 1, "steps": 0.5},
        "groups": {
            "see": {
                **common,
                "ours": "warm-actor",
                "pretrain": {"encoder": "mlp:features_dim=8", "objectives": ["inverse"], "updates": 4, "batch_size": 8},
                "explore": {"explorer": "count", "steps": 128, "n_envs": 4, "settings": settings},
                "arms": ["scratch", "frozen", "explorer", {"name": "warm-actor", "critic_steps": 64}],
                "tasks": {"one": task, "two": {**task, "explore": {"explorer": "e3b"}}},
            },
            "explore": {
                **common,
                "ours": "warm-actor",
                "collect": {"explorer": "count", "steps": 128, "n_envs": 4, "settings": settings},
                "arms": ["scratch", "warm-actor"],
                "tasks": {"three": task},
            },
        },
    }
    suite = module("suite/suite.py")
    (tmp_path / "plan.yaml").write_text(yaml.dump(plan))
    where = {"plan_file": tmp_path / "plan.yaml", "out": tmp_path / "out", "results": tmp_path / "results"}
    suite.main(**where)
    said = capsys.readouterr().out
    assert "see: warm-actor does best with" in said
    results = tmp_path / "results"
    text = (results / "suite.md").read_text()
    assert "3 of 3 tasks, seeds 0, 1" in text
    for name, free in (("one", 428), ("two", 428), ("three", 128)):
        assert f"| {name} | {free} | warm-actor | " in text
    assert "| scratch |" in text
    assert "Over all tasks the interquartile mean of their speed-ups is " in text
    assert (results / "report.html").exists()
    explorers = {
        name: runs.read_json(results / name / "run.json")["settings"]["explorer"]["name"]
        for name in ("one", "two", "three")
    }
    assert explorers == {"one": "count", "two": "e3b", "three": "count"}
    # What is done is kept in the scores alone, and a first look is apart.
    shutil.rmtree(tmp_path / "out")
    (results / "suite.md").unlink()
    suite.main(**where)
    assert (results / "suite.md").read_text() == text
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    suite.main(small=True, **where)
    said = capsys.readouterr().out
    assert "does best with" not in said
    small = (tmp_path / "out" / "small" / "results" / "suite.md").read_text()
    assert "1 of 1 tasks, seeds 0." in small
