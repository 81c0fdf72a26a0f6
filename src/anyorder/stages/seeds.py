"""Repetition over seeds in experiment files: one stage whose name holds `{seed}` stands for many.

    seeds: [0, 1, 2]
    stages:
      raster-s{seed}: {stage: train, tokens: tokens, order: raster, train: {seed: "{seed}"}}
      samples-s{seed}: {stage: sample, model: "raster-s{seed}", ...}

Quotes are needed inside `{...}`, where YAML takes braces for a mapping.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

SEED = "{seed}"
_PLACEHOLDER = re.compile(r"\{[^{}]*\}")


def expand(stages: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """Stages with those whose name holds `{seed}` made once per seed.

    Neighbouring templates are made seed by seed, so that all of the first seed is done first.

    Args:
        stages: artifact name -> settings, as an experiment file has them.
        seeds: distinct integers >= 0; may be empty if no name holds `{seed}`.

    Raises:
        ValueError: bad or no seeds, an unknown placeholder, one in a stage that is not repeated, or a name
            that is made twice.
    """
    _check_seeds(seeds)
    found: dict[str, Any] = {}
    for repeated, group in groupby(stages.items(), lambda item: SEED in item[0]):
        members = list(group)
        if repeated and not seeds:
            raise ValueError(
                f"stage '{members[0][0]}' is repeated over seeds: add seeds: [0, 1, 2] to the file"
            )
        for seed in seeds if repeated else [None]:
            for template, settings in members:
                name = _fill(template, template, seed)
                if name in found:
                    raise ValueError(f"stage '{name}' is given twice, once by '{template}': rename one")
                found[name] = _fill(template, settings, seed)
    return found


def _check_seeds(seeds: Any) -> None:
    integers = isinstance(seeds, list | tuple) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not integers or len(set(seeds)) != len(seeds):
        raise ValueError(
            f"seeds must be a list of different integers >= 0, for example [0, 1, 2], got {seeds}"
        )


def _fill(name: str, value: Any, seed: int | None) -> Any:
    """The value with its placeholders filled in; `{seed}` alone becomes the integer."""
    if isinstance(value, Mapping):
        if value == {"seed": None}:
            raise ValueError(
                f"stage '{name}': YAML reads {{seed}} as a mapping: write \"{{seed}}\", with quotes"
            )
        return {key: _fill(name, item, seed) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(name, item, seed) for item in value]
    if not isinstance(value, str):
        return value
    for placeholder in _PLACEHOLDER.findall(value):
        if placeholder != SEED:
            raise ValueError(
                f"stage '{name}': unknown placeholder {placeholder} in '{value}'. Allowed: {SEED}"
            )
        if seed is None:
            raise ValueError(
                f"stage '{name}' is not repeated, but '{value}' holds {SEED}: put {SEED} into its name too"
            )
    return seed if value == SEED else value.replace(SEED, str(seed))
