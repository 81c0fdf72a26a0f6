"""Tables for the report, as text, HTML and Markdown."""

import math
import numbers
import statistics
from collections import abc
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

MISSING = "\u2013"
_BEST = {"min": min, "max": max}


class Spread(float):
    """The mean of several values, shown with their sample standard deviation (0 for a single value)."""

    deviation: float

    @classmethod
    def of(cls, values: abc.Sequence[float]) -> "Spread":
        """Mean and deviation of one or more values."""
        result = cls(statistics.mean(values))
        result.deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return result


class Cell(NamedTuple):
    """One formatted value of a table."""

    text: str
    best: bool


@dataclass
class Table:
    """Rows by column name.

    Attributes:
        columns: names, in the order shown; the first column names the rows.
        rows: a mapping per row; a key that is absent, None or NaN is shown as a dash.
        caption: what the table shows.
        best: for some columns whether the least or the greatest value is the best; it is highlighted.
        unranked: number of last rows that do not compete for the best value.
    """

    kind = "table"
    columns: abc.Sequence[str]
    rows: abc.Sequence[abc.Mapping[str, Any]]
    caption: str = ""
    best: abc.Mapping[str, Literal["min", "max"]] = field(default_factory=dict)
    unranked: int = 0

    def __post_init__(self) -> None:
        for what, names in (("best", self.best), *((f"row {i}", row) for i, row in enumerate(self.rows))):
            if unknown := sorted(names.keys() - set(self.columns)):
                raise ValueError(f"{what} names columns {unknown} that are not among {list(self.columns)}")
        if wrong := {k: v for k, v in self.best.items() if v not in _BEST}:
            raise ValueError(f"the best value of a column is its 'min' or its 'max', got {wrong}")

    def cells(self) -> list[list[Cell]]:
        """The formatted values, row by row."""
        ranked = self.rows[: len(self.rows) - self.unranked]
        targets = {}
        for column, end in self.best.items():
            values = [row[column] for row in ranked if _is_number(row.get(column))]
            if len({format_value(value) for value in values}) > 1:  # none is better than its equals
                targets[column] = _BEST[end](values)

        def cell(column: str, value: Any, competes: bool) -> Cell:
            best = competes and column in targets and _is_number(value) and value == targets[column]
            return Cell(format_value(value), bool(best))

        count = len(ranked)
        return [[cell(c, row.get(c), i < count) for c in self.columns] for i, row in enumerate(self.rows)]

    def text(self) -> str:
        """The table in aligned columns, for terminals."""
        lines = [list(self.columns), *([cell.text for cell in row] for row in self.cells())]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
        return "\n".join(rows)

    def markdown(self) -> str:
        """The table in Markdown, the best values bold."""
        rows = [[f"**{c.text}**" if c.best else c.text for c in row] for row in self.cells()]
        rule = ["---:" if numeric else "---" for numeric in self.numeric]
        lines = (" | ".join(t.replace("|", "\\|") for t in row) for row in [self.columns, rule, *rows])
        return "\n".join(f"| {line} |" for line in lines)

    def latex(self) -> str:
        """A table for LaTeX (package booktabs), the best values bold."""
        cells = [[(c.text.translate(_TEX), c.best) for c in row] for row in self.cells()]
        rows = [[rf"\textbf{{{text}}}" if best else text for text, best in row] for row in cells]
        names = [name.translate(_TEX) for name in self.columns]
        head, *body = (" & ".join(row) + r" \\" for row in [names, *rows])
        kinds = "".join("r" if numeric else "l" for numeric in self.numeric)
        inner = [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
        caption = [rf"\caption{{{self.caption.translate(_TEX)}}}"] if self.caption else []
        lines = [r"\begin{table}", r"\centering", *inner, r"\end{tabular}", *caption, r"\end{table}"]
        return "\n".join(lines)

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold a number; these are aligned right."""
        return [any(_is_number(row.get(c)) for row in self.rows) for c in self.columns]


_TEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"\u00b1": r"$\pm$", "\u2013": "--", "\u00d7": r"$\times$", "<": r"$<$", ">": r"$>$"}
)
"""What is special in LaTeX, escaped."""


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


def format_value(value: Any) -> str:
    """Four significant digits, thousands separated, yes or no, and a dash where a value is missing.

    A `Spread` is shown as mean ± deviation, to the mean's decimals.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or (isinstance(value, numbers.Real) and math.isnan(value)):
        return MISSING
    if isinstance(value, numbers.Integral):
        return f"{value:,d}"
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        return str(value)
    decimals = 3 - math.floor(math.log10(abs(value))) if value else 0
    if isinstance(value, Spread):
        places = min(max(0, decimals), 7)
        return f"{float(value):,.{places}f} \u00b1 {value.deviation:,.{places}f}"
    return f"{float(value):.2e}" if decimals > 7 else f"{float(value):,.{max(0, decimals)}f}"
