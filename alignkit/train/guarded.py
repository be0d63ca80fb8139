"""What every trainer does the same way: order rows, refuse steps that are not finite, weigh the log, save and stop.

`Guarded` stands in front of a TRL trainer: `class Sft(Guarded, SFTTrainer)`. It knows no method's loss. Upstream
references are transformers 5.23, TRL 1.16 and accelerate 1.15.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import signal
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.utils import disable_dropout_in_model

from alignkit.errors import DiskError, NonFiniteError
from alignkit.runs import checkpoints
from alignkit.runs.files import describe_bytes, disk_failures, free_bytes
from alignkit.runs.heartbeat import pulse
from alignkit.runs.stop import StopFlag
from alignkit.train import ranks, restore, shards, zero
from alignkit.train.order import EpochSampler, Rest, fill_up, go_on, grouped_order, shuffled_order
from alignkit.train.tables import Stream

_NAMES = ("drop", "jitter")  # attention_dropout, layerdrop, embd_pdrop, router_jitter_noise, ...


def switch_off_dropout(model: nn.Module) -> None:
    """Make a forward pass in training compute what one in evaluation does.

    TRL's `disable_dropout` knows nn.Dropout alone. Most architectures call dropout as a function, at a rate that a
    layer holds (OPT, Granite) or reads from its config (Falcon, GPT-Neo). The model's own config keeps its rates, so
    that what is saved is the architecture it was.
    """
    disable_dropout_in_model(model)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    configs: dict[int, Any] = {}  # one copy for all layers that share a config
    for module in base.modules():
        for name in _rates(module):
            setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        if module is not base and config is not None and (rates := _rates(config)):
            changed = configs.setdefault(id(config), copy.copy(config))
            for name in rates:
                setattr(changed, name, 0.0)
            module.config = changed


def _rates(owner: Any) -> list[str]:
    return [
        name
        for name, value in vars(owner).items()
        if isinstance(value, float) and value and any(part in name for part in _NAMES)
    ]


class EvaluationCut(Exception):
    """A request to stop came while held-out rows were measured; caught where the step before can still be saved."""


class Measured(Trainer):
    """Mixin over transformers' Trainer; see the module docstring."""

    _metrics: dict[str, dict[str, list[float]]]  # TRL's: mode -> name -> one value per forward pass
    _weights: dict[str, list[float]]  # of the training metrics since the last log, where rows do not say it

    def weigh(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return for each metric of a batch how many things it is a mean over; unnamed ones are means over rows."""
        return {}

    # ---- training: values are of all ranks already, one per micro batch ----

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        weights = self.weigh(inputs)
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if weights:
            total = torch.stack([weight.to(self.args.device, torch.float64) for weight in weights.values()])
            if self.args.world_size > 1:
                torch.distributed.all_reduce(total)
            for name, weight in zip(weights, total.tolist(), strict=True):
                if weight:  # TRL, too, leaves out what it has no rows for
                    self._weights[name].append(weight)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.model.training:
            found = self._metrics["train"]
            for name, weights in self._weights.items():
                if found.get(name) and len(found[name]) == len(weights) and sum(weights):
                    values = zip(found[name], weights, strict=True)
                    found[name] = [sum(value * weight for value, weight in values) / sum(weights)]
            self._weights.clear()
        super().log(logs, *args, **kwargs)

    def stop_wanted(self) -> bool:
        """Tell whether the run was asked to stop, on all ranks alike."""
        return False

    # ---- held-out rows: whole batches are dealt to the ranks, each counts once ----

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the batches of this rank: of equal number on all ranks, which sharded models need to keep step."""
        table = self.eval_dataset if eval_dataset is None else eval_dataset
        size = self.args.per_device_eval_batch_size
        batches = [list(range(start, min(start + size, len(table)))) for start in range(0, len(table), size)]
        mine = batches[self.args.process_index :: self.args.world_size]
        missing = -(-len(batches) // self.args.world_size) - len(mine)
        return DataLoader(
            table,
            batch_sampler=mine + batches[:1] * missing,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def evaluation_loop(self, dataloader: DataLoader, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> Any:
        """Measure loss and metrics on held-out rows; the model is the one that is being trained."""
        num_rows, num_ranks = len(dataloader.dataset), self.args.world_size
        num_batches = -(-num_rows // self.args.per_device_eval_batch_size)
        self.model.eval()
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()
        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # name -> sum of value x weight, of weight
        with self._alone():
            for number, (rows, inputs) in enumerate(zip(dataloader.batch_sampler, dataloader, strict=True)):
                self._metrics["eval"].clear()
                weights = {name: float(weight) for name, weight in self.weigh(inputs).items()}
                loss, _logits, _labels = self.prediction_step(self.model, inputs, prediction_loss_only=True)
                values = {name: found[-1] for name, found in self._metrics["eval"].items() if found}
                if number * num_ranks + self.args.process_index < num_batches:  # else it fills up, and counts nowhere
                    for name, value in {"loss": float(loss) - values.get("loss/sft", 0.0), **values}.items():
                        weight = weights.get(name, len(rows))
                        totals[name][0] += value * weight if weight else 0.0
                        totals[name][1] += weight
                self.callback_handler.on_prediction_step(self.args, self.state, self.control)
                if self.stop_wanted():
                    self._metrics["eval"].clear()
                    raise EvaluationCut
        means = _mean_over_ranks(totals)
        self._metrics["eval"].clear()
        metrics = {f"{metric_key_prefix}_loss": means.pop("loss") + means.pop("loss/sft", 0.0)}
        self._metrics["eval"].update({name: [value] for name, value in means.items()})  # TRL's `log` adds them
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=num_rows)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let TRL's metrics see this rank only: it gathers means of unequal parts, and the parts that fill up."""
        names = ("gather", "gather_for_metrics")
        before = {name: getattr(self.accelerator, name) for name in names}
        for name in names:
            setattr(self.accelerator, name, lambda value, *_, **__: value)
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(self.accelerator, name, function)


def _mean_over_ranks(totals: dict[str, list[float]]) -> dict[str, float]:
    """Return the weighted means of all ranks' sums."""
    parts = ranks.gather(totals)
    means = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        value, weight = (sum(part.get(name, (0.0, 0.0))[index] for part in parts) for index in range(2))
        if weight:
            means[name] = value / weight
    return means


TRAINED_ADAPTER = "default"


@dataclass
class Watch:
    """What the guard needs to know beyond TRL's config; the fit loop fills it in before training."""

    keep_checkpoints: int = 2
    batching: str = "grouped"
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
        """Return how long the run has taken in all sittings."""
        return self.earlier_seconds + time.monotonic() - self.began


class Guarded(Measured):
    """Mixin over transformers' Trainer; see the module docstring."""

    watch: Watch
    trained_adapters: tuple[str, ...] = (TRAINED_ADAPTER,)  # PEFT's names of those that may have gradients

    @property
    def may_stop(self) -> bool:
        """Whether a checkpoint can be written after this step; not so inside a rollout of ppo."""
        return True

    def stop_wanted(self) -> bool:
        """Read the flag; when any rank was asked to stop, all of them are, at the same step and by the same signal."""
        if number := ranks.largest(self.watch.stop.signal or 0):
            self.watch.stop.signal = signal.Signals(number)
        return number != 0

    def ready_final(self) -> None:
        """Make the weights those that are to be published; called once, after training."""

    _rest: Rest | None = None  # rows left of the epoch in which the batch size was changed
    _skipped = 0  # steps of that epoch that others rows stand for
    _schedule_steps = 0
    schedule_place: int | None = None  # of a resumed run, in steps of this batch size; None: its own
    evaluation_cut = False  # by a request to stop: it is to be made up for

    _save_error: Exception | None = None  # of this rank's weights, until all ranks may hear of it

    def __init__(self, *args: Any, watch: Watch | None = None, **kwargs: Any) -> None:
        self.watch = watch or Watch()
        self._weights = defaultdict(list)
        loaded = {name: parameter.data for name, parameter in kwargs["model"].named_parameters()}
        super().__init__(*args, **kwargs)
        if getattr(self.args, "disable_dropout", False):
            switch_off_dropout(self.model)
        # Upstream takes the last batch of an epoch for incomplete and drops what it believes to be repeated.
        self.accelerator.gather_for_metrics = self.accelerator.gather
        # TRL casts every trainable parameter of a quantised model to bfloat16, whatever the compute dtype is. We
        # chose the dtypes when we loaded the model, and a cast back would keep the rounding: put the tensors back.
        for name, parameter in self.model.named_parameters():
            if name in loaded and parameter.dtype != loaded[name].dtype:
                parameter.data = loaded[name]

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if ranks.uses_fsdp():
            shards.set_up(self)

    def create_optimizer(self, *args: Any) -> Any:
        optimizer = super().create_optimizer(*args)
        # An empty group (LoRA has no biases) counts in one process and is dropped by DeepSpeed: nobody needs it.
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        if self.is_deepspeed_enabled:  # which replaces the parameters in the groups by flat pieces
            self.optimized_groups = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, checkpoint: Any) -> Any:
        max_steps = self._schedule_steps or max_steps
        if not self.is_deepspeed_enabled:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, checkpoint)
            shards.settle(self)
            return prepared
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # it would look for DeepSpeed's own
        zero.guard_backward(self)
        if checkpoint is not None:
            self._load_from_checkpoint(checkpoint)
            self._load_optimizer_and_scheduler(checkpoint)
        return prepared

    # ---- data: tokenised once, by us, before any trainer exists ----

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        table = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(table, Stream):
            seen = step = 0
            for last, size in self.watch.batches:
                seen, step = seen + (last - step) * size, last
            first = seen - step * self.batch_rows  # so that after the steps that are skipped comes the next row
            rows = range(first, first + self.args.max_steps * self.batch_rows)
            table.num_rows = rows.stop
            return rows
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed

        batch = self.batch_rows

        def whole(epoch: int, batch_size: int) -> Any:
            return self._order(table, batch_size, seed=seed, epoch=epoch)

        self._rest = go_on(self.watch.batches, whole, batch_size=batch)

        def order(epoch: int) -> Any:
            found = fill_up(whole(epoch, batch), batch_size=batch)
            if self._rest is None or epoch != self._rest.epoch:
                return found
            rest = fill_up(self._rest.rows, batch_size=batch)
            return np.concatenate([found[: len(found) - len(rest)], rest])  # what comes before is skipped

        num_rows = -(-len(table) // batch) * batch
        # state.epoch is a whole number when an epoch starts and keeps its whole part when a resumed one does.
        return EpochSampler(num_rows, order, lambda: int(self.state.epoch or 0))

    @property
    def batch_rows(self) -> int:
        """Rows of an optimizer step, over all ranks."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Count the steps that are left of a run whose batch size was changed: those of the rows that are left."""
        epochs, per_epoch, *others, total = super().set_initial_training_values(args, dataloader)
        self.schedule_place, self._schedule_steps = None, total
        if (rest := self._rest) is not None:
            left = -(-len(rest.rows) // self.batch_rows)
            self._skipped = per_epoch - left
            done = rest.epoch * per_epoch + self._skipped
            if args.max_steps <= 0:  # the learning rate stands where the rows do
                self.schedule_place = min(done, total)
                total = rest.step + max(total - done, 0)
            epochs = max(epochs, rest.epoch + -(-(total - rest.step + self._skipped) // per_epoch))
        return epochs, per_epoch, *others, total

    def _order(self, table: Any, batch_size: int, *, seed: int, epoch: int) -> Any:
        """Return the order of an epoch's rows."""
        if self.watch.batching == "grouped" and "length" in table.column_names:
            lengths = table.with_format("numpy")["length"][:]
            return grouped_order(lengths, batch_size=batch_size, seed=seed, epoch=epoch)
        return shuffled_order(len(table), seed=seed, epoch=epoch)

    # ---- steps: nothing that is not finite reaches the optimizer ----

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._last_loss = loss
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.refuse_not_finite(float(self._last_loss), float(grad_norm))
        return grad_norm

    def refuse_not_finite(self, loss: float, norm: float = 0.0) -> None:
        """Raise NonFiniteError on every rank when loss or gradient norm of any of them is NaN or infinite."""
        # With float16 the scaler skips steps whose gradients overflow; that is its normal work.
        bad = not math.isfinite(loss) or (not math.isfinite(norm) and not self.args.fp16)
        if ranks.largest(int(bad)):
            self._refuse_step(loss, norm)

    def _refuse_step(self, *found: float) -> None:
        """Raise NonFiniteError on every rank, with the figures of the first one that has such a thing."""
        everyone = [[float(value) for value in values] for values in ranks.gather([str(value) for value in found])]
        number, (loss, norm) = next(
            (number, values) for number, values in enumerate(everyone) if not all(map(math.isfinite, values))
        )
        last = self._last_good()
        where = f" on rank {number}" if len(everyone) > 1 else ""
        error = NonFiniteError(
            f"step {self.state.global_step + 1}: loss is {loss:g} and the gradient norm {norm:g}{where}; stopped "
            f"before the optimizer step, {last}. Lower learning_rate or max_grad_norm, or look at the rows of this step"
        )
        error.shared = not ranks.is_main()
        raise error

    def refuse_bad_weights(self) -> None:
        """Raise NonFiniteError on every rank when an update has left weights that are not finite: too large a step."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        bad = not all(bool(shards.local(parameter).isfinite().all()) for parameter in trained)
        if ranks.largest(int(bad)):
            error = NonFiniteError(
                f"step {self.state.global_step}: the update has left weights that are not finite; nothing of it was "
                f"saved, {self._last_good()}. Lower learning_rate or max_grad_norm"
            )
            error.shared = not ranks.is_main()
            raise error

    def _last_good(self) -> str:
        kept = checkpoints.list_checkpoints(Path(self.args.output_dir))
        return f"the last good checkpoint is {kept[0].name}" if kept else "no checkpoint was saved yet"

    # ---- held-out rows: a request to stop is heard between two batches ----

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        try:
            found = super()._evaluate(*args, **kwargs)
            self.evaluation_cut = False
            return found
        except EvaluationCut:  # the step is saved, and the evaluation made up for by the next sitting
            self.evaluation_cut = self.control.should_save = self.control.should_training_stop = True
            return {}

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        return bool(metrics) and super()._determine_best_metric(metrics, trial)

    # ---- checkpoints: one layout, whatever trained them; upstream names the files, we make them count ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._save(output_dir, state_dict=shards.gather_model(self))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save weights and tokenizer, without the frozen adapters and without `training_args.bin`, a pickle."""
        if not self.args.should_save:
            return
        # Checkpoints keep the names the model has in memory; `model/` gets the published ones (they differ for MoE).
        extra: dict[str, Any] = {"save_original_format": False}
        if isinstance(self.model, PeftModel):
            # "auto" would ask the hub whether the base's vocabulary has grown.
            extra = {"selected_adapters": [TRAINED_ADAPTER], "save_embedding_layers": False}
        try:
            self.model.save_pretrained(output_dir, state_dict=state_dict, **extra)
            self.processing_class.save_pretrained(output_dir)
        except Exception as error:  # raised after the optimizer is gathered, for which the other ranks wait
            self._save_error = error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = shards.gather_optimizer(self)
        error, self._save_error = self._save_error, None
        if error is not None:
            raise error
        if state is not None:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            with warnings.catch_warnings():  # torch warns that a scheduler is saved apart from its optimizer
                warnings.simplefilter("ignore")
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        directory = Path(self.args.output_dir)
        checkpoint = directory / f"checkpoint-{self.state.global_step}"
        pulse("saving", self.state.global_step)
        self.refuse_bad_weights()
        self.watch.window = ranks.gather(self._describe_window())
        if not ranks.once(lambda: self._make_way(directory, checkpoint)):
            return  # this very step is sealed: an interrupt at a save step, or the last step of a resumed run
        try:
            ranks.attempt(lambda: self._write_checkpoint(checkpoint, model, trial))
            ranks.once(lambda: self._seal(checkpoint))
        except DiskError:
            if self.args.should_save:
                shutil.rmtree(checkpoint, ignore_errors=True)  # ours, unsealed, and in the way of everything else
            raise
        pulse("saved", self.state.global_step)

    def _make_way(self, directory: Path, checkpoint: Path) -> bool:
        """Make room for a checkpoint; return False when it is there already, whole."""
        self.require_place()
        if (checkpoint / checkpoints.MANIFEST).exists():
            return False
        self.require_room(directory)
        shutil.rmtree(checkpoint, ignore_errors=True)
        return True

    def _write_checkpoint(self, checkpoint: Path, model: Any, trial: Any) -> None:
        """Write the files of a checkpoint; each rank writes its random numbers, rank 0 all else.

        The last thing in it that all ranks wait for is the optimizer's state: no error leaves before that.
        """
        with disk_failures(checkpoint.parent, checkpoint.name):
            Trainer._save_checkpoint(self, model, trial)  # past TRL's, which writes a model card each time

    def _seal(self, checkpoint: Path) -> None:
        with disk_failures(checkpoint.parent, checkpoint.name):
            checkpoints.seal(checkpoint, self._manifest_facts())
            checkpoints.remember(checkpoint.parent, self.state.global_step)
            checkpoints.rotate(checkpoint.parent, keep=self.watch.keep_checkpoints)

    def _manifest_facts(self) -> dict[str, Any]:
        return {
            "step": self.state.global_step,
            "world_size": self.args.world_size,
            "dtypes": sorted({str(p.dtype) for p in self.model.parameters() if p.requires_grad}),
            "num_tokens": self.watch.num_tokens + self.num_trained_tokens,
            "seconds": round(self.watch.seconds, 3),
            "batches": [*self.watch.batches, (self.state.global_step, self.batch_rows)],
            "window": self.watch.window,
            "evaluation_cut": self.evaluation_cut,
            **self.watch.facts,
        }

    def _describe_window(self) -> dict[str, Any]:
        """The sums since the last log, so that a resumed run logs what an undisturbed one would have."""
        return {
            "loss": float(self._tr_loss),
            "since": self._globalstep_last_logged,
            "metrics": {name: [float(value) for value in values] for name, values in self._metrics["train"].items()},
            "weights": {name: list(values) for name, values in self._weights.items()},
        }

    def restore_window(self) -> None:
        """Go on with the logging window of the checkpoint; of other processes than these, with the mean of theirs."""
        if not (windows := self.watch.window):
            return
        own = windows[self.args.process_index % len(windows)]
        same = len(windows) == self.args.world_size
        self._tr_loss += own["loss"] if same else sum(each["loss"] for each in windows) / len(windows)
        self._globalstep_last_logged = own["since"]
        for kept, found in ((self._metrics["train"], own["metrics"]), (self._weights, own["weights"])):
            kept.update({name: list(values) for name, values in found.items()})

    def require_place(self) -> None:
        """Raise DiskError when the run directory is not the one that the run has begun in."""
        directory = Path(self.args.output_dir).parent
        try:
            there = self.watch.place is None or os.path.samestat(directory.stat(), self.watch.place)
        except OSError:
            there = False
        if not there:
            raise DiskError(f"{directory}: the run directory was moved or deleted while the run went on")

    @property
    def num_trained_tokens(self) -> int:
        """Non-padding tokens seen in this sitting, over all ranks."""
        return int(getattr(self, "_total_train_tokens", 0))

    def require_room(self, directory: Path) -> None:
        """Raise DiskError when the next checkpoint would not fit the disk."""
        trainable = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        needed = checkpoints.expected_bytes(directory, first_guess=3 * trainable)
        free = free_bytes(directory)
        if free < needed:
            raise DiskError(
                f"{directory}: the next checkpoint needs about {describe_bytes(needed)} and "
                f"{describe_bytes(free)} are free; earlier checkpoints are untouched: make room and run the same "
                "command again"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore.load_optimizer(self, Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Go on drawing where each rank stopped; ranks that were not there draw anew, from seed, step and rank."""
        if checkpoint is None or checkpoints.read_manifest(Path(checkpoint))["world_size"] == self.args.world_size:
            super()._load_rng_state(checkpoint)
        else:
            restore.draw_anew(self.args.seed, self.state.global_step, self.args.process_index)

    def _init_training_state(self, max_steps: int, *args: Any) -> Any:
        """Take how often to log, save and evaluate from the recipe: upstream takes it from the checkpoint."""
        found = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        if (rest := self._rest) is None:
            return found
        self.state.epoch = float(rest.epoch)
        return rest.epoch, self._skipped * self.args.gradient_accumulation_steps

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Copy the sealed weights into the model as it stands, so that dtypes and frozen parts stay what they are.

        Upstream reloads adapters through `load_adapter`, which changes bfloat16 ones to float32, and for full models
        only logs missing keys.
        """
        restore.load_weights(self.model, Path(resume_from_checkpoint))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: upstream's card names local paths, and the run directory says more."""
