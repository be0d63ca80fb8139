"""Which devices the processes of this node would get, found out without loading torch.

It deliberately tries nothing: whether a device computes is for the worker that is given it.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from alignkit.recipe import Stage

Device = Literal["cpu", "cuda", "mps"]
Precision = Literal["no", "bf16", "fp16"]
_PRECISION_OF: dict[str, Precision] = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def count_cuda(environment: Mapping[str, str] = os.environ) -> int:
    """Return the CUDA devices a process started here would see."""
    present = len(list(Path("/dev").glob("nvidia[0-9]*"))) or len(_ask_nvidia_smi("--list-gpus"))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None or present == 0:
        return present
    count = 0
    for entry in visible.split(","):  # as the driver reads it: everything after a number it does not know is ignored
        name = entry.strip()
        if not name or (name.lstrip("-").isdigit() and not 0 <= int(name) < present):
            break
        count += 1
    return count


def pick_device(stage: Stage) -> Device:
    """Return what `launch.device` means on this machine."""
    wanted = stage.launch.device
    if wanted != "auto":
        return wanted
    if count_cuda():
        return "cuda"
    return "mps" if (platform.system(), platform.machine()) == ("Darwin", "arm64") else "cpu"


def mixed_precision(stage: Stage, device: Device) -> Precision:
    """Return what the launcher is told that matrix products are computed in.

    With nothing given it is bfloat16 on devices that have it, as `model.dtype: auto` says.
    """
    if stage.launch.mixed_precision != "auto":
        return stage.launch.mixed_precision
    if stage.model.dtype != "auto":
        return _PRECISION_OF[stage.model.dtype]
    if device != "cuda":
        return "no"
    found = [float(line) for line in _ask_nvidia_smi("--query-gpu=compute_cap", "--format=csv,noheader") if line]
    return "bf16" if all(capability >= 8.0 for capability in found) else "no"


def _ask_nvidia_smi(*arguments: str) -> list[str]:
    """Return the lines of an answer, none where the tool is absent or does not work."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        answer = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in answer.stdout.splitlines()] if answer.returncode == 0 else []
