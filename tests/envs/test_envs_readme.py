from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import get_args

import pytest
from gymnasium import spaces
from rlrep_envs import EnvSpec, make_env, make_vec_env
from rlrep_envs.spec import Distraction, ObservationMode

README = (Path(__file__).parents[2] / "envs" / "README.md").read_text()


def table(heading: str) -> dict[str, list[str]]:
    """Returns the rows of the first table under a heading by their first cell."""
    lines = README.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [re.split(r" ?\| ?", line.strip("|").strip()) for line in lines if line.startswith("|")][2:]
    return {row[0]: row[1:] for row in rows}


def describe(space: spaces.Space) -> str:
    if isinstance(space, spaces.Dict):
        return ", ".join(f"`{key} {part.shape}` {part.dtype}" for key, part in space.spaces.items())
    return f"`{space.shape}` {space.dtype}"


@pytest.mark.filterwarnings("ignore:.*is out of date:DeprecationWarning")
@pytest.mark.parametrize(("spec", "observation"), [(k.strip("`"), v[0]) for k, v in table("Environments").items()])
def test_the_table_of_environments_is_true(spec: str, observation: str) -> None:
    assert describe(make_vec_env(spec).observation_space) == observation
    assert EnvSpec.parse(str(EnvSpec.parse(spec))) == EnvSpec.parse(spec)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_the_examples_run(code: str) -> None:
    exec(code, {})


def test_options_modes_and_distractions_are_all_there() -> None:
    fields = {f"`{f.name}`": f.default for f in dataclasses.fields(EnvSpec) if f.name not in ("id", "kwargs")}
    options = table("Specs")
    assert options.keys() - {"any other"} == fields.keys()
    assert [options[name][1] for name in fields] == [f"`{str(default).lower()}`" for default in fields.values()]
    assert list(table("Observation modes of MiniGrid and BabyAI")) == [
        f"`{mode}`" for mode in get_args(ObservationMode)
    ]
    assert list(table("Distractions")) == [f"`{name}`" for name in get_args(Distraction)]


@pytest.mark.parametrize(("spec", "column"), [("MiniGrid-MemoryS11-v0", 0), ("rlrep/TinyGrid-v0", 1)])
def test_the_table_of_factors_is_complete(spec: str, column: int) -> None:
    factors = make_env(spec).reset(seed=0)[1]["factors"]
    rows = table("Factors").items()
    assert {name for names, cells in rows if cells[column] for name in re.findall(r"`(\w+)`", names)} == factors.keys()
