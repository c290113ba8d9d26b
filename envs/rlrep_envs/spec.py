"""Spec strings, `"name:key=value,key=value"`, and `EnvSpec`, the spec of an environment.

Values are integers, floats (`1e-4`), `true`, `false`, `none`, lists (`[1,2]`), or otherwise text. Text that would read
as something else is written between double quotes, as in JSON. Commas inside brackets and quotes separate nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

ObservationMode = Literal["native", "grid", "rgb", "rgb_full"]
Distraction = Literal["noisy_tv", "background"]
Backend = Literal["python", "envpool"]

THREADS = "num_threads"
"""The keyword of envpool's that says how it steps, and nothing about the environment."""

_WORDS = {"true": True, "false": False, "none": None}


def split_spec(text: str) -> tuple[str, dict[str, Any]]:
    """Splits `"name:key=value,key=value"` into its name and options.

    The options begin after the first colon that a `key=` follows, so a name may hold colons: `"module:Env-v0:obs=rgb"`.

    Raises:
        ValueError: An option without a value or a name, an option given twice, or brackets that do not match.
    """
    pieces = _split(text, ":")
    first = next((i for i, piece in enumerate(pieces) if i and "=" in piece), len(pieces))
    name = ":".join(pieces[:first]).strip()
    if not name.strip(":") or "=" in name:
        raise ValueError(f"{text!r} does not begin with a name; write 'name:key=value,key=value'")
    options: dict[str, Any] = {}
    for option in _split(":".join(pieces[first:]), ",") if pieces[first:] else []:
        key, equals, value = (part.strip() for part in option.partition("="))
        if not equals or not value:
            raise ValueError(f"{option.strip()!r} in {text!r} has no value; options are written key=value")
        if not key.isidentifier():
            raise ValueError(f"{key!r} in {text!r} is not an option's name; options are written key=value")
        if key in options:
            raise ValueError(f"{key!r} is given twice in {text!r}")
        options[key] = _parse(value)
    return name, options


def join_spec(name: str, options: Mapping[str, Any]) -> str:
    """Returns the spec string that `split_spec` splits into `name` and `options`; a tuple is written as a list.

    Raises:
        ValueError: A value that is not a number, text, true, false, none, or a list of those.
    """
    text = ":".join(
        [name, ",".join(f"{key}={_format(value)}" for key, value in options.items())] if options else [name]
    )
    if split_spec(text) != (name, {key: _lists(value) for key, value in options.items()}):
        raise ValueError(f"{name!r} with options {dict(options)} cannot be written as a spec string")
    return text


def _split(text: str, separator: str) -> list[str]:
    """Splits at separators that are outside brackets and double quotes."""
    pieces, start, depth = [], 0, 0
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[\]' + separator + "]", text):
        mark = match.group()
        depth += {"[": 1, "]": -1}.get(mark, 0)
        if depth < 0:
            break
        if mark == separator and depth == 0:
            pieces.append(text[start : match.start()])
            start = match.end()
    if depth:
        raise ValueError(f"the brackets in {text!r} do not match")
    return [*pieces, text[start:]]


def _parse(text: str) -> Any:
    if text.startswith("[") and text.endswith("]"):
        inside = text[1:-1].strip()
        return [_parse(item.strip()) for item in _split(inside, ",")] if inside else []
    if text.startswith('"'):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"{text} is not text between double quotes: {error}") from error
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _format(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(_format(item) for item in value)}]"
    if isinstance(value, str):
        bare = value == value.strip() and not set('"[],') & set(value) and value != "" and _parse(value) == value
        return value if bare else json.dumps(value)
    raise ValueError(f"a spec string holds numbers, text, true, false, none and lists of those, not {value!r}")


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def nearest(name: str, valid: Iterable[str], n: int = 1) -> str:
    """Returns `" Did you mean 'x'?"` for the names most like `name`, whatever their case, or an empty string."""
    by_lower = {candidate.lower(): candidate for candidate in valid}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=n, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(by_lower[match]) for match in matches)}?" if matches else ""


@dataclass(frozen=True)
class EnvSpec:
    """Which environment, and what is observed of it: the same as a string, a mapping, YAML and JSON.

    `"MiniGrid-DoorKey-6x6-v0:obs=rgb,agent_view_size=5"`: options that are no field of this class are keywords of the
    environment's constructor.
    """

    id: str
    """A Gymnasium id, `"CartPole-v1"`; `"my_package:MyEnv-v0"` imports the module first."""
    obs: ObservationMode = "native"
    """`native` for any environment; `grid`, `rgb` and `rgb_full` for MiniGrid and BabyAI."""
    frame_stack: int = 1
    """How many of the last observations are stacked along the last axis; `make_vec_env` does it."""
    mission: bool | Literal["auto"] = "auto"
    """Whether MiniGrid's mission is observed, as tokens. `auto`: where it differs between episodes, and in `native`."""
    distraction: Distraction | None = None
    """`noisy_tv` or `background`: something to look at that tells nothing about the task."""
    backend: Backend = "python"
    """What steps the environments: Gymnasium's own, one after the other, or all of them in envpool's C++."""
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Keywords of the environment's constructor. Lists are kept, and reach the environment, as tuples."""

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise ValueError(f"an environment's id is text such as 'CartPole-v1', not {self.id!r}")
        object.__setattr__(self, "kwargs", {key: _tuples(value) for key, value in sorted(self.kwargs.items())})
        self._check_choice("obs", get_args(ObservationMode))
        self._check_choice("backend", get_args(Backend))
        if self.distraction is not None:
            self._check_choice("distraction", get_args(Distraction))
        if self.mission != "auto" and not isinstance(self.mission, bool):
            raise ValueError(f"mission={self.mission!r} of {self.id} is not one of auto, true, false")
        if type(self.frame_stack) is not int or self.frame_stack < 1:
            raise ValueError(f"frame_stack={self.frame_stack!r} of {self.id} is not a whole number of at least 1")
        if taken := self._names().intersection(self.kwargs):
            raise ValueError(f"{', '.join(sorted(taken))} of {self.id} cannot be among the environment's own keywords")
        str(self)

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            hint = nearest(str(value), choices)
            raise ValueError(f"{name}={value!r} of {self.id} does not exist.{hint} It is one of {', '.join(choices)}.")

    @property
    def is_minigrid(self) -> bool:
        """Whether the id is one of MiniGrid's or BabyAI's own."""
        return self.id.startswith(("MiniGrid-", "BabyAI-"))

    @property
    def task(self) -> EnvSpec:
        """What is observed and done, whatever steps it: MiniGrid and BabyAI are the same in every backend."""
        if self.backend == "python" or not self.is_minigrid:
            return self
        kwargs = {key: value for key, value in self.kwargs.items() if key != THREADS}
        return dataclasses.replace(self, backend="python", kwargs=kwargs)

    @classmethod
    def _names(cls) -> set[str]:
        return {f.name for f in dataclasses.fields(cls)}

    @classmethod
    def parse(cls, spec: str | Mapping[str, Any] | EnvSpec) -> EnvSpec:
        """Reads a spec from a string `"id:key=value"` or a mapping `{"id": ..., "key": ...}`.

        Raises:
            ValueError: Malformed text, no id, or a value that a field does not take.
        """
        if isinstance(spec, EnvSpec):
            return spec
        if isinstance(spec, str):
            name, given = split_spec(spec)
            if "id" in given:
                raise ValueError(f"the id of {spec!r} is what stands before the colon")
            given["id"] = name
        elif isinstance(spec, Mapping) and "id" in spec:
            given = dict(spec)
        else:
            raise ValueError(f"an environment is given as 'id:key=value' or a mapping with an 'id', not {spec!r}")
        kwargs = given.pop("kwargs", {})
        if not isinstance(kwargs, Mapping):
            raise ValueError(f"kwargs={kwargs!r} is not a mapping; in a string, write the keywords as options")
        fields = {key: given.pop(key) for key in cls._names() & given.keys()}
        return cls(**fields, kwargs={**kwargs, **given})

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values that `parse` reads back: `id` and whatever differs from the defaults."""
        fields = [f for f in dataclasses.fields(self) if f.name != "kwargs"]
        changed = {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}
        return changed | {key: _lists(value) for key, value in self.kwargs.items()}

    def __str__(self) -> str:
        """Returns the shortest string that `parse` reads back."""
        options = self.to_dict()
        return join_spec(options.pop("id"), options)
