"""The losses TRL does not have, as pure functions of log-probabilities and scores.

Legend: B pairs (or prompts) in a batch, K answers of one prompt, P pairs of one prompt. Nothing here knows a model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alignkit.recipe.words import OWN_LOSSES


@dataclass(frozen=True)
class Pairs:
    """What a preference loss reads of B pairs: each answer's log-probability in nats, its tokens, its soft label."""

    chosen_B: Tensor
    rejected_B: Tensor
    chosen_tokens_B: Tensor
    rejected_tokens_B: Tensor
    label_B: Tensor  # P(chosen preferred)
    ref_chosen_B: Tensor | float = 0.0  # of the reference, where the loss has one
    ref_rejected_B: Tensor | float = 0.0

    @property
    def margins_B(self) -> Tensor:
        return (self.chosen_B - self.ref_chosen_B) - (self.rejected_B - self.ref_rejected_B)


PairLoss = Callable[[Pairs], Tensor]  # -> (B,)


def pick_loss(name: str, options: Mapping[str, Any], *, beta: float, label_smoothing: float) -> PairLoss:
    """The loss of `OWN_LOSSES` of that name, with its keys' values in a dpo stage's `options`."""
    keys = {key: options.get(key, fragment["default"]) for key, fragment in OWN_LOSSES[name].keys.items()}
    if name == "cdpo":
        keys["label_smoothing"] = label_smoothing
    return partial(globals()[name], beta=beta, **keys)


def is_logistic(options: Mapping[str, Any]) -> bool:
    """Tell whether a dpo stage's loss is the cross-entropy of one margin: ln 2 at step 0, and soft labels mean it."""
    names = options.get("loss_type", ["sigmoid"])
    return names == ["sigmoid"] or (len(names) == 1 and names[0] in OWN_LOSSES and OWN_LOSSES[names[0]].is_logistic)


def cdpo(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Conservative DPO: cross-entropy of each margin, of soft labels that are wrong with probability `label_smoothing`.
    Source: Mitchell, "A note on DPO with noisy preferences" (2023), eq. 3; `preference_loss` of the DPO authors."""
    wrong_B = 1 - (pairs.label_B * (1 - label_smoothing) + (1 - pairs.label_B) * label_smoothing)
    scaled_B = beta * pairs.margins_B
    return -(1 - wrong_B) * F.logsigmoid(scaled_B) - wrong_B * F.logsigmoid(-scaled_B)


def ipo_sum(pairs: Pairs, *, beta: float) -> Tensor:
    """IPO on summed log-probabilities: (margin - 1 / (2 beta))^2, as the DPO authors' code has it.
    TRL's `ipo` divides each side by its length first. Source: arXiv 2310.12036, eq. 17."""
    return (pairs.margins_B - 1 / (2 * beta)) ** 2


def dpop(pairs: Pairs, *, beta: float, dpop_lambda: float) -> Tensor:
    """DPO-Positive: the margin less lambda max(0, log pi_ref - log pi of the chosen answer).
    Source: Pal et al. 2024 (arXiv 2402.13228), eq. 3."""
    lost_B = (pairs.ref_chosen_B - pairs.chosen_B).clamp(min=0)
    return -F.logsigmoid(beta * (pairs.margins_B - dpop_lambda * lost_B))


def simpo(pairs: Pairs, *, beta: float, simpo_gamma: float) -> Tensor:
    """SimPO: -log s(beta (mean log pi of chosen - of rejected) - gamma), means over an answer's tokens.
    Source: Meng et al. 2024 (arXiv 2405.14734), eq. 6."""
    difference_B = pairs.chosen_B / pairs.chosen_tokens_B - pairs.rejected_B / pairs.rejected_tokens_B
    return -F.logsigmoid(beta * difference_B - simpo_gamma)


def cpo(pairs: Pairs, *, beta: float, cpo_alpha: float) -> Tensor:
    """CPO: DPO against a uniform reference, and the likelihood of the chosen answer, a mean over its tokens.
    Source: Xu et al. 2024 (arXiv 2401.08417), eq. 4 and 5; the mean over tokens is that of the authors' code."""
    likelihood_B = -pairs.chosen_B / pairs.chosen_tokens_B
    return -F.logsigmoid(beta * (pairs.chosen_B - pairs.rejected_B)) + cpo_alpha * likelihood_B


def orpo(pairs: Pairs, *, beta: float) -> Tensor:
    """ORPO: the likelihood of the chosen answer and, times beta (lambda), its odds ratio to the rejected one.
    Source: Hong et al. 2024 (arXiv 2403.07691), eq. 4 to 7; P is the geometric mean over an answer's tokens."""
    chosen_B = pairs.chosen_B / pairs.chosen_tokens_B
    rejected_B = pairs.rejected_B / pairs.rejected_tokens_B
    log_odds_B = (chosen_B - rejected_B) - (torch.log1p(-chosen_B.exp()) - torch.log1p(-rejected_B.exp()))
    return -chosen_B - beta * F.logsigmoid(log_odds_B)


def sequence_logps(token_logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum the log-probabilities of the masked tokens: (B, T), (B, T) -> (B,)."""
    return (token_logps_BT * mask_BT).sum(dim=-1)


def pairwise_losses(
    better_P: Tensor, worse_P: Tensor, *, label_P: Tensor | float = 1.0, margin_P: Tensor | float = 0.0
) -> Tensor:
    """Cross-entropy of Bradley-Terry: -p log s(d) - (1 - p) log s(-d) with d = better - worse - margin.
    `label_P` is P(better preferred): 1 for human labels, soft for AI labels (Constitutional AI, section 4.1)."""
    difference = better_P - worse_P - margin_P
    return -label_P * F.logsigmoid(difference) - (1 - label_P) * F.logsigmoid(-difference)


def kway_loss(losses_P: Tensor, prompt_P: Tensor, num_prompts: int) -> Tensor:
    """Average the pairs of each prompt, then the prompts: InstructGPT (arXiv 2203.02155) eq. 1. `prompt_P` holds the
    prompt's number in the batch for each pair. A prompt without a pair (all ties) counts nothing."""
    totals = torch.zeros(num_prompts, dtype=losses_P.dtype, device=losses_P.device)
    totals = totals.index_add(0, prompt_P, losses_P)
    pairs = torch.bincount(prompt_P, minlength=num_prompts)
    return (totals / pairs.clamp(min=1)).sum() / (pairs > 0).sum().clamp(min=1)


def measure_norm(rewards: Tensor, kind: str) -> tuple[float, float]:
    """Gain and bias that give these rewards mean 0, and with gain_and_bias deviation 1. Sources: Ziegler 2019, section
    2.1, and `train_reward.normalize` of its code; InstructGPT, section 3.5, shifts by the demonstrations."""
    gain = 1.0 / max(float(rewards.std(correction=0)), 1e-8) if kind == "gain_and_bias" else 1.0
    return gain, -gain * float(rewards.mean())


def best_of_loss(scores_BK: Tensor, best_B: Tensor) -> Tensor:
    """Softmax cross-entropy of picking the best of K answers: Ziegler 2019 (arXiv 1909.08593) eq. 1, with its minus.
    Missing answers of shorter groups carry -inf in `scores_BK`."""
    return F.cross_entropy(scores_BK, best_B)
