"""The direction of imports: a leaf, four groups that never import one another, and what builds on them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import anyorder

ROOT = Path(anyorder.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

LEAF = {"contracts", "orders", "families", "files", "settings", "efficientnet"}
GROUPS = ("method", "models", "tokenizers", "data", "evaluation")
"""Groups that do not import one another."""
LAYERS: tuple[set[str], ...] = (
    LEAF,
    {*GROUPS},
    {"adapters"},
    {"inference"},
    {"training", "demo"},
    {"report"},
    {"stages", "bench"},
    {"cli"},
)
"""Each package may import those of the layers before its own, and itself."""


def _allowed() -> dict[str, set[str]]:
    below: set[str] = set()
    allowed = {"": {"inference", "method"}, "__main__": {"cli"}}
    for layer in LAYERS:
        allowed |= {room: below | {room} for room in layer}
        below |= layer
    return allowed | {**{leaf: set() for leaf in LEAF}, "orders": {"contracts"}}


ALLOWED = _allowed()
"""What each top-level module or package may import; "" is the package's own `__init__`, lazily."""


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "" if parts[0] == "__init__" else parts[0]


def imported(source: str) -> set[str]:
    """The rooms that a module imports, at its top or inside functions."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("anyorder.")}
    return rooms & (ALLOWED.keys() - {""})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_down(path):
    room = room_of(path)
    assert room in ALLOWED, f"a new room: say in ALLOWED what '{room}' may import"
    wrong = imported(path.read_text(encoding="utf-8")) - ALLOWED[room]
    assert not wrong, f"{room} must not import {', '.join(sorted(wrong))}"


def test_every_form_of_import_is_seen():
    source = """
import anyorder.models.vq, numpy
from anyorder import demo as d, __version__
def f():
    from anyorder.data.ingest import ingest
    import anyorder.stages as stages
"""
    assert imported(source) == {"models", "demo", "data", "stages"}
    with pytest.raises(AssertionError, match="in full"):
        imported("from .contracts import Grid")


def test_the_groups_are_strangers():
    for group in GROUPS:
        assert not ALLOWED[group] & ({*GROUPS} - {group})


def loaded(code: str) -> set[str]:
    """Modules that are loaded after `code` ran in a process of its own."""
    program = f"{code}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_command_line_starts_without_torch():
    """`anyorder --help` must be quick: heavy packages are imported by the command that needs them."""
    heavy = {"torch", "torchmetrics", "matplotlib", "numpy", "pydantic"}
    assert not heavy & loaded("import anyorder.cli.main")


def test_a_pipeline_loads_neither_trainer_nor_stages_nor_matplotlib():
    modules = loaded("import anyorder.inference.pipeline")
    above = ("anyorder.training", "anyorder.stages", "anyorder.report", "matplotlib")
    assert not [module for module in modules if module.startswith(above)]


def test_loading_an_own_model_loads_no_adapter():
    modules = loaded("from anyorder.families import family; family('transformer'), family('vq')")
    assert "anyorder.models.transformer" in modules
    assert not [module for module in modules if module.startswith("anyorder.adapters")]
