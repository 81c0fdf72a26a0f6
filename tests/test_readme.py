"""What the README promises exists: every function, every test, every file of the tree."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ROWS = re.findall(r"^\|.*\| `([\w.]+)` \| `(test_\w+)` \|$", README, re.M)
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))


def test_the_table_is_found():
    assert len(ROWS) >= 8


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
    tree = README.split("## The tree")[1].split("```")[1]
    named = set(re.findall(r"^  (\w+)/", tree, re.M))
    package = ROOT / "src/anyorder"
    assert named == {path.parent.name for path in package.glob("*/__init__.py")} | {"pretrained"}


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
