"""PPO before its first step and after its last: the invariants of a fresh policy, and answers to held-out prompts.

Both draw from seeds of their own and leave every generator, every weight and the KL coefficient as they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from alignkit.errors import ModelError
from alignkit.train.collect import Collector, seeded

if TYPE_CHECKING:
    from datasets import Dataset

_KEPT = ("reward", "gold", "objective/kl", "entropy", "response_length", "ended_share", "repetition")


def check_step_zero(collector: Collector, model: Any, *, count: int, seed: int) -> None:
    """Raise ModelError unless the ratio is exactly 1 and the KL exactly 0 on `count` answers of the fresh policy."""
    with seeded(seed):
        rollout = collector.sample(range(count))
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
def answer_held_out(collector: Collector, model: Any, table: Dataset, *, step: int, seed: int) -> dict[str, float]:
    """Sample one answer to each held-out prompt and return the means as eval_*."""
    was_training = model.training
    sums: dict[str, float] = {}
    model.eval()
    with seeded(seed):
        for start in range(0, len(table), collector.num_answers):
            numbers = range(start, min(start + collector.num_answers, len(table)))
            found = collector.examine(collector.sample(numbers, table), model, step=step)
            for name, value in found.metrics.items():
                sums[name] = sums.get(name, 0.0) + value * len(numbers) / len(table)
    model.train(was_training)
    return {f"eval_{name}": sums[name] for name in _KEPT if name in sums}
