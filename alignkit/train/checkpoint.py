"""Checkpoints of every trainer: one layout, whatever and how many processes trained them, sealed when whole, and read
back exactly. Upstream (transformers 5.23) names the files; `runs.directory` chooses the one to go on from."""

import copy
import json
import os
import shutil
import threading
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainerState, set_seed

from alignkit.errors import DiskError, NonFiniteError, RunError
from alignkit.models.adapters import TRAINED
from alignkit.models.files import read_shapes
from alignkit.recipe.methods import TrainOptions
from alignkit.runs.directory import (
    MANIFEST,
    SEALED,
    expected_bytes,
    list_checkpoints,
    read_manifest,
    rotate_checkpoints,
    seal_checkpoint,
    step_of,
)
from alignkit.runs.files import describe_bytes, disk_failures, free_bytes, write_json
from alignkit.runs.record import spare_memory_bytes
from alignkit.runs.signals import StopFlag, pulse
from alignkit.train import ranks


@dataclass
class Watch:
    """What a trainer knows beyond its settings: this sitting of the run, and how earlier ones went."""

    facts: dict[str, Any] = field(default_factory=dict)  # goes into every manifest: fingerprint, versions, seed
    stop: StopFlag = field(default_factory=StopFlag)
    num_tokens: int = 0  # trained in earlier sittings of this run
    earlier_seconds: float = 0.0  # that those took, as far as they were saved
    began: float = field(default_factory=time.monotonic)  # this one
    batches: list[tuple[int, int]] = field(default_factory=list)  # of earlier sittings: (last step, rows in each)
    window: list[dict[str, Any]] = field(default_factory=list)  # what each rank has measured since the last log
    place: os.stat_result | None = None  # of the run directory

    @property
    def seconds(self) -> float:
        """How long the run has taken in all sittings."""
        return self.earlier_seconds + time.monotonic() - self.began


class Checkpointed(Trainer):
    """Mixin over TRL's trainers."""

    watch: Watch
    settings: TrainOptions
    batch_rows: int
    evaluation_cut = False  # by a request to stop: the next sitting makes up for it
    schedule_place: int | None = None  # of a resumed run, in steps of this batch size; None: its own
    _metrics: dict[str, dict[str, list[float]]]  # TRL's: mode -> name -> one value per forward pass
    _weights: dict[str, list[float]]  # of the training metrics since the last log, where rows do not say it
    _save_error: Exception | None = None  # of this rank's weights, until all ranks may hear of it
    _optimizer_state: dict[str, Any] | None = None  # rank 0's, between being gathered and being written
    _writer: threading.Thread | None = None  # rank 0's, which seals the newest checkpoint
    _unwritten: Exception | None = None  # why it could not, until all ranks may hear of it

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._save(output_dir, state_dict=ranks.gather_model(self))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save weights and tokenizer, without the frozen adapters and without `training_args.bin`, a pickle."""
        if not self.args.should_save:
            return
        # Checkpoints keep the names the model has in memory; `model/` gets the published ones (they differ for MoE).
        extra: dict[str, Any] = {"save_original_format": False}
        if isinstance(self.model, PeftModel):
            # "auto" would ask the hub whether the base's vocabulary has grown.
            extra = {"selected_adapters": [TRAINED], "save_embedding_layers": False}
        try:
            self.model.save_pretrained(output_dir, state_dict=state_dict, **extra)
            self.processing_class.save_pretrained(output_dir)
        except Exception as error:  # raised after the optimizer is gathered, for which the other ranks wait
            self._save_error = error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = ranks.gather_optimizer(self)
        error, self._save_error = self._save_error, None
        if error is not None:
            raise error
        self._optimizer_state = state
        if state is not None:
            with warnings.catch_warnings():  # torch warns that a scheduler is saved apart from its optimizer
                warnings.simplefilter("ignore")
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        directory, step = Path(self.args.output_dir), self.state.global_step
        checkpoint = directory / f"checkpoint-{step}"
        pulse("saving", step)
        self.settle()
        self.refuse_bad_weights()
        # So that a resumed run logs what an undisturbed one would have.
        metrics = {name: [float(value) for value in values] for name, values in self._metrics["train"].items()}
        window = {"loss": float(self._tr_loss), "since": self._globalstep_last_logged}
        self.watch.window = ranks.gather({**window, "metrics": metrics, "weights": self._weights})

        def make_way() -> bool:
            place, here = self.watch.place, directory.parent
            if place and not (here.exists() and os.path.samestat(here.stat(), place)):
                raise DiskError(f"{here}: the run directory was moved or deleted while the run went on")
            if (checkpoint / MANIFEST).exists():
                return False
            self.require_room(directory)
            shutil.rmtree(checkpoint, ignore_errors=True)
            return True

        def write() -> None:
            # Each rank writes its random numbers, rank 0 all else. The last thing in it that all ranks wait for is the
            # optimizer's state: no error leaves before that.
            with disk_failures(directory, checkpoint.name):
                Trainer._save_checkpoint(self, model, trial)  # past TRL's, which writes a model card each time

        def seal(state: Any, facts: dict[str, Any], best: int | None) -> None:
            try:
                with disk_failures(directory, checkpoint.name):
                    torch.save(state, checkpoint / "optimizer.pt")
                    seal_checkpoint(checkpoint, facts)
                    write_json(directory.parent / SEALED, {"step": step})  # should all vanish
                    rotate_checkpoints(directory, keep=self.settings.keep_checkpoints, best=best)
            except Exception as error:  # for `settle` to raise
                self._unwritten = error
                if isinstance(error, DiskError):
                    shutil.rmtree(checkpoint, ignore_errors=True)  # ours, and in the way of everything else

        def begin() -> None:
            # The steps to come wait for a copy of the optimizer's state, and for neither the disk nor checksums. Where
            # memory has no room for it, the state is written as it is, before the next step.
            state, self._optimizer_state = self._optimizer_state, None
            facts = copy.deepcopy({  # the steps to come add to the window
                "step": step, "world_size": self.args.world_size,
                "dtypes": sorted({str(p.dtype) for p in self.model.parameters() if p.requires_grad}),
                "num_tokens": self.watch.num_tokens + self.num_trained_tokens, "seconds": round(self.watch.seconds, 3),
                "batches": [*self.watch.batches, (step, self.batch_rows)], "window": self.watch.window,
                "evaluation_cut": self.evaluation_cut, **self.watch.facts,
            })  # fmt: skip
            best = self.state.best_global_step
            if not (self.is_deepspeed_enabled or ranks.is_sharded(self)):  # else it is a copy already
                size = sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor))
                if 2 * size > spare_memory_bytes():
                    return seal(state, facts, best)
                state = ranks.copy_tensors(state)
            # A daemon: a second signal waits for nothing.
            self._writer = threading.Thread(target=seal, args=(state, facts, best), name="checkpoint", daemon=True)
            self._writer.start()

        if not ranks.once(make_way):
            return  # this very step is sealed: an interrupt at a save step, or the last step of a resumed run
        try:
            ranks.attempt(write)
        except DiskError:
            if self.args.should_save:
                shutil.rmtree(checkpoint, ignore_errors=True)
            raise
        ranks.once(begin)
        pulse("saved", step)

    def settle(self) -> None:
        """Wait until the newest checkpoint is sealed; raises on every rank what kept it from that, as DiskError."""

        def look() -> None:
            self.await_disk()
            error, self._unwritten = self._unwritten, None
            if error is not None:
                raise error

        ranks.once(look)

    def await_disk(self) -> None:
        """Wait until the newest checkpoint is sealed or has failed, in this process alone."""
        if self._writer is not None:
            self._writer.join()

    @property
    def num_trained_tokens(self) -> int:
        """Non-padding tokens seen in this sitting, over all ranks."""
        return int(getattr(self, "_total_train_tokens", 0))

    def refuse_bad_weights(self) -> None:
        """Raise NonFiniteError on every rank when an update has left weights that are not finite: too large a step."""
        trained = [ranks.local_part(parameter) for parameter in self.model.parameters() if parameter.requires_grad]
        if ranks.largest(int(not all(bool(weight.isfinite().all()) for weight in trained))):
            what = f"step {self.state.global_step}: the update has left weights that are not finite; nothing of it was "
            what += f"saved, {self.describe_last_good()}. Lower learning_rate or max_grad_norm"
            raise ranks.met_by_all(NonFiniteError(what))

    def describe_last_good(self) -> str:
        """Name the checkpoint that a run which must end falls back on."""
        self.await_disk()
        kept = list_checkpoints(Path(self.args.output_dir))
        return f"the last good checkpoint is {kept[0].name}" if kept else "no checkpoint was saved yet"

    def require_room(self, directory: Path) -> None:
        """Raise DiskError when the next checkpoint would not fit the disk."""
        trainable = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        needed = expected_bytes(directory, first_guess=3 * trainable)
        if (free := free_bytes(directory)) < needed:
            what = f"the next checkpoint needs about {describe_bytes(needed)} and {describe_bytes(free)} are free; "
            what += "earlier checkpoints are untouched: make room and run the same command again"
            raise DiskError(f"{directory}: {what}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Copy the sealed weights into the model, or this rank's part of it; dtypes and frozen parts stay as they are.
        Upstream reloads adapters through `load_adapter`, which changes bfloat16 ones to float32, and for full models
        only logs missing keys. Raises RunError unless they are the weights of exactly the parameters being trained."""
        directory = Path(resume_from_checkpoint)
        places = self.model.state_dict(keep_vars=True)  # the parameters themselves: ZeRO knows them, not their data
        saved: dict[str, torch.Tensor] = {}
        if isinstance(self.model, PeftModel):
            places = get_peft_model_state_dict(self.model, places, adapter_name=TRAINED, save_embedding_layers=False)
        for shard in sorted(directory.glob("*model*.safetensors")):
            saved |= load_file(shard)
        given = {id(tensor) for name, tensor in places.items() if name in saved}  # tied weights are saved once
        missing = {name for name, tensor in places.items() if id(tensor) not in given}
        if differ := sorted(missing | (saved.keys() - places.keys())):
            what = f"does not hold the parameters being trained ({len(differ)} differ, first {differ[0]}); start over"
            raise RunError(f"{what} with --force", where=str(directory))
        ranks.scatter_model(places, saved)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load optimizer and schedule, but keep this sitting's settings: a change that was allowed has its effect. That
        holds for the schedule's length too: its place is that of the rows seen, out of all there will be."""
        if checkpoint is None:
            return
        groups, schedule, place = self.optimizer.param_groups, self.lr_scheduler, self.schedule_place
        names = {"weight_decay", "betas", "eps", "initial_lr"}
        settings = [{key: group[key] for key in names & group.keys()} for group in groups]
        base_lrs = list(getattr(schedule, "base_lrs", ()))
        read = partial(torch.load, map_location="cpu", weights_only=True)
        ranks.scatter_optimizer(self, read(Path(checkpoint, "optimizer.pt")))
        schedule.load_state_dict(read(Path(checkpoint, "scheduler.pt")))
        groups = self.optimizer.param_groups
        for group, given in zip(groups, settings, strict=True):
            group |= given
        if base_lrs and isinstance(schedule, LambdaLR):  # a function of the place alone: unchanged, the same rate
            schedule.base_lrs, schedule.last_epoch = base_lrs, schedule.last_epoch if place is None else place
            for group, rate in zip(groups, schedule.get_lr(), strict=True):
                group["lr"] = rate
            schedule._last_lr = [group["lr"] for group in groups]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Go on drawing where each rank stopped; ranks that were not there draw anew, from seed, step and rank."""
        world_size = self.args.world_size
        if checkpoint is None or read_manifest(Path(checkpoint))["world_size"] == world_size:
            super()._load_rng_state(checkpoint)
            return
        origin = (self.args.seed, self.state.global_step, self.args.process_index)
        set_seed(int(np.random.SeedSequence(origin).generate_state(1)[0]))

    def restore_window(self) -> None:
        """Go on with the logging window of the checkpoint; of other processes than these, with the mean of theirs."""
        if not (windows := self.watch.window):
            return
        own, same = windows[self.args.process_index % len(windows)], len(windows) == self.args.world_size
        self._tr_loss += own["loss"] if same else sum(each["loss"] for each in windows) / len(windows)
        self._globalstep_last_logged = own["since"]
        for kept, found in ((self._metrics["train"], own["metrics"]), (self._weights, own["weights"])):
            kept.update({name: list(values) for name, values in found.items()})


def find_fault(checkpoint: Path) -> str | None:
    """Find which file of a sealed checkpoint cannot be loaded, None when all can; large ones are opened, not read."""
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
