"""The computer a run was trained on: system, processor, cores, memory and devices, by name and size.

It names no host and no user, and tries nothing out: what works here is for `alignkit doctor` to find.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

_GIB = 2**30


def describe_hardware() -> dict[str, Any]:
    """Return system, processor, cores, memory in bytes and torch's devices by name; loads torch."""
    return {
        "system": platform.platform(terse=True),
        "processor": _name_processor(),
        "cores": count_cores(),
        "memory_bytes": memory_bytes(),
        "devices": describe_devices(),
    }


def _name_processor() -> str:
    """Return the name of the processor as Linux tells it, else as Python does."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def count_cores() -> int:
    """Return the cores this process may use, which a container or a scheduler can make fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Return the host memory this process may use: physical, or the control group's limit where that is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(physical, int(text)) if text.isdigit() else physical


def describe_devices() -> dict[str, str]:
    """Return torch's devices by name with their memory; loads torch."""
    import torch

    devices = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / _GIB:.1f} GiB"
        devices[f"cuda:{index}"] = f"{properties.name}, {memory}, compute capability {capability}"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU, shared memory"
    threads = torch.get_num_threads()
    devices["cpu"] = f"{threads} thread" if threads == 1 else f"{threads} threads"
    return devices
