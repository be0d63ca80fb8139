"""Metrics of a trainer: means weighted by what they are means over, and held-out rows, each counted once."""

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
    """Mixin over TRL's trainers."""

    _metrics: dict[str, dict[str, list[float]]]  # TRL's: mode -> name -> one value per forward pass
    _weights: dict[str, list[float]]  # of the training metrics since the last log, where rows do not say it

    def weigh(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Say for each metric of a batch how many things it is a mean over; unnamed ones are means over rows."""
        return {}

    def stop_wanted(self) -> bool:
        """Tell whether the run was asked to stop, on all ranks alike."""
        return False

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
        everywhere: dict[str, list[list[float]]] = defaultdict(list)
        for part in ranks.gather(totals):
            for name, sums in part.items():
                everywhere[name].append(sums)
        summed = {name: [sum(column) for column in zip(*parts, strict=True)] for name, parts in everywhere.items()}
        means = {name: value / weight for name, (value, weight) in summed.items() if weight}
        self._metrics["eval"].clear()
        metrics = {f"{metric_key_prefix}_loss": means.pop("loss") + means.pop("loss/sft", 0.0)}
        self._metrics["eval"].update({name: [value] for name, value in means.items()})  # TRL's `log` adds them
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=num_rows)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let TRL's metrics see this rank only: it gathers means of unequal parts, and the parts that fill up."""
        before = {name: getattr(self.accelerator, name) for name in ("gather", "gather_for_metrics")}
        for name in before:
            setattr(self.accelerator, name, lambda value, *_, **__: value)
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(self.accelerator, name, function)
