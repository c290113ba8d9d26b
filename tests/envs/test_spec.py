from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from rlrep_envs import EnvSpec, join_spec, split_spec


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("atc", "atc", {}),
        ("atc:lag=3,temperature=0.1", "atc", {"lag": 3, "temperature": 0.1}),
        ("x:lr=1e-4,big=-2.5E3,n=300_000", "x", {"lr": 1e-4, "big": -2500.0, "n": 300_000}),
        ("x:a=true,b=False,c=none", "x", {"a": True, "b": False, "c": None}),
        (
            "x:sizes=[64, 64],empty=[],deep=[[1,2],[a,none]]",
            "x",
            {"sizes": [64, 64], "empty": [], "deep": [[1, 2], ["a", None]]},
        ),
        ("gymnasium.envs:CartPole-v1", "gymnasium.envs:CartPole-v1", {}),
        ("my_pkg.envs:Env-v0:obs=rgb", "my_pkg.envs:Env-v0", {"obs": "rgb"}),
        ("my_pkg.file:MyObjective:a=1", "my_pkg.file:MyObjective", {"a": 1}),
        ("ALE/Pong-v5:frameskip=4", "ALE/Pong-v5", {"frameskip": 4}),
        ("x:url=http://a.b/c,next=a:b=c", "x", {"url": "http://a.b/c", "next": "a:b=c"}),
        ("x:objectives=[ae:weight=0.5,inverse]", "x", {"objectives": ["ae:weight=0.5", "inverse"]}),
        ('x:text="a, b: [c",number="3",word="none"', "x", {"text": "a, b: [c", "number": "3", "word": "none"}),
        (" x : a = 1 , b = two words ", "x", {"a": 1, "b": "two words"}),
    ],
)
def test_split_and_back(text: str, name: str, options: dict) -> None:
    assert split_spec(text) == (name, options)
    assert [type(v) for v in split_spec(text)[1].values()] == [type(v) for v in options.values()]
    assert split_spec(join_spec(name, options)) == (name, options)


def test_join_is_the_shortest_readable_text() -> None:
    options = {"lag": 3, "lr": 1e-4, "on": True, "off": None, "sizes": (64, 64), "kind": "rgb", "version": "2"}
    assert join_spec("atc", options) == 'atc:lag=3,lr=0.0001,on=true,off=none,sizes=[64,64],kind=rgb,version="2"'
    assert join_spec("atc", {}) == "atc"


def test_round_trip_of_any_values() -> None:
    rng = np.random.default_rng(0)
    letters = [*'ab1.e-[],:="\\ \n_é', "true", "none", "inf"]

    def value(depth: int) -> object:
        match rng.integers(0, 6 if depth else 5):
            case 0:
                return int(rng.integers(-(10**6), 10**6))
            case 1:
                return float(rng.normal() * 10.0 ** rng.integers(-300, 300))
            case 2:
                return [True, False, None][rng.integers(3)]
            case 3 | 4:
                return "".join(rng.choice(letters, rng.integers(0, 8)))
            case _:
                return [value(depth - 1) for _ in range(rng.integers(0, 4))]

    for _ in range(2000):
        options = {f"key{i}": value(2) for i in range(rng.integers(0, 4))}
        back = split_spec(join_spec("pkg.mod:Name-v0", options))
        assert back == ("pkg.mod:Name-v0", options)
        assert repr(back[1]) == repr(options)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "does not begin with a name"),
        (":lag=3", "does not begin with a name"),
        ("lag=3", "does not begin with a name"),
        ("atc:lag=", "'lag=' in 'atc:lag=' has no value"),
        ("atc:lag=3,temperature", "'temperature' in .* has no value"),
        ("atc:lag,temperature=3", "'lag' in .* has no value"),
        ("atc:lag=3,", "'' in .* has no value"),
        ("atc:=3", "'' in .* is not an option's name"),
        ("atc:the lag=3", "'the lag' in .* is not an option's name"),
        ("atc:lag=3,lag=4", "'lag' is given twice"),
        ("atc:sizes=[1,2", "brackets in .* do not match"),
        ("atc:sizes=1]", "brackets in .* do not match"),
        ('atc:text="abc', "is not text between double quotes"),
    ],
)
def test_malformed_text_says_what_is_wrong(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        split_spec(text)


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [("x", {"a": {"b": 1}}, "holds numbers, text"), ("x", {"a b": 1}, "not an option's name"), ("x=1", {}, "name")],
)
def test_what_cannot_be_written_is_refused(name: str, options: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        join_spec(name, options)


SPECS = [
    ("CartPole-v1", EnvSpec("CartPole-v1")),
    ("MiniGrid-DoorKey-6x6-v0:obs=rgb", EnvSpec("MiniGrid-DoorKey-6x6-v0", obs="rgb")),
    ("BabyAI-GoTo-v0:obs=grid,frame_stack=4,mission=false", EnvSpec("BabyAI-GoTo-v0", "grid", 4, False)),
    ("X-v0:mission=true,distraction=noisy_tv", EnvSpec("X-v0", mission=True, distraction="noisy_tv")),
    ("pkg:X-v0:agent_view_size=5,size=8", EnvSpec("pkg:X-v0", kwargs={"size": 8, "agent_view_size": 5})),
    ("X-v0:agent_start_pos=[1,2],name=none", EnvSpec("X-v0", kwargs={"agent_start_pos": (1, 2), "name": None})),
]


@pytest.mark.parametrize(("text", "spec"), SPECS)
def test_env_spec_is_the_same_as_text_mapping_yaml_and_json(text: str, spec: EnvSpec) -> None:
    assert EnvSpec.parse(text) == spec
    assert str(spec) == text
    assert EnvSpec.parse(spec) is spec
    assert EnvSpec.parse(spec.to_dict()) == spec
    assert EnvSpec.parse(json.loads(json.dumps(spec.to_dict()))) == spec
    assert EnvSpec.parse(yaml.safe_load(yaml.safe_dump(spec.to_dict()))) == spec
    assert hash(EnvSpec.parse(text)) == hash(spec)


def test_env_spec_leaves_out_defaults_and_orders_keywords() -> None:
    assert str(EnvSpec.parse("X-v0:b=1,frame_stack=1,a=2,obs=native,mission=auto,distraction=none")) == "X-v0:a=2,b=1"
    assert EnvSpec.parse("X-v0:b=1,a=2") == EnvSpec.parse("X-v0:a=2,b=1")
    assert EnvSpec.parse({"id": "X-v0", "kwargs": {"a": 2}, "b": 1}) == EnvSpec.parse("X-v0:a=2,b=1")


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        (
            "X-v0:obs=rbg",
            "obs='rbg' of X-v0 does not exist. Did you mean 'rgb'. It is one of native, grid, rgb, rgb_full",
        ),
        ("X-v0:obs=3", "obs=3 of X-v0 does not exist"),
        ("X-v0:distraction=noisytv", "Did you mean 'noisy_tv'"),
        ("X-v0:frame_stack=0", "frame_stack=0 of X-v0 is not a whole number of at least 1"),
        ("X-v0:frame_stack=2.5", "frame_stack=2.5"),
        ("X-v0:frame_stack=true", "frame_stack=True"),
        ("X-v0:mission=1", "mission=1 of X-v0 is not one of auto, true, false"),
        ("X-v0:mission=yes", "mission='yes'"),
        ("X-v0:id=Y-v0", "the id of .* stands before the colon"),
        ("X-v0:kwargs=3", "kwargs=3 is not a mapping"),
        ({"id": 3}, "an environment's id is text"),
        ({"obs": "rgb"}, "a mapping with an 'id'"),
        (3, "not 3"),
        ({"id": "X-v0", "kwargs": {"obs": "rgb"}}, "obs of X-v0 cannot be among the environment's own keywords"),
        ({"id": "X-v0", "a": {"b": 1}}, "holds numbers, text"),
    ],
)
def test_env_spec_errors_help(spec: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        EnvSpec.parse(spec)  # type: ignore[arg-type]
