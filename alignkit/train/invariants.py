"""What must hold before the first step; each broken one stops the run, for none of them heals in training.

It runs forward passes in eval mode and changes nothing, random numbers included.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from alignkit.errors import ModelError
from alignkit.models.adapters import TRAINED
from alignkit.models.parameters import compare_probes, take_probe
from alignkit.recipe import Stage
from alignkit.runs.files import read_json
from alignkit.train import ranks
from alignkit.train.losses import is_logistic
from alignkit.train.setup import Setup
from alignkit.train.shards import is_sharded
from alignkit.train.trainer import Guarded

LN2 = math.log(2)
_LARGEST_REWARD_LOSS = 2.5  # above that of reward 0: a head drawn as Ziegler 2019 does scores with a deviation near 1
_ROUNDS_TO = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of mixed precision
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def check_parameters(stage: Stage, model: Any, *, adapters: tuple[str, ...] = (TRAINED,)) -> None:
    """Raise ModelError unless exactly the expected parameters are trained.

    With `lora:` those are the trained adapters, their heads and modules_to_save; without it, all but model.freeze.
    """
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
    dtype = _ROUNDS_TO.get(trainer.accelerator.mixed_precision) if is_sharded(trainer) else None
    return str(dtype).removeprefix("torch.") if dtype else None


def check_start(setup: Setup) -> None:
    """Raise ModelError unless the model answers as the run it starts from did when it was saved.

    This catches an adapter that was silently wiped, which no loss at step 0 shows. A sharded model is asked once it
    is sharded, any other before autocast wraps it. It compares only like with like: a start that has no probe, or had
    another head, precision or quantisation, is left to its own checks.
    """
    stage = setup.stage
    if not stage.start_dir or setup.is_reward:
        return
    if not (path := Path(stage.start_dir).parent / "probe.json").is_file():
        return
    before = read_json(path)
    if stage.training.adapter == "merge" and stage.model.quantization != "none":
        before["quantization"] = "of the base alone"  # now that of base and adapter together: rounded otherwise
    before["dtype"] = computes_in(setup.trainer) or before["dtype"]
    vocab_size = len(setup.chat.tokenizer)
    reason = compare_probes(before, take_probe(setup.trainer.model, vocab_size=vocab_size, reward=False))
    if reason is not None:
        what = f"{stage.name} does not start where {stage.start_dir} ended ({reason}); the adapter, base or tokenizer "
        what += "was changed after it was trained, or another base is loaded"
        raise ModelError(what, where=stage.where(f"{stage.name}.start_from"))


def check_step_zero(stage: Stage, trainer: Guarded) -> None:
    """Raise ModelError unless the first batch has the loss that the method must have at step 0.

    dpo: policy and reference are equal, so the margin is 0 and a logistic loss is ln 2. rm: with a new head the loss
    is near ln 2; far from it, the head's scale or the labels are wrong. With dropout off, every method's
    loss is the same in training and in evaluation.
    """
    if stage.method == "sft":
        return
    if stage.method == "ppo":
        ranks.alike(trainer.check_step_zero)
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
    trainer._total_train_tokens = num_tokens
    loss = losses["eval"]
    dtype = _ROUNDS_TO.get(trainer.accelerator.mixed_precision, getattr(model, "dtype", torch.float32))
    tolerance = _TOLERANCE.get(dtype, 5e-2)
    if abs(losses.get("train", loss) - loss) > tolerance * max(1.0, abs(loss)):
        raise ModelError(
            f"{stage.name}: the loss at step 0 is {losses['train']:.6f} in training and {loss:.6f} in evaluation: the "
            "model draws random numbers that disable_dropout does not reach; set disable_dropout: false to allow it",
            where=stage.where(f"{stage.name}.disable_dropout"),
        )
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
