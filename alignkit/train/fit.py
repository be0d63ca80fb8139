"""One way to run every trainer: resume, check step 0, train, save, verify, record.

A method only builds its trainer; everything that must hold for all of them is here. Nothing here knows a loss.
"""

from __future__ import annotations

import hashlib
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignkit import console
from alignkit.data import Rejects
from alignkit.errors import RunError
from alignkit.models.chat import Chat
from alignkit.models.files import find_model_dir, fingerprint_weights
from alignkit.models.load import Loaded, load_trained
from alignkit.models.parameters import describe_parameters, hash_base
from alignkit.models.probe import compare_probes, take_probe
from alignkit.models.save import save_model
from alignkit.recipe import Stage
from alignkit.runs import checkpoints
from alignkit.runs.files import disk_failures, read_json, write_json
from alignkit.runs.layout import RunDir, compare_fingerprints, copy_recipe, write_result
from alignkit.runs.record import JsonLines, git_state, versions
from alignkit.train.encode import Tables
from alignkit.train.guard import Guarded, Watch
from alignkit.train.invariants import check_parameters, check_start, check_step_zero
from alignkit.train.samples import write_samples
from alignkit.train.signals import StopFlag, catch_signals

_BOOKKEEPING = ("_runtime", "_per_second", "_num_tokens")
_SHOWN = ("loss", "accuracy", "rewards/accuracies", "mean_token_accuracy")


@dataclass
class Built:
    """A trainer that is ready to train, and what came with it."""

    trainer: Guarded
    tables: Tables
    chat: Chat
    loaded: Loaded
    rejects: Rejects
    is_reward: bool = False
    generates: bool = True
    finish: Callable[[Path], dict[str, float]] | None = None  # measures and writes beside the model, before it counts
    base_hash: str | None = None  # bytes of what adapters leave alone, before training


@dataclass
class Result:
    """How a stage ended; result.json holds the same."""

    stage: str
    status: str
    step: int
    model_dir: str
    metrics: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    wall_seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def watch_for(stage: Stage) -> Watch:
    """Return the guard's settings for a stage."""
    return Watch(keep_checkpoints=stage.options.keep_checkpoints, batching=stage.options.batching)


def fit(
    stage: Stage,
    run_dir: Path,
    build: Callable[[Stage, RunDir], Built],
    *,
    allow_change: Sequence[str] = (),
) -> Result:
    """Train a stage in its run directory, which the caller has opened and locked.

    A finished run is returned as it is; an unfinished one goes on from its newest checkpoint that verifies. Raises
    RunError when the run was started with other settings, Stopped after a signal, NonFiniteError, DiskError.
    """
    run = RunDir(run_dir)
    began = time.monotonic()
    with catch_signals() as stop:
        fingerprint = {**stage.fingerprint_values(), "start_weights": _hash_start(stage)}
        if run.stage.exists():  # what the recipe alone tells is compared before anything heavy loads
            compare_fingerprints(run, {**fingerprint, **_kept_fingerprint(run)}, allow_change=allow_change)
        if run.is_finished():
            return _read_result(run)
        console.note(f"{stage.name}: reading data and loading the model")
        built = build(stage, run)
        fingerprint |= {"data": built.tables.report.fingerprint, "template": _hash_tokenizer(built.chat)}
        for change in compare_fingerprints(run, fingerprint, allow_change=allow_change):
            console.warn(f"{stage.name}: going on with a changed setting: {change}")
        _report_rows(stage, run, built)
        if stage.lora is not None:
            built.base_hash = hash_base(built.trainer.model)
        _write_stage(stage, run, built, fingerprint)
        _train(stage, run, built, stop, fingerprint)
        result = _finish(stage, run, built, seconds=time.monotonic() - began)
    return result


def _hash_start(stage: Stage) -> str | None:
    """Fingerprint the files a stage starts from; built-in and hub weights are told by their name."""
    directory = find_model_dir(stage.start_dir or stage.model.path)
    return fingerprint_weights(directory) if directory else None


def _hash_tokenizer(chat: Chat) -> str:
    """Fingerprint vocabulary and template: other tokens are other data."""
    text = chat.tokenizer.backend_tokenizer.to_str() + str(chat.tokenizer.chat_template)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _kept_fingerprint(run: RunDir) -> dict[str, Any]:
    """Return the parts of the fingerprint that only reading the data gives again."""
    kept = read_json(run.stage).get("fingerprint", {})
    return {key: kept.get(key) for key in ("data", "template")}


def _read_result(run: RunDir) -> Result:
    data = read_json(run.result)
    console.note(f"{data['stage']}: already finished, nothing to do (--force starts over)")
    return Result(**{key: data[key] for key in Result.__dataclass_fields__})


def _report_rows(stage: Stage, run: RunDir, built: Built) -> None:
    """Say what was read and what was left out; every row left out is in rejects.jsonl too."""
    lengths, rejects = built.tables.lengths, built.rejects
    line = f"{stage.name}: {lengths.num_rows} rows, {lengths.num_trained_tokens} trained tokens"
    if lengths.num_truncated:
        line += f", {lengths.num_truncated} cut to max_length"
    if rejects.count:
        rejects.write(run.rejects)
        line += f", {rejects.count} left out (rejects.jsonl)"
    console.note(line)


def _write_stage(stage: Stage, run: RunDir, built: Built, fingerprint: dict[str, Any]) -> None:
    copy_recipe(run, Path(stage.recipe_path))
    with disk_failures(run.path, "stage.json"):
        write_json(
            run.stage,
            {
                **stage.to_dict(),
                "trl": {key: value for key, value in built.trainer.args.to_dict().items() if "token" not in key},
                "fingerprint": fingerprint,
                "data": built.tables.report.to_dict(),
                "lengths": asdict(built.tables.lengths),
                "eval_lengths": asdict(built.tables.eval_lengths) if built.tables.eval_lengths else None,
                "lineage": built.loaded.lineage,
                "parameters": describe_parameters(built.trainer.model),
                "versions": versions(),
                "git": git_state(Path(stage.recipe_path).resolve().parent),
            },
        )


def _train(stage: Stage, run: RunDir, built: Built, stop: StopFlag, fingerprint: dict[str, Any]) -> None:
    trainer = built.trainer
    run.checkpoints.mkdir(exist_ok=True)
    checkpoints.sweep(run.checkpoints)
    newest = checkpoints.find_resumable(run.checkpoints, warn=console.warn)
    metrics, samples = JsonLines(run.metrics), JsonLines(run.samples)
    step = 0
    if newest is not None:
        manifest = checkpoints.read_manifest(newest)
        step, trainer.watch.num_tokens = manifest["step"], manifest["num_tokens"]
        console.note(f"{stage.name}: going on from step {step} ({newest})")
    metrics.keep(lambda row: row["step"] <= step)
    samples.keep(lambda row: row["step"] < step)
    check_parameters(stage, trainer.model)
    if newest is None:
        check_start(stage, built)
        check_step_zero(stage, trainer)
        write_samples(stage, built, samples, step=0, when="before")
    trainer.watch.stop = stop
    trainer.watch.facts = {"fingerprint": fingerprint, "versions": versions(), "seed": stage.seed}
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
    trainer.add_callback(_Recorder(stage, built, metrics, samples))
    if newest is not None and step >= _planned_steps(trainer):
        trainer._load_from_checkpoint(str(newest))
        trainer.state.global_step = step
        return
    stop.training = True
    try:
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    finally:
        stop.training = False
    if stop.signal is not None:
        raise stop.stopped(f"step {trainer.state.global_step} is saved; the same command goes on from there")


def _planned_steps(trainer: Guarded) -> int:
    """Return the optimizer steps of the whole run."""
    loader = trainer.get_train_dataloader()
    return trainer.set_initial_training_values(trainer.args, loader)[-1]


class _Recorder(TrainerCallback):
    """Metrics to the file and the screen, samples half way, and the stop flag at the end of a step."""

    def __init__(self, stage: Stage, built: Built, metrics: JsonLines, samples: JsonLines) -> None:
        self._stage, self._built, self._metrics, self._samples = stage, built, metrics, samples
        self._progress: console.TrainingProgress | None = None
        self._shown: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
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
        if "loss" in logs:
            row["tokens_per_second"] = tokens / max(time.monotonic() - self._began, 1e-9)
        self._metrics.append(row)
        self._shown |= {name: row[name] for name in (*_SHOWN, "tokens_per_second") if name in row}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if self._stop_wanted(args):
            control.should_save = control.should_training_stop = True
        return control

    def _stop_wanted(self, args: TrainingArguments) -> bool:
        """Read the flag; with several ranks, stop all at the same step when any of them was asked to."""
        wanted = self._built.trainer.watch.stop.signal is not None
        if args.world_size > 1:
            flag = torch.tensor([int(wanted)], device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            wanted = bool(flag.item())
        return wanted

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._show(state)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._show(state)
        if state.global_step == state.max_steps // 2 > 0:
            write_samples(self._stage, self._built, self._samples, step=state.global_step, when="during")

    def _show(self, state: TrainerState) -> None:
        if self._progress is not None and state.global_step:
            self._progress.update(state.global_step, self._shown)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._show(state)
        if self._progress is not None:
            self._progress.close()


def _finish(stage: Stage, run: RunDir, built: Built, *, seconds: float) -> Result:
    """Measure, save the final model, reload it and compare, then write the result."""
    trainer = built.trainer
    metrics = _final_metrics(trainer, JsonLines(run.metrics))
    write_samples(stage, built, JsonLines(run.samples), step=trainer.state.global_step, when="after")
    tokens = trainer.watch.num_tokens + trainer.num_trained_tokens
    if trainer.args.should_save:
        with disk_failures(run.path, "the final model"):
            metrics |= _save_final(run, built)
        shutil.rmtree(run.cache, ignore_errors=True)
    result = Result(
        stage=stage.name,
        status="finished",
        step=trainer.state.global_step,
        model_dir=str(run.model),
        metrics=metrics,
        tokens=tokens,
        wall_seconds=round(seconds, 3),
        tokens_per_second=round(trainer.num_trained_tokens / seconds, 1),
        peak_memory_bytes=_peak_memory_bytes(),
    )
    if trainer.args.should_save:
        write_result(run, result.to_dict())
    return result


def _final_metrics(trainer: Guarded, metrics: JsonLines) -> dict[str, float]:
    rows = [row for row in metrics.read() if "loss" in row]
    final = {"loss": rows[-1]["loss"]} if rows else {}
    if trainer.eval_dataset is not None:
        evaluated = trainer.evaluate()
        final |= {key: value for key, value in evaluated.items() if key.startswith("eval_")}
    return {key: value for key, value in final.items() if not key.endswith(_BOOKKEEPING)}


def _save_final(run: RunDir, built: Built) -> dict[str, Any]:
    """Write model/ in one step, after the copy on disk has given the same answers as the model in memory.

    Raises RunError when it does not, and when the frozen base has other bytes than before training.
    """
    trainer, loaded = built.trainer, built.loaded
    model = trainer.accelerator.unwrap_model(trainer.model)
    if built.base_hash and hash_base(model) != built.base_hash:
        raise RunError(
            "the frozen base changed during training; this is a bug, keep the run directory", where=str(run.path)
        )
    staging = run.path / "model.tmp"
    save_model(
        model,
        trainer.processing_class,
        staging,
        lineage=loaded.lineage,
        precision=loaded.precision,
        stop_ids=built.chat.stop_ids,
    )
    extra = built.finish(staging) if built.finish else {}
    vocab_size = len(trainer.processing_class)
    probe = take_probe(model, vocab_size=vocab_size, reward=built.is_reward)
    trainer.optimizer = None  # its room is needed for the copy
    again = load_trained(staging, device=_device_with_room(trainer), reward=built.is_reward)
    reason = compare_probes(probe, take_probe(again, vocab_size=vocab_size, reward=built.is_reward))
    if reason is not None:
        raise RunError(
            f"the saved model is not the trained one ({reason}); the checkpoints are whole", where=str(staging)
        )
    write_json(run.probe, probe)
    shutil.rmtree(run.model, ignore_errors=True)
    staging.rename(run.model)
    return extra


def _device_with_room(trainer: Guarded) -> str:
    """Return the training device when a second copy of the model fits there, else cpu."""
    if trainer.args.device.type != "cuda":
        return trainer.args.device.type
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return "cuda" if free > 1.2 * describe_parameters(trainer.model)["bytes"] else "cpu"


def _peak_memory_bytes() -> int:
    """Return the most memory this process held: device memory with CUDA, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
