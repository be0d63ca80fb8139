"""Metrics that do not depend on how a batch is cut up: over micro batches, over ranks, over held-out batches.

`Measured` stands between our trainers and TRL's. TRL averages over forward passes whatever each of them holds, so its
figures change with the number of processes; here each value counts by what it is a mean over. It computes no loss.
Upstream references are transformers 5.23 and TRL 1.16.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from alignkit.train import ranks


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
