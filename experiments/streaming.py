"""Time and memory of images that are decoded when they are asked for.

    python experiments/streaming.py decode 1000        # images per second, by number of workers
    python experiments/streaming.py memory 100000      # peak memory of `data cache=false` and `tokens`

Adds what it measured to docs/results/streaming.json. The images are made by seed, in a temporary folder.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anyorder.data.decoding import WORKERS, Reader
from anyorder.data.images import MAX_PIXELS, WHITE
from anyorder.data.rows import slices
from anyorder.data.sources import FolderSource

RESULTS = Path(__file__).parents[1] / "docs/results/streaming.json"
SIZES = {"channels": 8, "multipliers": "[1,1,2]", "groups": 1, "res_blocks": 1, "attention": "false"}
SIZES |= {"z_channels": 8, "vocab_size": 16, "code_dim": 4}
TINY = " ".join(f"model.{name}={value}" for name, value in SIZES.items())


def photos(folder: Path, count: int, size: tuple[int, int]) -> None:
    """JPEG files of about the detail of photographs, of which 50 differ."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    contents = []
    for _ in range(50):
        noise = Image.fromarray(rng.integers(0, 256, (size[0] // 4, size[1] // 4, 3), np.uint8))
        noise.resize(size[::-1], Image.Resampling.BICUBIC).save(folder / "x.jpg", quality=90)
        contents.append((folder / "x.jpg").read_bytes())
    (folder / "x.jpg").unlink()
    for i in range(count):
        (folder / f"{i // 1000:04d}").mkdir(exist_ok=True)
        (folder / f"{i // 1000:04d}/{i:07d}.jpg").write_bytes(contents[i % 50])


def seconds() -> tuple[float, float]:
    """Of the clock, and of processor time of this process and of the workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(each.ru_utime + each.ru_stime for each in used)


def decode(count: int) -> dict[str, Any]:
    """Images of 500 x 375 pixels to 256 x 256, per second of the clock and per second of processor time."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        photos(Path(name) / "photos", count, (375, 500))
        source = FolderSource(Path(name) / "photos", 0)
        names = np.array([os.fsencode(item.name) for item in source.items["train"]])
        decoding = {"size": (256, 256), "fit": "crop", "fill": WHITE, "max_pixels": MAX_PIXELS}
        for workers in (0, 1, 2, 0, 1, 2):
            os.environ[WORKERS] = str(workers)
            begin = seconds()
            for block in Reader(source, names, decoding).stream(slices(count, 64)):
                assert not block.failures
            clock, processor = (b - a for a, b in zip(begin, seconds(), strict=True))
            rates = {
                "per second": round(count / clock, 1),
                "per processor second": round(count / processor, 1),
            }
            found.setdefault(f"{workers} workers", []).append(rates)
    return found


def memory(count: int) -> dict[str, Any]:
    """Largest resident memory in MB of each command over so many images, of it and of its largest worker."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        photos(Path(name) / "photos", count, (24, 24))
        for command in (
            f"data source={name}/photos size=16 cache=false out={name}/data",
            f"tokenizer data={name}/data train.steps=1 train.batch_size=4 out={name}/vq {TINY}",
            f"tokens data={name}/data tokenizer={name}/vq out={name}/tokens",
        ):
            watched = [sys.executable, __file__, "watched", *command.split()]
            said = subprocess.run(watched, check=True, capture_output=True, text=True).stdout
            found[command.split()[0]] = json.loads(said.splitlines()[-1])
    return found


def watched(arguments: list[str]) -> dict[str, float]:
    """Run a command in this process; peak memory in MB."""
    from anyorder.cli.main import main

    assert main(arguments) == 0
    sizes = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return dict(zip(("process", "largest worker"), (round(size / 1024) for size in sizes), strict=True))


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "watched":
        print(json.dumps(watched(rest)))
    else:
        count = int(rest[0])
        known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        load = round(os.getloadavg()[0], 1)
        known[f"{what} {count}"] = {"load average": load, **{"decode": decode, "memory": memory}[what](count)}
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        print(json.dumps(known, indent=1))
