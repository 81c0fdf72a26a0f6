"""Typed configurations: dataclasses filled from YAML files and dotted `key=value` overrides.

A *setting* is a leaf of the nested dataclasses, named by its dotted key (`train.learning_rate`). tyro
converts and checks each value by the annotation of its field, so that what PyYAML reads as a string
(`1e-3`) still becomes the number that the field asks for.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import json
import operator
import textwrap
import threading
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

Config = TypeVar("Config")
_ALONE = threading.Lock()
"""tyro and the redirection of its complaints are of the whole process: one thread converts at a time."""
_CONTAINERS = (tuple, list, set, frozenset, dict)


class Setting(NamedTuple):
    """One leaf of a configuration."""

    hint: Any
    """Annotation of the field."""
    default: Any
    """Its default, or `dataclasses.MISSING` if the setting is required."""
    owner: type
    """The dataclass that the field belongs to."""


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
    _refuse_unknown([*given, *texts], settings)
    given |= {key: _from_text(key, settings[key].hint, text) for key, text in texts.items()}
    return _build(config_class, {key: _convert(key, settings[key].hint, v) for key, v in given.items()})


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping; an empty file is an empty mapping.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, not a mapping, or a key that is given twice; the message says where.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    try:
        # _UniqueKeys is a SafeLoader: it builds plain values only.
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not valid YAML: {e}") from e
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping (key: value), got {type(values).__name__}")
    return values or {}


def describe(config_class: type) -> str:
    """Help text: every setting as `key=default  (type)`, with its documentation below."""
    lines = []
    for key, setting in _settings(config_class).items():
        if setting.default is MISSING:
            lines.append(f"{key}=...  ({_name(setting.hint)}, required)")
        else:
            lines.append(f"{key}={json.dumps(setting.default, default=str)}  ({_name(setting.hint)})")
        doc = _docs(setting.owner).get(key.rpartition(".")[2], "")
        lines += textwrap.wrap(doc, 100, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """The tail of an error message: the allowed name closest to an unknown one, or nothing."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f", did you mean '{close[0]}'?" if close else ""


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML silently takes the last of two equal keys; a configuration must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for i, (key, _) in enumerate(node.value):
            if key.value in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key.value}' is given twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


# --- what a configuration class asks for ----------------------------------------------------------------


def _fields(config_class: type, base: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """Name, annotation and default of each field; defaults come from the instance `base` if there is one."""
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if base is not None:
            default = getattr(base, field.name)
        elif field.default_factory is not MISSING:
            default = field.default_factory()
        else:
            default = field.default
        yield field.name, hints[field.name], default


def _settings(config_class: type, prefix: str = "", base: Any = None) -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    for name, hint, default in _fields(config_class, base):
        if group := _group(hint):
            settings |= _settings(group, f"{prefix}{name}.", None if default is MISSING else default)
        else:
            settings[prefix + name] = Setting(hint, default, config_class)
    return settings


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


def _without_none(hint: Any) -> Any:
    """`X` of `X | None`."""
    if get_origin(hint) in (Union, types.UnionType):
        return functools.reduce(operator.or_, (arg for arg in get_args(hint) if arg is not type(None)))
    return hint


def _group(hint: Any) -> type | None:
    """The dataclass that a field nests, if it does."""
    inner = _without_none(hint)
    return inner if isinstance(inner, type) and dataclasses.is_dataclass(inner) else None


def _allows_none(hint: Any) -> bool:
    return type(None) in get_args(hint)


def _name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join("null" if arg is type(None) else _name(arg) for arg in get_args(hint))
    if get_origin(hint):
        inside = ", ".join("..." if arg is ... else _name(arg) for arg in get_args(hint))
        return f"{get_origin(hint).__name__}[{inside}]"
    return getattr(hint, "__name__", str(hint))


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


def _refuse_unknown(keys: Sequence[str], settings: Mapping[str, Setting]) -> None:
    unknown = [key for key in keys if key not in settings]
    if not unknown:
        return
    lines = []
    for key in unknown:
        close = [known for known in settings if known.startswith(f"{key}.") or known.endswith(f".{key}")][:3]
        close = close or difflib.get_close_matches(key, settings)
        lines.append(f"unknown setting '{key}'" + (f", did you mean {' or '.join(close)}?" if close else ""))
    raise ValueError("\n".join(lines) + f"\nallowed: {', '.join(settings)}")


def _from_text(key: str, hint: Any, text: str) -> Any:
    """What the text of an override would be in YAML; texts of strings, paths and numbers stay as they are."""
    inner = _without_none(hint)
    if _allows_none(hint) and text in ("null", "None", "none", "~"):
        return None
    if inner is not bool and get_origin(inner) not in _CONTAINERS:
        return text
    if get_origin(inner) in _CONTAINERS and not text.startswith(("[", "{")):
        text = f"{{{text}}}" if get_origin(inner) is dict else f"[{text}]"
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ValueError(f"{key}={text}: expected {_name(hint)}, got malformed YAML") from e


def _convert(key: str, hint: Any, value: Any) -> Any:
    """A YAML value as an instance of `hint`.

    Raises:
        ValueError: it is none; the message names key, value and type.
    """
    if value is None and _allows_none(hint):
        return None
    import tyro  # 60 ms, which a mere `import anyorder` should not cost

    inner = _without_none(hint)
    try:
        if value is None or (isinstance(value, _CONTAINERS) and get_origin(inner) not in _CONTAINERS):
            raise SystemExit
        silent = io.StringIO()
        with _ALONE, contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            return tyro.cli(inner, args=["--", *_arguments(value)])
    except SystemExit:
        raise ValueError(f"{key}={value!r}: expected {_name(hint)}") from None


def _arguments(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        value = itertools.chain.from_iterable(value.items())
    elif not isinstance(value, _CONTAINERS):
        return [str(value)]
    return [argument for item in value for argument in _arguments(item)]


def _build(
    config_class: type[Config], values: Mapping[str, Any], prefix: str = "", base: Any = None
) -> Config:
    """An instance of `config_class` from converted settings, starting at `base` if there is one."""
    changes: dict[str, Any] = {}
    for name, hint, default in _fields(config_class, base):
        key = prefix + name
        if group := _group(hint):
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
