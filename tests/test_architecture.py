"""The rules of the house: imports point one way, everything public is explained, and nothing of ours is unpickled."""

from __future__ import annotations

import ast
import functools
import inspect
import pkgutil
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import rlrep_envs

import rlrep
from rlrep.encoders import encoders
from rlrep.explore import explorers
from rlrep.objectives import objectives
from rlrep.registry import Registry

TIERS = [
    ["types", "runs", "storage", "distributed"],
    ["spaces", "registry"],
    ["nets", "losses", "augment", "dataset", "settings", "fanout", "interop", "recorder"],
    ["encoders"],
    ["objectives", "sb3"],
    ["explore", "latent", "transfer", "belief", "imagination", "dreaming"],
    ["evaluate", "intrinsic"],
    ["live"],
    ["collect", "pretrain", "warm", "finetune", "export"],
    ["recipe"],
    ["cli"],
    ["__main__"],
]
"""A module imports from its own tier and from those above it in this list."""

TIER_OF = {name: tier for tier, names in enumerate(TIERS) for name in names}

WITHOUT_PAPER = {
    ("encoder", "mlp"): "older than any one paper",
    ("encoder", "dict"): "joins other encoders",
    ("explorer", "policy"): "acts as somebody else's model does",
}

UNPICKLING = {"torch.load", "load_from_pkl", "load_replay_buffer"}
PICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNPICKLING_ALLOWED = {
    ("interop", "load_from_pkl"): "Stable-Baselines3 saves replay buffers in no other way; the docstring warns",
}


@functools.cache
def modules(package: Path) -> dict[str, ast.Module]:
    """The parsed modules of a package by dotted name, such as "rlrep.encoders.mlp"."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


RLREP = Path(rlrep.__file__).parent
ENVS = Path(rlrep_envs.__file__).parent


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Every (module, name) imported anywhere in a module; the name is empty where the module itself is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield from ((str(node.module), alias.name) for alias in node.names)


def own_imports(tree: ast.Module) -> set[str]:
    """The modules of rlrep that a module of rlrep imports."""
    names = {f"{module}.{name}" if f"{module}.{name}" in modules(RLREP) else module for module, name in imports(tree)}
    return {name for name in names if name.split(".")[0] == "rlrep"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute or a name, as it is written."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def test_the_table_names_every_module() -> None:
    assert set(TIER_OF) == {module.name for module in pkgutil.iter_modules([str(RLREP)])}


@pytest.mark.parametrize("name", [name for name in modules(RLREP) if name != "rlrep"])
def test_imports_point_one_way(name: str) -> None:
    part = name.split(".")[1]
    for imported in own_imports(modules(RLREP)[name]):
        assert imported != "rlrep", f"{name} imports the package itself"
        other = imported.split(".")[1]
        assert TIER_OF[other] <= TIER_OF[part], f"{name} imports {imported}, which stands on it"


def test_no_imports_go_round_in_circles() -> None:
    graph = {name: own_imports(tree) for name, tree in modules(RLREP).items() if name != "rlrep"}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


def test_the_environments_stand_alone() -> None:
    for name, tree in modules(ENVS).items():
        assert not [module for module, _ in imports(tree) if module.split(".")[0] == "rlrep"], name


@pytest.mark.parametrize("name", [*modules(RLREP), *modules(ENVS)])
def test_everything_public_is_explained(name: str) -> None:
    tree = {**modules(RLREP), **modules(ENVS)}[name]
    assert ast.get_docstring(tree), f"{name} has no docstring"

    def check(owner: str, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{owner}.{node.name} has no docstring"
                if isinstance(node, ast.ClassDef):
                    check(f"{owner}.{node.name}", node.body)

    check(name, tree.body)


@pytest.mark.parametrize("registry", [encoders, objectives, explorers], ids=lambda registry: registry.kind)
def test_every_method_says_what_it_does_and_whose_it_is(registry: Registry[Any]) -> None:
    for name, cls in registry.items():
        if not cls.__module__.startswith("rlrep."):
            continue
        own = cls.__dict__.get("__doc__") or ""
        first = inspect.cleandoc(own).partition("\n")[0]
        assert first.endswith("."), f"the docstring of {registry.kind} {name} does not begin with one sentence"
        without = (registry.kind, name) in WITHOUT_PAPER
        assert bool(cls.paper) != without, f"{registry.kind} {name}: set `paper`, or say in WITHOUT_PAPER why not"


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    names = {part for name in [*modules(RLREP), *modules(ENVS)] for part in name.split(".")}
    assert not names & {"utils", "util", "helpers", "misc", "common"}


def unpickling(tree: ast.Module) -> set[str]:
    """What a module uses that unpickles."""
    found = {module.split(".")[0] for module, _ in imports(tree)} & PICKLERS
    found |= {f"{module}.{name}" for module, name in imports(tree)} & UNPICKLING
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            found |= {dotted(node), dotted(node).rpartition(".")[2]} & UNPICKLING
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and getattr(node.value, "value", None):
            found.add("allow_pickle")
    return found | {name for _, name in imports(tree)} & UNPICKLING


def test_nothing_of_ours_is_unpickled() -> None:
    found = {(name.partition(".")[2], use) for name, tree in modules(RLREP).items() for use in unpickling(tree)}
    assert found == set(UNPICKLING_ALLOWED)


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load(path)",
        "from torch import load\nload(path)",
        "def f():\n    import pickle",
        "from cloudpickle import loads",
        "np.load(path, allow_pickle=True)",
        "model.load_replay_buffer(path)",
        "from stable_baselines3.common.save_util import load_from_pkl",
    ],
)
def test_unpickling_would_be_noticed(code: str) -> None:
    assert unpickling(ast.parse(code))


def rewards_read(tree: ast.Module) -> list[int]:
    """The lines where a field called `reward` or `rewards` is read; calling a method of that name is no reading."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in ("reward", "rewards") and id(node) not in called)
        or (isinstance(node, ast.Subscript) and getattr(node.slice, "value", None) in ("reward", "rewards"))
    ]


@pytest.mark.parametrize("name", [n for n in modules(RLREP) if n.split(".")[1:2] in (["objectives"], ["explore"])])
def test_what_learns_without_reward_reads_none(name: str) -> None:
    assert rewards_read(modules(RLREP)[name]) == []


@pytest.mark.parametrize("code", ["batch.reward.mean()", "x = info['reward']", "step.rewards", "f(batch.reward)"])
def test_reading_a_reward_would_be_noticed(code: str) -> None:
    assert rewards_read(ast.parse(code))
    assert not rewards_read(ast.parse("bonus.reward(step)"))
