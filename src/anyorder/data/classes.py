"""Classes: their sequence, which of a model's classes they are, and names that can be shown."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

log = logging.getLogger("anyorder")


def in_sequence(names: Iterable[str]) -> list[str]:
    """Names without a sequence of their own: by number if all are numbers, else by alphabet."""
    found = sorted(set(names))
    return sorted(found, key=int) if all(_is_number(name) for name in found) else found


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def map_classes(classes: Sequence[str], known: Sequence[str], count: int) -> list[int | None]:
    """Which of a model's classes each class of some data is.

    Names are compared without regard to case. A model without names is matched by number: a class that is
    called `7` is its class 7. Where neither helps and only the number of classes agrees, they are taken to be
    the same in the same sequence, with a warning.

    Args:
        classes: names of the data's classes.
        known: names of the model's classes, empty if it has none.
        count: number of the model's classes.

    Returns:
        For each of `classes` its index in [0, count), None for a class that the model does not know.
    """
    if known:
        exact = {name: i for i, name in enumerate(known)}
        folded = {name.strip().casefold(): i for i, name in reversed([*enumerate(known)])}
        return [exact.get(name, folded.get(name.strip().casefold())) for name in classes]
    if classes and all(_is_number(name) and int(name) < count for name in classes):
        return [int(name) for name in classes]
    if len(classes) != count:
        return [None] * len(classes)
    log.warning(
        "the model has %d classes without names, and so many has the data (%s, ...): they are taken to be "
        "the same, in this sequence; check that class 0 of the model is '%s'",
        count, ", ".join(map(display_name, classes[:3])), display_name(classes[0] if classes else ""),
    )  # fmt: skip
    return list(range(count))


def display_name(name: str, mathtext: bool = False) -> str:
    """A name that can be printed and drawn: what cannot be shown is escaped.

    Args:
        name: any text, with control characters or undecodable bytes (lone surrogates) too.
        mathtext: for matplotlib, where `$` would begin a formula.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return shown.replace("$", r"\$") if mathtext else shown
