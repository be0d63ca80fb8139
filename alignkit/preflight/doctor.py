"""`alignkit doctor`: versions, devices, memory, and which kinds of training really work here."""

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from alignkit.errors import EnvironmentProblem
from alignkit.runs.record import count_cores, describe_devices, memory_bytes

# Older versions load hostile files whatever we do, so they are refused whatever else the bounds say:
# torch CVE-2025-32434 and CVE-2026-24747 (weights_only), transformers CVE-2026-4372, CVE-2026-5241 and
# CVE-2026-1839 (code from the hub without trust), jinja2 CVE-2025-27516 (sandbox), PyYAML CVE-2020-14343.
SAFE_SINCE = {"torch": "2.10", "transformers": "5.3", "jinja2": "3.1.6", "pyyaml": "5.4"}
_GIB = 2**30
# Secrets are shown as set or not, never by value.
_SECRET = ("HF_TOKEN", "WANDB_API_KEY")
_WATCHED = (
    "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF", "RANK", "WORLD_SIZE", "WANDB_MODE", "ALIGNKIT_DEBUG")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Library:
    """One library: what is installed and what alignkit accepts."""

    name: str
    installed: str | None
    accepted: str  # a version specifier, "" for any
    extra: str | None  # the extra it belongs to; None for what alignkit cannot do without
    problem: str | None


@dataclass(frozen=True, slots=True)
class Ability:
    """One thing a recipe may ask for, whether it works here, and if not, why and what to do."""

    name: str
    works: bool
    note: str


Table = tuple[str, list[str], list[list[str]]]  # title, column names, rows


@dataclass(frozen=True)
class DoctorReport:
    """What was found; `torch_problem` says why torch would not load, and then nothing that needs it was tried."""

    system: dict[str, str]
    variables: dict[str, str]
    libraries: list[Library]
    devices: dict[str, str]
    abilities: list[Ability]
    torch_problem: str | None

    def problems(self) -> list[str]:
        """What stops alignkit from working at all; a missing extra or ability does not."""
        found = [library.problem for library in self.libraries if library.extra is None and library.problem]
        return found + ([self.torch_problem] if self.torch_problem else [])

    def error(self) -> EnvironmentProblem | None:
        """The error to end with, or None when alignkit can work here."""
        problems = self.problems()
        return EnvironmentProblem("\n".join(problems)) if problems else None

    def tables(self) -> list[Table]:
        libraries = []
        for library in self.libraries:
            missing = library.extra and library.installed is None
            state = "ok" if library.problem is None else "optional, missing" if missing else "problem"
            libraries.append([library.name, library.installed or "-", library.accepted or "any", state])
        abilities = [[ability.name, "yes" if ability.works else "no", ability.note] for ability in self.abilities]
        tables: list[Table] = [
            ("This computer", ["what", "found"], [[*fact] for fact in {**self.system, **self.devices}.items()]),
            ("Environment variables", ["name", "value"], [[*variable] for variable in self.variables.items()]),
            ("Libraries", ["name", "installed", "accepted", "state"], libraries),
            ("What works here", ["what", "works", "how, or why not"], abilities),
        ]
        return [table for table in tables if table[2]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"problems": self.problems()}


def examine(directory: Path = Path("runs")) -> DoctorReport:
    """Look at everything; loads torch and bitsandbytes, which takes a few seconds."""
    libraries, problem = read_libraries(), None
    devices, abilities = dict[str, str](), list[Ability]()
    try:
        devices = describe_devices()
        import torch

        for number in range(torch.cuda.device_count()):
            devices[f"cuda:{number}"] += f", {torch.cuda.mem_get_info(number)[0] / _GIB:.1f} GiB free"
        abilities = try_abilities()
    except (ImportError, OSError) as error:  # not installed, or a shared library that does not load
        problem = f"torch does not load: {error}"
    return DoctorReport(describe_system(directory), describe_variables(), libraries, devices, abilities, problem)


def read_libraries() -> list[Library]:
    """Look at every library that alignkit declares and at those with a safety floor."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(line) for line in metadata.requires("alignkit") or ()]
    except metadata.PackageNotFoundError:
        raise EnvironmentProblem("alignkit is not installed, only importable; run `pip install -e .`") from None
    core = {need.name: str(need.specifier) for need in declared if need.marker is None}
    core |= {name: "" for name in SAFE_SINCE if name not in {known.lower() for known in core}}
    trackers = [need for need in declared if need.marker is not None and need.marker.evaluate({"extra": "trackers"})]
    wanted: list[tuple[str, str, str | None]] = [(name, specifier, None) for name, specifier in sorted(core.items())]
    found = []
    for name, specifier, extra in [*wanted, *((need.name, str(need.specifier), "trackers") for need in trackers)]:
        try:
            installed: str | None = metadata.version(name)
            problem = judge_version(name, str(installed), specifier)
        except metadata.PackageNotFoundError:
            install = f"pip install 'alignkit[{extra}]'" if extra else f"pip install '{name}{specifier}'"
            installed, problem = None, f"{name} is not installed; {install}"
        found.append(Library(name, installed, specifier, extra, problem))
    return found


def require_versions() -> None:
    """Raise EnvironmentProblem naming every core library that is missing, unsafe or out of bounds."""
    problems = [library.problem for library in read_libraries() if library.extra is None and library.problem]
    if problems:
        raise EnvironmentProblem("\n".join(problems))


def judge_version(name: str, installed: str, specifier: str) -> str | None:
    """Say what is wrong with a version, and which to install."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    floor = SAFE_SINCE.get(name.lower())
    if floor and Version(installed) < Version(floor):
        return f"{name} {installed} has known security holes; alignkit needs {floor}: pip install '{name}>={floor}'"
    if not SpecifierSet(specifier).contains(installed, prereleases=True):
        return f"{name} is {installed}; alignkit needs {specifier}: pip install '{name}{specifier}'"
    return None


def describe_system(directory: Path) -> dict[str, str]:
    """Describe the host; `directory` is where runs would be written."""
    existing = next(place for place in (directory.absolute(), *directory.absolute().parents) if place.is_dir())
    disk = shutil.disk_usage(existing)
    return {
        "python": f"{platform.python_version()} ({sys.executable})", "system": platform.platform(),
        "cores": str(count_cores()), "memory": f"{memory_bytes() / _GIB:.1f} GiB",
        "disk": f"{disk.free / _GIB:.1f} GiB free of {disk.total / _GIB:.1f} at {existing}"}  # fmt: skip


def describe_variables() -> dict[str, str]:
    """List the environment variables that change what a run does, without the value of a secret."""
    found = {name: os.environ[name] for name in _WATCHED if name in os.environ}
    return found | {name: "set" for name in _SECRET if os.environ.get(name)}


def try_abilities() -> list[Ability]:
    """Try what recipes can ask for on the device that `launch.device: auto` would take; loads torch."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"

    def multiply(dtype: torch.dtype) -> None:
        weight = torch.ones(8, 8, device=device, dtype=dtype, requires_grad=True)
        (weight @ weight).sum().backward()
        if weight.grad is None or weight.grad[0, 0].item() != 16:
            raise ArithmeticError("a gradient came out wrong")

    abilities = [
        try_ability("full fine-tuning and LoRA", f"on {device}", lambda: multiply(torch.float32)),
        try_ability("dtype: bfloat16", f"on {device}", lambda: multiply(torch.bfloat16)),
        *(try_quantization(kind, device) for kind in ("nf4", "fp4", "int8")),
        Ability("paged optimizers", device == "cuda", "cuda only; elsewhere ordinary ones take their place"),
    ]
    compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang")
    is_able = compiler is not None and importlib.util.find_spec("triton") is not None
    what = f"with {compiler}" if is_able else "cuda only, with triton and a C compiler (gcc, or what CC names)"
    abilities.append(Ability("kernels of Triton (TRL's fused head)", is_able, what))
    if device == "cuda":
        ones = [torch.ones(1, device=f"cuda:{number}") for number in range(torch.cuda.device_count())]
        what = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))} on {len(ones)}"
        abilities.append(try_ability("several devices", what, lambda: torch.cuda.nccl.all_reduce(ones)))
    trackers = "pip install 'alignkit[trackers]'"
    for name, module, advice in (
        ("attn_implementation: flash_attention_2", "flash_attn", "pip install flash-attn, or kernels; needs cuda"),
        ("use_kernels, attn_implementation of the hub", "kernels", "pip install 'alignkit[kernels]'"),
        *((f"report_to: {tracker}", tracker, trackers) for tracker in ("tensorboard", "trackio", "wandb")),
    ):
        there = importlib.util.find_spec(module) is not None
        abilities.append(Ability(name, there, "installed" if there else f"not installed; {advice}"))
    return abilities


def try_quantization(kind: str, device: str) -> Ability:
    """Quantise a small weight with bitsandbytes and look at what comes back; loads torch and bitsandbytes."""

    def quantise() -> None:
        import torch
        from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_quant, quantize_4bit

        weight = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
        if kind == "int8":
            packed, scale, _ = int8_vectorwise_quant(weight.to(torch.float16))
            restored, most = packed.float() * scale[:, None].float() / 127, 0.02
        else:
            packed, state = quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=True)
            # Half of the widest gap between neighbouring codes, that of fp4 from 2/3 to 1, and some for double
            # quantisation.
            restored, most = dequantize_4bit(packed, state), 0.2
        if (restored - weight).abs().max().item() > most:
            raise ArithmeticError(f"{kind} came out wrong")

    return try_ability(f"quantization: {kind}", f"bitsandbytes on {device}", quantise)


def try_ability(name: str, note: str, action: Callable[[], None]) -> Ability:
    """Do something small; whatever it raises is the finding, for no failure here is a bug of ours to show."""
    try:
        action()
    except Exception as error:
        return Ability(name, False, f"{type(error).__name__}: {str(error).strip().split(chr(10), 1)[0]}")
    return Ability(name, True, note)
