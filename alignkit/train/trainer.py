"""What every trainer does the same way: order rows, refuse steps that are not finite, weigh metrics, save and stop.

`Guarded` stands in front of a TRL trainer: `class Sft(Guarded, SFTTrainer)`. Upstream references are transformers 5.23,
TRL 1.16 and accelerate 1.15.
"""

import copy
import math
import signal
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import TrainerState
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.utils import disable_dropout_in_model

from alignkit import console
from alignkit.errors import NonFiniteError, RecipeError
from alignkit.models import kernels
from alignkit.models.adapters import TRAINED
from alignkit.recipe.methods import TrainOptions
from alignkit.runs.signals import pulse
from alignkit.train import ranks
from alignkit.train.checkpoint import Checkpointed, Watch
from alignkit.train.tables import EpochSampler, Rest, Stream, fill_up, go_on, grouped_order, shuffled_order

_UNWRITTEN = 1000  # beside the numbers of signals


class EvaluationCut(Exception):
    """A request to stop came while held-out rows were measured; caught where the step before can still be saved."""


def switch_off_dropout(model: nn.Module) -> None:
    """Make a forward pass in training compute what one in evaluation does. TRL's `disable_dropout` knows nn.Dropout
    alone; most architectures call a function, at a rate that a layer holds (OPT, Granite) or reads from its config
    (Falcon, GPT-Neo). The model's own config keeps its rates, for it is saved."""

    def rates(owner: Any) -> list[str]:  # attention_dropout, layerdrop, embd_pdrop, router_jitter_noise, ...
        floats = [name for name, value in vars(owner).items() if type(value) is float and value]
        return [name for name in floats if "drop" in name or "jitter" in name]

    disable_dropout_in_model(model)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    configs: dict[int, Any] = {}  # one copy for all layers that share a config
    for module in base.modules():
        for name in rates(module):
            setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        if module is not base and config is not None and (found := rates(config)):
            changed = configs.setdefault(id(config), copy.copy(config))
            for name in found:
                setattr(changed, name, 0.0)
            module.config = changed


class Guarded(Checkpointed):
    """Mixin over TRL's trainers; see the module docstring."""

    trained_adapters: tuple[str, ...] = (TRAINED,)  # PEFT's names of those that may have gradients
    lora_plus_ratio: float | None = None
    measure: Callable[[int], dict[str, float]] | None = None  # the metrics of `evaluate:` at a step, all ranks together
    measure_every, evaluated = 0, (0, 1)  # steps; rows of a measurement, and how often each is read
    _rest: Rest | None = None  # rows left of the epoch in which the batch size was changed
    _skipped = 0  # steps of that epoch that others rows stand for
    _schedule_steps = 0

    def __init__(self, *args: Any, settings: TrainOptions, **kwargs: Any) -> None:
        self.watch, self.settings = Watch(), settings
        self._weights = defaultdict(list)
        kernels.use_head()
        if kwargs["args"].device.type == "cpu":
            kernels.keep_freed_memory()
        loaded = {name: parameter.data for name, parameter in kwargs["model"].named_parameters()}
        super().__init__(*args, **kwargs)
        for model in filter(None, (self.model, getattr(self, "ref_model", None))):
            model = self.accelerator.unwrap_model(model)  # DeepSpeed's engine around a reference
            kernels.leave_out_masks(model.get_base_model() if isinstance(model, PeftModel) else model)
            if not ranks.is_sharded(self):  # whose layers may be run a second time
                kernels.leave_out_unread(model)
        if getattr(self.args, "disable_dropout", False):
            switch_off_dropout(self.model)
        # Upstream takes the last batch of an epoch for incomplete and drops what it believes to be repeated.
        self.accelerator.gather_for_metrics = self.accelerator.gather
        # TRL casts every trainable parameter of a quantised model to bfloat16, whatever the compute dtype is. We
        # chose the dtypes when we loaded the model, and a cast back would keep the rounding: put the tensors back.
        for name, parameter in self.model.named_parameters():
            if name in loaded and parameter.dtype != loaded[name].dtype:
                parameter.data = loaded[name]

    @property
    def may_stop(self) -> bool:
        """Whether a checkpoint can be written after this step; not so inside a rollout of ppo."""
        return True

    def weigh(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Say for each metric of a batch how many things it is a mean over; unnamed ones are means over rows."""
        return {}

    def ready_final(self) -> None:
        """Make the weights those that are to be published; called once, after training."""

    def stop_wanted(self) -> bool:
        """Read the flag; when any rank was asked to stop, all of them are, at the same step and by the same signal.
        Raises DiskError on all of them when the newest checkpoint could not be written."""
        if (number := ranks.largest(_UNWRITTEN if self._unwritten else self.watch.stop.signal or 0)) == _UNWRITTEN:
            self.settle()
        elif number:
            self.watch.stop.signal = signal.Signals(number)
        return number != 0

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: upstream's card names local paths, and the run directory says more."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if ranks.uses_fsdp():
            ranks.set_up_shards(self)

    def create_optimizer(self, *args: Any) -> Any:
        if self.lora_plus_ratio is not None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            settings |= {"loraplus_lr_ratio": self.lora_plus_ratio, "loraplus_weight_decay": self.args.weight_decay}
            self.optimizer = create_loraplus_optimizer(self.model, kind, **settings)
        optimizer = super().create_optimizer(*args)
        # An empty group (LoRA has no biases) counts in one process and is dropped by DeepSpeed: nobody needs it.
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        if self.is_deepspeed_enabled:  # which replaces the parameters in the groups by flat pieces
            self.optimized_groups = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Begin a warm-up above 0: upstream takes the first step at a rate of 0, and so learns nothing from it.
        Step t of w goes where upstream's schedule is at (t + 1) w / (w + 1); from step w on nothing changes."""
        made, schedule = self.lr_scheduler is None, super().create_scheduler(num_training_steps, optimizer)
        if made and isinstance(schedule, LambdaLR) and not any(rate(0) for rate in schedule.lr_lambdas):
            warmup = self.args.get_warmup_steps(num_training_steps)
            schedule.lr_lambdas = [
                lambda step, rate=rate: rate(step if step >= warmup else (step + 1) * warmup / (warmup + 1))
                for rate in schedule.lr_lambdas
            ]
            rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            schedule._last_lr = [base * rate(0) for base, rate in rates]
            for group, first in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
                group["lr"] = first
        return schedule

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, checkpoint: Any) -> Any:
        max_steps = self._schedule_steps or max_steps
        if not self.is_deepspeed_enabled:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, checkpoint)
            ranks.settle_shards(self)
            return prepared
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # it would look for DeepSpeed's own
        backward = self.accelerator.backward

        def guarded(loss: Tensor, **arguments: Any) -> None:
            # DeepSpeed's backward pass takes the optimizer step within it. A gradient that is not finite where the loss
            # is finite is seen after its step, and ends the run before a save.
            self.refuse_not_finite(float(loss.detach()))
            backward(loss, **{"scale_wrt_gas": False, **arguments})  # the losses are parts of the step's already

        self.accelerator.backward = guarded
        if checkpoint is not None:
            self._load_from_checkpoint(checkpoint)
            self._load_optimizer_and_scheduler(checkpoint)
        return prepared

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    @property
    def batch_rows(self) -> int:  # type: ignore[override]
        """Rows of an optimizer step, over all ranks."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _order(self, table: Any, epoch: int, batch_size: int) -> Any:
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        if self.settings.batching == "grouped" and "length" in table.column_names:
            return grouped_order(table.with_format("numpy")["length"][:], batch_size=batch_size, seed=seed, epoch=epoch)
        return shuffled_order(len(table), seed=seed, epoch=epoch)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        table = self.train_dataset if train_dataset is None else train_dataset
        batch = self.batch_rows
        if isinstance(table, Stream):
            seen = step = 0
            for last, size in self.watch.batches:
                seen, step = seen + (last - step) * size, last
            first = seen - step * batch  # so that after the steps that are skipped comes the next row
            rows = range(first, first + self.args.max_steps * batch)
            table.num_rows = rows.stop
            return rows
        whole = partial(self._order, table)

        def order(epoch: int) -> Any:
            found = fill_up(whole(epoch, batch), batch_size=batch)
            if self._rest is None or epoch != self._rest.epoch:
                return found
            rest = fill_up(self._rest.rows, batch_size=batch)
            return np.concatenate([found[: len(found) - len(rest)], rest])  # what comes before is skipped

        self._rest = go_on(self.watch.batches, whole, batch_size=batch)
        num_rows = -(-len(table) // batch) * batch
        # state.epoch is a whole number when an epoch starts and keeps its whole part when a resumed one does.
        return EpochSampler(num_rows, order, lambda: int(self.state.epoch or 0))

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Count the steps that are left of a run whose batch size was changed: those of the rows that are left."""
        epochs, per_epoch, *others, total = super().set_initial_training_values(args, dataloader)
        self.schedule_place, self._schedule_steps = None, total
        if (rest := self._rest) is not None:
            self._skipped = per_epoch - -(-len(rest.rows) // self.batch_rows)
            done = rest.epoch * per_epoch + self._skipped
            if args.max_steps <= 0:  # the learning rate stands where the rows do
                self.schedule_place = min(done, total)
                total = rest.step + max(total - done, 0)
            epochs = max(epochs, rest.epoch + -(-(total - rest.step + self._skipped) // per_epoch))
        return epochs, per_epoch, *others, total

    def _init_training_state(self, max_steps: int, *args: Any) -> Any:
        """Take how often to log, save and evaluate from the recipe: upstream takes it from the checkpoint."""
        found = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        self._bound_evaluation(max_steps)
        if (rest := self._rest) is None:
            return found
        self.state.epoch = float(rest.epoch)
        return rest.epoch, self._skipped * self.args.gradient_accumulation_steps

    def _bound_evaluation(self, max_steps: int) -> None:
        """Evaluate less often than asked where it would cost more than `eval_share` of training.
        A row costs a forward pass in evaluation, about a third of what it costs in training, and an answer that is
        written is taken for four of them; with evaluate_every each kind may cost half. By counts and not by the clock,
        so that a resumed run evaluates where an undisturbed one does."""
        share, every = self.settings.eval_share, self.state.eval_steps
        self.measure_every = self.settings.evaluate_every or 0
        if share is None or self.eval_dataset is None or self.args.eval_strategy != "steps" or not every:
            return

        def bound(every: int, rows: int, what: str, part: float) -> int:
            most = int(part * max_steps * self.batch_rows * 3 / max(rows, 1))  # the first and the last one included
            least = math.ceil(max_steps / max(most - 1, 1))
            if every < least:
                often = f"every {least} steps instead of {every}"
                when = often if least < max_steps else "at the start and the end only"
                cost = f"{rows} {what} beside {max_steps} steps of {self.batch_rows} rows would take more than"
                console.note(f"evaluating {when}: {cost} eval_share {share:g} of training (null: no limit)")
            return max(every, least)

        num_rows, part = len(self.eval_dataset), share / 2 if self.measure_every else share
        self.state.eval_steps = bound(every, num_rows, "held-out rows", part)
        if self.measure_every:
            num_read = min(num_rows, self.evaluated[0]) * self.evaluated[1]
            self.measure_every = bound(self.measure_every, num_read, "rows read and answered", part)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        weights = self.weigh(inputs)
        self._last_loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if weights:
            total = torch.stack([weight.to(self.args.device, torch.float64) for weight in weights.values()])
            if self.args.world_size > 1:
                torch.distributed.all_reduce(total)
            for name, weight in zip(weights, total.tolist(), strict=True):
                if weight:  # TRL, too, leaves out what it has no rows for
                    self._weights[name].append(weight)
        return self._last_loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.refuse_not_finite(float(self._last_loss), float(grad_norm))
        return grad_norm

    def refuse_not_finite(self, loss: float, norm: float = 0.0) -> None:
        """Raise NonFiniteError on every rank when loss or gradient norm of any of them is NaN or infinite."""
        # With float16 the scaler skips steps whose gradients overflow; that is its normal work.
        bad = not math.isfinite(loss) or (not math.isfinite(norm) and not self.args.fp16)
        if not ranks.largest(int(bad)):
            return
        everyone = [tuple(map(float, values)) for values in ranks.gather([str(loss), str(norm)])]
        number = next(number for number, values in enumerate(everyone) if not all(map(math.isfinite, values)))
        loss, norm = everyone[number]
        where = f" on rank {number}" if len(everyone) > 1 else ""
        what = f"step {self.state.global_step + 1}: loss is {loss:g} and the gradient norm {norm:g}{where}; stopped "
        what += f"before the optimizer step, {self.describe_last_good()}. Lower learning_rate or max_grad_norm, or look"
        raise ranks.met_by_all(NonFiniteError(f"{what} at the rows of this step"))

    def note_metrics(self, values: dict[str, Tensor], *, num_tokens: Tensor) -> None:
        """Take each metric's mean over the values of all ranks, and count the tokens of a training batch."""
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._total_train_tokens += int(self.accelerator.gather(num_tokens).sum())
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        for name, value in values.items():
            sums = torch.stack([value.detach().float().sum(), torch.tensor(float(value.numel()), device=value.device)])
            total, count = self.accelerator.gather(sums).view(-1, 2).sum(dim=0).tolist()
            self._metrics[mode][name].append(total / count)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Weigh the values since the last log, one per micro batch and of all ranks already."""
        if self.model.training:
            found = self._metrics["train"]
            for name, weights in self._weights.items():
                if found.get(name) and len(found[name]) == len(weights) and sum(weights):
                    values = zip(found[name], weights, strict=True)
                    found[name] = [sum(value * weight for value, weight in values) / sum(weights)]
            self._weights.clear()
        super().log(logs, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Deal whole batches to the ranks: of equal number on all of them, which sharded models need to keep step."""
        table = self.eval_dataset if eval_dataset is None else eval_dataset
        size = self.args.per_device_eval_batch_size
        batches = [list(range(start, min(start + size, len(table)))) for start in range(0, len(table), size)]
        mine = batches[self.args.process_index :: self.args.world_size]
        missing = -(-len(batches) // self.args.world_size) - len(mine)
        return DataLoader(
            table, batch_sampler=mine + batches[:1] * missing, collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers, pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # else a loader draws from the generator of dropout
        )  # fmt: skip

    def evaluation_loop(self, dataloader: DataLoader, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> Any:
        """Measure loss and metrics on held-out rows; the model is the one that is being trained."""
        num_rows, num_ranks = len(dataloader.dataset), self.args.world_size
        num_batches = -(-num_rows // self.args.per_device_eval_batch_size)
        self.model.eval()
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()
        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # name -> sum of value x weight, of weight
        # TRL's metrics see this rank only: it gathers means of unequal parts, and the parts that fill up.
        own: Any = dict.fromkeys(("gather", "gather_for_metrics"), lambda value, *_, **__: value)
        alone = patch.multiple(self.accelerator, **own)
        with alone, console.Meter("held-out rows", num_rows) as meter:
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
                meter.advance(min(len(rows) * num_ranks, num_rows - meter.done))
                pulse("evaluating", self.state.global_step)
                if self.stop_wanted():
                    self._metrics["eval"].clear()
                    raise EvaluationCut
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for part in ranks.gather(totals):
            for name, (value, weight) in part.items():
                sums[name] = [sums[name][0] + value, sums[name][1] + weight]
        means = {name: value / weight for name, (value, weight) in sums.items() if weight}
        self._metrics["eval"].clear()
        metrics = {f"{metric_key_prefix}_loss": means.pop("loss") + means.pop("loss/sft", 0.0)}
        self._metrics["eval"].update({name: [value] for name, value in means.items()})  # TRL's `log` adds them
        if self.is_measured():
            assert self.measure is not None
            with ranks.gathered_root(self.model):
                found = ranks.share(self.measure(self.state.global_step))
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=num_rows)

    def is_measured(self) -> bool:
        """Whether the metrics of `evaluate:` are measured at this step: every so many, and at the last one."""
        step = self.state.global_step
        return bool(self.measure_every) and (step % self.measure_every == 0 or step >= self.state.max_steps)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        try:
            found = super()._evaluate(*args, **kwargs)
            self.evaluation_cut = False
            return found
        except EvaluationCut:  # the step is saved, and the evaluation made up for by the next sitting
            self.evaluation_cut = self.control.should_save = self.control.should_training_stop = True
            return {}

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        """Save the weights that are the best so far, and stop when they have been that for too long."""
        if not metrics or (wanted := self.settings.keep_best) is None:
            return False
        state, sign, name = self.state, 1 if wanted[0] == "+" else -1, f"eval_{wanted[1:]}"
        measured = state.log_history[-1]  # with the metrics of the method
        if name not in measured and self.measure_every and not self.is_measured():
            return False
        if name not in measured:
            known = sorted(key.removeprefix("eval_") for key in measured if key.startswith("eval_"))
            what = f"keep_best is {wanted[1:]}, which is not measured on held-out rows; there are {', '.join(known)}"
            raise ranks.met_by_all(RecipeError(what))
        if not state.global_step:  # what was started from is kept where it came from
            return False
        better = state.best_metric is None or sign * measured[name] > sign * state.best_metric
        if better:
            state.best_metric, state.best_global_step = measured[name], state.global_step
        self.control.should_training_stop |= self.has_stalled(state)
        self.control.should_save |= better or self.control.should_training_stop
        return better

    def has_stalled(self, state: TrainerState) -> bool:
        """Whether `patience` evaluations have passed since the best one, by the log that every checkpoint keeps."""
        if self.settings.patience is None or not state.best_global_step:
            return False
        name = f"eval_{(self.settings.keep_best or '')[1:]}"
        since = [row for row in state.log_history if name in row and row["step"] > state.best_global_step]
        return len(since) >= self.settings.patience
