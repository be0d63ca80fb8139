"""What a run writes while it trains: metrics.jsonl, progress, and answers to the same prompts in samples.jsonl."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit import console
from alignkit.data import Row
from alignkit.models.classifier import score_ids
from alignkit.models.generation import generate_greedy
from alignkit.recipe import Stage
from alignkit.runs.heartbeat import pulse
from alignkit.runs.record import JsonLines
from alignkit.train import ranks
from alignkit.train.built import Built
from alignkit.train.invariants import check_start, check_step_zero
from alignkit.train.shards import gathered_root, is_sharded


def write_samples(stage: Stage, built: Built, samples: JsonLines, *, step: int, when: str) -> None:
    """Append one row per prompt to samples.jsonl: step, when, prompt, answer or scores, and the row's own answer.

    Every rank answers, for a sharded model needs all of them; rank 0 writes. Leaves the model in the mode it was in.
    Does nothing for language-model pre-training without prompts.
    """
    options = stage.training.samples
    rows = built.tables.eval_rows[: options.num]
    if not rows:
        return
    pulse("samples", step)
    model = built.trainer.model
    was_training = model.training
    model.eval()
    try:
        if built.is_reward:
            fields = _score_answers(built, rows)
        else:
            fields = _answer(built, rows, max_new_tokens=options.max_new_tokens)
    finally:
        model.train(was_training)
    for number, extra in enumerate(fields if ranks.is_main() else ()):
        samples.append({"step": step, "when": when, "number": number, **extra})


def _answer(built: Built, rows: Sequence[Row], *, max_new_tokens: int) -> list[dict[str, Any]]:
    tokenizer = built.chat.tokenizer
    prompts = [_prompt_of(row) for row in rows]
    ids = built.chat.encode_prompts(prompts)
    with gathered_root(built.trainer.model):
        answers = generate_greedy(
            built.trainer.model,
            ids,
            max_new_tokens=max_new_tokens,
            eos_ids=built.chat.stop_ids,
            pad_id=tokenizer.pad_token_id,
        )
    fields = [
        {"prompt": prompt, "answer": tokenizer.decode(answer, skip_special_tokens=True)}
        | ({"reference": _reference_of(row)} if row.completions else {})
        for prompt, answer, row in zip(prompts, answers, rows, strict=True)
    ]
    scores = built.score_answers(rows, answers) if built.score_answers else [{}] * len(rows)
    return [known | more for known, more in zip(fields, scores, strict=True)]


def _score_answers(built: Built, rows: Sequence[Row]) -> list[dict[str, Any]]:
    scored = []
    for row in rows:
        encoded = built.chat.encode_prompt_completion([row.prompt] * len(row.completions), row.completions)
        pad_id = built.chat.tokenizer.pad_token_id
        rewards = score_ids(built.trainer.model, [item.ids for item in encoded], pad_id=pad_id).tolist()
        scored.append({"prompt": row.prompt, "answers": list(row.completions), "rewards": rewards})
    return scored


def _prompt_of(row: Row) -> Any:
    """Return what is asked: the prompt; of a conversation its turns up to the last question; of a text its start."""
    if row.prompt:
        return row.prompt
    content = row.completions[0]
    if isinstance(content, str):
        return content[: max(len(content) // 4, 1)]
    last = max(number for number, message in enumerate(content) if message["role"] == "assistant")
    return content[:last]


def _reference_of(row: Row) -> Any:
    content = row.completions[0]
    return content if isinstance(content, str) or row.prompt else content[-1]["content"]


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
            self._sample(step=0, when="before")
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
            self._sample(step=state.global_step, when="during")

    def _sample(self, *, step: int, when: str) -> None:
        """Answer the prompts; a request to stop ends that at once, where no other rank would wait for this one."""
        trainer = self._built.trainer
        stop = trainer.watch.stop
        stop.training = ranks.world_size() > 1
        stop.saved = stop.saved or (step > 0 and trainer.may_stop)  # `fit` saves where the last step left off
        write_samples(self._stage, self._built, self._samples, step=step, when=when)
        stop.training = True

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
