"""What this computer offers: cores, memory, disk, devices, and which kinds of training really run on them.

An ability is tried, not looked up, wherever a try costs less than a second. Nothing is downloaded and nothing is
left behind.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alignkit.runs.record import count_cores, memory_bytes

_GIB = 2**30
# Secrets are shown as set or not, never by value.
_SECRET = ("HF_TOKEN", "WANDB_API_KEY")
_WATCHED = (
    "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF", "RANK", "WORLD_SIZE", "WANDB_MODE", "ALIGNKIT_DEBUG",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ability:
    """One thing a recipe may ask for, whether it works here, and if not, why and what to do."""

    name: str
    works: bool
    note: str


def describe_system(directory: Path) -> dict[str, str]:
    """Return facts about the host; `directory` is where runs would be written."""
    existing = next(place for place in (directory.absolute(), *directory.absolute().parents) if place.is_dir())
    disk = shutil.disk_usage(existing)
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "cores": str(count_cores()),
        "memory": f"{memory_bytes() / _GIB:.1f} GiB",
        "disk": f"{disk.free / _GIB:.1f} GiB free of {disk.total / _GIB:.1f} at {existing}",
    }


def describe_variables() -> dict[str, str]:
    """Return the environment variables that change what a run does, without the value of a secret."""
    found = {name: os.environ[name] for name in _WATCHED if name in os.environ}
    return found | {name: "set" for name in _SECRET if os.environ.get(name)}


def try_abilities() -> list[Ability]:
    """Try what recipes can ask for on the device that `launch.device: auto` would take; loads torch."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return [
        _try("full fine-tuning and LoRA", f"on {device}", lambda: _multiply(device, torch.float32)),
        _try("dtype: bfloat16", f"on {device}", lambda: _multiply(device, torch.bfloat16)),
        try_quantization("nf4", device),
        try_quantization("fp4", device),
        try_quantization("int8", device),
        Ability("paged optimizers", device == "cuda", "cuda only; elsewhere ordinary ones take their place"),
        _look_for("attn_implementation: flash_attention_2", "flash_attn", "pip install flash-attn; needs cuda"),
        _look_for("report_to: tensorboard", "tensorboard", "pip install 'alignkit[trackers]'"),
        _look_for("report_to: trackio", "trackio", "pip install 'alignkit[trackers]'"),
        _look_for("report_to: wandb", "wandb", "pip install 'alignkit[trackers]'"),
    ]


def try_quantization(kind: Literal["nf4", "fp4", "int8"], device: str) -> Ability:
    """Quantise a small weight with bitsandbytes and look at what comes back; loads torch and bitsandbytes."""
    action = (lambda: _quantise_8bit(device)) if kind == "int8" else (lambda: _quantise_4bit(device, kind))
    return _try(f"quantization: {kind}", f"bitsandbytes on {device}", action)


def _try(name: str, note: str, action: Callable[[], None]) -> Ability:
    try:
        action()
    except Exception as error:  # whatever it raises is the finding: no failure here is a bug of ours to show
        return Ability(name, False, f"{type(error).__name__}: {str(error).strip().split(chr(10), 1)[0]}")
    return Ability(name, True, note)


def _look_for(name: str, module: str, advice: str) -> Ability:
    there = importlib.util.find_spec(module) is not None
    return Ability(name, there, "installed" if there else f"not installed; {advice}")


def _multiply(device: str, dtype: object) -> None:
    import torch

    weight = torch.ones(8, 8, device=device, dtype=dtype, requires_grad=True)
    (weight @ weight).sum().backward()
    if weight.grad is None or weight.grad[0, 0].item() != 16:
        raise ArithmeticError("a gradient came out wrong")


def _quantise_4bit(device: str, kind: str) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=True)
    # Half of the widest gap between neighbouring codes, that of fp4 from 2/3 to 1, and some for double quantisation.
    if (dequantize_4bit(packed, state) - weight).abs().max().item() > 0.2:
        raise ArithmeticError(f"{kind} came out wrong")


def _quantise_8bit(device: str) -> None:
    import torch
    from bitsandbytes.functional import int8_vectorwise_quant

    weight = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64).to(torch.float16)
    packed, scale, _ = int8_vectorwise_quant(weight)
    restored = packed.float() * scale[:, None].float() / 127
    if (restored - weight.float()).abs().max().item() > 0.02:
        raise ArithmeticError("int8 came out wrong")
