"""README and documentation keep their promises: functions, tests, links, snippets and commands."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from anyorder.cli.main import main
from anyorder.contracts import Grid
from anyorder.files import read_manifest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.md"))
METHOD = (ROOT / "docs/concepts/method.md").read_text()
ROWS = re.findall(r"^\|.*\| `([\w.]+)`(?:, `[\w.]+`)? \| `(test_\w+)` \|$", METHOD, re.M)
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_the_table_is_found():
    assert len(ROWS) >= 15


@pytest.mark.parametrize(("function", "test"), ROWS)
def test_every_formula_has_its_function_and_its_test(function, test):
    path = function.split(".")
    module = next(
        importlib.import_module("anyorder." + ".".join(path[:n]))
        for n in range(len(path) - 1, 0, -1)
        if (ROOT / "src/anyorder" / "/".join(path[:n])).with_suffix(".py").exists()
    )
    thing = module
    for name in path[module.__name__.count(".") :]:
        thing = getattr(thing, name)
    assert thing.__doc__
    assert f"def {test}(" in TESTS


def test_the_tree_names_every_package():
    tree = README.read_text().split("## Where things are")[1].split("```")[1]
    named = set(re.findall(r"^  (\w+)/", tree, re.M))
    package = ROOT / "src/anyorder"
    assert named == {path.parent.name for path in package.glob("*/__init__.py")} | {"pretrained"}


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.fixture
def at_page(tmp_path, monkeypatch):
    """Enters an empty folder, with the files that code blocks of a page begin with the names of."""

    def enter(page: Path) -> list[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        code = []
        for block in blocks(page, "python"):
            if found := re.match(r"# (\w+)\.py\n", block):
                monkeypatch.delitem(sys.modules, found[1], raising=False)
                with open(tmp_path / f"{found[1]}.py", "a") as file:
                    file.write(block)
            else:
                code.append(block)
        return code

    return enter


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python") and p not in TUTORIALS], ids=name_of
)
def test_python_snippets_run(page, at_page):
    exec("\n".join(at_page(page)), {})


def commands(page: Path) -> list[str]:
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("anyorder ")]


@pytest.mark.parametrize(
    ("command", "page"),
    sorted({command: page for page in PAGES for command in commands(page)}.items()),
    ids=lambda c: c[9:60] if isinstance(c, str) else "",
)
def test_commands_have_known_settings(command, page, at_page, capsys):
    """`--dry-run` reads every setting of a command and runs nothing."""
    at_page(page)
    arguments = shlex.split(command, comments=True)[1:]
    if arguments[0] in ("report", "run", "fit") or "--dry-run" in arguments:
        pytest.skip("needs images or finished runs")
    assert main([*arguments, "--dry-run"]) == 0, capsys.readouterr().err


def test_the_parts_of_extending_go_through_every_stage(at_page, capsys):
    """What the page defines is not only defined: each part does its work in the command that takes it."""
    at_page(ROOT / "docs/how-to/extend.md")
    small = "train.steps=2 train.batch_size=4 train.log_every=1 train.eval_every=0"
    model = "model.depth=1 model.width=32 model.heads=1"
    for command in (
        "data source=mine:Greys size=32,32 out=run/data",
        "convert mine:tokenizer run/tokenizer",
        "tokens data=run/data tokenizer=run/tokenizer out=run/tokens",
        f"train tokens=run/tokens order=mine:border_first {model} {small} train.logger=mine:Printer "
        "out=run/model",
        "data source=sunsets size=32,32 max_train=20 max_test=8 out=run/suns",
        "tokens data=run/suns tokenizer=run/tokenizer out=run/suns-tokens",
        f"train tokens=run/suns-tokens network=mine:Counts network_settings='smoothing: 0.5' {small} "
        "out=run/counts",
        "features data=run/data extractor=mine:Moments out=run/features",
        "sample model=run/model policy.order=mine:border_first num_images=4 out=run/samples",
        "sample model=run/counts policy.order=mine:Rows num_images=4 out=run/rows",
        "eval samples=run/samples features=run/features nll_images=2 out=run/eval",
    ):
        assert main(shlex.split(command)) == 0, command
    said = capsys.readouterr().out
    assert "goes on after step 0" in said
    assert "{'loss':" in said
    order = np.load("run/samples/order.npy")
    assert (order[0] == sys.modules["mine"].border_first(Grid(8, 8)).numpy()).all()
    assert read_manifest("run/eval")["metrics"]["metric_name"] == "FD (moments)"


@pytest.mark.parametrize("page", TUTORIALS, ids=name_of)
def test_a_tutorial_is_a_notebook_that_runs(page, at_page, monkeypatch):
    """Its code cells are the blocks of the page, its commands begin with an exclamation mark."""
    at_page(page)
    monkeypatch.syspath_prepend(ROOT / "docs")
    made = importlib.import_module("notebooks").notebook(page.read_text())
    cells = [cell["source"] for cell in made["cells"] if cell["cell_type"] == "code"]
    python = [block.strip() for block in blocks(page, "python")]
    assert [cell for cell in cells if not cell.startswith("!")] == python
    assert [cell.split("#")[0] for cell in cells if cell.startswith("!")] == [
        f"!{line.split('#')[0]}" for line in commands(page)
    ]
    assert len({cell["id"] for cell in made["cells"]}) == len(made["cells"])
    assert not any("```" in cell["source"] or "{download}" in cell["source"] for cell in made["cells"])
    variables: dict = {}
    for cell in cells:
        if cell.startswith("!"):
            assert main(shlex.split(cell, comments=True)[1:]) == 0, cell
        else:
            exec(cell, variables)
