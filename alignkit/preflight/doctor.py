"""`alignkit doctor`: versions, devices, memory, and which kinds of training really work here. `alignkit doctor resume`:
whether a killed run of a recipe goes on exactly, tried with a tiny model on a few rows."""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from alignkit.errors import EnvironmentProblem, ModelError, Problem, RecipeError, RewardError, RunError
from alignkit.models.files import find_model_dir
from alignkit.recipe import Recipe, resolve
from alignkit.recipe.methods import FEEDBACK, PpoOptions
from alignkit.recipe.schema import BUILTIN_REWARD
from alignkit.runs.directory import RunDir, newest_step
from alignkit.runs.files import describe_files, read_lines
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
_STEPS, _ROWS, _TOKENS, _SMALL_BYTES = 20, 200, 16, 200 << 20
_TEACHER = """
name: teacher
model: {path: builtin:tiny-gpt2}
sft: {data: {path: builtin:instructions, max_rows: 32}, batch_size: 8, samples: {num: 0}}
"""
_OF_THE_CLOCK = ("runtime", "second", "time")  # in the names of metrics that differ between two equal runs


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


def list_stages(recipe: Recipe, name: str | None, *, trust_code: bool = False) -> list[str]:
    """The stage to try, or without `name` all that train; raises RewardError for rewards that are code."""
    names = [each for each in recipe.stage_names if recipe.stages[each].options.method not in FEEDBACK]
    if not names or (name is not None and name not in names):
        raise RecipeError(f"stages that train can be tried: {', '.join(names) or 'the recipe has none'}")
    names = names if name is None else [name]
    from alignkit.rewards.kinds import kind_of

    refused: list[Problem] = []
    for stage in (resolve(recipe, each, trust_code=trust_code) for each in names):
        for key, source in stage.rewards:
            try:
                if source.function or source.verify == "code":
                    kind_of(source).check(source, stage, key)
            except RewardError as error:
                refused += error.problems
    if refused:
        raise RewardError(refused)
    return names


def prove_resume(recipe: Recipe, name: str, *, trust_code: bool = False) -> dict[str, Any]:
    """Train a stage twice, killed and resumed the second time, and compare; `differences` is empty where all is equal.
    The settings are the recipe's, but for models that are small, few rows and steps, and rewards that need no others;
    `instead` has the keys whose own values were not tried."""
    stage = resolve(recipe, name, trust_code=trust_code)
    path, options = stage.model.path, stage.training
    rows = [source.model_dump(exclude_unset=True) | {"max_rows": _ROWS} for source in options.data]
    own: dict[str, Any] = {
        "data": rows, "save_steps": 1, "logging_steps": 1, "batch_size": 8, "micro_batch_size": 4,
        "samples": {"num": 0}, "report_to": "none", **({"start_from": None} if options.start_from else {}),
    }  # fmt: skip
    # A try is measured and pushed nowhere.
    own |= {key: None for key in ("push_to", "push_every", "evaluate_every") if getattr(options, key) is not None}
    steps, instead = _STEPS, dict[str, Any]()
    if isinstance(options, PpoOptions):
        answers = -(-8 // options.answers_per_prompt) * options.answers_per_prompt
        own |= {"batch_size": answers, "micro_batch_size": answers // 2 if answers % 2 == 0 else answers}
        own |= {"total_episodes": None, "max_new_tokens": min(options.max_new_tokens, _TOKENS)}
        own |= {"min_new_tokens": None} if (options.min_new_tokens or 0) > _TOKENS else {}
        steps = 4 * options.ppo_epochs * options.minibatches  # four rollouts
        for key in ("reward", "gold"):
            given = getattr(options, key) or ()
            are_kept = [bool(one.function or one.verify) or _is_small(one.model) for one in given]
            if not all(are_kept):
                instead[key] = [
                    one.model_dump(exclude_unset=True) if kept else {"model": BUILTIN_REWARD, "weight": one.weight}
                    for one, kept in zip(given, are_kept, strict=True)
                ]
        instead |= {"value_init": "policy"} if "reward" in instead and options.value_init == "reward" else {}
        if options.generation.engine == "vllm":
            instead["generation"] = {"engine": "transformers"}
    is_small = _is_small(path) or stage.model.init == "scratch"
    teacher = getattr(options, "teacher", None)
    if teacher is not None:
        is_small &= _is_small(teacher.model)
        kept = teacher.model_dump(exclude_unset=True, exclude={"url"})
        own["teacher"] = kept | {"max_new_tokens": min(teacher.max_new_tokens, _TOKENS)} if teacher.on_policy else kept
    changes: dict[str, Any] = {"launch": {"device": stage.launch.device}}
    if not is_small:
        path = "builtin:tiny-llama"
        changes["model"] = {"path": path}
        own |= {"max_length": 256} if stage.method != "ppo" else {}
        instead |= {"truncate": None} if getattr(options, "truncate", None) else {}
    alignkit = [sys.executable, "-m", "alignkit"]
    with tempfile.TemporaryDirectory(prefix="alignkit-resume-") as folder:
        if teacher is not None and not is_small:  # another one, of the same tokens
            Path(folder, "teacher.yaml").write_text(_TEACHER, encoding="utf-8")
            _run([*alignkit, "sft", "--recipe", f"{folder}/teacher.yaml", "--out", f"{folder}/teacher"])
            instead["teacher"] = own["teacher"] | {"model": f"{folder}/teacher"}
        changes |= {f"{name}.{key}": value for key, value in ({"max_steps": steps} | own | instead).items()}
        command = [*alignkit, stage.method, "--recipe", recipe.path, "--stage", name]
        command += ["--trust-code"] if trust_code else []
        command += [word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        _run([*command, "--out", str(whole)])
        process = subprocess.Popen([*command, "--out", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and (newest_step(killed / "checkpoints") or 0) < steps // 2:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        step = newest_step(killed / "checkpoints")
        _run([*command, "--out", str(killed)])
        differences = list(find_differences(whole, killed))
    tried = {"stage": name, "model": path, "steps": steps, "killed_at": step, "instead": sorted(instead)}
    return tried | {"differences": differences}


def _is_small(model: str | None) -> bool:
    """Whether a model can be trained here in seconds: one that is built in, or a directory of few bytes."""
    try:
        directory = find_model_dir(model) if model and not model.startswith("builtin:") else None
    except (ModelError, RunError):  # of a stage that has not run
        return False
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors")) if directory else 0
    return bool(model) and (str(model).startswith("builtin:") or 0 < size < _SMALL_BYTES)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.rpartition("error: ")[2].strip()[-2000:]
        raise RunError(f"the try ended with exit code {done.returncode}: {said}")


def find_differences(first: Path, second: Path) -> Iterator[str]:
    """Yield where two runs differ first: a metric at a step, and each file of the weights."""
    one, other = ({row["step"]: row for row in read_lines(RunDir(path).metrics)} for path in (first, second))
    for step in sorted({*one, *other}):
        a, b = one.get(step, {}), other.get(step, {})
        keys = [key for key in {**a, **b} if not any(word in key for word in _OF_THE_CLOCK)]
        if key := next((key for key in keys if a.get(key) != b.get(key)), None):
            yield f"{key} at step {step} is {a.get(key)} without and {b.get(key)} with the kill"
            break
    sums = [describe_files(path, (path / "model").glob("*.safetensors")) for path in (first, second)]
    for name in sorted({*sums[0], *sums[1]}):
        if sums[0].get(name, {}).get("crc32") != sums[1].get(name, {}).get("crc32"):
            yield f"{name} has other weights"
