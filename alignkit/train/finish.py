"""The end of a run: measure, save the final model, read it back and compare, and only then say that it is finished."""

from __future__ import annotations

import math
import resource
import shutil
from pathlib import Path
from typing import Any

import torch

from alignkit.errors import NonFiniteError, RunError
from alignkit.models.load import load_trained
from alignkit.models.parameters import compare_probes, describe_parameters, hash_base, take_probe
from alignkit.models.save import save_model
from alignkit.report.publish import show
from alignkit.runs.directory import Result, write_result
from alignkit.runs.files import disk_failures, write_json
from alignkit.runs.heartbeat import pulse
from alignkit.runs.record import JsonLines
from alignkit.train import ranks, shards, zero
from alignkit.train.invariants import computes_in
from alignkit.train.recorder import write_samples
from alignkit.train.setup import Setup
from alignkit.train.trainer import Guarded

_BOOKKEEPING = ("_runtime", "_per_second", "_num_tokens")


def finish(setup: Setup) -> Result:
    """Measure, save the final model, reload it and compare, then write the result."""
    trainer, run = setup.trainer, setup.run
    trainer.refuse_bad_weights()
    trainer.ready_final()
    # Opened before the ranks meet again: opening mends a torn last line, which must not be one that is being written.
    rows, samples = JsonLines(run.metrics), JsonLines(run.samples)
    metrics = _final_metrics(trainer, rows)
    write_samples(setup, samples, step=trainer.state.global_step, when="after")
    tokens = trainer.watch.num_tokens + trainer.num_trained_tokens
    metrics |= _save_final(setup)

    def record() -> dict[str, Any]:
        shutil.rmtree(run.cache, ignore_errors=True)
        # Of this sitting's steps; loading and saving are left out.
        runtime = next((row["train_runtime"] for row in trainer.state.log_history[::-1] if "train_runtime" in row), 0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        result = Result(
            stage=setup.stage.name,
            status="finished",
            step=trainer.state.global_step,
            model_dir=str(run.model),
            metrics=metrics,
            tokens=tokens,
            wall_seconds=round(trainer.watch.seconds, 3),
            tokens_per_second=round(trainer.num_trained_tokens / runtime if runtime else 0.0, 1),
            peak_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak,
        ).to_dict()
        write_result(run, result, [run.model, run.base, run.probe])
        show(run)
        return result

    return Result(**ranks.once(record))


def _final_metrics(trainer: Guarded, metrics: JsonLines) -> dict[str, float]:
    """The last loss, and the metrics on the held-out rows: those of the last step, if they were measured."""
    rows, step = ranks.once(metrics.read), trainer.state.global_step
    losses = [row["loss"] for row in rows if "loss" in row]
    final = {"loss": losses[-1]} if losses else {}
    if trainer.eval_dataset is not None:
        last = next((row for row in rows[::-1] if "eval_loss" in row and row["step"] == step), None)
        final |= {key: value for key, value in (last or trainer.evaluate()).items() if key.startswith("eval_")}
    return {key: value for key, value in final.items() if not key.endswith(_BOOKKEEPING)}


def _save_final(setup: Setup) -> dict[str, Any]:
    """Write model/ in one step, after the copy on disk has given the same answers as the model in memory.

    Raises RunError when it does not, and when the frozen base has other bytes than before training. All ranks take
    part, for the model may be sharded; rank 0 writes and reads back.
    """
    trainer, run = setup.trainer, setup.run
    # Without its autocast wrapper: what is saved must be compared in the precision it is loaded in.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    shards.reshard(model)
    if setup.base_hash and hash_base(model) != setup.base_hash:
        raise RunError(
            "the frozen base changed during training; this is a bug, keep the run directory", where=str(run.path)
        )
    staging = run.path / "model.tmp"  # does not count yet
    pulse("saving the model")
    state = shards.gather_model(trainer)

    def save() -> None:
        with disk_failures(run.path, "the final model"):
            save_model(
                model,
                trainer.processing_class,
                staging,
                lineage=setup.loaded.lineage,
                precision=setup.loaded.precision,
                stop_ids=setup.chat.stop_ids,
                state_dict=state,
            )

    ranks.once(save)
    extra = setup.finish(staging) if setup.finish else {}
    probe = take_probe(model, vocab_size=len(trainer.processing_class), reward=setup.is_reward)
    probe["dtype"] = computes_in(trainer) or probe["dtype"]
    handler = trainer.callback_handler  # the optimizer's room is needed for the copy
    trainer.optimizer = trainer.lr_scheduler = handler.optimizer = handler.lr_scheduler = None
    trainer.accelerator.free_memory()
    pulse("reading the model back")
    if trainer.is_deepspeed_enabled:
        zero.load_plainly()
    ranks.once(lambda: _verify(setup, staging, probe))
    return extra


def _verify(setup: Setup, staging: Path, probe: dict[str, Any]) -> None:
    """Read the saved model back, compare its answers with the trained one's, and make it count."""
    trainer, run = setup.trainer, setup.run
    device = trainer.args.device.type
    if device == "cuda":  # where a second copy fits
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        device = "cuda" if free > 1.2 * describe_parameters(trainer.model)["bytes"] else "cpu"
    again = load_trained(staging, device=device, reward=setup.is_reward)
    found = take_probe(again, vocab_size=len(trainer.processing_class), reward=setup.is_reward)
    if not all(map(math.isfinite, probe["values"])):
        raise NonFiniteError(
            f"the trained model computes values that are not finite, though its weights are; {staging} is not used. "
            "Lower learning_rate or max_grad_norm"
        )
    if (reason := compare_probes(probe, found)) is not None:
        raise RunError(
            f"the saved model is not the trained one ({reason}); the checkpoints are whole", where=str(staging)
        )
    write_json(run.probe, found)
    with disk_failures(run.path, "the final model"):
        shutil.rmtree(run.model, ignore_errors=True)
        staging.rename(run.model)
