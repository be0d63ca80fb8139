"""PPO's arithmetic as functions of tensors: rewards with the KL in them, advantages, losses, KL control, averages.

Legend: B responses, T response tokens. Masks are 1 on tokens of the response and 0 after its end; masked entries of the
inputs are read nowhere and come out as 0. Sources: Ziegler 2019 (arXiv 1909.08593) and openai/lm-human-preferences;
the masked forms of vwxyzjn/summarize_from_feedback_details.
"""

import torch
from torch import Tensor


def masked_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the tokens of all responses: every token weighs the same. Returns a scalar."""
    return (values_BT * mask_BT).sum() / mask_BT.sum()


def whiten(values_BT: Tensor, mask_BT: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale to variance 1 (biased, over all masked tokens) and, with `shift_mean`, to mean 0.
    Rewards keep their mean (`shift_mean=False`), advantages lose it. Source: `whiten` of lm-human-preferences."""
    mean = masked_mean(values_BT, mask_BT)
    variance = masked_mean((values_BT - mean) ** 2, mask_BT)
    whitened = (values_BT - mean) * torch.rsqrt(variance + eps)
    return (whitened if shift_mean else whitened + mean) * mask_BT


def shaped_rewards(
    scores_B: Tensor, logps_BT: Tensor, ref_logps_BT: Tensor, mask_BT: Tensor, *, kl_coef: float
) -> Tensor:
    """Per-token rewards, (B, T): -kl_coef (log pi - log ref), and the score on the last token of each response."""
    rewards = -kl_coef * (logps_BT - ref_logps_BT) * mask_BT
    last_B = (mask_BT.sum(dim=1).long() - 1).clamp(min=0)
    return rewards.scatter_add(1, last_B[:, None], scores_B[:, None].to(rewards.dtype))


def sequence_kl(logps_BT: Tensor, ref_logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Estimate KL(pi || ref) of each response in nats, (B,): the sum of its log-ratios (k1)."""
    return ((logps_BT - ref_logps_BT) * mask_BT).sum(dim=1)


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: (advantages, returns), both (B, T), not yet whitened.
    delta_t = r_t + gamma V_{t+1} - V_t with V = 0 after the last token; A_t = delta_t + gamma lam A_{t+1};
    returns are A + V. Source: arXiv 1506.02438, eq. 16."""
    rewards_BT, values_BT = rewards_BT * mask_BT, values_BT * mask_BT
    next_values = torch.cat([values_BT[:, 1:], torch.zeros_like(values_BT[:, :1])], dim=1)
    deltas = (rewards_BT + gamma * next_values - values_BT) * mask_BT
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for step in range(deltas.size(1) - 1, -1, -1):
        running = (deltas[:, step] + gamma * lam * running) * mask_BT[:, step]
        advantages[:, step] = running
    return advantages, advantages + values_BT


def kl_losses(logps_BT: Tensor, ref_logps_BT: Tensor) -> Tensor:
    """Estimate KL(pi || ref) per token, never below 0: exp(d) - d - 1, d = log ref - log pi (k3).
    Source: arXiv 2402.03300, eq. 4; Schulman, "Approximating KL divergence" (2020)."""
    difference = ref_logps_BT - logps_BT
    return difference.exp() - difference - 1


def group_advantages(returns_B: Tensor, group_size: int, kind: str, *, scale: str = "group") -> Tensor:
    """Advantages of whole responses without a critic, (B,); the `group_size` answers of a prompt stand together.
    `returns_B` is score - kl_coef KL of each response. rloo: minus the mean of the others (arXiv 2402.14740); grpo: the
    group's z-score (arXiv 2402.03300), with the deviation of the batch instead, or with none (arXiv 2503.20783) as
    `scale` says; reinforce: minus the mean of the batch. Raises ValueError for a group of one where a group is needed.
    """
    if kind == "reinforce":
        return returns_B - returns_B.mean()
    if group_size < 2:
        raise ValueError(f"{kind} compares the answers of a prompt and needs at least 2")
    groups_PG = returns_B.view(-1, group_size)  # P prompts, G answers of each
    if kind == "rloo":
        others_PG = (groups_PG.sum(dim=1, keepdim=True) - groups_PG) / (group_size - 1)
        return (groups_PG - others_PG).flatten()
    centred_PG = groups_PG - groups_PG.mean(dim=1, keepdim=True)
    if scale != "none":
        spread = groups_PG.std(dim=1, keepdim=True) if scale == "group" else returns_B.std()
        centred_PG = centred_PG / (spread + 1e-4)
    return centred_PG.flatten()


def policy_losses(
    logps_BT: Tensor, old_logps_BT: Tensor, advantages_BT: Tensor, *, clip: float, clip_high: float | None = None
) -> Tensor:
    """Clipped surrogate per token, (B, T): max(-A u, -A clip(u, 1 - clip, 1 + clip_high)), u = pi / pi_old.
    Source: arXiv 1707.06347, eq. 7, with the sign of a loss; a bound of its own above: arXiv 2503.14476, eq. 8."""
    ratio = (logps_BT - old_logps_BT).exp()
    bounded = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    return torch.maximum(-advantages_BT * ratio, -advantages_BT * bounded)


def answer_means(values_N: Tensor, rows_N: Tensor) -> Tensor:
    """Give every token the mean over its answer, (N,); `rows_N` holds the answer's number for each token.
    Of log-ratios it is the log of GSPO's ratio (arXiv 2507.18071, eq. 7)."""
    sums_B = torch.zeros(int(rows_N.max()) + 1, dtype=values_N.dtype, device=values_N.device)
    return (sums_B.index_add(0, rows_N, values_N) / rows_N.bincount().clamp(min=1))[rows_N]


def token_weights(learnt_BT: Tensor, kind: str, *, longest: int) -> Tensor:
    """Weigh the tokens that are learnt, (B, T), for a sum that is divided by the tokens (token) or the answers.
    token: 1 each; sequence: 1 / tokens of the answer (arXiv 2402.03300, eq. 3); constant: 1 / `longest`, the most
    tokens that an answer may have (arXiv 2503.20783, section 3.2)."""
    if kind == "sequence":
        return learnt_BT / learnt_BT.sum(dim=1, keepdim=True).clamp(min=1)
    return learnt_BT / longest if kind == "constant" else learnt_BT


def value_losses(values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, *, clip: float) -> Tensor:
    """Clipped squared error per token, (B, T), with its factor 1/2: new values stay within `clip` of the rollout's."""
    clipped = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
    return 0.5 * torch.maximum((values_BT - returns_BT) ** 2, (clipped - returns_BT) ** 2)


def adapt_kl_coef(coef: float, kl: float, num_episodes: int, *, target: float | None, horizon: int) -> float:
    """Move the KL coefficient towards a `target` in nats per sequence; without one it stays.
    coef *= 1 + clip(kl / target - 1, -0.2, 0.2) n / horizon after n episodes. Source: Ziegler 2019 section 2.2,
    `AdaptiveKLController` of lm-human-preferences; `horizon` counts episodes."""
    return coef if target is None else coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * num_episodes / horizon)


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> float:
    """Share of the returns' variance the critic predicts: 1 is perfect, 0 no better than their mean."""
    kept = mask_BT.bool()
    returns = returns_BT[kept]
    variance = returns.var(correction=0)
    return float(1 - (returns - values_BT[kept]).var(correction=0) / variance) if variance > 0 else 0.0
