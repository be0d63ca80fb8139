"""From a resolved stage to TRL's config object: what the recipe asks for, and what alignkit insists on."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from alignkit.errors import RecipeError
from alignkit.models.load import pick_device
from alignkit.recipe import Stage
from alignkit.recipe.stage import check_batch
from alignkit.train.ranks import uses_fsdp, world_size

_Config = TypeVar("_Config", bound=TrainingArguments)
_LARGEST_MICRO_BATCH = 8


def micro_batch_size(stage: Stage) -> int:
    """Rows per forward pass: the recipe's, or for auto the largest divisor of the share up to 8.

    For KTO, auto takes 8 over all processes together: its KL term is estimated from the rows that all of them have in
    one forward pass, which then are the same rows however many processes there are.
    Raises RecipeError when the global batch cannot be divided evenly.
    """
    if problem := check_batch(stage, world_size()):
        raise RecipeError(problem)
    options = stage.training
    share = options.batch_size // world_size()
    wanted = options.micro_batch_size
    limit = max(_LARGEST_MICRO_BATCH // world_size(), 2) if stage.is_unpaired else _LARGEST_MICRO_BATCH
    largest = max(size for size in range(1, limit + 1) if share % size == 0)
    micro = largest if wanted == "auto" else wanted
    if stage.is_unpaired and micro == 1:
        raise RecipeError(
            f"{stage.name}.batch_size is {options.batch_size}, of which one row fits a forward pass; KTO estimates its "
            "KL term across rows: make it a multiple of a number from 2 to 8, or set micro_batch_size",
            where=stage.where(f"{stage.name}.batch_size"),
        )
    return micro


def build_config(stage: Stage, config_class: type[_Config], checkpoints: Path, **fixed: Any) -> _Config:
    """Fill TRL's config for a stage; `fixed` are values the method itself decides."""
    device = pick_device(stage.launch.device, where=stage.where("launch.device"))
    micro, wanted = micro_batch_size(stage), stage.training.micro_batch_size
    precision, dtype = stage.launch.mixed_precision, stage.model.dtype  # of matrix products: no, bf16 or fp16
    if precision == "auto" and (
        dtype == "bfloat16" or (dtype == "auto" and device == "cuda" and torch.cuda.is_bf16_supported())
    ):
        precision = "bf16"
    elif precision == "auto":
        precision = "fp16" if dtype == "float16" else "no"
    types = {field.name: str(field.type) for field in dataclasses.fields(config_class)}
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
        "logging_first_step": True,
        # Every trained parameter takes part in every step; looking for others costs a walk over the graph each time.
        "ddp_find_unused_parameters": False,
        "ddp_timeout": int(stage.launch.timeout_seconds),
    }
    # A whole number for a float field: TRL copies router_aux_loss_coef into configs that refuse an int. Counts of steps
    # stay what they are: they are shares below 1 only.
    values |= {
        key: float(value) if type(value) is int and "float" in types[key] and not key.endswith("_steps") else value
        for key, value in stage.trainer.items()
        if key in types
    }
    values |= {
        "output_dir": str(checkpoints),
        "per_device_train_batch_size": micro,
        # Held-out rows per forward pass do not depend on the number of processes.
        "per_device_eval_batch_size": int(
            stage.trainer.get("per_device_eval_batch_size") or (_LARGEST_MICRO_BATCH if wanted == "auto" else wanted)
        ),
        "gradient_accumulation_steps": stage.training.batch_size // world_size() // micro,
        "seed": stage.seed,
        "use_cpu": device == "cpu",
        "ddp_backend": "gloo" if device == "cpu" and world_size() > 1 else None,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
    }
    # A launcher that has FSDP recompute activations must not find transformers doing it too; `shards.set_up` sees to
    # it later.
    by_fsdp = uses_fsdp() and os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true"
    recompute = False if by_fsdp else stage.launch.activation_checkpointing
    if recompute is not None:
        values |= {"gradient_checkpointing": recompute, "activation_checkpointing": recompute}
    return config_class(**(values | fixed))
