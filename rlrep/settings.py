"""Settings, stated once: a function's signature becomes a dataclass, a section of YAML and a command line.

`settings_of(collect)` turns the keywords of `collect`, their types, defaults and documentation into a dataclass.
`load_yaml` fills dataclasses from a file, or says where it is wrong; `tyro.cli(cls, default=loaded)` overrides it.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import operator
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import docstring_parser
import tyro
import yaml

from rlrep.registry import nearest
from rlrep.types import RlrepError

T = TypeVar("T")

# Types made at run time, which type checkers do not take in brackets.
_subscript: Callable[[Any, Any], Any] = operator.getitem

TAG = "tag:yaml.org,2002:"
DIGITS = r"[0-9](?:_?[0-9])*"


class SettingsError(RlrepError, ValueError):
    """A settings file, or a value on the command line, is not what the program takes."""


class _Loader(yaml.SafeLoader):
    """YAML whose bare words mean what a Python user expects: `1e-4` is a number, `off` and `2024-01-01` are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (as the base class declares it)


class _Dumper(yaml.SafeDumper):
    """Quotes the text that `_Loader` would take for something else."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (as the base class declares it)

    def ignore_aliases(self, data: Any) -> bool:
        """Writes a value that occurs twice in full, twice."""
        return True


for _yaml in (_Loader, _Dumper):
    for _kind_name, _pattern, _first in (
        ("null", r"~|null|None|", [*"~nN", ""]),
        ("bool", r"[tT]rue|[fF]alse", [*"tTfF"]),
        ("int", rf"[-+]?(?:0|(?!0){DIGITS})", [*"-+0123456789"]),
        ("float", rf"[-+]?(?:{DIGITS}(?:\.(?:{DIGITS})?)?|\.{DIGITS})[eE][-+]?[0-9]+", [*"-+.0123456789"]),
        ("float", rf"[-+]?(?:{DIGITS}\.(?:{DIGITS})?|\.{DIGITS}|\.inf)|\.nan", [*"-+.0123456789"]),
    ):
        _yaml.add_implicit_resolver(TAG + _kind_name, re.compile(f"(?:{_pattern})$"), _first)

_PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": lambda text: float(text.replace(".inf", "inf").replace(".nan", "nan")),
    "bool": lambda text: text.lower() == "true",
    "null": lambda text: None,
}
_SCALARS: dict[Any, tuple[str, set[str]]] = {
    str: ("text", {"str"}),
    Path: ("a path", {"str"}),
    int: ("a whole number", {"int"}),
    float: ("a number", {"int", "float"}),
    bool: ("true or false", {"bool"}),
    type(None): ("null", {"null"}),
}
"""What a type is called in messages, and the kinds of YAML scalar that are one."""


def load_yaml(cls: type[T], path: str | Path) -> T:
    """Reads a YAML file into the dataclass `cls`, and its sections into the dataclasses they are declared as.

    Raises:
        SettingsError: The file is missing or is not YAML, has a key that `cls` has not, lacks one that `cls` needs, or
            has a value of another type. The message names the file, the line and the nearest key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    return _Reader(str(path)).parse(text, cls)


def dump_yaml(instance: Any) -> str:
    """Returns a dataclass as YAML that `load_yaml` reads back into an equal one."""
    return yaml.dump(_plain(instance), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def read_value(text: str) -> Any:
    """Returns a plain value from YAML, read as in a settings file.

    Raises:
        SettingsError: It is not YAML.
    """
    return _Reader(None).parse(text, Any)


def changed(instance: T, values: Mapping[str, Any]) -> T:
    """Returns a dataclass with other values under dotted keys, such as `"pretrain.updates"`, checked as in a file.

    Raises:
        SettingsError: There is no such key, or a value has another type than it takes.
    """
    plain = _plain(instance)
    for key, value in values.items():
        *sections, name = key.split(".")
        section = plain
        for each in sections:
            section = section.setdefault(each, {})
        section[name] = _plain(value)
    text = yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return _Reader(None).parse(text, type(instance))


def settings_of(
    function: Callable[..., Any],
    omit: Collection[str] = (),
    name: str | None = None,
    defaults: Mapping[str, Any] = types.MappingProxyType({}),
) -> type[Any]:
    """Makes a frozen dataclass of a function's parameters, so that `function(**vars(settings))` calls it.

    Types, defaults and the help shown on the command line come from the signature and from the Args of its Google
    docstring. Alternatives that YAML cannot write are left out, so `Dataset | str | Path` becomes `str | Path`, and a
    `Sequence` becomes a tuple. On the command line a parameter that may be a mapping is written as YAML.

    Args:
        function: Its docstring's first line documents the dataclass.
        omit: Parameters that the caller passes itself.
        name: Of the dataclass; the function's in CamelCase if not given.
        defaults: Instead of the function's own.

    Raises:
        TypeError: A parameter's type has nothing that YAML can write; it belongs in `omit`. Or there is no such one.
    """
    parameters = inspect.signature(function).parameters
    if strangers := sorted({*omit, *defaults} - set(parameters)):
        raise TypeError(f"{function.__qualname__} has no parameter {strangers[0]!r}")
    documentation = docstring_parser.parse(function.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)
    helps = {entry.arg_name: " ".join((entry.description or "").split()) for entry in documentation.params}
    hints = typing.get_type_hints(function, include_extras=True)
    fields = []
    for key, parameter in parameters.items():
        if key in omit or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        hint = _writable(hints.get(key, Any))
        if hint is None:
            raise TypeError(f"{function.__qualname__}({key}) is {hints[key]}, which YAML cannot write; omit it")
        marks = [tyro.conf.arg(help=helps.get(key)), *([_yaml_argument(hint)] if _is_free_form(hint) else [])]
        if key in defaults:
            parameter = parameter.replace(default=defaults[key])
        fields.append((key, _subscript(Annotated, (hint, *marks)), _field(parameter)))
    cls = dataclasses.make_dataclass(
        name or "".join(word.capitalize() for word in function.__name__.split("_")), fields, frozen=True, kw_only=True
    )
    cls.__module__ = function.__module__
    cls.__doc__ = documentation.short_description
    return cls


def _field(parameter: inspect.Parameter) -> Any:
    default = parameter.default
    if default is parameter.empty:
        return dataclasses.field()
    if isinstance(default, (list, dict, set)):
        return dataclasses.field(default_factory=lambda: type(default)(default))
    return dataclasses.field(default=default)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Turns nodes of YAML, which know their lines, into values of declared types."""

    path: str | None
    """The file, or None for an argument of the command line."""

    def error(self, mark: yaml.Mark | None, message: str) -> SettingsError:
        """Returns an error that says where `mark` is."""
        line = "" if mark is None else f", line {mark.line + 1}"
        return SettingsError(f"{self.path}{line}: {message}" if self.path else message)

    def parse(self, text: str, hint: Any) -> Any:
        """Returns the one document in `text` as a `hint`."""
        try:
            node = yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            problem = ", ".join(part for part in (error.context, error.problem) if part)
            raise self.error(error.problem_mark or error.context_mark, f"this is not YAML: {problem}") from error
        except yaml.YAMLError as error:
            raise self.error(None, f"this is not YAML: {error}") from error
        if node is None:
            start = yaml.Mark("", 0, 0, 0, None, 0)
            node = yaml.ScalarNode(f"{TAG}null", "", start, start)
        return self.read(node, hint, "")

    def read(self, node: yaml.Node, hint: Any, where: str) -> Any:
        """Returns the value of `node` as a `hint`; `where` is the dotted path of keys that leads to it."""
        alternatives = [each for each in _alternatives(hint) if _fits(node, each)]
        for alternative in alternatives:
            try:
                return self.read_as(node, alternative, where)
            except SettingsError:
                # With one way to read it, the error is about something inside, and says more.
                if len(alternatives) == 1 and get_origin(alternative) is not Literal:
                    raise
        choices = [
            str(choice) for each in _alternatives(hint) if get_origin(each) is Literal for choice in get_args(each)
        ]
        advice = nearest(node.value, choices) if isinstance(node, yaml.ScalarNode) else ""
        if isinstance(node, yaml.ScalarNode) and node.value and str in _alternatives(hint):
            advice = f' If the text is meant, quote it: "{node.value}".'
        raise self.error(node.start_mark, f"{self.name(where)} must be {_describe(hint)}, not {_seen(node)}.{advice}")

    def read_as(self, node: yaml.Node, hint: Any, where: str) -> Any:
        """Returns the value of `node` as a `hint` that is no union and that `_fits` it."""
        origin, args = get_origin(hint) or hint, get_args(hint)
        if dataclasses.is_dataclass(hint):
            return self.read_section(node, hint, where)
        if isinstance(node, yaml.MappingNode):
            of_key, of_value = args or (Any, Any)
            return {
                self.read(key, of_key, f"a key of {self.name(where)}"): self.read(value, of_value, _join(where, key))
                for key, value in self.entries(node, where)
            }
        if isinstance(node, yaml.SequenceNode):
            fixed = origin is tuple and args and args[-1] is not ...
            if fixed and len(args) != len(node.value):
                raise self.error(
                    node.start_mark, f"{self.name(where)} must be {_describe(hint)}, not {len(node.value)} values"
                )
            of_items = args if fixed else (*args[:1], Any)[:1] * len(node.value)
            items = [
                self.read(item, of_item, f"{where}[{i}]")
                for i, (item, of_item) in enumerate(zip(node.value, of_items, strict=True))
            ]
            return items if origin in (list, Any) else tuple(items)
        try:
            value = _PARSERS[_kind(node)](node.value)
        except (KeyError, ValueError) as error:
            message = f"{self.name(where)} has the YAML tag {node.tag}; write the plain value"
            raise self.error(node.start_mark, message) from error
        if origin is Literal and not any(value == choice and type(value) is type(choice) for choice in args):
            raise self.error(node.start_mark, f"{self.name(where)} must be {_describe(hint)}")
        return hint(value) if hint in (float, Path) else value

    def read_section(self, node: yaml.Node, cls: Any, where: str) -> Any:
        """Returns a dataclass from a mapping of its fields, or from nothing if they all have defaults."""
        hints = typing.get_type_hints(cls, include_extras=True)
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        values: dict[str, Any] = {}
        for key, value in self.entries(node, where) if isinstance(node, yaml.MappingNode) else []:
            if key.value not in fields:
                of, near = f" in {where}" if where else "", nearest(key.value, fields)
                raise self.error(key.start_mark, f"unknown key {key.value!r}{of}.{near} Keys: {', '.join(fields)}.")
            values[key.value] = self.read(value, hints[key.value], _join(where, key))
        for name, field in fields.items():
            if name not in values and field.default is field.default_factory is dataclasses.MISSING:
                raise self.error(
                    node.start_mark, f"{self.name(where)} needs the key {name!r}, {_describe(hints[name])}"
                )
        try:
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise self.error(node.start_mark, f"{self.name(where)}: {error}") from error

    def entries(self, node: yaml.MappingNode, where: str) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
        """Returns the pairs of a mapping, whose keys are scalars and differ."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.error(key.start_mark, f"a key of {self.name(where)} must be a word, not {_seen(key)}")
            if key.value in lines:
                first = f", first in line {lines[key.value]}" if self.path else ""
                raise self.error(key.start_mark, f"{_join(where, key)!r} is set twice{first}")
            lines[key.value] = key.start_mark.line + 1
        return node.value

    def name(self, where: str) -> str:
        """Returns what the message calls a value."""
        return where or ("the file" if self.path else "the value")


def _kind(node: yaml.Node) -> str:
    return node.tag.removeprefix(TAG)


def _seen(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return f"the text {node.value!r}" if _kind(node) == "str" else node.value or "nothing"


def _join(where: str, key: yaml.ScalarNode) -> str:
    return f"{where}.{key.value}" if where else key.value


def _alternatives(hint: Any) -> list[Any]:
    """Returns what a union is of, whole numbers first so that 3 stays one in `float | int`."""
    if get_origin(hint) is Annotated:
        return _alternatives(get_args(hint)[0])
    if get_origin(hint) not in (Union, types.UnionType):
        return [hint]
    flat = [each for member in get_args(hint) for each in _alternatives(member)]
    return sorted(flat, key=lambda each: each is not int)


def _fits(node: yaml.Node, hint: Any) -> bool:
    """Whether a value of this type may be written as this kind of node."""
    origin = get_origin(hint) or hint
    if origin is Any:
        return True
    if dataclasses.is_dataclass(hint):
        # A section with nothing under its name has its defaults.
        return isinstance(node, yaml.MappingNode) or _kind(node) == "null"
    if isinstance(node, yaml.MappingNode):
        return origin in (dict, collections.abc.Mapping)
    if isinstance(node, yaml.SequenceNode):
        return origin in (list, tuple, collections.abc.Sequence)
    return origin is Literal or _kind(node) in _SCALARS.get(origin, ("", set()))[1]


def _describe(hint: Any) -> str:
    if len(alternatives := _alternatives(hint)) > 1:
        return " or ".join(_describe(each) for each in alternatives)
    hint = alternatives[0]
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(str(choice) for choice in args)}"
    if dataclasses.is_dataclass(hint):
        return f"a mapping with the keys {', '.join(field.name for field in dataclasses.fields(hint))}"
    if origin in (dict, collections.abc.Mapping):
        return "a mapping"
    if origin is tuple and args and args[-1] is not ...:
        return f"a list of {len(args)} values ({', '.join(_describe(each) for each in args)})"
    if origin in (list, tuple, collections.abc.Sequence):
        return f"a list of ({_describe(args[0])})" if args else "a list"
    return _SCALARS[origin][0] if origin in _SCALARS else "any value"


def _writable(hint: Any) -> Any:
    """Returns `hint` with only the alternatives that YAML can write, or None if it can write none."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        inner = _writable(args[0])
        return None if inner is None else _subscript(Annotated, (inner, *hint.__metadata__))
    if origin in (Union, types.UnionType):
        members = tuple(member for member in map(_writable, args) if member is not None)
        return _subscript(Union, members) if set(members) - {type(None)} else None
    if origin is Literal or hint is Any or hint in _SCALARS or dataclasses.is_dataclass(hint):
        return hint
    of = tuple(arg if arg is ... else _writable(arg) for arg in args)
    if None in of:
        return None
    if (origin or hint) in (dict, collections.abc.Mapping):
        return _subscript(dict, of or (str, Any))
    if (origin or hint) in (list, tuple):
        return _subscript(origin, of) if of else hint
    return _subscript(tuple, (*(of or (Any,)), ...)) if (origin or hint) is collections.abc.Sequence else None


def _is_free_form(hint: Any) -> bool:
    """Whether a mapping, or anything at all, may stand somewhere in it: a command line has no flags for that."""
    return any(
        (get_origin(each) or each) in (dict, Any) or each in (list, tuple) or any(map(_is_free_form, get_args(each)))
        for each in _alternatives(hint)
        if get_origin(each) is not Literal
    )


def _yaml_argument(hint: Any) -> tyro.constructors.PrimitiveConstructorSpec[Any]:
    """Returns how tyro reads a `hint` from a command line: YAML, checked as in a file; a list is several arguments."""
    reader, alternatives = _Reader(None), _alternatives(hint)
    lists = [each for each in alternatives if get_origin(each) is list or get_args(each)[1:] == (...,)]
    item_hint = get_args(lists[0])[0] if lists else hint

    def read(arguments: list[str]) -> Any:
        if not lists or (arguments == ["None"] and type(None) in alternatives):
            return reader.parse(arguments[0], hint)
        items = [reader.parse(argument, item_hint) for argument in arguments]
        return items if get_origin(lists[0]) is list else tuple(items)

    def write(value: Any) -> list[str]:
        return [_one_line(item) for item in (value if lists and isinstance(value, (list, tuple)) else [value])]

    word = "SPEC" if str in _alternatives(item_hint) else "YAML"
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*" if lists else 1,
        metavar=f"[{word} [{word} ...]]" if lists else word,
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=write,
    )


def _one_line(value: Any) -> str:
    line = yaml.dump(_plain(value), Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=10_000)
    return "None" if value is None else line.removesuffix("...\n").strip()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
