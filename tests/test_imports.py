"""The direction of imports: a leaf, four groups that never import one another, and what builds on them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import anyorder

ROOT = Path(anyorder.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

LEAF = {"contracts", "orders", "artifacts"}
METHOD = {"logits", "schedules", "policies", "guidance", "decode", "likelihood"}
MIDDLE = METHOD | {"models", "data", "evaluation"}
TOP = {"pipeline", "draw", "complete", "cli", "demo"}
ALLOWED: dict[str, set[str]] = {
    "": {"pipeline"},
    "contracts": set(),
    "orders": {"contracts"},
    "artifacts": {"contracts"},
    **dict.fromkeys(METHOD, LEAF | METHOD),
    **{room: LEAF | {room} for room in ("models", "data", "evaluation")},
    "adapters": LEAF | {"models", "adapters"},
    "runs": LEAF | MIDDLE | {"adapters", "runs"},
    **{room: LEAF | MIDDLE | {"adapters", "runs"} | TOP for room in TOP},
}
"""Which rooms each room may import; the room "" is the package's own `__init__`, lazily."""


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
from anyorder import decode as d, __version__
def f():
    from anyorder.data.images import ingest
    import anyorder.runs as runs
"""
    assert imported(source) == {"models", "decode", "data", "runs"}
    with pytest.raises(AssertionError, match="in full"):
        imported("from .contracts import Grid")


def test_the_middle_groups_are_strangers():
    groups = [METHOD, {"models"}, {"data"}, {"evaluation"}]
    for group in groups:
        others = MIDDLE - group
        assert not any(ALLOWED[room] & others for room in group)


@pytest.mark.skipif(not (ROOT / "cli.py").is_file(), reason="there is no command line yet")
def test_the_command_line_starts_without_torch():
    """`anyorder --help` must be quick: heavy packages are imported by the command that needs them."""
    code = (
        "import sys, anyorder.cli; print({'torch', 'torchmetrics', 'matplotlib'} & {*sys.modules} or 'none')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "none"
