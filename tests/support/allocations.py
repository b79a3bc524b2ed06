"""Measures what a call allocates, with torch's own allocator, so that custom ops and kernels are included."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


@dataclass
class Allocations:
    """Bytes of the largest single allocation, and the highest total above the total at the start."""

    largest: int
    peak: int


def measure_allocations(function) -> Allocations:
    """Run function() on the CPU and return what it allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = [
            e["args"] for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"
        ]
    assert events, "the profiler recorded no allocation"
    start = events[0]["Total Allocated"] - events[0]["Bytes"]
    return Allocations(max(e["Bytes"] for e in events), max(e["Total Allocated"] for e in events) - start)
