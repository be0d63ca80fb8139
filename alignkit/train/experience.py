"""One rollout as tensors: what was sampled, what the models said about it, and what PPO learns from it.

Everything here is arithmetic on rewards and log-probabilities; sampling and models are elsewhere.

Legend: R answers of a rollout, T tokens of its longest answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from alignkit.recipe.schema import PpoOptions
from alignkit.train.ppo_math import (
    explained_variance,
    gae,
    group_advantages,
    masked_mean,
    sequence_kl,
    shaped_rewards,
    whiten,
)
from alignkit.train.rollout import Rollout


@dataclass
class Experience:
    """A rollout with what PPO needs of it; tensors lie on the CPU, in float32."""

    rollout: Rollout
    scores_R: Tensor
    mask_RT: Tensor
    logps_RT: Tensor
    ref_logps_RT: Tensor
    values_RT: Tensor  # zeros without a critic
    advantages_RT: Tensor
    returns_RT: Tensor
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def kl(self) -> float:
        """Mean KL to the reference in nats per sequence."""
        return float(sequence_kl(self.logps_RT, self.ref_logps_RT, self.mask_RT).mean())


def make_experience(
    options: PpoOptions,
    rollout: Rollout,
    scores_R: Tensor,
    *,
    mask_RT: Tensor,
    logps_RT: Tensor,
    ref_logps_RT: Tensor,
    values_RT: Tensor | None,
    kl_coef: float,
) -> Experience:
    """Shape the rewards and estimate the advantages; `scores_R` are normalised and final."""
    rewards_RT = shaped_rewards(scores_R, logps_RT, ref_logps_RT, mask_RT, kl_coef=kl_coef)
    if options.whiten_rewards:
        rewards_RT = whiten(rewards_RT, mask_RT, shift_mean=False)
    metrics: dict[str, float] = {}
    if values_RT is not None:
        advantages_RT, returns_RT = gae(rewards_RT, values_RT, mask_RT, gamma=options.gamma, lam=options.lam)
        metrics["explained_variance"] = explained_variance(values_RT, returns_RT, mask_RT)
        metrics["value"] = float(masked_mean(values_RT, mask_RT))
    else:
        values_RT = returns_RT = torch.zeros_like(rewards_RT)
        advantages_R = group_advantages(rewards_RT.sum(dim=1), options.answers_per_prompt, options.advantage)
        advantages_RT = advantages_R[:, None] * mask_RT
    # The baseline of rloo and the z-score of grpo are their own scale.
    if options.whiten_advantages and options.advantage in ("gae", "reinforce"):
        advantages_RT = whiten(advantages_RT, mask_RT)
    return Experience(rollout, scores_R, mask_RT, logps_RT, ref_logps_RT, values_RT, advantages_RT, returns_RT, metrics)


def finish_scores(
    options: PpoOptions, total_R: Tensor, ended: Sequence[bool], norm: tuple[float, float] | None
) -> Tensor:
    """Return the final score of each answer: normalised, clipped, and with what a missing end costs."""
    scores_R = total_R.float()
    if norm is not None:
        gain, bias = norm
        scores_R = gain * scores_R + bias
    if options.reward_clip is not None:
        scores_R = scores_R.clamp(-options.reward_clip, options.reward_clip)
    if options.missing_eos is not None:
        cut_R = ~torch.tensor(ended, dtype=torch.bool)
        if options.missing_eos.score is not None:
            scores_R = torch.where(cut_R, torch.full_like(scores_R, options.missing_eos.score), scores_R)
        else:
            scores_R = scores_R - cut_R * float(options.missing_eos.penalty or 0.0)
    return scores_R


def measure_norm(options: PpoOptions, rewards_R: Tensor) -> tuple[float, float]:
    """Return gain and bias that give these rewards mean 0, and with gain_and_bias deviation 1 (Ziegler 2019)."""
    gain = 1.0
    if options.reward_normalize == "gain_and_bias":
        gain = 1.0 / max(float(rewards_R.std(correction=0)), 1e-8)
    return gain, -gain * float(rewards_R.mean())


def answer_order(num_answers: int, *, seed: int, rollout: int, epoch: int) -> np.ndarray:
    """Return the order in which an epoch goes through a rollout, (R,).

    The first epoch keeps the rollout's own order: its prompts are in random order already, and the first minibatch is
    then computed as its log-probabilities were, so that its ratio is exactly 1.
    """
    if epoch == 0:
        return np.arange(num_answers)
    return np.random.default_rng((seed, rollout, epoch)).permutation(num_answers)


def sort_steps(rows: np.ndarray, lengths: Sequence[int], *, step_size: int) -> np.ndarray:
    """Sort the answers of each optimizer step by length, longest first: micro batches then hold little padding.

    A step's loss is a sum over its tokens, so that the order inside a step changes no more than rounding.
    """
    sizes = np.asarray(lengths)
    parts = [rows[start : start + step_size] for start in range(0, len(rows), step_size)]
    return np.concatenate([part[np.argsort(-sizes[part], kind="stable")] for part in parts])


def prompt_numbers(first: int, count: int, *, num_prompts: int, seed: int) -> list[int]:
    """Return places `first` to `first + count` of the endless stream of prompts: one shuffled pass after the other."""
    numbers: list[int] = []
    order: dict[int, np.ndarray] = {}
    for place in range(first, first + count):
        turn, offset = divmod(place, num_prompts)
        if turn not in order:
            order[turn] = np.random.default_rng((seed, turn)).permutation(num_prompts)
        numbers.append(int(order[turn][offset]))
    return numbers
