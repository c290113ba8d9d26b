from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import tyro

from rlrep.settings import SettingsError, dump_yaml, load_yaml, settings_of


class Dataset:
    """Something that YAML cannot write."""


def collect(
    env: str,
    *,
    steps: int = 300_000,
    explorer: str | Mapping[str, Any] | Dataset = "random",
    objectives: Sequence[str | Mapping[str, Any]] = ("ae", "inverse:weight=0.5"),
    seeds: Sequence[int] = (0, 1),
    lr: float = 1e-4,
    returns: Literal["episodic", "lifelong"] = "lifelong",
    settings: Mapping[str, Any] | None = None,
    compress: bool = True,
    limit: int | None = None,
    rng: Dataset | None = None,
) -> dict[str, Any]:
    """Explores without reward.

    And writes everything down.

    Args:
        env: Environment spec.
        steps: Environment steps [in all],
            100% reward-free.
        explorer: Who explores.
        objectives: What to learn.
    """
    return {"env": env, "steps": steps, "explorer": explorer}


Collect = settings_of(collect, omit=("rng",))


@dataclasses.dataclass(frozen=True)
class Stage:
    kind: Literal["slow", "fast"]
    size: tuple[int, float] = (1, 0.5)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole experiment."""

    collect: Collect
    out: Path = Path("out")
    stages: list[Stage] = dataclasses.field(default_factory=list)
    last: Stage | None = None
    ratio: float | int = 1
    label: str | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ratio < 0:
            raise ValueError(f"ratio is {self.ratio}; it cannot be negative")


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write_and_load(text):
        Path("recipe.yaml").write_text(text)
        return load_yaml(Recipe, "recipe.yaml")

    return write_and_load


FULL = """\
collect:
  env: MiniGrid-DoorKey-6x6-v0:obs=rgb   # a spec is one word of YAML
  steps: 20_000
  explorer: {name: count, scale: 1e-2}
  objectives:
    - ae
    - {name: atc, lag: 3}
  lr: 3e-4
  seeds: [3, 4]
  returns: episodic
  compress: false
  limit: null
out: runs/x
stages:
  - kind: slow
    size: [2, 1]
  - {kind: fast}
last:
  kind: fast
ratio: 3
label: off
extra: {a: [1, 2.5, yes, "3"], b: {c: null}}
"""


def test_a_full_file(load):
    recipe = load(FULL)
    assert recipe == Recipe(
        collect=Collect(
            env="MiniGrid-DoorKey-6x6-v0:obs=rgb",
            steps=20_000,
            explorer={"name": "count", "scale": 0.01},
            objectives=("ae", {"name": "atc", "lag": 3}),
            lr=3e-4,
            seeds=(3, 4),
            returns="episodic",
            compress=False,
        ),
        out=Path("runs/x"),
        stages=[Stage("slow", (2, 1.0)), Stage("fast")],
        last=Stage("fast"),
        ratio=3,
        label="off",
        extra={"a": [1, 2.5, "yes", "3"], "b": {"c": None}},
    )
    assert isinstance(recipe.ratio, int)
    assert isinstance(recipe.stages[0].size[1], float)


def test_what_is_not_in_the_file_has_its_default(load):
    recipe = load("collect:\n  env: x\n")
    assert recipe.collect == Collect(env="x")
    assert (recipe.collect.objectives, recipe.collect.lr, recipe.out) == (
        ("ae", "inverse:weight=0.5"),
        1e-4,
        Path("out"),
    )


def test_dumping_and_loading_gives_an_equal_one(load):
    recipe = load(FULL)
    assert load(dump_yaml(recipe)) == recipe
    awkward = ["3", "1e-4", "null", "None", "true", "", "a: b", "#x", "off", "08", "line\nline", "ä", "-", "{x}"]
    odd = dataclasses.replace(recipe, extra={"text": awkward, "numbers": [1e-5, 1e22, float("inf"), -3, 0.1], "x": {}})
    assert load(dump_yaml(odd)) == odd


ENV = "collect:\n  env: x\n"


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        (
            "collect:\n  env: x\n  explorrer: a\n",
            3,
            ["unknown key 'explorrer' in collect", "'explorer'?", "Keys: env, steps"],
        ),
        (ENV + "colect: 1\n", 3, ["unknown key 'colect'.", "'collect'?", "Keys: collect, out"]),
        ("collect:\n  env: x\n  steps: many\n", 3, ["collect.steps must be a whole number, not the text 'many'"]),
        ("collect:\n  env: x\n  steps: 1.5\n", 3, ["collect.steps must be a whole number, not 1.5"]),
        ("collect:\n  env: x\n  steps: true\n", 3, ["collect.steps must be a whole number, not true"]),
        ("collect:\n  env: x\n  steps:\n", 3, ["collect.steps must be a whole number, not nothing"]),
        ("collect:\n  env: x\n  lr: [1]\n", 3, ["collect.lr must be a number, not a list"]),
        ("collect:\n  env: 8\n", 2, ["collect.env must be text, not 8", 'quote it: "8"']),
        ("collect:\n  env: x\n  compress: 1\n", 3, ["collect.compress must be true or false, not 1"]),
        ("collect:\n  env: x\n  limit: x\n", 3, ["collect.limit must be a whole number or null, not the text 'x'"]),
        ("collect:\n  env: x\n  returns: episodc\n", 3, ["one of episodic, lifelong", "'episodic'?"]),
        ("collect:\n  env: x\n  objectives: ae\n", 3, ["collect.objectives must be a list of (text or a mapping)"]),
        ("collect:\n  env: x\n  objectives:\n  - ae\n  - 3\n", 5, ["collect.objectives[1] must be text or a mapping"]),
        ("collect:\n  env: x\n  env: y\n", 3, ["'collect.env' is set twice, first in line 2"]),
        ("collect:\n  env: x\n  settings:\n    a: 1\n    a: 2\n", 5, ["'collect.settings.a' is set twice"]),
        ("collect:\n  steps: 3\n", 2, ["collect needs the key 'env', text"]),
        ("collect:\n", 1, ["collect needs the key 'env'"]),
        ("out: x\n", 1, ["the file needs the key 'collect'"]),
        ("", 1, ["the file needs the key 'collect'"]),
        ("- a\n", 1, ["the file must be a mapping with the keys collect, out", "not a list"]),
        (ENV + "stages:\n- kind: slow\n- kind: slwo\n", 5, ["stages[1].kind must be one of slow, fast", "'slow'?"]),
        (
            ENV + "stages:\n- {kind: slow, size: [1]}\n",
            4,
            ["stages[0].size must be a list of 2 values", "not 1 values"],
        ),
        (ENV + "last:\n  kid: slow\n", 4, ["unknown key 'kid' in last", "'kind'?"]),
        (ENV + "extra: {1: 2}\n", 3, ["a key of extra must be text, not 1"]),
        (ENV + "extra: {[a]: 2}\n", 3, ["a key of extra must be a word, not a list"]),
        (ENV + "extra: {a: !!python/name:os.system }\n", 3, ["tag", "python/name"]),
        (ENV + "extra: {a: !!int x}\n", 3, ["extra.a", "write the plain value"]),
        (ENV + "ratio: -1\n", 1, ["ratio is -1; it cannot be negative"]),
        ("collect: {env: x\nout: y\n", 2, ["not YAML"]),
        ("collect:\n\tenv: x\n", 2, ["not YAML"]),
    ],
)
def test_an_error_says_where_and_what(load, text, line, parts):
    with pytest.raises(SettingsError) as error:
        load(text)
    message = str(error.value)
    assert message.startswith(f"recipe.yaml, line {line}: ")
    for part in parts:
        assert part in message


def test_a_file_that_cannot_be_read(load, tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere\.yaml cannot be read"):
        load_yaml(Recipe, tmp_path / "nowhere.yaml")
    Path("recipe.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="cannot be read"):
        load_yaml(Recipe, "recipe.yaml")
    with pytest.raises(SettingsError, match="not YAML"):
        load("a: \x00")


def test_settings_of_a_function_call_it():
    settings = Collect(env="x", steps=5)
    assert Collect.__name__ == "Collect"
    assert collect(**vars(settings)) == {"env": "x", "steps": 5, "explorer": "random"}
    assert "rng" not in vars(settings)


def test_mutable_defaults_are_not_shared():
    def function(values: list[int] = [1]) -> None:  # noqa: B006
        """Does nothing."""

    cls = settings_of(function)
    cls().values.append(2)
    assert cls().values == [1]


def test_what_yaml_cannot_write_must_be_omitted():
    with pytest.raises(TypeError, match=r"collect\(rng\).*omit"):
        settings_of(collect)
    with pytest.raises(TypeError, match="no parameter 'rgn'"):
        settings_of(collect, omit=("rng", "rgn"))


def cli(args, default):
    return tyro.cli(Recipe, default=default, args=args, config=(tyro.conf.AvoidSubcommands,))


def test_the_command_line_overrides_the_file(load):
    recipe = load(FULL)
    got = cli(
        ["--collect.steps", "1000", "--collect.lr", "1e-2", "--collect.no-compress", "--last.kind", "slow"], recipe
    )
    assert got == dataclasses.replace(
        recipe,
        collect=dataclasses.replace(recipe.collect, steps=1000, lr=0.01, compress=False),
        last=Stage("slow"),
    )


def test_specs_on_the_command_line_are_text_or_yaml(load):
    recipe = load("collect: {env: x}")
    args = ["--collect.explorer", "rnd:lr=0.1,width=2", "--collect.objectives", "spr", "{name: atc, lag: 4}"]
    got = cli([*args, "--collect.settings", "{gamma: 0.9, net_arch: [64]}", "--collect.seeds", "7"], recipe).collect
    assert got.explorer == "rnd:lr=0.1,width=2"
    assert got.objectives == ("spr", {"name": "atc", "lag": 4})
    assert got.settings == {"gamma": 0.9, "net_arch": [64]}
    assert got.seeds == (7,)
    assert cli(["--collect.settings", "None"], load(FULL)).collect.settings is None


def test_a_wrong_value_on_the_command_line_is_explained(load, capsys):
    recipe = load("collect: {env: x}")
    with pytest.raises(SystemExit):
        cli(["--collect.explorer", "{a: 1, a: 2}"], recipe)
    with pytest.raises(SystemExit):
        cli(["--collect.objectives", "ae", "3"], recipe)
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "Error parsing --collect.explorer: 'a' is set twice" in shown
    assert "the value must be text or a mapping, not 3" in shown


def test_help_shows_documentation_and_the_values_of_the_file(load, capsys):
    with pytest.raises(SystemExit):
        cli(["--help"], load(FULL))
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Explores without reward." in shown
    assert "Environment steps [in all], 100% reward-free. (default: 20000)" in shown
    assert "{name: count, scale: 0.01}" in shown
    assert "--collect.returns {episodic,lifelong}" in shown


def test_marks_of_the_signature_are_kept():
    def function(steps: Annotated[int, tyro.conf.arg(aliases=["-s"])] = 1) -> None:
        """Does nothing.

        Args:
            steps: How many.
        """

    assert tyro.cli(settings_of(function, name="Settings"), args=["-s", "3"]).steps == 3
