"""One way to run every trainer: resume, train, save, verify, record. A method only builds its trainer.

With several processes all of them run this; rank 0 alone decides what files say, and writes them.
"""

import hashlib
import math
import resource
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerState, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from alignkit import console
from alignkit.data.store import forget_parsed
from alignkit.errors import Interrupt, NonFiniteError, RunError, Stopped
from alignkit.models.adapters import begin_by_data
from alignkit.models.load import build_skeleton, load_trained
from alignkit.models.parameters import compare_probes, describe_parameters, hash_base, hash_samples, take_probe
from alignkit.models.save import save_model
from alignkit.recipe import Stage
from alignkit.runs import directory, record
from alignkit.runs.directory import Result, RunDir, compare_fingerprints, newest_step
from alignkit.runs.files import disk_failures, put_aside, write_json
from alignkit.runs.record import JsonLines, describe_hardware, git_state, versions
from alignkit.runs.signals import StopFlag, pulse, stop_between_steps
from alignkit.train import ranks
from alignkit.train.checkpoint import find_fault
from alignkit.train.encode import preview_rows
from alignkit.train.fingerprint import find_longer, fingerprint_stage, hash_data, unread
from alignkit.train.recorder import Recorder, check_parameters, check_start, computes_in, write_samples
from alignkit.train.setup import Setup
from alignkit.train.tables import learn_vocabulary


def fit(
    build: Callable[[Stage, RunDir], Setup], stage: Stage, run_dir: Path, *, allow_change: Sequence[str] = ()
) -> Result:
    """Train a stage in its run directory, which the caller has opened and locked.
    A finished run is returned as it is; an unfinished one goes on from its newest checkpoint that verifies."""
    run = RunDir(run_dir)
    began = record.began.pop() if record.began else time.monotonic()
    with stop_between_steps() as stop:
        pulse("joining")
        ranks.start(stage, run.path)
        asked = ranks.largest(stop.signal or 0)  # any of them, before they met
        stop.joined = True
        if asked:
            ranks.leave_at_exit()
            stop.signal = signal.Signals(asked)
        if stop.signal is not None:
            raise ranks.met_by_all(stop.not_begun())
        fingerprint: dict[str, Any] = {}  # of rank 0, until the others are told
        if finished := ranks.once(lambda: _find_finished(stage, run, fingerprint, allow_change)):
            ranks.leave_at_exit()
            return Result(**finished)
        skeleton = ranks.once(lambda: vars(build_skeleton(stage, learnt=learn_vocabulary(stage))))
        for doubt in skeleton["doubts"]:
            console.warn(f"{stage.name}: {doubt}")
        for note in skeleton["notes"]:
            console.note(f"{stage.name}: not used: {note}")
        console.note(f"{stage.name}: reading data and loading the model")
        setup = build(stage, run)
        setup.trainer.watch.began = began
        setup.trainer.lora_plus_ratio = stage.lora.lora_plus_ratio if stage.lora else None
        setup.record["notes"] = skeleton["notes"]
        if stage.evaluate is not None:
            from alignkit.evaluate.run import measure_in_training

            trainer, chat = setup.trainer, setup.chat
            trainer.evaluated = stage.evaluate.max_rows, 1 + 4 * stage.evaluate.samples
            trainer.measure = lambda step: measure_in_training(stage, trainer.model, chat, step=step)
        samples = ranks.gather(hash_samples(setup.trainer.model)) if ranks.world_size() > 1 else []
        if others := [rank for rank, digest in enumerate(samples) if digest != samples[0]]:
            what = f"rank 0 and rank {others[0]} have loaded different weights; give all nodes the same model files or "
            raise ranks.met_by_all(RunError(f"{what}revision"))
        if stage.lora is not None and ranks.is_main():
            setup.base_hash = hash_base(setup.trainer.model)
        ranks.once(lambda: _begin(setup, fingerprint, allow_change))
        _train(setup, stop, ranks.share(fingerprint))
        result = finish(setup)
        ranks.leave_at_exit()
        return result


def _find_finished(
    stage: Stage, run: RunDir, fingerprint: dict[str, Any], allow_change: Sequence[str]
) -> dict[str, Any] | None:
    """Fill in the fingerprint, and give the result of a finished run, None for one to be trained."""
    fingerprint |= fingerprint_stage(stage)
    if not run.stage.exists():
        return None
    # What the recipe alone tells is compared before anything heavy loads.
    compare_fingerprints(run, {**fingerprint, **unread(run)}, allow_change=allow_change)
    if not run.is_finished():
        return None
    compare_fingerprints(run, {**fingerprint, **unread(run), "data": hash_data(stage)}, allow_change=allow_change)
    reason, what = directory.find_damaged_product(run.path) or find_longer(stage, run), ""
    if reason is None:
        from alignkit.report.publish import leave_finished

        return leave_finished(run).to_dict()
    if newest_step(run.checkpoints) is None:
        what = "the run cannot go on, for it has no checkpoint left: start over with --force, which keeps this "
        what += "directory under another name"
    elif reason.startswith("base/") and (run.path / "base").exists():
        what = "no checkpoint has the base, so put the file back, or start over with --force"
    if what:
        raise RunError(f"{reason}; {what}", where=str(run.path))
    console.warn(f"{stage.name}: the run had finished, but {reason}; it goes on from its last checkpoint")
    return None


def _begin(setup: Setup, fingerprint: dict[str, Any], allow_change: Sequence[str]) -> None:
    """Compare the whole fingerprint with that of an earlier sitting, say what was read, and write stage.json."""
    stage, run, chat, trainer, tables = setup.stage, setup.run, setup.chat, setup.trainer, setup.tables
    # Other tokens are other data: vocabulary and template count.
    template = chat.tokenizer.backend_tokenizer.to_str() + str(chat.tokenizer.chat_template)
    template += "".join(str(part) for part in (chat.settings, chat.dated) if part)
    digest = hashlib.blake2b(template.encode(), digest_size=16).hexdigest()
    fingerprint |= {"data": tables.report.fingerprint, "template": digest, "ptx_data": setup.ptx_data}
    for change in compare_fingerprints(run, fingerprint, allow_change=allow_change):
        console.warn(f"{stage.name}: going on with a changed setting: {change}")
    if run.result.exists():  # torn, or of a run that was damaged since or is to be trained longer
        # The model too: were this sitting killed, others would take it for that of a run with no checksums.
        kept = [put_aside(path).name for path in (run.result, run.model) if path.exists()]
        console.note(f"{stage.name}: the earlier result is kept as {' and '.join(kept)}")
    # Every row that is left out is in rejects.jsonl too.
    lengths, rejects, report = tables.lengths, setup.rejects, tables.report
    line = f"{lengths.num_rows} rows, {lengths.num_trained_tokens} trained tokens"
    if stage.method == "ppo":
        line = f"{lengths.num_rows} prompts, the longest of {lengths.longest_tokens} tokens"
    if lengths.num_truncated:
        line += f", {lengths.num_truncated} cut to max_length (first: {lengths.first_cut})"
    if rejects.count:
        rejects.write(run.rejects)
        line += f", {rejects.count} left out (rejects.jsonl)"
    console.note(f"{stage.name}: {line}")
    remarks = report.remarks()
    columns = {column: place for source in reversed(report.sources) for column, place in source.ignored_places.items()}
    if columns:
        named = ", ".join(f"{column} ({place})" for column, place in sorted(columns.items()))
        remarks = [f"columns that are not read, and a row that has each: {named} (data.columns renames)", *remarks]
    if report.overlap:
        shared = f"{report.overlap} held-out rows share a prompt with training rows, first {report.overlap_places[0]}"
        remarks = [f"{shared}; the held-out figures are too good", *remarks]
    for remark in remarks:
        console.warn(f"{stage.name}: {remark}")
    directory.copy_recipe(run, Path(stage.recipe_path))
    write_json(
        run.stage,
        {
            **stage.to_dict(),
            "trl": {key: value for key, value in trainer.args.to_dict().items() if "token" not in key},
            "fingerprint": fingerprint, "clock": chat.clock.isoformat() if chat.dated else None,
            "data": report.to_dict(), "lengths": asdict(lengths),
            "eval_lengths": asdict(tables.eval_lengths) if tables.eval_lengths else None,
            "lineage": setup.loaded.lineage, "parameters": describe_parameters(trainer.model), **setup.record,
            "versions": versions(), "hardware": describe_hardware(), "num_processes": ranks.world_size(),
            "git": git_state(Path(stage.recipe_path).resolve().parent),
        },
    )  # fmt: skip
    if tables.prompts:  # an evaluation says which of its prompts this model was trained on
        with disk_failures(run.path, run.prompts.name), run.prompts.open("wb") as file:
            file.writelines(tables.prompts.chunks())
    limit = stage.trainer.get("max_length") if lengths.first_cut else None
    previewed = preview_rows(trainer.train_dataset, trainer.data_collator, chat.tokenizer, limit=limit)
    write_json(run.preview, {"rows": previewed})


def _find_place(setup: Setup, stop: StopFlag) -> tuple[str | None, int]:
    """Find the newest checkpoint and its step, take over what it knows, and say what has changed since."""
    stage, run, trainer = setup.stage, setup.run, setup.trainer

    def find_checkpoint() -> str | None:
        run.checkpoints.mkdir(exist_ok=True)
        directory.sweep_checkpoints(run.checkpoints)  # what an interrupted rotation left
        newest = directory.find_resumable(run.checkpoints, warn=console.warn, find_fault=find_fault)
        return str(newest) if newest else None

    newest = ranks.once(find_checkpoint)
    stop.saved = newest is not None
    if newest is None:
        if not ranks.is_main():
            set_seed(stage.seed + ranks.rank())  # dropout: every rank draws its own; rank 0 draws as one process does
        return None, 0
    manifest = directory.read_manifest(Path(newest))
    step, watch = manifest["step"], trainer.watch
    watch.num_tokens, watch.earlier_seconds = manifest["num_tokens"], manifest.get("seconds", 0.0)
    watch.window = manifest.get("window", [])
    watch.batches = manifest.get("batches", []) if stage.method != "ppo" else []
    trainer.evaluation_cut = manifest.get("evaluation_cut", False)
    console.note(f"{stage.name}: going on from step {step} ({newest})")
    changed = [(name, manifest["versions"].get(name), now) for name, now in sorted(versions().items())]
    if told := ", ".join(f"{name} {old} -> {now}" for name, old, now in changed if old not in (None, now)):
        console.warn(f"{stage.name}: other versions than when it was stopped: {told}")
    rows, planned = (manifest.get("batches") or [(0, trainer.batch_rows)])[-1][1], stage.trainer.get("max_steps", 0)
    if planned > 0 and rows != trainer.batch_rows:
        same = step + -(-(planned - step) * rows // trainer.batch_rows)
        what = f"those to come have {trainer.batch_rows} rows instead of {rows}: max_steps: {same} reads as many rows"
        console.warn(f"{stage.name}: max_steps counts steps, and {what} as before")
    if (before := manifest["world_size"]) != (now := ranks.world_size()):
        what = f"{before} processes before, {now} now: the same batches, other random numbers (dropout)"
        console.note(f"{stage.name}: {what}")
    return newest, step


def _train(setup: Setup, stop: StopFlag, fingerprint: dict[str, Any]) -> None:
    """Take the steps that are left, from the newest checkpoint on. Raises Stopped when a signal came."""
    stage, run, trainer = setup.stage, setup.run, setup.trainer
    newest, step = _find_place(setup, stop)
    metrics, samples = JsonLines(run.metrics), JsonLines(run.samples)

    def drop_later_rows() -> None:  # the steps to come write them again
        metrics.keep(lambda row: row["step"] <= step)
        samples.keep(lambda row: row["step"] < step)
        if newest is None:
            return
        history = TrainerState.load_from_json(str(Path(newest, "trainer_state.json"))).log_history
        if lost := sorted({row["step"] for row in history} - {row["step"] for row in metrics.read()}):
            some = f"{len(lost)} logged steps, {lost[0]} to {lost[-1]}"
            what = f"metrics.jsonl has lost {some}: its curves have a gap there, the weights have not"
            console.warn(f"{stage.name}: {what}")

    def describe_loss() -> str:
        saved, now = newest_step(run.checkpoints) or 0, trainer.state.global_step
        return f"steps {saved + 1} to {now} were not saved and are lost" if now > saved else f"step {now} is saved"

    ranks.once(drop_later_rows)
    check_parameters(stage, trainer.model, adapters=trainer.trained_adapters)
    trainer.watch.stop, trainer.watch.place = stop, run.path.stat()
    stop.at_risk = describe_loss
    trainer.watch.facts = {"fingerprint": fingerprint, "versions": versions(), "seed": stage.seed}
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
    if stage.training.push_to and ranks.is_main():
        from alignkit.report.publish import Pusher

        setup.pusher = Pusher(run, stage.training.push_to, every=stage.training.push_every, step=step)
    recorder = Recorder(setup, metrics, samples)
    trainer.add_callback(recorder)
    if newest is not None:
        loader = trainer.get_train_dataloader()
        planned = trainer.set_initial_training_values(trainer.args, loader)[-1]
        state = TrainerState.load_from_json(str(Path(newest, "trainer_state.json")))
        if step >= planned or trainer.has_stalled(state):  # no step is left: the model gets the weights of the last one
            if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # those read a checkpoint once sharded
                trainer._load_from_checkpoint(newest)
            trainer._prepare_for_training(planned, loader, newest)
            trainer.state = state
            return
    elif not ranks.is_sharded(trainer):
        check_start(setup)
    if newest is None and stage.lora is not None and stage.lora.init_lora_weights == "eva":
        begin_by_data(trainer.model, islice(trainer.get_train_dataloader(), 16))
    ranks.once(lambda: trainer.require_room(run.checkpoints))
    stop.training = True
    forget_parsed()
    try:
        trainer.train(resume_from_checkpoint=newest)
        trainer.settle()
    except (Stopped, Interrupt):
        # While samples were drawn, or a judge was waited for before a rollout's first step: nothing has changed since
        # the last step's end.
        if not stop.at_once and trainer.may_stop and trainer.state.global_step:
            trainer._save_checkpoint(trainer.model, None)
            trainer.settle()
        raise
    finally:
        if not stop.at_once:
            trainer.await_disk()
        stop.training, stop.saved = False, True
        recorder.close()
    if stop.signal is not None:
        ranks.leave_at_exit()
        saved = f"step {trainer.state.global_step} is saved; the same command goes on from there"
        raise ranks.met_by_all(stop.stopped(saved))


def finish(setup: Setup) -> Result:
    """Measure, save the final model, reload it and compare, then write the result."""
    trainer, run = setup.trainer, setup.run
    trainer.refuse_bad_weights()
    trainer.ready_final()
    if callable(getattr(trainer.optimizer, "eval", None)):  # schedule-free ones train other weights than they publish
        trainer.optimizer.eval()
    # Where the weights of the best evaluation are kept, the model gets them.
    step = last = trainer.state.global_step
    if (wanted := setup.stage.training.keep_best) is not None and trainer.state.best_global_step:
        step = trainer.state.best_global_step
        kept = run.checkpoints / f"checkpoint-{step}"
        if step != last and (damage := ranks.once(lambda: directory.find_damage(kept))):
            what = f"the best weights cannot be used: {damage}; put the files back, or take the last weights with "
            key = f"{setup.stage.name}.keep_best"
            raise ranks.met_by_all(RunError(f"{what}--set {key}=null --allow-change {key}", where=str(kept)))
        if step != last:
            trainer._load_from_checkpoint(str(kept))
        said = f"the model is that of step {step} of {last}"
        console.note(f"{setup.stage.name}: {said}, whose {wanted[1:]} was the best ({trainer.state.best_metric:.4g})")
    # Opened before the ranks meet again: opening mends a torn last line, which must not be one that is being written.
    rows, samples = JsonLines(run.metrics), JsonLines(run.samples)
    # Of the step whose weights these are: the last loss up to it, and the metrics on the held-out rows, if measured.
    logged = ranks.once(rows.read)
    metrics = dict([("loss", row["loss"]) for row in logged if "loss" in row and row["step"] <= step][-1:])
    if trainer.eval_dataset is not None:
        found = next((row for row in logged[::-1] if "eval_loss" in row and row["step"] == step), None)
        metrics |= {key: value for key, value in (found or trainer.evaluate()).items() if key.startswith("eval_")}
    bookkeeping = ("_runtime", "_per_second", "_num_tokens")
    metrics = {key: value for key, value in metrics.items() if not key.endswith(bookkeeping)}
    metrics |= {"kept_step": step} if step != last else {}
    write_samples(setup, samples, step=last, when="after")
    tokens = trainer.watch.num_tokens + trainer.num_trained_tokens
    metrics |= _save_final(setup)

    def write_record() -> dict[str, Any]:
        from alignkit.report.publish import show

        shutil.rmtree(run.cache, ignore_errors=True)
        # Of this sitting's steps; loading and saving are left out.
        runtime = next((row["train_runtime"] for row in trainer.state.log_history[::-1] if "train_runtime" in row), 0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        result = Result(
            stage=setup.stage.name, status="finished", step=last, model_dir=str(run.model),
            metrics=metrics, tokens=tokens, wall_seconds=round(trainer.watch.seconds, 3),
            tokens_per_second=round(trainer.num_trained_tokens / runtime if runtime else 0.0, 1),
            peak_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak,
        ).to_dict()  # fmt: skip
        directory.write_result(run, result, [run.model, run.base, run.probe])
        show(run)
        if setup.pusher is not None:
            setup.pusher.push_final()
        return result

    return Result(**ranks.once(write_record))


def _save_final(setup: Setup) -> dict[str, Any]:
    """Write model/ in one step, after the copy on disk has given the same answers as the model in memory. All ranks
    take part, for the model may be sharded; rank 0 writes and reads back."""
    trainer, run = setup.trainer, setup.run
    model = trainer.accelerator.unwrap_model(trainer.model)
    # Without autocast: what is saved must be compared in the precision it is loaded in. accelerate 1.15's
    # `keep_fp32_wrapper` goes back to the class's forward, past those that TRL and ppo have put in its place.
    if (before := model.__dict__.pop("_original_forward", None)) is not None:
        model.forward = before
    ranks.reshard(model)
    after = None  # of a sharded model all ranks put it together
    if setup.stage.lora is not None and (ranks.is_main() or ranks.is_sharded(trainer)):
        after = hash_base(model)
    staging = run.path / "model.tmp"  # does not count yet
    pulse("saving the model")
    facts: dict[str, Any] = {
        "lineage": setup.loaded.lineage, "precision": setup.loaded.precision, "stop_ids": setup.chat.stop_ids,
        "state_dict": ranks.gather_model(trainer), "head": setup.head, "dtype": setup.stage.model.save_dtype,
    }  # fmt: skip

    def save() -> None:
        if after != setup.base_hash:
            what = "the frozen base changed during training; this is a bug, keep the run directory"
            raise RunError(what, where=str(run.path))
        with disk_failures(run.path, "the final model"):
            save_model(model, trainer.processing_class, staging, **facts)

    ranks.once(save)
    extra = setup.finish(staging) if setup.finish else {}
    probe = take_probe(model, vocab_size=len(trainer.processing_class), reward=setup.is_reward)
    probe["dtype"] = computes_in(trainer) or probe["dtype"]
    handler = trainer.callback_handler  # the optimizer's room is needed for the copy
    trainer.optimizer = trainer.lr_scheduler = handler.optimizer = handler.lr_scheduler = None
    trainer.accelerator.free_memory()
    pulse("reading the model back")
    if trainer.is_deepspeed_enabled:
        unset_hf_deepspeed_config()  # with ZeRO-3 transformers would have every rank take part in loading

    def verify() -> None:
        device = trainer.args.device.type
        if device == "cuda":  # where a second copy fits
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info()
            device = "cuda" if free > 1.2 * describe_parameters(trainer.model)["bytes"] else "cpu"
        again = load_trained(staging, device=device, reward=setup.is_reward)
        found = take_probe(again, vocab_size=len(trainer.processing_class), reward=setup.is_reward)
        if not all(map(math.isfinite, probe["values"])):
            what = "the trained model computes values that are not finite, though its weights are; "
            raise NonFiniteError(f"{what}{staging} is not used. Lower learning_rate or max_grad_norm")
        if (reason := compare_probes(probe, found)) is not None:
            what = f"the saved model is not the trained one ({reason}); the checkpoints are whole"
            raise RunError(what, where=str(staging))
        write_json(run.probe, found)
        with disk_failures(run.path, "the final model"):
            shutil.rmtree(run.model, ignore_errors=True)
            staging.rename(run.model)

    ranks.once(verify)
    return extra
