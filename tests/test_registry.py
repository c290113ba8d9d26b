"""Registries: what is found by name or by import path, which options it has, and what mistakes are told."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.spaces import Box

from rlrep.encoders import Encoder, encoders, load_encoder, make_encoder
from rlrep.explore import explorers
from rlrep.objectives import objectives
from rlrep.registry import Registry, SpecError, join_spec, nearest, split_spec

SPACE = Box(-1, 1, (3,), np.float32)

MODULES = {
    "__init__.py": "",
    "base.py": """
        from rlrep.registry import Registry

        things = Registry("thing", "{package}", given=("owner",))

        class Thing:
            def __init__(self, owner, size: int = 3, *, colour: str = "red"):
                self.owner, self.size, self.colour = owner, size, colour
    """,
    "one.py": """
        from {package}.base import Thing, things

        @things.register("plain")
        class Plain(Thing):
            pass

        @things.register("wide")
        class Wide(Thing):
            def __init__(self, owner, width: "float | None" = 1, **base):
                super().__init__(owner, **base)
                self.width = width

        @things.register("closed")
        class Closed(Thing):
            def __init__(self, owner, only: bool = True):
                super().__init__(owner, size=1)
                self.only = only
    """,
    "two.py": """
        from {package}.base import things
        from {package}.one import Wide

        @things.register("wider")
        class Wider(Wide):
            def __init__(self, owner, depth=2, layers: "Sequence[int]" = (), **base):
                super().__init__(owner, **base)
                self.depth, self.layers = depth, layers
    """,
}


def write_package(folder: Path, package: str, modules: dict[str, str]) -> None:
    (folder / package).mkdir(parents=True)
    for name, text in modules.items():
        (folder / package / name).write_text(inspect.cleandoc(text.replace("{package}", package)) + "\n")


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that can be imported from, and is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("made_for_test"):
            del sys.modules[name]


@pytest.fixture
def things(on_path: Path) -> Registry[Any]:
    import importlib

    write_package(on_path, "made_for_test", MODULES)
    return importlib.import_module("made_for_test.base").things


def test_every_module_of_the_package_is_discovered(things: Registry[Any]) -> None:
    assert things.names() == ["closed", "plain", "wide", "wider"]
    assert [name for name, cls in things.items() if cls.name == name] == things.names()


def test_one_new_file_is_a_new_name(on_path: Path, things: Registry[Any]) -> None:
    (on_path / "made_for_test" / "three.py").write_text(
        "from made_for_test.base import Thing, things\n\nthings.register('third')(type('Third', (Thing,), {}))\n"
    )
    assert "third" in things.names()


def test_a_module_that_cannot_be_imported_is_told_every_time(on_path: Path, things: Registry[Any]) -> None:
    (on_path / "made_for_test" / "broken.py").write_text("import no_such_library\n")
    for _ in range(2):
        with pytest.raises(ImportError, match="no_such_library"):
            things.names()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", {"size": 3, "colour": "red"}),
        ("wide", {"width": 1, "size": 3, "colour": "red"}),
        ("wider", {"depth": 2, "layers": (), "width": 1, "size": 3, "colour": "red"}),
        ("closed", {"only": True}),
    ],
)
def test_options_are_those_the_constructor_takes(things: Registry[Any], name: str, expected: dict[str, Any]) -> None:
    options = things.options(name)
    assert {key: parameter.default for key, parameter in options.items()} == expected
    made = things.build({"name": name, **expected}, owner="me")
    assert {key: getattr(made, key) for key in expected} == expected
    assert made.owner == "me"


@pytest.mark.parametrize("registry", [encoders, objectives, explorers], ids=lambda r: r.kind)
def test_options_of_the_methods_have_plain_defaults(registry: Registry[Any]) -> None:
    for name in registry.names():
        for key, parameter in registry.options(name).items():
            if parameter.default is not parameter.empty:
                assert split_spec(join_spec(name, {key: parameter.default}))[0] == name


def test_a_spec_is_text_or_a_mapping(things: Registry[Any]) -> None:
    expected = ("wide", {"width": 2, "colour": "blue"})
    assert things.parse("wide:width=2,colour=blue") == expected
    assert things.parse({"name": "wide", "width": 2, "colour": "blue"}) == expected
    assert things.parse("plain") == ("plain", {})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wied", r"no thing called 'wied'\. Did you mean 'wider?'\? The things are: closed, plain, wide, wider\."),
        ("WIDE", r"Did you mean 'wide'\?"),
        ("zzzzz", r"no thing called 'zzzzz'\. The things are"),
        ("wide:widht=2", r"thing 'wide' has no option 'widht'\. Did you mean 'width'\? Its options: .*width=1"),
        ("wide:owner=me", r"no option 'owner'"),
        ("closed:size=2", r"no option 'size'.* Its options: only=True\."),
        ("wide:width=", r"thing spec 'wide:width=': .*has no value"),
        ("wide:width=1,width=2", r"given twice"),
        ("wide:width=[1", r"brackets"),
        ("", r"does not begin with a name"),
        ({"width": 2}, r"a mapping with a 'name', not \{'width': 2\}"),
        ({"name": "wide", 3: 4}, r"has no option 3"),
        ({"name": 3}, r"a mapping with a 'name'"),
        (7, r"a string 'name:key=value' or a mapping with a 'name', not 7"),
        (None, r"not None"),
        ("plain:size=big", r"option 'size' of thing 'plain' is a whole number, not 'big'"),
        ("plain:size=1.5", r"is a whole number, not 1\.5"),
        ("plain:size=true", r"is a whole number, not True"),
        ("plain:size=none", r"is a whole number, not None"),
        ("plain:colour=7", r"'colour' of thing 'plain' is text, not 7"),
        ("wide:width=wide", r"is a number or none, not 'wide'"),
        ("closed:only=1", r"is true or false, not 1"),
        ("wider:layers=3", r"is a list, not 3"),
    ],
    ids=str,
)
def test_mistakes_are_told_with_what_is_right(things: Registry[Any], spec: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        things.parse(spec)


def test_values_of_the_right_kind_are_taken(things: Registry[Any]) -> None:
    # The annotation counts: a number whose default happens to be whole need not be.
    for width in (2, 0.5, None):
        assert things.parse({"name": "wide", "width": width})[1] == {"width": width}
    # Of an option without an annotation nothing is known.
    assert things.parse("wider:depth=deep,layers=[1,2]")[1] == {"depth": "deep", "layers": [1, 2]}
    # A sweep with numpy makes its own kind of numbers, which JSON does not know.
    found = things.parse({"name": "wide", "width": np.float32(0.5), "size": np.int64(4)})[1]
    assert found == {"width": 0.5, "size": 4}
    assert [type(value) for value in found.values()] == [float, int]


def test_two_classes_cannot_have_one_name(things: Registry[Any]) -> None:
    wide = things.get("wide")
    # A class of the same name in another module is another class.
    for other in (type("Other", (), {}), type("Wide", (), {"__module__": "elsewhere"})):
        with pytest.raises(ValueError, match=r"two things are called 'wide': .*Wide.*"):
            things.register("wide")(other)
    assert things.get("wide") is wide


def test_a_reloaded_module_replaces_its_own_class(things: Registry[Any]) -> None:
    import importlib

    before = things.get("wider")
    importlib.reload(sys.modules["made_for_test.two"])
    assert things.get("wider") is not before


FOREIGN = """
    from torch import nn

    from rlrep.encoders import Encoder, encoders

    number = 3

    class Plain(Encoder):
        kinds = ("vector",)

        def __init__(self, observation_space, features_dim=4):
            super().__init__(observation_space, features_dim)
            self.net = nn.Linear(3, features_dim)

        def forward(self, obs):
            return self.net(obs)

    class Named(Plain):
        name = "mine"

    class Child(Named):
        pass
"""


@pytest.mark.parametrize("cls", ["Plain", "Named", "Child"])
def test_a_class_is_named_by_its_import_path_and_found_again_in_a_new_process(on_path: Path, cls: str) -> None:
    write_package(on_path, "made_for_test_foreign", {"__init__.py": "", "mine.py": FOREIGN})
    spec = f"made_for_test_foreign.mine:{cls}"
    encoder = make_encoder(f"{spec}:features_dim=5", SPACE)
    assert (type(encoder).__name__, encoder.features_dim, encoder.config["encoder"]) == (cls, 5, spec)
    encoder.save_pretrained(on_path / "saved")
    assert load_encoder(on_path / "saved").digest() == encoder.digest()
    assert encoders.get(spec) is type(encoder)
    assert set(encoders.options(spec)) == {"features_dim"}
    assert spec not in encoders.names()


def test_a_saved_foreign_encoder_loads_where_its_module_was_never_imported(on_path: Path) -> None:
    write_package(on_path, "made_for_test_foreign", {"__init__.py": "", "mine.py": FOREIGN})
    make_encoder("made_for_test_foreign.mine:Named", SPACE).save_pretrained(on_path / "saved")
    code = "from rlrep.encoders import load_encoder; print(type(load_encoder('saved')).__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=on_path, capture_output=True, text=True)
    assert done.stdout.strip() == "Named", done.stderr


def test_a_registered_class_keeps_its_name_when_asked_for_by_path() -> None:
    cls: type[Encoder] = encoders.get("mlp")
    assert encoders.get(f"{cls.__module__}:{cls.__name__}") is cls
    assert cls.name == "mlp"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module_anywhere:Thing", "No module named 'no_such_module_anywhere'"),
        ("rlrep.encoders:NoSuch", "no attribute 'NoSuch'"),
        (".relative:Thing", "cannot be imported"),
        ("a..b:Thing", "cannot be imported"),
        ("made_for_test_foreign.mine:number", r"is not a class, but 3"),
        ("subprocess:Popen:executable=/bin/sh", "something else; derive it from Encoder"),
        ("made_for_test_foreign.mine:Plain:featuresdim=2", r"no option 'featuresdim'\. Did you mean 'features_dim'\?"),
    ],
)
def test_mistakes_in_import_paths(on_path: Path, spec: str, message: str) -> None:
    write_package(on_path, "made_for_test_foreign", {"__init__.py": "", "mine.py": FOREIGN})
    with pytest.raises(SpecError, match=message):
        encoders.parse(spec)


def test_nearest_ignores_case_and_says_nothing_of_what_is_far() -> None:
    assert nearest("ppo", ["PPO", "SAC"]) == " Did you mean 'PPO'?"
    assert nearest("qqqq", ["PPO", "SAC"]) == ""
    assert nearest("count", iter(["random", "counts"])) == " Did you mean 'counts'?"
