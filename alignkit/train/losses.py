"""The losses TRL does not have, as pure functions of log-probabilities and scores.

Legend: B pairs (or prompts) in a batch, K answers of one prompt, P pairs of one prompt. Nothing here knows a model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sequence_logps(token_logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum the log-probabilities of the masked tokens: (B, T), (B, T) -> (B,)."""
    return (token_logps_BT * mask_BT).sum(dim=-1)


def cdpo_loss(margins_B: Tensor, *, beta: float, label_smoothing: float | Tensor) -> Tensor:
    """Conservative DPO: cross-entropy against labels that are wrong with probability `label_smoothing`.

    `margins_B` is (log pi/ref of chosen) - (log pi/ref of rejected), in nats. With a tensor (B,) every pair has its
    own probability, which is DPO on soft labels: P(chosen preferred) = 1 - label_smoothing.
    Source: Mitchell, "A note on DPO with noisy preferences" (2023), eq. 3; `preference_loss` of the DPO authors.
    """
    scaled = beta * margins_B
    return -(1 - label_smoothing) * F.logsigmoid(scaled) - label_smoothing * F.logsigmoid(-scaled)


def ipo_sum_loss(margins_B: Tensor, *, beta: float) -> Tensor:
    """IPO on summed log-probabilities: (margin - 1 / (2 beta))^2, as the DPO authors' code has it.

    TRL's `ipo` divides each side by its length first. Source: arXiv 2310.12036, eq. 17.
    """
    return (margins_B - 1 / (2 * beta)) ** 2


def pairwise_losses(
    better_P: Tensor, worse_P: Tensor, *, label_P: Tensor | float = 1.0, margin_P: Tensor | float = 0.0
) -> Tensor:
    """Cross-entropy of Bradley-Terry: -p log s(d) - (1 - p) log s(-d) with d = better - worse - margin.

    `label_P` is P(better preferred): 1 for human labels, soft for AI labels (Constitutional AI, section 4.1).
    """
    difference = better_P - worse_P - margin_P
    return -label_P * F.logsigmoid(difference) - (1 - label_P) * F.logsigmoid(-difference)


def kway_loss(losses_P: Tensor, prompt_P: Tensor, num_prompts: int) -> Tensor:
    """Average the pairs of each prompt, then the prompts: InstructGPT (arXiv 2203.02155) eq. 1.

    `prompt_P` holds the prompt's number in the batch for each pair. A prompt without a pair (all ties) counts nothing.
    """
    totals = torch.zeros(num_prompts, dtype=losses_P.dtype, device=losses_P.device)
    totals = totals.index_add(0, prompt_P, losses_P)
    pairs = torch.bincount(prompt_P, minlength=num_prompts)
    return (totals / pairs.clamp(min=1)).sum() / (pairs > 0).sum().clamp(min=1)


def best_of_loss(scores_BK: Tensor, best_B: Tensor) -> Tensor:
    """Softmax cross-entropy of picking the best of K answers: Ziegler 2019 (arXiv 1909.08593) eq. 1, with its minus.

    Missing answers of shorter groups carry -inf in `scores_BK`.
    """
    return F.cross_entropy(scores_BK, best_B)
