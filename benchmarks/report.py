"""What every benchmark says about itself: the machine, the date, and a file under results/."""

from __future__ import annotations

import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"


def save(name: str, **results: Any) -> Path:
    """Write ``results/NAME-DATE.json``."""
    RESULTS.mkdir(exist_ok=True)
    today = date.today().isoformat()
    path = RESULTS / f"{name}-{today}.json"
    path.write_text(json.dumps({"date": today, "machine": machine(), **results}, indent=2) + "\n")
    return path
