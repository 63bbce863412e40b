"""What a proof hands back, and how it is written down: figures beside the machine, the commit and the command."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Table:
    """One table of the docs; a cell is text as it shall appear, or a number."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]


@dataclass(frozen=True)
class Proof:
    """figures: every measured number, JSON-able, units in the names. tables: what `<!-- table: part.name -->` shows.
    outputs: terminal output that `<!-- output: part.name -->` shows. missed: each target that was not met, in words,
    with target and figure; a proof that missed one is written all the same, and `make proof` then exits 1.
    """

    figures: dict[str, Any]
    tables: dict[str, Table] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)


def write_result(part: str, proof: Proof, seconds: float, folder: Path = RESULTS) -> Path:
    """Writes `<folder>/<part>.json`; refuses a path of this machine in it, since results are published."""
    result = {
        "part": part,
        "command": f"make proof PART={part}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "seconds": round(seconds, 1),
        **_commit(),
        "machine": machine(),
        "figures": proof.figures,
        "tables": {name: {"columns": table.columns, "rows": table.rows} for name, table in proof.tables.items()},
        "outputs": proof.outputs,
        "missed": proof.missed,
    }
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if found := machine_path(text):
        raise ValueError(f"the result of '{part}' holds a path of this machine: {found}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{part}.json"
    path.write_text(text, encoding="utf-8")
    return path


def machine_path(text: str) -> str | None:
    """The first absolute path of a machine in the text (home, temporary and work folders, or this checkout's)."""
    match = re.search(r"(?<![\w.~/-])/(?:root|home|Users|tmp|mnt|wo[r]k)/[^\s\"'`)]*", text)
    if match:
        return match.group()
    return str(ROOT) if str(ROOT) in text else None


def machine() -> dict[str, Any]:
    """The machine as a reader needs it to judge a figure: processor, cores, memory, versions, and its GPU."""
    described: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for package in ("torch", "transformers"):
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            described[package] = None
    described["gpu"] = _gpu_name()
    return described


def _commit() -> dict[str, Any]:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Earlier results are not part of what was measured; anything else uncommitted is.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs")
        return {"commit": git("rev-parse", "--short=10", "HEAD"), "uncommitted_changes": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "uncommitted_changes": None}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.lower().startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
