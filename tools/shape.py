"""Print the shape of the repository beside its limits; exit with 1 if one of them does not hold.

    python tools/shape.py [--static]

Frames are those of our code on the stack when a command first reaches the loss (training) or the model's
`score` (sampling), both included; `--static` leaves them out and takes a second.
"""

from __future__ import annotations

import ast
import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "anyorder"
LIMITS = {
    "lines in src": 12_500,
    "lines of the largest file": 450,
    "imported names per file, median": 9,
    "imported names per file, largest": 30,
    "MB in docs/results": 1.0,
    "lines of README.md": 130,
    "frames from train to the loss": 8,
    "frames from sample (stage) to score": 8,
    "frames from sample (pipeline) to score": 8,
}


def lines(path: Path) -> int:
    """Lines of a text file."""
    return path.read_text(encoding="utf-8").count("\n")


def imported_names(source: str) -> int:
    """Different names that a file imports, anywhere in it, `from __future__` aside."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module != "__future__"):
            names |= {alias.asname or alias.name for alias in node.names}
    return len(names)


def function_lengths(source: str) -> list[int]:
    """Lines of each function, signature and docstring included."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [(node.end_lineno or 0) - node.lineno + 1 for node in nodes]


def comment_lines(source: str) -> int:
    """Lines with a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def static() -> dict[str, Any]:
    """What can be read from the files."""
    files = sorted(SOURCE.rglob("*.py"))
    sources = [path.read_text(encoding="utf-8") for path in files]
    sizes = {str(path.relative_to(SOURCE)): lines(path) for path in files}
    imports = {name: imported_names(source) for name, source in zip(sizes, sources, strict=True)}
    functions = sorted(length for source in sources for length in function_lengths(source))
    packages = Counter[str]()
    for name, size in sizes.items():
        packages[name.split("/")[0] if "/" in name else "(top)"] += size
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    results = [path for path in tracked if path.is_relative_to(ROOT / "docs" / "results")]
    return {
        "lines in src": sum(sizes.values()),
        **{f"  {name}": size for name, size in packages.most_common()},
        "files in src": len(files),
        "lines of the largest file": max(sizes.values()),
        f"  {max(sizes, key=sizes.__getitem__)}": "",
        "imported names per file, median": statistics.median(imports.values()),
        "imported names per file, largest": max(imports.values()),
        f"  {max(imports, key=imports.__getitem__)}": "",
        "comment lines (%)": round(100 * sum(map(comment_lines, sources)) / sum(sizes.values()), 1),
        "lines per function, median": statistics.median(functions),
        "lines per function, 90 % below": functions[len(functions) * 9 // 10],
        "lines per function, largest": functions[-1],
        "tracked files": len(tracked),
        "tracked MB": round(sum(path.stat().st_size for path in tracked) / 1e6, 1),
        "MB in docs/results": round(sum(path.stat().st_size for path in results) / 1e6, 2),
        "lines of README.md": lines(ROOT / "README.md"),
    }


def frames_to(function: str, run: Callable[[], Any]) -> list[str]:
    """Functions of ours on the stack when `function` is first called, outermost first."""
    found: list[str] = []

    def hook(frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or found or frame.f_code.co_name != function or not _ours(frame):
            return
        caller: FrameType | None = frame
        while caller is not None:
            # Python 3.12 and up have no frames for comprehensions.
            if _ours(caller) and not caller.f_code.co_name.endswith("comp>"):
                found.append(f"{Path(caller.f_code.co_filename).stem}.{caller.f_code.co_qualname}")
            caller = caller.f_back

    sys.setprofile(hook)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found[::-1]


def _ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(str(SOURCE))


def dynamic() -> dict[str, Any]:
    """Frames of a tiny training and of tiny samplings."""
    from anyorder.cli.main import main

    def command(*arguments: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            code = main(arguments)
        if code:
            raise RuntimeError(f"anyorder {' '.join(arguments)}: {errors.getvalue()[-2000:]}")

    with tempfile.TemporaryDirectory() as name:
        at = Path(name).joinpath
        command("data", f"out={at('data')}", "max_train=16", "max_test=8", "size=[16,16]")
        vq = "channels=8 multipliers=1,1,2 groups=1 res_blocks=1 attention=false vocab_size=16 code_dim=4"
        short = ("train.steps=1", "train.batch_size=4", "train.eval_every=0")
        settings = [f"model.{setting}" for setting in vq.split()]
        command("tokenizer", f"out={at('vq')}", f"data={at('data')}", *settings, *short)
        command("tokens", f"out={at('tokens')}", f"data={at('data')}", f"tokenizer={at('vq')}")
        model = ("model.depth=1", "model.width=32", "model.heads=2")
        train = ("train", f"out={at('model')}", f"tokens={at('tokens')}", *model, *short)
        made = (f"model={at('model')}", f"tokens={at('tokens')}", f"tokenizer={at('vq')}")
        found = {
            "frames from train to the loss": frames_to("token_nll", lambda: command(*train)),
            "frames from sample (stage) to score": frames_to(
                "score", lambda: command("sample", f"out={at('samples')}", *made, "num_images=2")
            ),
            "frames from sample (pipeline) to score": frames_to(
                "score", lambda: command("sample", "pipeline=fashion32", f"out={at('images')}")
            ),
        }
    return {
        k: v
        for name, frames in found.items()
        for k, v in ((name, len(frames)), (f"  {' > '.join(frames)}", ""))
    }


def main(arguments: list[str]) -> int:
    """Print everything; returns the exit code."""
    shape = static() | ({} if "--static" in arguments else dynamic())
    missed = []
    for name, value in shape.items():
        limit = LIMITS.get(name)
        if limit is not None and value > limit:
            missed.append(name)
        beside = "" if limit is None else f"  <= {limit:,}{'  MISSED' if name in missed else ''}"
        print(f"{name:40} {value:>8,}{beside}" if value != "" else name)
    if missed:
        print(f"{len(missed)} of {len(LIMITS)} limits do not hold: {'; '.join(missed)}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
