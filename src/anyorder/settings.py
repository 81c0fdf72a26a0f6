"""Settings: dataclasses filled from YAML files, stored JSON and `key=value` texts.

A *setting* is a leaf of nested dataclasses, named by its dotted key (`train.learning_rate`). Pydantic checks
each value by the annotation of its field. A text means what its field says: `1e-3` is a number for a float, a
text for a str, so that class names such as `010`, `yes`, `null` or `1:30` stay what they are.
"""

import ast
import csv
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import os
import re
import textwrap
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import yaml

Config = TypeVar("Config")
COMMON = [["steps"], ["batch_size"], ["learning_rate"], ["patience"], ["depth"], ["width"], ["order"]]
"""Settings of groups that a first look at the help shows."""


def parse(
    config_class: type[Config], values: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Build a configuration from nested values and overrides; the later one wins, defaults fill the rest.

    Args:
        config_class: dataclass of bools, numbers, strings, paths, `Literal`s, tuples, lists and dicts of
            these, any of them `| None`, or dataclasses again.
        values: nested mapping; dotted keys are understood too.
        overrides: texts like `train.steps=100`, `size=[32,32]`, `size=32,32`, `bf16=false`, `ema=null`.

    Raises:
        ValueError: unknown key, bad value, missing setting, or what a `__post_init__` refuses; it says where.
    """
    settings = _settings(config_class)
    given, texts = flatten(values or {}, settings), dict(map(_split, overrides))
    _refuse_unknown([*given, *texts], settings, dict(_old_names(config_class)))
    for key, text in texts.items():
        none = _optional(settings[key].hint) and text in ("null", "None", "none", "~")
        given[key] = None if none else text
    return _build(config_class, {key: _convert(key, settings[key].hint, v) for key, v in given.items()})


def parse_stored(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """The configuration that this or an older version stored; errors as of `parse` and `read_stored`."""
    return parse(config_class, read_stored(config_class, values))


def read_stored(config_class: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """What an older version stored, under today's names; for `parse` or the constructor.

    A dataclass says how its fields were called (or `name=value`), and which value of one that is gone changed
    nothing:

        renamed: ClassVar[dict[str, str]] = {"spread": "min_distance", "order=own": "order=per_image"}
                                                # "order=own": "order=" for null
        removed: ClassVar[dict[str, Any]] = {"full_every": 0}

    Raises:
        ValueError: a removed setting had another value.
    """
    found = dict(values)
    for name, neutral in getattr(config_class, "removed", {}).items():
        if (got := found.pop(name, neutral)) != neutral:
            raise ValueError(f"{name}={got!r} cannot be read: the setting no longer exists")
    for old, new in getattr(config_class, "renamed", {}).items():
        (name, _, value), (new_name, equals, new_value) = old.partition("="), new.partition("=")
        if name in found and (not value or found[name] == value):
            stored = found.pop(name)
            found[new_name] = (new_value or None) if equals else stored
    for field in _fields(config_class):
        if field.group and isinstance(found.get(field.name), Mapping):
            found[field.name] = read_stored(field.group, found[field.name])
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
            if not equals and (close := difflib.get_close_matches(argument, flags, 1, 0.85)):
                raise ValueError(f"unknown option {argument}, did you mean {close[0]}?")
            value = value if equals else next(rest, "--")
            if not equals and value.startswith("--"):
                raise ValueError(f"unknown option {argument}, or its value is missing: {argument} VALUE")
            argument = f"{key.replace('-', '_')}={value}"
        found.append(argument)
    return found


def describe(config_class: type, full: bool = True) -> str:
    """Help text: settings as `key=default  (type)`, with their documentation below; the common ones first.

    Without `full` the others are only counted.
    """
    settings = _settings(config_class)
    common = [key for key in settings if "." not in key or key.split(".")[1:] in COMMON]
    others = [key for key in settings if key not in common]
    lines = _lines(settings, common)
    for field in _fields(config_class):
        if field.group and field.default is None:  # what is shown below it holds only where one is given
            inside = (i for i, line in enumerate(lines) if line.startswith(f"{field.name}."))
            at = next(inside, len(lines))
            lines[at:at] = [f"{field.name}=null", *_wrapped(field)]
    if full and others:
        return "\n".join([*lines, "\nfurther settings:\n", *_lines(settings, others)])
    return "\n".join([*lines, *([f"\n{len(others)} more settings: --help-all"] if others else [])])


def names(config_class: type) -> list[str]:
    """Dotted names of all settings."""
    return list(_settings(config_class))


def defaults(config_class: type) -> dict[str, Any]:
    """Fields that have a default, by name, and their defaults as `dataclasses.asdict` has them."""
    given = (field for field in _fields(config_class) if not field.required)
    return {f.name: dataclasses.asdict(f.default) if f.group and f.default else f.default for f in given}


def _lines(settings: Mapping[str, "_Field"], keys: Iterable[str]) -> list[str]:
    lines = []
    for key in keys:
        field = settings[key]
        value = "..." if field.required else json.dumps(field.default, default=str)
        lines.append(f"{key}={value}  ({_name(field.hint)}{', required' if field.required else ''})")
        lines += _wrapped(field)
    return lines


def _wrapped(field: "_Field") -> list[str]:
    doc = _docs(field.owner).get(field.name, "")
    return textwrap.wrap(doc, 100, initial_indent="    ", subsequent_indent="    ")


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """The tail of an error message: the allowed name closest to an unknown one, or nothing."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f", did you mean '{close[0]}'?" if close else ""


# --- the fields of a configuration class ------------------------------------------------------------------


class _Field(NamedTuple):
    owner: type
    name: str
    group: Any  # the nested dataclass, None if the field is a setting
    hint: Any
    default: Any

    @property
    def required(self) -> bool:
        return self.default is MISSING


def _fields(config_class: type, base: Any = None) -> list[_Field]:
    """Required fields first, then those of a subclass before its base; `base` may hold other defaults."""
    found, hints = [], typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        default = getattr(base, field.name) if dataclasses.is_dataclass(base) else default
        inner = _required(hints[field.name])
        group = inner if dataclasses.is_dataclass(inner) else None
        found.append(_Field(config_class, field.name, group, hints[field.name], default))
    names = [name for cls in config_class.__mro__ for name in inspect.get_annotations(cls)]
    return sorted(found, key=lambda field: (not field.required, names.index(field.name)))


def _settings(config_class: type, prefix: str = "", base: Any = None) -> dict[str, _Field]:
    settings: dict[str, _Field] = {}
    for field in _fields(config_class, base):
        key = prefix + field.name
        settings |= _settings(field.group, f"{key}.", field.default) if field.group else {key: field}
    return settings


def _old_names(config_class: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names of older versions and those of today, empty where there is none."""
    removed = dict.fromkeys(getattr(config_class, "removed", ()), "")
    for old, new in (getattr(config_class, "renamed", {}) | removed).items():
        yield prefix + old, new and prefix + new
    for field in _fields(config_class):
        if field.group:
            yield from _old_names(field.group, f"{prefix}{field.name}.")


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
                    docs[name] = " ".join(doc.split())
    return docs


def _optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _required(hint: Any) -> Any:
    """`X` of `X | None`."""
    args = tuple(arg for arg in typing.get_args(hint) if arg is not type(None))
    return typing.Union[args] if _optional(hint) else hint  # noqa: UP007


def _name(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(map(repr, args))
    names = ["null" if arg is type(None) else "..." if arg is ... else _name(arg) for arg in args]
    if origin in (typing.Union, types.UnionType):
        return " | ".join(names)
    return f"{origin.__name__}[{', '.join(names)}]" if origin else getattr(hint, "__name__", str(hint))


# --- the values that a user gives -------------------------------------------------------------------------


def flatten(values: Mapping[str, Any], settings: Collection[str] = (), prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted keys; one of `settings` is a value, even if it is a mapping."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and key not in settings:
            flat |= flatten(value, settings, f"{key}.")
        elif value not in (None, {}) or not any(known.startswith(f"{key}.") for known in settings):
            flat[key] = value  # left out: a group whose lines are all commented out
    return flat


def _split(override: str) -> tuple[str, str]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"got override '{override}', expected key=value, for example train.steps=100")
    return key.strip(), text


def _refuse_unknown(keys: Sequence[str], settings: Mapping[str, Any], old: Mapping[str, str]) -> None:
    problems = []
    for key in [key for key in keys if key not in settings][:5]:
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
    """A value as an instance of `hint`, or a ValueError with key, value and type."""
    if value is None and _optional(hint):
        return None
    kind, items, problem = _required(hint), value, ""
    if kind == tuple[int, int] and (size := re.fullmatch(r"(\d+)(?:x(\d+))?", str(value).strip())):
        items = value = size[1], size[2] or size[1]
    try:
        if isinstance(value, str) and typing.get_origin(kind) in (tuple, list, dict):
            items = _items(value, typing.get_origin(kind) is dict)
        if value is not None:
            return _adapter(kind).validate_python(items)
    except (yaml.YAMLError, csv.Error, RecursionError):
        problem = ", got malformed YAML"
    except ValueError as e:  # pydantic's message has several lines
        problem = ", a finite number" if "finite number" in str(e) else ""
    got = repr(value) if len(repr(value)) <= 90 else f"{str(value)[:90]}..."
    raise ValueError(f"{key}={got}: expected {_name(hint)}{problem}")


def _items(text: str, mapping: bool) -> Any:
    """The texts in a text: `a, b`, `[a, b]`, `a: b` or `{a: b}`."""
    bare = not text.startswith(("[", "{"))
    if bare and not mapping:
        return [item.strip() for item in next(csv.reader([text], skipinitialspace=True), [])]
    return yaml.load(f"{{{text}}}" if bare else text, yaml.BaseLoader)


@functools.cache
def _adapter(hint: Any) -> Any:
    from pydantic import BeforeValidator, TypeAdapter  # 90 ms, which `import anyorder` should not cost

    def prepared(hint: Any) -> Any:
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin not in (None, Literal):
            return origin[tuple(arg if arg is ... else prepared(arg) for arg in args)]
        return typing.Annotated[hint, BeforeValidator(functools.partial(_prepare, hint))]

    return TypeAdapter(prepared(hint), config={"allow_inf_nan": False})  # JSON has neither


def _prepare(hint: Any, value: Any) -> Any:
    """What pydantic should see: it takes True for 1, no number for a text and no text for `Literal[1]`."""
    if hasattr(value, "tolist"):  # of NumPy
        value = value.tolist()
    if hint is str and isinstance(value, bool | int | float | None):
        return json.dumps(value)
    if hint is Path and value == "":  # such as init=$NOT_SET
        raise ValueError
    if hint is Path and isinstance(value, str | Path):
        return Path(os.path.expanduser(value))  # which leaves "~0" alone, where there is no such user
    if typing.get_origin(hint) is Literal:
        return {str(arg): arg for arg in typing.get_args(hint)}.get(str(value))
    if isinstance(value, bool) != (hint is bool) and not isinstance(value, str):
        raise ValueError
    return value


def _build(config_class: type[Config], values: dict[str, Any], prefix: str = "", base: Any = None) -> Config:
    """An instance of `config_class` from converted settings, starting at `base` if that is an instance."""
    changes: dict[str, Any] = {}
    for field in _fields(config_class, base):
        key = prefix + field.name
        if field.group:
            if field.default is not None or any(known.startswith(f"{key}.") for known in values):
                changes[field.name] = _build(field.group, values, f"{key}.", field.default)
        elif key in values:
            changes[field.name] = values[key]
        elif field.required:
            raise ValueError(f"setting '{key}' ({_name(field.hint)}) is required: add {key}=...")
    make: Any = config_class if base in (None, MISSING) else functools.partial(dataclasses.replace, base)
    try:
        return make(**changes)
    except ValueError as e:
        raise ValueError(f"{prefix.rstrip('.')}: {e}" if prefix else str(e)) from e
