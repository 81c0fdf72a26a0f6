"""One self-contained HTML page: tables, images and manifests, with nothing to load and no script.

A report is a list of `Section`s; a section holds text and items, and an item is a sentence, a `Table`, a
`Figure`, a `Gallery` of figures side by side, or `Details` that unfold. All text is escaped.
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from anyorder import __version__, files
from anyorder.report.tables import Table


@dataclass
class Figure:
    """An image from Pillow or from a file; `alt` says in words what it shows, `uri` is a `data:` address."""

    kind = "figure"
    image: Image.Image | Path
    caption: str
    alt: str

    def __post_init__(self) -> None:
        if not self.alt.strip():
            raise ValueError(f"figure '{self.caption}' needs an alt text: say in words what it shows")
        data = _image_bytes(self.image)
        try:
            with Image.open(io.BytesIO(data)) as image:
                self.width, self.height = image.size
                mime = Image.MIME[image.format or ""]
        except OSError as e:
            raise ValueError(f"figure '{self.caption}' is not an image that Pillow can read: {e}") from e
        self.uri = f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _image_bytes(image: Image.Image | Path) -> bytes:
    if isinstance(image, Image.Image):
        image.save(buffer := io.BytesIO(), format="PNG", optimize=True)
        return buffer.getvalue()
    if not image.is_file():
        raise FileNotFoundError(f"no image at {image}: run the stage that makes it")
    return image.read_bytes()


@dataclass
class Gallery:
    """Figures side by side, for comparison; they wrap on narrow screens."""

    kind = "gallery"
    figures: Sequence[Figure]


@dataclass
class Details:
    """Something long that unfolds on demand: a command, a log, or a manifest (shown as JSON)."""

    kind = "details"
    title: str
    content: str | dict[str, Any]

    def __post_init__(self) -> None:
        as_json = json.dumps(self.content, indent=2, default=str, ensure_ascii=False)
        self.text = self.content if isinstance(self.content, str) else as_json


Item = str | Table | Figure | Gallery | Details


@dataclass
class Section:
    """A heading with text (blank lines separate paragraphs) and items; on the page it may be folded."""

    title: str
    text: str = ""
    items: Sequence[Item] = ()
    folded: bool = False

    def __post_init__(self) -> None:
        self.paragraphs = [p.strip() for p in self.text.split("\n\n") if p.strip()]
        self.tables = [item for item in self.items if isinstance(item, Table)]


def write_report(path: str | Path, title: str, sections: Sequence[Section]) -> None:
    """Write a page that needs no other file, atomically; the same sections give the same bytes."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("anyorder.report"), undefined=jinja2.StrictUndefined,
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    template = environment.get_template("report.html.j2")
    files.write_text(path, template.render(title=title, sections=sections, version=__version__))


def write_markdown(path: str | Path, title: str, sections: Sequence[Section]) -> None:
    """Write the sections that hold tables as Markdown, without images and details."""
    blocks = [f"# {title}"]
    for section in sections:
        if section.tables:
            blocks += [f"## {section.title}", *section.paragraphs]
            for item in section.items:
                if isinstance(item, str):
                    blocks.append(item)
                elif isinstance(item, Table):
                    blocks += [item.markdown(), *([item.caption] if item.caption else [])]
    files.write_text(path, "\n\n".join(blocks) + "\n")


def write_latex(path: str | Path, title: str, sections: Sequence[Section]) -> None:
    """Write the same tables for LaTeX (package booktabs), to be read by a paper's `\\input`."""
    tables = [item.latex() for section in sections for item in section.tables]
    files.write_text(path, "\n\n".join([f"% {title}", *tables]) + "\n")


def write_records(path: str | Path, title: str, sections: Sequence[Section]) -> None:
    """Write the same tables as JSON, with the versions of the packages: a small file to keep with a study."""
    tables = [
        {"section": section.title, "caption": item.caption, "rows": [dict(row) for row in item.rows]}
        for section in sections
        for item in section.tables
    ]
    files.write_json(path, {"title": title, "versions": files.versions(), "tables": tables})
