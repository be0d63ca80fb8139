"""From a resolved stage to TRL's config object: what the recipe asks for, and what alignkit insists on.

It builds no model and reads no data. Why each switch is set: reliability.md's list is upstream behaviour we measured.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from alignkit.errors import EnvironmentProblem, RecipeError
from alignkit.recipe import Stage

_Config = TypeVar("_Config", bound=TrainingArguments)


def pick_device(stage: Stage) -> str:
    """Return cuda, mps or cpu: what the recipe says, else what is there.

    Raises EnvironmentProblem when the device asked for is not available.
    """
    wanted = stage.launch.device
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, there in available.items() if there)
    if not available[wanted]:
        raise EnvironmentProblem(
            f"{stage.where('launch.device')}: launch.device is {wanted}, which torch {torch.__version__} does not see "
            "here; use auto or cpu, or run `alignkit doctor`"
        )
    return wanted


def world_size() -> int:
    """Return the number of processes a launcher started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def micro_batch_size(stage: Stage) -> int:
    """Return the rows per forward pass: the recipe's, or for auto the largest divisor of the share up to 8.

    Raises RecipeError when the global batch cannot be divided evenly.
    """
    options = stage.options
    share, rest = divmod(options.batch_size, world_size())
    wanted = options.micro_batch_size
    largest = max(size for size in range(1, 9) if share % size == 0)
    micro = largest if wanted == "auto" else wanted
    if stage.is_unpaired and micro == 1:
        raise RecipeError(
            f"{stage.name}.batch_size is {options.batch_size}, of which one row fits a forward pass; KTO estimates its "
            "KL term across rows: make it a multiple of a number from 2 to 8, or set micro_batch_size",
            where=stage.where(f"{stage.name}.batch_size"),
        )
    if rest or share % micro:
        raise RecipeError(
            f"{stage.name}.batch_size is {options.batch_size}, which {world_size()} processes with "
            f"micro_batch_size {micro} cannot divide; make it a multiple of {world_size() * micro}",
            where=stage.where(f"{stage.name}.batch_size"),
        )
    return micro


def build_config(stage: Stage, config_class: type[_Config], checkpoints: Path, **fixed: Any) -> _Config:
    """Return the TRL config for this stage; `fixed` are values the method itself decides."""
    device = pick_device(stage)
    micro = micro_batch_size(stage)
    dtype = stage.model.dtype
    bf16 = dtype == "bfloat16" or (dtype == "auto" and device == "cuda" and torch.cuda.is_bf16_supported())
    names = {field.name for field in dataclasses.fields(config_class)}
    values: dict[str, Any] = {
        # A loss that is not finite must be seen, not averaged away; the guard stops before the optimizer step.
        "logging_nan_inf_filter": False,
        # Upstream rotates before we have sealed the new checkpoint, and by mtime; we rotate ourselves, by step.
        "save_total_limit": None,
        "save_strategy": "steps",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        # On CPU there is nothing to pin or to overlap, and a worker would only fight for the cores.
        "dataloader_pin_memory": device == "cuda",
        "remove_unused_columns": False,
        "per_device_eval_batch_size": micro,
        "logging_first_step": True,
    }
    values |= {key: value for key, value in stage.trainer.items() if key in names}
    values |= {
        "output_dir": str(checkpoints),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": stage.options.batch_size // world_size() // micro,
        "seed": stage.seed,
        "use_cpu": device == "cpu",
        "bf16": bf16,
        "fp16": dtype == "float16",
        **fixed,
    }
    return config_class(**values)
