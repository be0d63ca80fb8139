"""One way to run every trainer: resume, check step 0, train, save, verify, record.

A method only builds its trainer; everything that must hold for all of them is here. Nothing here knows a loss.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from alignkit import console
from alignkit.models.chat import Chat
from alignkit.models.files import find_model_dir, fingerprint_weights
from alignkit.models.parameters import describe_parameters, hash_base
from alignkit.recipe import Stage
from alignkit.runs import checkpoints
from alignkit.runs.files import disk_failures, read_json, write_json
from alignkit.runs.layout import RunDir, compare_fingerprints, copy_recipe
from alignkit.runs.record import JsonLines, git_state, versions
from alignkit.train.built import Built, Result
from alignkit.train.finish import finish
from alignkit.train.guard import Guarded, Watch
from alignkit.train.invariants import check_parameters, check_start, check_step_zero
from alignkit.train.recorder import Recorder
from alignkit.train.rewards import hash_rewards
from alignkit.train.samples import write_samples
from alignkit.train.signals import StopFlag, catch_signals
from alignkit.train.tables import hash_data


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
        fingerprint = {**stage.fingerprint_values(), "start_weights": _hash_start(stage), **hash_rewards(stage)}
        if run.stage.exists():  # what the recipe alone tells is compared before anything heavy loads
            compare_fingerprints(run, {**fingerprint, **_kept_fingerprint(run)}, allow_change=allow_change)
        if run.is_finished():
            compare_fingerprints(run, {**fingerprint, **_kept_fingerprint(run), "data": hash_data(stage)},
                                 allow_change=allow_change)  # fmt: skip
            return _read_result(run)
        console.note(f"{stage.name}: reading data and loading the model")
        built = build(stage, run)
        fingerprint |= {"data": built.tables.report.fingerprint, "template": _hash_tokenizer(built.chat)}
        fingerprint["ptx_data"] = built.ptx_data
        for change in compare_fingerprints(run, fingerprint, allow_change=allow_change):
            console.warn(f"{stage.name}: going on with a changed setting: {change}")
        _report_rows(stage, run, built)
        if stage.lora is not None:
            built.base_hash = hash_base(built.trainer.model)
        _write_stage(stage, run, built, fingerprint)
        _train(stage, run, built, stop, fingerprint)
        return finish(stage, run, built, seconds=time.monotonic() - began)


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
    return {key: kept.get(key) for key in ("data", "template", "ptx_data")}


def _read_result(run: RunDir) -> Result:
    data = read_json(run.result)
    console.note(f"{data['stage']}: already finished, nothing to do (--force starts over)")
    return Result(**{key: data[key] for key in Result.__dataclass_fields__})


def _report_rows(stage: Stage, run: RunDir, built: Built) -> None:
    """Say what was read and what was left out; every row left out is in rejects.jsonl too."""
    lengths, rejects = built.tables.lengths, built.rejects
    trained = f"{lengths.num_rows} rows, {lengths.num_trained_tokens} trained tokens"
    prompts = f"{lengths.num_rows} prompts, the longest of {lengths.longest_tokens} tokens"
    line = f"{stage.name}: {prompts if stage.method == 'ppo' else trained}"
    if lengths.num_truncated:
        line += f", {lengths.num_truncated} cut to max_length"
    if rejects.count:
        rejects.write(run.rejects)
        line += f", {rejects.count} left out (rejects.jsonl)"
    console.note(line)
    report = built.tables.report
    if report.overlap:
        console.warn(f"{stage.name}: {report.overlap} held-out rows share a prompt with training rows, first "
                     f"{report.overlap_places[0]}; the held-out figures are too good")  # fmt: skip
    unread = sorted({column for source in report.sources for column in source.ignored_columns})
    if unread:
        console.warn(f"{stage.name}: columns that are not read: {', '.join(unread)} (data.columns renames)")


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
                **built.record,
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
        _warn_of_versions(stage, manifest["versions"])
    metrics.keep(lambda row: row["step"] <= step)
    samples.keep(lambda row: row["step"] < step)
    check_parameters(stage, trainer.model, adapters=trainer.trained_adapters)
    if newest is None:
        check_start(stage, built)
        check_step_zero(stage, trainer)
        write_samples(stage, built, samples, step=0, when="before")
    trainer.watch.stop = stop
    trainer.watch.facts = {"fingerprint": fingerprint, "versions": versions(), "seed": stage.seed}
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
    recorder = Recorder(stage, built, metrics, samples)
    trainer.add_callback(recorder)
    if newest is not None and step >= _planned_steps(trainer):
        trainer._load_from_checkpoint(str(newest))
        trainer.state.global_step = step
        return
    stop.training = True
    try:
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    finally:
        stop.training = False
        recorder.close()
    if stop.signal is not None:
        raise stop.stopped(f"step {trainer.state.global_step} is saved; the same command goes on from there")


def _warn_of_versions(stage: Stage, before: dict[str, str]) -> None:
    """Say which libraries changed since the checkpoint: the run goes on, but not to the same bits."""
    now = versions()
    changed = [
        f"{name} {before[name]} -> {now[name]}" for name in sorted(before.keys() & now) if before[name] != now[name]
    ]
    if changed:
        console.warn(f"{stage.name}: other versions than when it was stopped: {', '.join(changed)}")


def _planned_steps(trainer: Guarded) -> int:
    """Return the optimizer steps of the whole run."""
    loader = trainer.get_train_dataloader()
    return trainer.set_initial_training_values(trainer.args, loader)[-1]
