"""What happens while a trainer runs: checks and samples before the first step, metrics, samples, the stop flag.

It changes nothing about training but its end.
"""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit import console
from alignkit.recipe import Stage
from alignkit.runs.heartbeat import pulse
from alignkit.runs.record import JsonLines
from alignkit.train.built import Built
from alignkit.train.invariants import check_start, check_step_zero
from alignkit.train.samples import write_samples
from alignkit.train.shards import is_sharded

_SHOWN = ("loss", "reward", "gold", "objective/kl", "accuracy", "rewards/accuracies", "mean_token_accuracy")


class Recorder(TrainerCallback):
    """Metrics to the file and the screen, samples half way, and the stop flag at the end of a step."""

    def __init__(self, stage: Stage, built: Built, metrics: JsonLines, samples: JsonLines) -> None:
        self._stage, self._built, self._metrics, self._samples = stage, built, metrics, samples
        self._progress: console.TrainingProgress | None = None
        self._shown: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if state.global_step == 0:  # not of a resumed run; the model is as it will be trained: sharded, autocast
            if is_sharded(self._built.trainer):
                check_start(self._stage, self._built)
            check_step_zero(self._stage, self._built.trainer)
            write_samples(self._stage, self._built, self._samples, step=0, when="before")
        else:
            trainer = self._built.trainer
            trainer.restore_window()
            if trainer.evaluation_cut:  # as it would have come before that step was saved
                trainer._evaluate(None, None)
        self._began, self._tokens = time.monotonic(), 0
        self._progress = console.TrainingProgress(
            self._stage.name, total_steps=state.max_steps, start_step=state.global_step
        )
        return control

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        tokens = self._built.trainer.num_trained_tokens
        row = {"step": state.global_step, **logs}
        for name in {"num_tokens", "eval_num_tokens"} & row.keys():  # upstream counts this sitting only
            row[name] = self._built.trainer.watch.num_tokens + tokens
        if "loss" in logs:
            row["tokens_per_second"] = tokens / max(time.monotonic() - self._began, 1e-9)
        self._metrics.append(row)
        self._shown |= {name: row[name] for name in (*_SHOWN, "tokens_per_second") if name in row}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if state.global_step >= state.max_steps:
            control.should_log = True  # the loss in result.json is that of the last step
        pulse("training", state.global_step)
        if self._built.trainer.stop_wanted() and self._built.trainer.may_stop:
            control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._show(state)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._show(state)
        pulse("training", state.global_step)
        if state.global_step == state.max_steps // 2 > 0:
            write_samples(self._stage, self._built, self._samples, step=state.global_step, when="during")

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        pulse("evaluating", state.global_step)

    def _show(self, state: TrainerState) -> None:
        if self._progress is not None and state.global_step:
            self._progress.update(state.global_step, self._shown)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._show(state)

    def close(self) -> None:
        """Leave the terminal as it was, however training ended."""
        if self._progress is not None:
            self._progress.close()
