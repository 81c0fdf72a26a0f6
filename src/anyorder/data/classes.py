"""Classes: their sequence, which of a model's classes they are, and names that can be shown."""

import logging
from collections.abc import Iterable, Sequence

from anyorder.settings import did_you_mean

log = logging.getLogger("anyorder")


def in_sequence(names: Iterable[str]) -> list[str]:
    """Unique names, by number if all are numbers, else by alphabet."""
    found = sorted(set(names))
    return sorted(found, key=int) if all(_is_number(name) for name in found) else found


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def map_classes(classes: Sequence[str], known: Sequence[str], count: int) -> list[int | None]:
    """Which of a model's `count` classes each class of some data is: its index, None for none of them.

    Names are compared without regard to case. A model without names (`known` is empty) is matched by number:
    a class that is called `7` is class 7. Where neither helps and only the number of classes agrees, they are
    taken to be the same in the same sequence, with a warning.
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
    """A name that can be shown: control characters and undecodable bytes (lone surrogates) are escaped.

    With `mathtext` also for matplotlib, where `$` would begin a formula.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return shown.replace("$", r"\$") if mathtext else shown


def index_of(name: str, allowed: Sequence[str], what: str) -> int:
    """Where a name stands among those allowed; one that cannot be typed is found as it is displayed.

    Raises:
        ValueError: it does not; the message suggests the closest one.
    """
    allowed = allowed if name in allowed else list(map(display_name, allowed))
    if name not in allowed:
        same = (f", did you mean '{other}'?" for other in allowed if other.lower() == name.lower())
        hint = did_you_mean(name, allowed) or next(same, ":")
        text = f"unknown {what} '{name}'{hint} choose one of {', '.join(allowed) or 'none'}"
        parted = (other for other in allowed if name in map(str.strip, other.split(",")) and name != other)
        raise ValueError("; ".join([text, *(f'a name with a comma is written ["{x}"]' for x in parted)]))
    return list(allowed).index(name)
