"""Keeping a benchmark's figures: a dated JSON under results/ with machine and commit, and the line that judges them."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def record(name: str, ratio: float, limit: float, figures: dict[str, Any], *, is_kept: bool = True) -> int:
    """Write results/NAME-DATE.json, print `NAME: ratio R (limit L)`; return 1 where the ratio is past its limit."""
    now = datetime.now(UTC)
    document = {
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": processor(),
        "cores": os.cpu_count(),
        "ratio": ratio,
        "limit": limit,
        **figures,
    }
    if is_kept:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}-{now.date()}.json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"{name}: ratio {ratio:.2f} (limit {limit:g})")
    return 1 if ratio > limit else 0


def processor() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """Return the commit that is checked out, marked where files differ from it."""
    describe = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    return subprocess.run(describe, cwd=folder, capture_output=True, text=True, check=False).stdout.strip()
