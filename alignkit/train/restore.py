"""What a resumed run takes from a checkpoint: weights, optimizer, random numbers; by how many processes it was written
does not matter.

It chooses no checkpoint: `runs.checkpoints` has verified that the files are those that were sealed.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState

from alignkit.errors import RunError
from alignkit.models.adapters import TRAINED
from alignkit.models.files import read_shapes
from alignkit.runs.checkpoints import step_of
from alignkit.train import shards

_SETTINGS = frozenset({"weight_decay", "betas", "eps", "initial_lr"})  # of an optimizer's parameter group


def find_fault(checkpoint: Path) -> str | None:
    """Return which file of a sealed checkpoint cannot be loaded, None when all can; large ones are opened, not read."""
    for path in sorted(checkpoint.iterdir()):
        try:
            if path.suffix == ".safetensors":
                read_shapes(path)
            elif path.suffix == ".pt":
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            elif path.name == "trainer_state.json":
                state = TrainerState.load_from_json(str(path))
                if state.global_step != step_of(checkpoint) or not isinstance(state.epoch, int | float):
                    return f"{path.name} is not of step {step_of(checkpoint)}"
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        except Exception as error:  # whatever the libraries raise over a file is the finding
            return f"{path.name} cannot be loaded ({type(error).__name__})"
    return None


def load_weights(model: Any, directory: Path) -> None:
    """Copy the weights of a checkpoint into a model, or into this rank's part of it.

    Raises RunError unless they are the weights of exactly the parameters being trained.
    """
    if isinstance(model, PeftModel):
        own = model.state_dict(keep_vars=True)  # the parameters themselves: ZeRO knows them, not their data
        places = get_peft_model_state_dict(model, own, adapter_name=TRAINED, save_embedding_layers=False)
        saved = load_file(directory / "adapter_model.safetensors")
    else:
        places = model.state_dict(keep_vars=True)
        saved = {}
        for shard in sorted(directory.glob("model*.safetensors")):
            saved |= load_file(shard)
    given = {id(tensor) for name, tensor in places.items() if name in saved}  # tied weights are saved once
    missing = {name for name, tensor in places.items() if name not in saved and id(tensor) not in given}
    differ = sorted(missing | (saved.keys() - places.keys()))
    if differ:
        raise RunError(
            f"does not hold the parameters being trained ({len(differ)} differ, first {differ[0]}); "
            "start over with --force",
            where=str(directory),
        )
    shards.scatter_model(places, saved)


def load_optimizer(trainer: Any, directory: Path) -> None:
    """Load optimizer and schedule, but keep this sitting's settings: a change that was allowed must have its effect.

    That holds for the schedule's length too: its place is that of the rows that were seen, out of all there will be.
    """
    settings = [{key: group[key] for key in _SETTINGS & group.keys()} for group in trainer.optimizer.param_groups]
    schedule = trainer.lr_scheduler
    base_lrs = list(getattr(schedule, "base_lrs", ()))
    shards.scatter_optimizer(trainer, torch.load(directory / "optimizer.pt", map_location="cpu", weights_only=True))
    schedule.load_state_dict(torch.load(directory / "scheduler.pt", map_location="cpu", weights_only=True))
    for group, given in zip(trainer.optimizer.param_groups, settings, strict=True):
        group |= given
    place = trainer.schedule_place
    if base_lrs and isinstance(schedule, LambdaLR):  # a function of the place alone: unchanged, it gives the same rate
        schedule.base_lrs, schedule.last_epoch = base_lrs, schedule.last_epoch if place is None else place
        for group, rate in zip(trainer.optimizer.param_groups, schedule.get_lr(), strict=True):
            group["lr"] = rate
        schedule._last_lr = [group["lr"] for group in trainer.optimizer.param_groups]


def draw_anew(seed: int, step: int, rank: int) -> None:
    """Seed every generator of this process from the run's seed, the step and the rank."""
    drawn = int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
    random.seed(drawn)
    np.random.seed(drawn)
    torch.manual_seed(drawn)
