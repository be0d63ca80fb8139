"""How much disk a stage needs and whether it is there, from tensor shapes alone.

An estimate from above: it takes every optimizer for AdamW, whose state is two values per trained parameter.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.errors import EnvironmentProblem
from alignkit.models.files import find_model_dir, read_shapes
from alignkit.recipe import Stage
from alignkit.recipe.schema import LoraOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Shapes = Mapping[str, Sequence[int]]

_GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Layers that all-linear leaves alone, by the names that transformers gives them.
_NOT_LINEAR = ("embed", "wte", "wpe", "lm_head", "score", "norm")


def read_model_shapes(stage: Stage, tokenizer: PreTrainedTokenizerFast) -> Shapes | None:
    """Return name -> shape of the model a stage trains; None for a hub id that is not on this machine yet.

    Reads headers, or builds the model without memory for its weights.
    """
    import torch

    from alignkit.models.bases import draw_base, is_random

    if not stage.start_dir and is_random(stage):
        with torch.device("meta"):
            model = draw_base(stage, tokenizer, torch.float32)
        return {name: list(weight.shape) for name, weight in model.named_parameters()}
    directory = _find_weights(stage.start_dir or stage.model.path)
    if directory is None:
        return None
    files = sorted(directory.glob("*.safetensors"))
    return {name: shape for file in files for name, shape in read_shapes(file).items()}


def count_trained(shapes: Shapes, lora: LoraOptions | None) -> int:
    """Return the number of trained parameters: all of them, or those of a new adapter."""
    if any("lora_" in name for name in shapes):  # the shapes of an adapter that is trained on
        return sum(prod(shape) for shape in shapes.values())
    if lora is None:
        return sum(prod(shape) for shape in shapes.values())
    whole = sum(prod(shape) for name, shape in shapes.items() if _is_named(name, lora.modules_to_save))
    return whole + sum(
        lora.r * (shape[0] + shape[1]) for name, shape in shapes.items() if len(shape) == 2 and _is_target(name, lora)
    )


def checkpoint_bytes(num_trained: int, *, dtype: str) -> int:
    """Return the size of a checkpoint: the trained weights and two optimizer values for each, in one dtype."""
    return 3 * num_trained * _BYTES[dtype]


def require_space(run_dir: Path, needed_bytes: int, *, num_checkpoints: int) -> int:
    """Return the free bytes where the run will be written.

    Raises EnvironmentProblem when fewer than `needed_bytes` are free there.
    """
    existing = next(place for place in (run_dir.absolute(), *run_dir.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise EnvironmentProblem(
            f"{existing} has {free / _GIB:.2f} GiB free; {num_checkpoints} checkpoints and the final model need about "
            f"{needed_bytes / _GIB:.2f} GiB; free some, lower keep_checkpoints, or choose another --out"
        )
    return free


def _find_weights(source: str) -> Path | None:
    directory = find_model_dir(source)
    if directory is not None:
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _is_target(name: str, lora: LoraOptions) -> bool:
    if lora.target_modules == "all-linear":
        return not any(part in name for part in _NOT_LINEAR)
    if isinstance(lora.target_modules, str):
        return lora.target_modules in name
    return _is_named(name, lora.target_modules)


def _is_named(name: str, modules: Sequence[str]) -> bool:
    return any(name == f"{module}.weight" or name.endswith(f".{module}.weight") for module in modules)
