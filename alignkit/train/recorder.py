"""What goes on around a run's steps: checks before the first one, then metrics.jsonl, progress and samples.jsonl.

A check that fails stops the run, for nothing that it finds heals in training. Checks change nothing, random numbers
included.
"""

import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState

from alignkit import console
from alignkit.data import Row
from alignkit.errors import ModelError
from alignkit.models.adapters import TRAINED
from alignkit.models.frozen import score_ids
from alignkit.models.generation import generate_answers, usual_length
from alignkit.models.load import ROUNDS_TO
from alignkit.models.parameters import compare_probes, take_probe
from alignkit.recipe import Stage
from alignkit.runs.files import read_json
from alignkit.runs.record import JsonLines
from alignkit.runs.signals import pulse
from alignkit.train import ranks
from alignkit.train.losses import is_logistic
from alignkit.train.ranks import gathered_root, is_sharded
from alignkit.train.setup import Setup
from alignkit.train.trainer import Guarded

LN2 = math.log(2)
_LARGEST_REWARD_LOSS = 2.5  # above that of reward 0: a head drawn as Ziegler 2019 does scores with a deviation near 1
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def check_parameters(stage: Stage, model: Any, *, adapters: tuple[str, ...] = (TRAINED,)) -> None:
    """Raise ModelError unless exactly the expected parameters are trained.
    With `lora:` those are the trained adapters, their heads and modules_to_save; without it, all but model.freeze."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ModelError(f"{stage.name}: no parameter is trained; look at lora.target_modules")
    if isinstance(model, PeftModel):
        wrong = [name for name in trained if not any(f".{adapter}" in name for adapter in adapters)]
    else:
        # Positions of sines (Marian) are computed, and no architecture trains them.
        sines = [f"{name}." for name, module in model.named_modules() if "Sinusoidal" in type(module).__name__]
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        wrong = [name for name in frozen if not name.startswith(tuple(sines))]
        wrong = [name for name in wrong if not any(re.search(pattern, name) for pattern in stage.model.freeze)]
    if wrong:
        raise ModelError(f"{stage.name}: {len(wrong)} parameters are trained or frozen by mistake, first {wrong[0]}")


def computes_in(trainer: Guarded) -> str | None:
    """The dtype that a sharded model rounds to wherever it is asked, None for a model that computes as it is."""
    dtype = ROUNDS_TO.get(trainer.accelerator.mixed_precision) if is_sharded(trainer) else None
    return str(dtype).removeprefix("torch.") if dtype else None


def check_start(setup: Setup) -> None:
    """Raise ModelError unless the model answers as the run it starts from did when it was saved.
    This catches an adapter that was silently wiped, which no loss at step 0 shows. A sharded model is asked once it
    is sharded, any other before autocast wraps it. It compares only like with like: a start that has no probe, or had
    another head, precision or quantisation, is left to its own checks."""
    stage = setup.stage
    path = Path(stage.start_dir or "").parent / "probe.json"
    if not stage.start_dir or setup.is_reward or not path.is_file():
        return
    before = read_json(path)
    if stage.training.adapter == "merge" and stage.model.quantization != "none":
        before["quantization"] = "of the base alone"  # now that of base and adapter together: rounded otherwise
    before["dtype"] = computes_in(setup.trainer) or before["dtype"]
    now = take_probe(setup.trainer.model, vocab_size=len(setup.chat.tokenizer), reward=False)
    if (reason := compare_probes(before, now)) is not None:
        what = f"{stage.name} does not start where {stage.start_dir} ended ({reason}); the adapter, base or tokenizer "
        what += "was changed after it was trained, or another base is loaded"
        raise ModelError(what, where=stage.where(f"{stage.name}.start_from"))


def check_step_zero(stage: Stage, trainer: Guarded) -> None:
    """Raise ModelError unless the first batch has the loss that the method must have at step 0: with dropout off the
    same in training and in evaluation. dpo: policy and reference are equal, so the margin is 0 and a logistic loss is
    ln 2. rm: with a new head the loss is near ln 2; far from it, the head's scale or the labels are wrong."""
    if stage.method == "ppo":
        ranks.alike(trainer.check_step_zero)
    if stage.method in ("sft", "ppo"):
        return
    model = trainer.model
    num_rows = min(trainer.args.per_device_eval_batch_size, len(trainer.train_dataset))
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(num_rows)])
    num_tokens, losses, measured = trainer._total_train_tokens, {}, {}
    for mode in ("train", "eval") if trainer.args.disable_dropout else ("eval",):
        model.train(mode == "train")
        devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad(), trainer.compute_loss_context_manager():
            losses[mode] = float(trainer.compute_loss(model, trainer._prepare_inputs(dict(batch))))
        measured = {name: values[-1] for name, values in trainer._metrics[mode].items() if values}
        trainer._metrics[mode].clear()
    trainer._total_train_tokens, loss = num_tokens, losses["eval"]
    dtype = ROUNDS_TO.get(trainer.accelerator.mixed_precision, getattr(model, "dtype", torch.float32))
    tolerance = _TOLERANCE.get(dtype, 5e-2)
    if abs(losses.get("train", loss) - loss) > tolerance * max(1.0, abs(loss)):
        what = f"the loss at step 0 is {losses['train']:.6f} in training and {loss:.6f} in evaluation: the model draws "
        what += "random numbers that disable_dropout does not reach; set disable_dropout: false to allow it"
        raise ModelError(f"{stage.name}: {what}", where=stage.where(f"{stage.name}.disable_dropout"))
    if stage.method == "dpo" and not stage.is_unpaired and trainer.has_reference:
        margin = measured.get("rewards/margins", 0.0) / float(stage.trainer.get("beta", 0.1))
        if abs(margin) > tolerance * max(1.0, abs(measured.get("logps/chosen", 1.0))):
            what = f"policy and reference differ at step 0 (margin {margin:.3g} nats, it must be 0): the reference is"
            raise ModelError(f"{stage.name}: {what} not the model that training starts from")
        plain = not (trainer.use_weighting or trainer.aux_loss_enabled or stage.trainer.get("loss_weights"))
        if plain and is_logistic(stage.trainer) and abs(loss - LN2) > 10 * tolerance:
            raise ModelError(f"{stage.name}: the loss at step 0 is {loss:.6f} instead of {LN2:.6f} (ln 2)")
    elif stage.method == "rm":
        # At reward 0 a pair costs ln 2, a margin m softplus(m), and the best of K ln K.
        expected = float(trainer._group_loss(torch.zeros(len(batch["input_ids"])), batch))
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        is_new = bool(getattr(base, "score_is_new", False))
        if not math.isfinite(loss) or (loss > expected + _LARGEST_REWARD_LOSS and is_new):
            what = f"the reward loss at step 0 is {loss:.3g}, it should be near {expected:.3f}; the weights it starts"
            raise ModelError(f"{stage.name}: {what} from give far too large activations")


_SHOWN = ("loss", "reward", "gold", "objective/kl", "accuracy", "rewards/accuracies", "mean_token_accuracy")


def write_samples(setup: Setup, samples: JsonLines, *, step: int, when: str) -> None:
    """Append one row per prompt to samples.jsonl: step, when, prompt, answer or scores, and the row's own answer.
    Every rank answers, for a sharded model needs all of them; rank 0 writes. Leaves the model in the mode it was in.
    Does nothing for language-model pre-training without prompts."""
    rows = setup.tables.eval_rows[: setup.stage.training.samples.num]
    if not rows:
        return
    pulse("samples", step)
    model = setup.trainer.model
    was_training = model.training
    model.eval()
    try:
        if setup.answer_rows is not None:
            fields = setup.answer_rows(rows)
        elif setup.is_reward:
            fields = []
            for row in rows:
                encoded = setup.chat.encode_prompt_completion([row.prompt] * len(row.completions), row.completions)
                rewards = score_ids(model, [item.ids for item in encoded], pad_id=setup.chat.tokenizer.pad_token_id)
                answers = list(row.completions)
                fields.append({"prompt": row.prompt, "answers": answers, "rewards": rewards.tolist()})
        else:
            fields = _answer(setup, rows)
    finally:
        model.train(was_training)
    for number, extra in enumerate(fields if ranks.is_main() else ()):
        samples.append({"step": step, "when": when, "number": number, **extra})


@torch.no_grad()
def align(model: Any, source: Sequence[int], target: Sequence[int]) -> list[list[float]] | None:
    """Weights of an encoder-decoder's last layer, target by source tokens, mean over heads; None without any."""
    device = next(model.parameters()).device
    source_1S, target_1T = (torch.tensor([list(ids)], device=device) for ids in (source, target))
    output = model(input_ids=source_1S, labels=target_1T, use_cache=False, output_attentions=True)
    weights = (output.cross_attentions or [None])[-1]
    return None if weights is None else weights[0].float().mean(dim=0).tolist()


def _answer(setup: Setup, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Answer what each row asks: its prompt, a conversation up to its last question, or a text's start."""
    fields: list[dict[str, Any]] = []
    for row in rows:
        content = row.completions[0] if row.completions else None
        if row.prompt:
            fields.append({"prompt": row.prompt, "reference": content})
        elif isinstance(content, str):
            fields.append({"prompt": content[: max(len(content) // 4, 1)], "reference": content})
        elif content is not None:
            last = max(number for number, message in enumerate(content) if message["role"] == "assistant")
            fields.append({"prompt": content[:last], "reference": content[-1]["content"]})
    chat, model = setup.chat, setup.trainer.model
    prompts = chat.encode_prompts([field["prompt"] for field in fields])
    alignments: list[dict[str, Any]] = [{} for _ in rows]
    asked = setup.stage.training.samples.model_dump(exclude={"num"})
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    asked["max_new_tokens"] = asked["max_new_tokens"] or usual_length(chat, positions, short=48)
    with gathered_root(model):
        answers: list[list[int]] = []
        seed, stops, pad_id = setup.stage.seed, chat.stop_ids, chat.tokenizer.pad_token_id
        with console.Meter("samples", len(prompts)) as meter:
            for start in range(0, len(prompts), 16):
                batch = prompts[start : start + 16]
                seeds = range(seed + start, seed + start + len(batch))
                answers += generate_answers(model, batch, seeds, **asked, eos_ids=stops, pad_id=pad_id)
                meter.advance(len(batch))
        for prompt, answer, found in zip(prompts, answers, alignments, strict=True) if chat.encoder_decoder else ():
            if answer and (weights := align(model, prompt, answer)):
                source, target = ([chat.tokenizer.decode([token]) for token in ids] for ids in (prompt, answer))
                found["alignment"] = {"source": source, "target": target, "weights": weights}
    scores = setup.score_answers(rows, answers) if setup.score_answers else [{}] * len(rows)
    return [
        {"prompt": field["prompt"], "answer": chat.tokenizer.decode(answer, skip_special_tokens=True)}
        | ({"reference": field["reference"]} if row.completions else {})
        | alignment
        | score
        for field, answer, row, alignment, score in zip(fields, answers, rows, alignments, scores, strict=True)
    ]


class Recorder(TrainerCallback):
    """Metrics to the file and the screen, samples half way, and the stop flag at the end of a step."""

    def __init__(self, setup: Setup, metrics: JsonLines, samples: JsonLines) -> None:
        self._setup, self._metrics, self._samples = setup, metrics, samples
        self._progress: console.TrainingProgress | None = None
        self._shown: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        trainer = self._setup.trainer
        if state.global_step == 0:  # not of a resumed run; the model is as it will be trained: sharded, autocast
            if is_sharded(trainer):
                check_start(self._setup)
            check_step_zero(self._setup.stage, trainer)
            if trainer.eval_dataset is not None and self._setup.stage.trainer.get("eval_on_start"):
                self._evaluate()
            self._sample(step=0, when="before")
        else:
            trainer.restore_window()
            if trainer.evaluation_cut:  # as it would have come before that step was saved
                self._evaluate()
        self._began = time.monotonic()
        name, start = self._setup.stage.name, state.global_step
        self._progress = console.TrainingProgress(name, total_steps=state.max_steps, start_step=start)
        return control

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        tokens = self._setup.trainer.num_trained_tokens
        row = {"step": state.global_step, **logs}
        for name in {"num_tokens", "eval_num_tokens"} & row.keys():  # upstream counts this sitting only
            row[name] = self._setup.trainer.watch.num_tokens + tokens
        if "loss" in logs:
            row["tokens_per_second"] = tokens / max(time.monotonic() - self._began, 1e-9)
        self._metrics.append(row)
        self._shown |= {name: row[name] for name in (*_SHOWN, "tokens_per_second") if name in row}

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.on_train_end(args, state, control)
        pulse("training", state.global_step)
        if state.global_step == state.max_steps // 2 > 0:
            self._sample(step=state.global_step, when="during")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        if state.global_step >= state.max_steps:
            control.should_log = True  # the loss in result.json is that of the last step
            control.should_evaluate |= self._setup.stage.training.keep_best is not None
        control.should_evaluate |= self._setup.trainer.is_measured()
        pulse("training", state.global_step)
        if self._setup.trainer.stop_wanted() and self._setup.trainer.may_stop:
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Show how far the run is; so do the begin of a step and a save."""
        if self._progress is not None and state.global_step:
            self._progress.update(state.global_step, self._shown)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.on_train_end(args, state, control)
        if self._setup.pusher is not None:
            step = state.global_step
            self._setup.pusher.push_checkpoint(self._setup.run.checkpoints / f"checkpoint-{step}", step)

    def _evaluate(self) -> None:
        """Measure the held-out rows outside the loop over steps; a request to stop ends that as it ends samples."""
        trainer, state = self._setup.trainer, self._setup.trainer.state
        trainer.watch.stop.training = state.global_step > 0 or ranks.world_size() > 1
        trainer._determine_best_metric(trainer._evaluate(None, None, skip_scheduler=True), None)
        trainer.evaluation_cut &= state.global_step > 0
        trainer.watch.stop.training = True

    def _sample(self, *, step: int, when: str) -> None:
        """Answer the prompts; a request to stop ends that at once, where no other rank would wait for this one."""
        trainer, stop = self._setup.trainer, self._setup.trainer.watch.stop
        stop.training = ranks.world_size() > 1
        stop.saved = stop.saved or (step > 0 and trainer.may_stop)  # `fit` saves where the last step left off
        if stop.signal is not None and not stop.training:  # it came between the end of a step and here
            raise stop.not_begun()
        write_samples(self._setup, self._samples, step=step, when=when)
        stop.training = True

    def close(self) -> None:
        """Leave the terminal as it was, however training ended."""
        if self._progress is not None:
            self._progress.close()
