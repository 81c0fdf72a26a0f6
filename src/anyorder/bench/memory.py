"""Memory that work really takes, beside what `fake.measure` counts."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_of_cpu(work: Callable[[], Any]) -> int:
    """Most bytes that `work` allocates and has alive at once, for tensors and within kernels."""
    gc.collect()  # what others left must not be freed, and counted, in between
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would announce its start and stop
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]) for e in events if e.get("name") == "[memory]")
    totals = [change["Total Allocated"] for _, change in changes]
    return max(totals) - (totals[0] - changes[0][1]["Bytes"])
