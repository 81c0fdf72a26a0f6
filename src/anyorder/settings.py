"""Settings: dataclasses filled from YAML files, stored JSON and `key=value` texts.

A *setting* is a leaf of nested dataclasses, named by its dotted key (`train.learning_rate`). Pydantic checks
each value by the annotation of its field. A text means what its field says: `1e-3` is a number for a float, a
text for a str, so that class names such as `010`, `yes`, `null` or `1:30` stay what they are.

A dataclass says how older versions called its fields, see `read_stored`:

    renamed: ClassVar[dict[str, str]] = {"spread": "min_distance", "order=own": "order=per_image"}
    removed: ClassVar[dict[str, Any]] = {"full_every": 0}
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import re
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

Config = TypeVar("Config")
LARGEST_YAML, MOST_VALUES = 1 << 20, 100_000
"""Limits of a YAML file: bytes, and values after its aliases are expanded."""


class Setting(NamedTuple):
    """One leaf of a configuration; its default is `dataclasses.MISSING` if it is required."""

    hint: Any
    default: Any
    doc: str


def parse(
    config_class: type[Config], values: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Build a configuration from nested values and overrides; the later one wins, defaults fill the rest.

    Args:
        config_class: dataclass whose fields are bools, numbers, strings, paths, `Literal`s, tuples, lists
            and dicts of these, any of them `| None`, or dataclasses again.
        values: nested mapping, as `load_yaml` returns it; dotted keys are understood too.
        overrides: texts like `train.steps=100`, `size=[32,32]`, `size=32,32`, `bf16=false`, `ema=null`.

    Raises:
        ValueError: unknown key (with the closest known ones), bad value (with the type expected), missing
            required setting, or whatever a `__post_init__` refuses, prefixed with its group.
    """
    settings = _settings(config_class)
    texts = dict(_split(text) for text in overrides)
    given = _flatten(values or {}, settings)
    _refuse_unknown([*given, *texts], settings, dict(_old_names(config_class)))
    for key, text in texts.items():
        none = _optional(settings[key].hint) and text in ("null", "None", "none", "~")
        given[key] = None if none else text
    return _build(config_class, {key: _convert(key, settings[key].hint, v) for key, v in given.items()})


def read_stored(config_class: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """What an older version stored, under today's names; for `parse` or the constructor.

    `renamed` of a dataclass maps old names (or `name=value`) to new ones; `removed` maps names that are gone
    to the value that changed nothing.

    Raises:
        ValueError: a removed setting had another value.
    """
    found = dict(values)
    for name, neutral in getattr(config_class, "removed", {}).items():
        if (got := found.pop(name, neutral)) != neutral:
            raise ValueError(f"{name}={got!r} cannot be read: the setting no longer exists")
    for old, new in getattr(config_class, "renamed", {}).items():
        (name, _, value), (new_name, _, new_value) = old.partition("="), new.partition("=")
        if name in found and (not value or found[name] == value):
            stored = found.pop(name)
            found[new_name] = new_value or stored
    for name, group, *_ in _fields(config_class):
        if group and isinstance(found.get(name), Mapping):
            found[name] = read_stored(group, found[name])
    return found


def as_overrides(arguments: Iterable[str], flags: Sequence[str] = ()) -> list[str]:
    """Arguments with `--key value` and `--key=value` as `key=value`; `flags` have no value and stay.

    Raises:
        ValueError: an option without a value.
    """
    found, rest = [], iter(arguments)
    for argument in rest:
        if argument.startswith("--") and argument not in flags:
            key, equals, value = argument[2:].partition("=")
            value = value if equals else next(rest, "--")
            if not equals and value.startswith("--"):
                raise ValueError(f"unknown option {argument}, or its value is missing: {argument} VALUE")
            argument = f"{key.replace('-', '_')}={value}"
        found.append(argument)
    return found


def describe(config_class: type) -> str:
    """Help text: every setting as `key=default  (type)`, with its documentation below."""
    lines = []
    for key, (hint, default, doc) in _settings(config_class).items():
        required = default is MISSING
        value = "..." if required else json.dumps(default, default=str)
        lines.append(f"{key}={value}  ({_name(hint)}{', required' if required else ''})")
        lines += textwrap.wrap(doc, 100, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """The tail of an error message: the allowed name closest to an unknown one, or nothing."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f", did you mean '{close[0]}'?" if close else ""


# --- YAML -----------------------------------------------------------------------------------------------


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping; an empty file is an empty mapping.

    Scalars stay texts, except `true`, `false`, `null` and integers that YAML itself would write so.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, not a mapping, too large, or a key that is given twice; the message says where.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    if path.stat().st_size > LARGEST_YAML:
        raise ValueError(f"{path} is larger than {LARGEST_YAML >> 20} MiB: that is no configuration")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader: plain values only
    except RecursionError:
        raise ValueError(f"{path} is not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from e
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping (key: value), got {type(values).__name__}")
    return values or {}


class _Loader(yaml.SafeLoader):
    """Refuses equal keys and alias bombs; what YAML would write differently (010, yes, 1.10) stays text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(f"tag:yaml.org,2002:{tag}", re.compile(pattern))]
        for tag, pattern, firsts in (
            ("bool", "(true|false)$", "tf"),
            ("null", "(null|~|)$", ["n", "~", ""]),
            ("int", "(0|-?[1-9][0-9]{0,17})$", "-0123456789"),
            ("merge", "<<$", "<"),
        )
        for first in firsts
    }

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _size(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"more than {MOST_VALUES} values, with its aliases expanded")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if (name := str(key.value)) in seen:
                raise yaml.MarkedYAMLError(None, None, f"key '{name}' is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values in a node, an alias counted as often as it is used."""
    if id(node) not in known:
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        nodes = itertools.chain(*parts) if isinstance(node, yaml.MappingNode) else parts
        known[id(node)] = 1 + sum(_size(part, known) for part in nodes)
    return known[id(node)]


# --- what a configuration class asks for ----------------------------------------------------------------


def _fields(config_class: type, base: Any = None) -> Iterator[tuple[str, type | None, Any, Any]]:
    """Name, nested dataclass, annotation and default (that of the instance `base`) of each field."""
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        inner = _required(hints[field.name])
        yield (
            field.name,
            inner if isinstance(inner, type) and dataclasses.is_dataclass(inner) else None,
            hints[field.name],
            default if base is None else getattr(base, field.name),
        )


def _settings(config_class: type, prefix: str = "", base: Any = None) -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    for name, group, hint, default in _fields(config_class, base):
        if group:
            settings |= _settings(group, f"{prefix}{name}.", None if default is MISSING else default)
        else:
            settings[prefix + name] = Setting(hint, default, _docs(config_class).get(name, ""))
    return settings


def _old_names(config_class: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names of older versions and those of today, empty where there is none."""
    removed = dict.fromkeys(getattr(config_class, "removed", ()), "")
    for old, new in (getattr(config_class, "renamed", {}) | removed).items():
        yield prefix + old, new and prefix + new
    for name, group, *_ in _fields(config_class):
        if group:
            yield from _old_names(group, f"{prefix}{name}.")


@functools.cache
def _docs(config_class: type) -> dict[str, str]:
    """The strings below the fields of a class and its bases (Python keeps them in the source only)."""
    docs = {}
    for cls in filter(dataclasses.is_dataclass, reversed(config_class.__mro__)):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in itertools.pairwise(definition.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    docs[name] = doc
    return docs


def _optional(hint: Any) -> bool:
    return type(None) in get_args(hint)


def _required(hint: Any) -> Any:
    """`X` of `X | None`."""
    args = tuple(arg for arg in get_args(hint) if arg is not type(None))
    return Union[args] if _optional(hint) else hint  # noqa: UP007


def _name(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(map(repr, args))
    names = ["null" if arg is type(None) else "..." if arg is ... else _name(arg) for arg in args]
    if origin in (Union, types.UnionType):
        return " | ".join(names)
    return f"{origin.__name__}[{', '.join(names)}]" if origin else getattr(hint, "__name__", str(hint))


# --- what a user gives ----------------------------------------------------------------------------------


def _flatten(values: Mapping[str, Any], settings: Mapping[str, Setting], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and key not in settings:
            flat |= _flatten(value, settings, f"{key}.")
        elif value in (None, {}) and any(known.startswith(f"{key}.") for known in settings):
            continue  # a group whose lines are all commented out
        else:
            flat[key] = value
    return flat


def _split(override: str) -> tuple[str, str]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"got override '{override}', expected key=value, for example train.steps=100")
    return key.strip(), text


def _refuse_unknown(keys: Sequence[str], settings: Mapping[str, Setting], old: Mapping[str, str]) -> None:
    problems = []
    for key in (key for key in keys if key not in settings):
        close = [known for known in settings if known.startswith(f"{key}.") or known.endswith(f".{key}")][:3]
        close = close or difflib.get_close_matches(key, settings)
        if key in old:
            now = f"is now called '{old[key]}'" if old[key] else "no longer exists: leave it out"
            problems.append(f"setting '{key}' {now}")
        elif close:
            problems.append(f"unknown setting '{key}', did you mean {' or '.join(close)}?")
        else:
            problems.append(f"unknown setting '{key}'; allowed: {', '.join(settings)}")
    if problems:
        raise ValueError("; ".join(problems))


def _convert(key: str, hint: Any, value: Any) -> Any:
    """A value as an instance of `hint`.

    Raises:
        ValueError: it is none; the message names key, value and type.
    """
    if value is None and _optional(hint):
        return None
    got = value if isinstance(value, str) and len(value) > 90 else repr(value)
    if len(got) > 90:
        got = f"{got[:90]}..."
    kind = _required(hint)
    try:
        if isinstance(value, str) and get_origin(kind) in (tuple, list, dict):
            value = _items(value, get_origin(kind) is dict)
        if value is not None:
            return _adapter(kind).validate_python(value)
    except (yaml.YAMLError, csv.Error, RecursionError):
        raise ValueError(f"{key}={got}: expected {_name(hint)}, got malformed YAML") from None
    except ValueError:  # pydantic's message has several lines
        pass
    raise ValueError(f"{key}={got}: expected {_name(hint)}")


def _items(text: str, mapping: bool) -> Any:
    """The texts in a text: `a, b`, `[a, b]`, `a: b` or `{a: b}`."""
    if text.startswith(("[", "{")):
        return yaml.load(text, yaml.BaseLoader)
    if mapping:
        return yaml.load(f"{{{text}}}", yaml.BaseLoader)
    return [item.strip() for item in next(csv.reader([text], skipinitialspace=True), [])]


@functools.cache
def _adapter(hint: Any) -> Any:
    from pydantic import TypeAdapter  # 90 ms, which a mere `import anyorder` should not cost

    return TypeAdapter(_checked(hint))


def _checked(hint: Any) -> Any:
    """The annotation, with values prepared for pydantic by `_prepared`."""
    from pydantic import BeforeValidator

    if get_origin(hint) not in (None, Literal):
        return get_origin(hint)[tuple(arg if arg is ... else _checked(arg) for arg in get_args(hint))]
    return Annotated[hint, BeforeValidator(functools.partial(_prepared, hint))]


def _prepared(hint: Any, value: Any) -> Any:
    """What pydantic should see: it takes True for 1, no number for a text and no text for `Literal[1]`."""
    if hasattr(value, "tolist"):  # of NumPy
        value = value.tolist()
    if hint is str and isinstance(value, bool | int | float | None):
        return json.dumps(value)
    if hint is Path and isinstance(value, str | Path):
        return Path(value).expanduser()
    if get_origin(hint) is Literal:
        return {str(arg): arg for arg in get_args(hint)}.get(str(value))
    if isinstance(value, bool) != (hint is bool) and not isinstance(value, str):
        raise ValueError
    if str(value).strip().lower() in ("nan", "+nan", "-nan") and hint is float:
        raise ValueError
    return value


def _build(
    config_class: type[Config], values: Mapping[str, Any], prefix: str = "", base: Any = None
) -> Config:
    """An instance of `config_class` from converted settings, starting at `base` if there is one."""
    changes: dict[str, Any] = {}
    for name, group, hint, default in _fields(config_class, base):
        key = prefix + name
        if group:
            if default is not None or any(known.startswith(f"{key}.") for known in values):
                start = None if default is MISSING else default
                changes[name] = _build(group, values, f"{key}.", start)
        elif key in values:
            changes[name] = values[key]
        elif default is MISSING:
            raise ValueError(f"setting '{key}' ({_name(hint)}) is required: add {key}=...")
    try:
        return config_class(**changes) if base is None else dataclasses.replace(base, **changes)
    except ValueError as e:
        raise ValueError(f"{prefix.rstrip('.')}: {e}" if prefix else str(e)) from e
