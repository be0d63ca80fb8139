"""What every trainer does the same way: order rows, refuse steps that are not finite, weigh the log, save and stop.

`Guarded` stands in front of a TRL trainer: `class Sft(Guarded, SFTTrainer)`. It knows no method's loss. Upstream
references are transformers 5.23, TRL 1.16 and accelerate 1.15.
"""

from __future__ import annotations

import copy
import math
import signal
from collections import defaultdict
from typing import Any

import numpy as np
from peft import PeftModel
from torch import Tensor, nn
from trl.trainer.utils import disable_dropout_in_model

from alignkit.errors import NonFiniteError
from alignkit.models.adapters import TRAINED
from alignkit.recipe.schema import TrainOptions
from alignkit.train import ranks, shards, zero
from alignkit.train.checkpoint import Checkpointed, Watch
from alignkit.train.measure import EvaluationCut, Measured
from alignkit.train.order import EpochSampler, Rest, fill_up, go_on, grouped_order, shuffled_order
from alignkit.train.tables import Stream


def switch_off_dropout(model: nn.Module) -> None:
    """Make a forward pass in training compute what one in evaluation does.

    TRL's `disable_dropout` knows nn.Dropout alone. Most architectures call dropout as a function, at a rate that a
    layer holds (OPT, Granite) or reads from its config (Falcon, GPT-Neo). The model's own config keeps its rates, so
    that what is saved is the architecture it was.
    """

    def rates(owner: Any) -> list[str]:  # attention_dropout, layerdrop, embd_pdrop, router_jitter_noise, ...
        named = ((name, value) for name, value in vars(owner).items() if "drop" in name or "jitter" in name)
        return [name for name, value in named if isinstance(value, float) and value]

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


class Guarded(Measured, Checkpointed):
    """Mixin over TRL's trainers; see the module docstring."""

    trained_adapters: tuple[str, ...] = (TRAINED,)  # PEFT's names of those that may have gradients
    _rest: Rest | None = None  # rows left of the epoch in which the batch size was changed
    _skipped = 0  # steps of that epoch that others rows stand for
    _schedule_steps = 0

    def __init__(self, *args: Any, settings: TrainOptions, **kwargs: Any) -> None:
        self.watch = Watch(settings.keep_checkpoints, settings.batching)
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

    # ---- what methods change ----

    @property
    def may_stop(self) -> bool:
        """Whether a checkpoint can be written after this step; not so inside a rollout of ppo."""
        return True

    def ready_final(self) -> None:
        """Make the weights those that are to be published; called once, after training."""

    def stop_wanted(self) -> bool:
        """Read the flag; when any rank was asked to stop, all of them are, at the same step and by the same signal."""
        if number := ranks.largest(self.watch.stop.signal or 0):
            self.watch.stop.signal = signal.Signals(number)
        return number != 0

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: upstream's card names local paths, and the run directory says more."""

    # ---- FSDP and DeepSpeed ----

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

    # ---- rows: tokenised once, by us, before any trainer exists ----

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    @property
    def batch_rows(self) -> int:  # type: ignore[override]
        """Rows of an optimizer step, over all ranks."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _order(self, table: Any, batch_size: int, *, seed: int, epoch: int) -> Any:
        """Put an epoch's rows in order."""
        if self.watch.batching == "grouped" and "length" in table.column_names:
            lengths = table.with_format("numpy")["length"][:]
            return grouped_order(lengths, batch_size=batch_size, seed=seed, epoch=epoch)
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
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed

        def whole(epoch: int, batch_size: int) -> Any:
            return self._order(table, batch_size, seed=seed, epoch=epoch)

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
        if (rest := self._rest) is None:
            return found
        self.state.epoch = float(rest.epoch)
        return rest.epoch, self._skipped * self.args.gradient_accumulation_steps

    # ---- steps: nothing that is not finite reaches the optimizer ----

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self._last_loss = super().training_step(*args, **kwargs)
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
        raise ranks.met_by_all(
            NonFiniteError(
                f"step {self.state.global_step + 1}: loss is {loss:g} and the gradient norm {norm:g}{where}; stopped "
                f"before the optimizer step, {self.describe_last_good()}. Lower learning_rate or max_grad_norm, or "
                "look at the rows of this step"
            )
        )

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
