"""README and documentation keep their promises: functions, tests, links, snippets and commands."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from anyorder.cli.main import main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
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


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_python_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks(page, "python")), {})


def commands(page: Path) -> list[str]:
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("anyorder ")]


@pytest.mark.parametrize(
    "command", sorted({command for page in PAGES for command in commands(page)}), ids=lambda c: c[9:60]
)
def test_commands_have_known_settings(command, capsys):
    """`--dry-run` reads every setting of a command and runs nothing."""
    arguments = shlex.split(command, comments=True)[1:]
    if arguments[0] in ("report", "run", "fit") or "--dry-run" in arguments:
        pytest.skip("needs images or finished runs")
    assert main([*arguments, "--dry-run"]) == 0, capsys.readouterr().err
