"""The machine that is measured, and the folder of its results."""

from __future__ import annotations

import datetime
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from ossia.ops.cpu import CpuOps


def machine() -> dict[str, Any]:
    processor = "unknown"
    with suppress(OSError), open("/proc/cpuinfo") as file:
        processor = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    return {"processor": processor, "isa": CpuOps(1).isa, "cores": os.cpu_count()}


def keep(name: str, out: dict[str, Any]) -> Path:
    """Write a result of today; parts of an earlier run of the day that this one has not repeated stay."""
    processor = re.sub(r"\W+", "-", f"{out['machine']['processor']} {out['machine']['isa']}").strip("-").lower()
    folder = Path(__file__).parent / "results" / processor
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.date.today().isoformat()}-{name}.json"
    if path.exists():
        out = json.loads(path.read_text()) | out
    path.write_text(json.dumps(out, indent=1) + "\n")
    return path
