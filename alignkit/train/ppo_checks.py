"""PPO before its first step and after its last: a fresh policy's invariants, a KL out of bounds, held-out prompts.

What is sampled here draws random numbers of its own and leaves weights and KL coefficient as they were.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alignkit import console
from alignkit.errors import ModelError, RunError
from alignkit.runs import checkpoints
from alignkit.train import ranks
from alignkit.train.collect import CHECK, HELD_OUT, Collector
from alignkit.train.monitors import KlTooLarge

if TYPE_CHECKING:
    from datasets import Dataset

_KEPT = ("reward", "gold", "objective/kl", "entropy", "response_length", "ended_share", "repetition")


def check_step_zero(collector: Collector, model: Any, *, count: int) -> None:
    """Raise ModelError unless the ratio is exactly 1 and the KL exactly 0 on `count` answers of the fresh policy."""
    ranks.alike(lambda: _check_step_zero(collector, model, count))


def _check_step_zero(collector: Collector, model: Any, count: int) -> None:
    rollout = collector.sample(range(count), (CHECK,))
    mask_RT, logps_RT, ref_logps_RT, *_ = collector.read(rollout, model)
    batch = collector.batch(rollout, range(count), mask_RT.size(1))
    with collector.autocast():  # with gradients, as a training step computes it
        again_RT = batch.spread(collector.roles.policy_logps(model, batch)[0].float()).detach().cpu()
    # Kernels of a GPU may add in another order from one call to the next.
    bound = 0.0 if batch.input_ids_BL.device.type == "cpu" else 1e-2
    kl, ratio = float((logps_RT - ref_logps_RT).abs().max()), float((again_RT - logps_RT).abs().max())
    if not kl <= bound:
        raise ModelError(
            f"{collector.name}: policy and reference differ at step 0 (by {kl:.3g} nats in a token, it must be 0): the "
            "reference is not the model that training starts from"
        )
    if not ratio <= bound:
        raise ModelError(
            f"{collector.name}: the ratio at step 0 is exp({ratio:.3g}), it must be 1: the policy is not the same in "
            "sampling and in training; switch dropout off"
        )


@torch.no_grad()
def answer_held_out(collector: Collector, model: Any, table: Dataset, *, step: int) -> dict[str, float]:
    """Answer each held-out prompt as in training and return the means as eval_*."""
    was_training = model.training
    sums: dict[str, float] = {}
    model.eval()
    repeats = collector.options.answers_per_prompt
    for start in range(0, len(table), collector.num_answers // repeats):
        numbers = range(start, min(start + collector.num_answers // repeats, len(table)))
        rollout = collector.sample(numbers, (HELD_OUT, start), table=table, repeats=repeats)
        found = collector.examine(rollout, model, step=step)
        for name, value in found.metrics.items():
            sums[name] = sums.get(name, 0.0) + value * len(numbers) / len(table)
    model.train(was_training)
    return {f"eval_{name}": sums[name] for name in _KEPT if name in sums}


def go_back(trainer: Any, stop: KlTooLarge) -> None:
    """Take the weights of the last checkpoint whose KL was within bounds: the newest before the one just judged.

    Raises RunError when there is none.
    """
    directory = Path(trainer.args.output_dir)
    good = [path for path in checkpoints.list_checkpoints(directory) if checkpoints.step_of(path) < stop.step]
    limit = f"the KL is {stop.kl:.3g} nats per sequence at step {stop.step}, above max_kl {trainer.options.max_kl:g}"
    if not good:
        error = RunError(
            f"{limit}, and no earlier checkpoint was saved; lower learning_rate or save_steps, or raise kl_coef",
            where=str(directory),
        )
        error.shared = not ranks.is_main()
        raise error
    trainer._load_from_checkpoint(str(good[0]))
    trainer.state.global_step = checkpoints.step_of(good[0])
    console.warn(f"{trainer.collector.name}: {limit}; stopped, and the model is that of {good[0].name}")
