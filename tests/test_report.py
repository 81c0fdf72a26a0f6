import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from anyorder.report import summary
from anyorder.report.page import (
    Details,
    Figure,
    Gallery,
    Section,
    write_latex,
    write_markdown,
    write_records,
    write_report,
)
from anyorder.report.tables import Spread, Table, format_value

DASH = "\u2013"
VOID = {"meta", "img"}
EVIL = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Collects elements with their text, and fails on tags that do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[tuple[str, dict, list[str]]] = []
        self.elements: list[tuple[str, dict, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {[tag for tag, *_ in self.open]}"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        opened = self.open.pop()[0]
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data: str) -> None:
        for *_, texts in self.open:
            texts.append(data)

    def all(self, tag: str, **attributes: str) -> list[tuple[str, dict]]:
        return [
            ("".join(texts).strip(), attrs)
            for name, attrs, texts in self.elements
            if name == tag and attributes.items() <= attrs.items()
        ]

    def texts(self, tag: str) -> list[str]:
        return [text for text, _ in self.all(tag)]


def image_of(colour: str = "red") -> Image.Image:
    return Image.new("RGB", (6, 4), colour)


def page(tmp_path, *sections: Section, title: str = "Report", folded: int | None = None) -> Page:
    if folded is not None:
        sections[folded].folded = True
    write_report(tmp_path / "report.html", title, sections)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def full(tmp_path) -> Page:
    table = Table(["order", "fd"], [{"order": "raster", "fd": 2.0}], "quality", {"fd": "min"})
    return page(
        tmp_path,
        Section("Quality", "One.\n\nTwo.\n", [table]),
        Section(
            "Samples", items=[Gallery([Figure(image_of(), "a", "red"), Figure(image_of("blue"), "", "blue")])]
        ),
        Section(
            "Runs",
            items=[Details("config", {"lr": 1e-3, "classes": ["é"]}), Details("command", "a b")],
            folded=True,
        ),
    )


def test_structure(tmp_path) -> None:
    result = full(tmp_path)
    assert result.texts("title") == result.texts("h1") == ["Report"]
    assert result.texts("h2") == ["Quality", "Samples", "Runs"]
    assert result.texts("p") == ["One.", "Two."]
    assert [attrs["id"] for _, attrs in result.all("section")] == ["s1", "s2", "s3"]
    assert result.texts("summary") == ["Runs", "config", "command"]
    assert len(result.all("details")) == 3
    assert result.texts("pre") == ['{\n  "lr": 0.001,\n  "classes": [\n    "é"\n  ]\n}', "a b"]
    assert result.texts("figcaption") == ["a"]
    assert result.all("html", lang="en")


def test_page_needs_nothing_else(tmp_path) -> None:
    result = full(tmp_path)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, *_ in result.elements}
    for _, attrs, _ in result.elements:
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href", "data", "srcset", "action"):
                assert value.startswith(("data:image/", "#"))
    assert not re.search(r"url\(|@import", result.texts("style")[0])


def test_it_follows_the_readers_colours_and_screen(tmp_path) -> None:
    result = full(tmp_path)
    assert "prefers-color-scheme: dark" in result.texts("style")[0]
    assert result.all("meta", name="viewport")
    assert all(attrs["alt"] for _, attrs in result.all("img"))


def test_all_text_is_escaped(tmp_path) -> None:
    table = Table([EVIL], [{EVIL: EVIL}], EVIL, {EVIL: "max"})
    items = [
        table,
        Figure(image_of(), EVIL, f'" onload="x{EVIL}'),
        Details(EVIL, {EVIL: EVIL}),
        Details("b", EVIL),
    ]
    result = page(tmp_path, Section(EVIL, EVIL, items), Section(EVIL), title=EVIL)
    assert not result.all("script")
    assert result.texts("h1") == [EVIL]
    assert result.texts("h2") == [EVIL, EVIL]
    assert result.texts("p") == [EVIL]
    assert [text for text, _ in result.all("th", scope="row")] == [EVIL]
    assert result.texts("pre")[1] == EVIL
    ((_, image),) = result.all("img")
    assert image["alt"] == f'" onload="x{EVIL}'
    assert "onload" not in image


def test_table_cells_by_column(tmp_path) -> None:
    rows = [
        {"order": "raster", "fd": 31.234, "recall": 0.5, "n": 5000},
        {"order": "random", "fd": math.nan, "recall": 0.5, "n": 5000},
        {"order": "ordered", "fd": 27.1, "recall": 0.4, "n": None},
    ]
    table = Table(["order", "fd", "recall", "n"], rows, best={"fd": "min", "recall": "max", "n": "max"})
    result = page(tmp_path, Section("Quality", items=[table]))
    assert [text for text, _ in result.all("th", scope="col")] == ["order", "fd ↓", "recall ↑", "n ↑"]
    assert [text for text, _ in result.all("th", scope="row")] == ["raster", "random", "ordered"]
    cells = result.all("td")
    assert [text for text, _ in cells] == [
        "31.23",
        "0.5000",
        "5,000",
        DASH,
        "0.5000",
        "5,000",
        "27.10",
        "0.4000",
        DASH,
    ]
    assert [text for text, attrs in cells if "best" in attrs["class"]] == ["0.5000", "0.5000", "27.10"]
    assert all("number" in attrs["class"] for _, attrs in cells)
    assert result.all("th", scope="col")[0][1].get("class") is None
    assert not result.all("caption")


def test_a_single_value_is_not_the_best_of_anything() -> None:
    table = Table(["a", "b"], [{"a": 1.0, "b": 2.0}, {"a": None, "b": 3.0}], best={"a": "min", "b": "max"})
    assert [[cell.best for cell in row] for row in table.cells()] == [[False, False], [False, True]]


def test_tables_refuse_columns_that_they_have_not() -> None:
    with pytest.raises(ValueError, match=r"row 1 names columns \['b'\]"):
        Table(["a"], [{"a": 1}, {"b": 2}])
    with pytest.raises(ValueError, match=r"best names columns \['c'\]"):
        Table(["a"], [], best={"c": "min"})
    with pytest.raises(ValueError, match=r"'min' or its 'max', got \{'a': 'least'\}"):
        Table(["a"], [], best={"a": "least"})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, DASH),
        (math.nan, DASH),
        (np.float32("nan"), DASH),
        (True, "yes"),
        (False, "no"),
        (12345678, "12,345,678"),
        (np.int64(1234), "1,234"),
        (0, "0"),
        (0.0, "0"),
        (3.14159, "3.142"),
        (-27.1, "-27.10"),
        (0.0123449, "0.01234"),
        (123456.7, "123,457"),
        (1.5e-7, "1.50e-07"),
        (np.float32(0.5), "0.5000"),
        (math.inf, "inf"),
        ("raster", "raster"),
    ],
)
def test_values_are_formatted_sensibly(value: object, text: str) -> None:
    assert format_value(value) == text


def decoded(figure: Figure) -> Image.Image:
    header, data = figure.uri.split(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert header == f"data:{Image.MIME[image.format]};base64"
    return image


def test_figures_embed_images_and_files(tmp_path) -> None:
    image_of().save(tmp_path / "a.gif", save_all=True, append_images=[image_of("blue")], duration=100)
    from_image, from_path = Figure(image_of(), "", "red"), Figure(tmp_path / "a.gif", "", "red and blue")
    assert decoded(from_image).tobytes() == image_of().tobytes()
    assert decoded(from_path).n_frames == 2
    assert (from_path.width, from_path.height) == (6, 4)


def test_figures_that_cannot_be_shown_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="'a' needs an alt text"):
        Figure(image_of(), "a", " ")
    with pytest.raises(FileNotFoundError, match="no image at"):
        Figure(tmp_path / "missing.png", "a", "b")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="'a' is not an image"):
        Figure(tmp_path / "a.txt", "a", "b")


def test_same_content_gives_the_same_bytes(tmp_path) -> None:
    full(tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    full(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_rows_below_the_others_are_not_the_best_of_them() -> None:
    rows = [{"a": "x", "b": 2.0}, {"a": "y", "b": 3.0}, {"a": "floor", "b": 1.0}]
    table = Table(["a", "b"], rows, best={"b": "min"}, unranked=1)
    assert [row[1].best for row in table.cells()] == [True, False, False]


def test_sentences_stand_between_tables(tmp_path) -> None:
    table = Table(["a"], [{"a": "x"}])
    sections = [Section("One", items=[table, "A verdict."])]
    result = page(tmp_path, *sections)
    assert [text for text, _ in result.all("p", **{"class": "lead"})] == ["A verdict."]
    write_markdown(tmp_path / "r.md", "Title", sections)
    assert (tmp_path / "r.md").read_text().endswith("| --- |\n| x |\n\nA verdict.\n")


def test_records_hold_the_tables_and_the_versions(tmp_path) -> None:
    sections = [Section("One", items=[Table(["a", "b"], [{"a": "x", "b": 1.5}], "What it is."), "Text."])]
    write_records(tmp_path / "r.json", "Title", sections)
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["tables"] == [{"section": "One", "caption": "What it is.", "rows": [{"a": "x", "b": 1.5}]}]
    assert found["title"] == "Title"
    assert found["versions"]["torch"]


def test_markdown_holds_tables_and_texts(tmp_path) -> None:
    table = Table(["name", "a|b"], [{"name": "x", "a|b": 1.5}, {"name": "y", "a|b": None}], "What it is.")
    best = Table(["name", "n"], [{"name": "x", "n": 1}, {"name": "y", "n": 2}], best={"n": "max"})
    sections = [Section("One", "Text.", [table, best]), Section("No tables", "Gone.", [])]
    write_markdown(tmp_path / "r.md", "Title", sections)
    assert (tmp_path / "r.md").read_text() == (
        "# Title\n\n## One\n\nText.\n\n"
        "| name | a\\|b |\n| --- | ---: |\n| x | 1.500 |\n| y | \u2013 |\n\nWhat it is.\n\n"
        "| name | n |\n| --- | ---: |\n| x | 1 |\n| y | **2** |\n"
    )


def test_tables_for_papers_escape_what_latex_reads(tmp_path) -> None:
    spread = Spread.of([1.0, 3.0])
    rows = [{"a_b": "50 % & {x}", "FD": spread}, {"a_b": "~^\\\\", "FD": None}, {"a_b": "c", "FD": 9.0}]
    table = Table(["a_b", "FD"], rows, "Caption #1", best={"FD": "min"})
    write_latex(tmp_path / "r.tex", "Title", [Section("S", "", ["text", table])])
    text = (tmp_path / "r.tex").read_text()
    assert text.startswith("% Title\n\n\\begin{table}")
    for line in (
        "\\begin{tabular}{lr}",
        "a\\_b & FD \\\\",
        "50 \\% \\& \\{x\\} & \\textbf{2.000 $\\pm$ 1.414} \\\\",
        "\\textasciitilde{}\\textasciicircum{}\\textbackslash{}\\textbackslash{} & -- \\\\",
        "\\caption{Caption \\#1}",
    ):
        assert line in text.splitlines(), (line, text)


def test_numbers_for_papers_are_not_rounded(tmp_path) -> None:
    rows = [{"samples": "a, b", "FD": 1 / 3, "none": None}, {"samples": "c", "FD": None, "none": None}]
    summary._write_csv(tmp_path / "r.csv", rows)
    assert (tmp_path / "r.csv").read_text() == f'samples,FD\n"a, b",{1 / 3!r}\nc,\n'
