"""Names for methods: registries that discover one-file methods, and spec strings that configure them.

A spec is `"name"` or `"name:key=value,key=value"`, the same in Python, YAML, on the command line and in `config.json`.
The keys are the keyword arguments of the method's constructor: the signature is the configuration. A class outside this
package is named by its import path, `"my_pkg.my_file:MyObjective"`, options following a second colon.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from rlrep_envs.spec import join_spec, split_spec

from rlrep.types import RlrepError

__all__ = ["Registry", "SpecError", "join_spec", "nearest", "split_spec"]

C = TypeVar("C", bound=type)


class SpecError(RlrepError, ValueError):
    """A spec names something that does not exist, or sets an option it does not have."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns `" Did you mean 'x'?"` for the closest valid name, or an empty string."""
    match = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


class Registry(Generic[C]):
    """A table of the classes of one kind, filled by importing every module of a package.

    Args:
        kind: What the entries are, in the singular, for messages: `"encoder"`.
        package: The package whose modules register themselves when imported.
        given: Constructor arguments that rlrep passes itself, so that a spec may not.
    """

    def __init__(self, kind: str, package: str, given: Iterable[str] = ()) -> None:
        self.kind = kind
        self._package = package
        self._given = {"self", *given}
        self._entries: dict[str, C] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[C], C]:
        """Returns a class decorator that files the class under `name`."""

        def add(cls: C) -> C:
            if name in self._entries and self._entries[name].__qualname__ != cls.__qualname__:
                raise ValueError(f"two {self.kind}s are called {name!r}: {self._entries[name]} and {cls}")
            self._entries[name] = cls
            cls.name = name  # type: ignore[attr-defined]
            return cls

        return add

    def names(self) -> list[str]:
        """Returns every registered name, sorted."""
        if not self._discovered:
            self._discovered = True
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
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
            module, _, attribute = name.partition(":")
            try:
                cls: C = getattr(importlib.import_module(module), attribute)
            except (ImportError, AttributeError) as error:
                raise SpecError(f"{self.kind} {name!r} cannot be imported: {error}") from error
            if "name" not in vars(cls):
                cls.name = name  # type: ignore[attr-defined]
            return cls
        raise SpecError(
            f"there is no {self.kind} called {name!r}.{nearest(name, self.names())} "
            f"The {self.kind}s are: {', '.join(self.names())}."
        )

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

    def parse(self, spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Splits a spec into its name and options, both checked.

        Args:
            spec: `"atc:lag=3"`, or the same as a mapping `{"name": "atc", "lag": 3}`.

        Raises:
            SpecError: Unknown name or option.
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
        for key in options:
            if key not in valid:
                listing = ", ".join(f"{k}={p.default}" for k, p in valid.items()) or "none"
                raise SpecError(
                    f"{self.kind} {name!r} has no option {key!r}.{nearest(key, valid)} Its options: {listing}."
                )
        return name, options

    def build(self, spec: str | Mapping[str, Any], *args: Any, **given: Any) -> Any:
        """Builds what `spec` describes, passing `args` and `given` beside its options."""
        name, options = self.parse(spec)
        return self.get(name)(*args, **given, **options)
