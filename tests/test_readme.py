"""The README is true: its code and commands run, its tables are what is registered.

`RLREP_WRITE_README=1 pytest tests/test_readme.py` writes the tables again.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlrep.encoders import encoders
from rlrep.explore import explorers
from rlrep.objectives import objectives

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

SMALLER = {
    r"steps=100_000": "steps=1024",
    r"learn\(100_000": "learn(2048",
    r"out=\"doorkey/encoder\"": 'out="doorkey/encoder", updates=10, batch_size=8',
    r"out=\"doorkey/memory\"": 'out="doorkey/memory", updates=2, batch_size=4',
    r"--steps 100000": "--steps 1024",
    r"--out (doorkey/encoder\S*)": r"--out \1 --updates 10 --batch-size 8",
    r"--seeds 0 1 2": "--seeds 0 --arms frozen --steps 64 --n-envs 2 --eval-every 64 --eval-episodes 1 "
    "--settings '{n_steps: 16, batch_size: 16}'",
}
"""What is made smaller, so that the README can be run as a test: numbers of steps, and nothing else of its code."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def smaller(code: str) -> str:
    for pattern, replacement in SMALLER.items():
        code = re.sub(pattern, replacement, code)
    return code


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks, in order, in one namespace, as a reader who types them would have it."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"np": np, "__name__": "readme"}
    for code in blocks("python"):
        exec(compile(smaller(code), "README.md", "exec"), names)
    assert names["model"].num_timesteps == 2048
    assert names["batch"].mask.shape == (32, 8)
    # The method added in one file is built, trained and described as any other.
    slow = names["rlrep"].make_objective("slow:margin=0.5", names["encoder"], names["env"].action_space)
    loss, metrics = slow(names["batch"])
    assert np.isfinite(float(loss.detach()))
    assert "slow/near" in metrics
    objectives._entries.pop("slow")
    assert names["seen"].n_transitions == 1024
    explorers._entries.pop("unlike")


def test_commands_run(tmp_path: Path) -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("rlrep ")]
    assert len(commands) >= 4
    for command in commands:
        script = Path(sys.executable).parent / "rlrep"
        words = shlex.split(smaller(command))
        done = subprocess.run([script, *words[1:]], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_set_up_is_two_commands() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("pip ")]
    assert lines == ["pip install -e . && rlrep run runs/quickstart", "pip install -e '.[dev]' && pytest"]


def tables() -> str:
    text = ""
    for registry in (encoders, objectives, explorers):
        text += f"\n| {registry.kind} | what it does | paper |\n|---|---|---|\n"
        for name, cls in registry.items():
            summary = (cls.__doc__ or "").strip().split("\n")[0]
            text += f"| `{name}` | {summary} | {getattr(cls, 'paper', '')} |\n"
    return text + "\n"


def test_tables_are_what_is_registered() -> None:
    start, end = "<!-- tables: written by tests/test_readme.py -->\n", "<!-- end of tables -->"
    written = README.split(start)[1].split(end)[0]
    if os.environ.get("RLREP_WRITE_README"):
        (ROOT / "README.md").write_text(README.replace(start + written + end, start + tables() + end))
    else:
        assert written == tables(), "run RLREP_WRITE_README=1 pytest tests/test_readme.py"


def test_speed_is_what_was_measured() -> None:
    start, end = "<!-- speed: written by tests/test_readme.py -->\n", "<!-- end of speed -->"
    written = README.split(start)[1].split(end)[0]
    measured = f"\n{(ROOT / 'runs/speed/results.md').read_text()}\n"
    if os.environ.get("RLREP_WRITE_README"):
        (ROOT / "README.md").write_text(README.replace(start + written + end, start + measured + end))
    else:
        assert written == measured, "run RLREP_WRITE_README=1 pytest tests/test_readme.py -k speed"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
