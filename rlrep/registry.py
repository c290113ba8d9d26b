"""Names for methods: registries that discover one-file methods, and spec strings that configure them.

A spec is `"name"` or `"name:key=value,key=value"`, the same in Python, YAML, on the command line and in `config.json`.
The keys are the keyword arguments of the method's constructor: the signature is the configuration. A class outside this
package is named by its import path, `"my_pkg.my_file:MyObjective"`, options following a second colon.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar, cast

import numpy as np
from rlrep_envs.spec import join_spec, nearest, split_spec

from rlrep.types import RlrepError

__all__ = ["Registry", "SpecError", "join_spec", "nearest", "split_spec"]

C = TypeVar("C", bound=type)

PLAIN: dict[str, tuple[str, tuple[type, ...]]] = {
    "bool": ("true or false", (bool,)),
    "int": ("a whole number", (int,)),
    "float": ("a number", (int, float)),
    "str": ("text", (str,)),
    "Sequence": ("a list", (list, tuple)),
    "None": ("none", (type(None),)),
}
"""What an option takes, by its annotation: in words, and in Python."""


class SpecError(RlrepError, ValueError):
    """A spec names something that does not exist, or sets an option it does not have."""


def _takes(option: inspect.Parameter) -> list[str]:
    """Returns the parts of an annotation such as `int | None`, or nothing where one of them is not in `PLAIN`."""
    annotation = option.annotation
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    parts = [part.partition("[")[0].strip() for part in text.split("|")]
    return parts if all(part in PLAIN for part in parts) else []


def _suits(value: Any, parts: list[str]) -> bool:
    return any(isinstance(value, PLAIN[part][1]) and isinstance(value, bool) == (part == "bool") for part in parts)


class Registry(Generic[C]):
    """A table of the classes of one kind, filled by importing every module of a package.

    Args:
        kind: What the entries are, in the singular, for messages: `"encoder"`.
        package: The package whose modules register themselves when imported.
        given: Constructor arguments that rlrep passes itself, so that a spec may not.
        bases: What a class named by its import path is derived from; nothing else is built. A saved encoder names its
            class, and must not be able to name `subprocess:Popen`.
    """

    def __init__(self, kind: str, package: str, given: Iterable[str] = (), bases: tuple[type, ...] = (object,)) -> None:
        self.kind = kind
        self._bases = bases
        self._package = package
        self._given = {"self", *given}
        self._entries: dict[str, C] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[C], C]:
        """Returns a class decorator that files the class under `name`."""

        def add(cls: C) -> C:
            known = self._entries.get(name, cls)
            # The same class again is a module that was reloaded.
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"two {self.kind}s are called {name!r}: {known} and {cls}")
            self._entries[name] = cls
            cls.name = name  # type: ignore[attr-defined]
            return cls

        return add

    def names(self) -> list[str]:
        """Returns every registered name, sorted."""
        if not self._discovered:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            self._discovered = True
        return sorted(self._entries)

    def items(self) -> list[tuple[str, C]]:
        """Returns (name, class) pairs, sorted by name."""
        return [(name, self._entries[name]) for name in self.names()]

    def get(self, name: str) -> C:
        """Returns the class called `name`, or the one at an import path `"module:Class"`.

        Raises:
            SpecError: No such name; the message lists the valid ones and the nearest.
        """
        if name in self.names():
            return self._entries[name]
        if ":" in name:
            return self._import(name)
        raise SpecError(
            f"there is no {self.kind} called {name!r}.{nearest(name, self.names())} "
            f"The {self.kind}s are: {', '.join(self.names())}."
        )

    def _import(self, name: str) -> C:
        module, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise SpecError(f"{self.kind} {name!r} cannot be imported: {error}") from error
        if not isinstance(found, type):
            raise SpecError(f"{self.kind} {name!r} is not a class, but {found!r}")
        if not issubclass(found, self._bases):
            names = " or ".join(base.__name__ for base in self._bases)
            raise SpecError(f"{self.kind} {name!r} is a class of something else; derive it from {names}")
        # The name is what is saved, and must find the class again in a process that has not imported its module.
        if not found.__module__.startswith(f"{self._package}."):
            found.name = name  # type: ignore[attr-defined]
        return cast(C, found)

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """Returns the keyword options that a spec of `name` may set, with their defaults."""
        parameters: dict[str, inspect.Parameter] = {}
        for cls in reversed(self.get(name).__mro__[:-1]):
            if "__init__" in vars(cls):
                own = inspect.signature(vars(cls)["__init__"]).parameters
                # A constructor without **kwargs states all its options; one with passes the rest to its base.
                if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
                    parameters = {}
                parameters |= own
        variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        return {k: p for k, p in parameters.items() if k not in self._given and p.kind not in variadic}

    def signature(self, name: str) -> list[str]:
        """Returns the options as text, `"lag=3"`, or only the key of one that has no default."""
        options = self.options(name).items()
        return [key if p.default is p.empty else f"{key}={p.default}" for key, p in options]

    def parse(self, spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Splits a spec into its name and options, both checked.

        Args:
            spec: `"atc:lag=3"`, or the same as a mapping `{"name": "atc", "lag": 3}`.

        Raises:
            SpecError: Unknown name or option, or a value that the option's annotation does not allow.
        """
        if isinstance(spec, str):
            try:
                name, options = split_spec(spec)
            except ValueError as error:
                raise SpecError(f"{self.kind} spec {spec!r}: {error}") from error
        elif isinstance(spec, Mapping) and isinstance(spec.get("name"), str):
            name, options = spec["name"], {k: v for k, v in spec.items() if k != "name"}
        else:
            raise SpecError(f"a {self.kind} spec is a string 'name:key=value' or a mapping with a 'name', not {spec!r}")
        valid = self.options(name)
        for key, value in options.items():
            if key not in valid:
                listing = ", ".join(self.signature(name)) or "none"
                raise SpecError(
                    f"{self.kind} {name!r} has no option {key!r}.{nearest(str(key), valid)} Its options: {listing}."
                )
            if isinstance(value, np.generic):
                options[key] = value = value.item()
            if (parts := _takes(valid[key])) and not _suits(value, parts):
                words = " or ".join(PLAIN[part][0] for part in parts)
                raise SpecError(f"option {key!r} of {self.kind} {name!r} is {words}, not {value!r}")
        return name, options

    def build(self, spec: str | Mapping[str, Any], *args: Any, **given: Any) -> Any:
        """Builds what `spec` describes, passing `args` and `given` beside its options."""
        name, options = self.parse(spec)
        return self.get(name)(*args, **given, **options)
