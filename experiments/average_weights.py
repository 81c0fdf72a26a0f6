"""The weights of two trained models of one shape, averaged, as a model that `sample` and `completion` take.

python experiments/average_weights.py runs/fashion64/longer runs/fashion64/ordered-longer OUT
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from anyorder import files

WEIGHTS = "model.safetensors"


def main(first: str, second: str, out: str) -> None:
    """Write OUT, with the settings of the second model."""
    folder = Path(out)
    folder.mkdir(parents=True)
    one, other = (load_file(Path(each) / WEIGHTS) for each in (first, second))
    save_file({name: one[name].lerp(x, 0.5).contiguous() for name, x in other.items()}, folder / WEIGHTS)
    shutil.copy(Path(second) / "config.json", folder)
    manifest: dict[str, Any] = files.read_json(Path(second) / "manifest.json")  # type: ignore[assignment]
    digest = files.sha256(folder / WEIGHTS)
    manifest["files"][WEIGHTS], manifest["fingerprint"], manifest["other_files"] = digest, digest[:16], []
    files.write_json(folder / "manifest.json", manifest)


if __name__ == "__main__":
    main(*sys.argv[1:])
