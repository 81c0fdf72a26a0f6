"""The tutorials as notebooks: each page of `tutorials` becomes an `.ipynb` when the site is built."""

import json
import re
from pathlib import Path

HERE = Path(__file__).parent


def notebook(text: str) -> dict:
    """A notebook (nbformat 4.5) of a page in MyST: blocks of Python and of commands are code."""
    cells = []
    for i, part in enumerate(re.split(r"^(```(?:python|sh)\n.*?^```)$", text, flags=re.M | re.S)):
        if not part.strip():
            continue
        code = i % 2 == 1
        language, _, source = part.partition("\n") if code else ("", "", part)
        source = re.sub(r"\{download\}`[^`]*`\.", "", source).removesuffix("```").strip()
        source = re.sub(r"^(?=anyorder )", "!", source, flags=re.M) if language == "```sh" else source
        cell = {"id": str(i), "metadata": {}, "source": source, "cell_type": "code" if code else "markdown"}
        cells.append(cell | ({"outputs": [], "execution_count": None} if code else {}))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


def write_all(app=None) -> None:
    """Write the notebooks to `_notebooks`, from where the pages offer them."""
    (HERE / "_notebooks").mkdir(exist_ok=True)
    for page in (HERE / "tutorials").glob("*.md"):
        text = json.dumps(notebook(page.read_text("utf-8")), indent=1, ensure_ascii=False)
        (HERE / "_notebooks" / f"{page.stem}.ipynb").write_text(text + "\n", "utf-8")


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", write_all)
