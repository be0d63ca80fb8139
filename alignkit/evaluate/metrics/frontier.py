"""The most reward that a policy can have at a distance from its reference: pi_ref(y|x) exp(r(x, y) / beta) / Z(x).

That policy is the optimum of E[r] - beta KL(pi || pi_ref) (DPO, arXiv 2305.18290, equation 4); its reward and KL follow
from answers of the reference alone, by self-normalised importance sampling. Every prompt has its own Z(x): one over all
of them would let an optimum choose its prompts, which no policy can. How it can err, and what is done:
- With few effective answers, 1 / sum of squared weights, the estimate knows only the best answers it has drawn, and is
  too low to be a bound. A beta whose median prompt has fewer than MIN_EFFECTIVE is left out, and said to be.
- log Z is biased low by about 1 / (2 effective answers) (Jensen), the value of the objective by beta times that: under
  0.05 beta where nothing is left out.
- KL cannot exceed the log of the number of answers; what has a larger one is left out by the same rule.

Legend: P prompts, M answers to each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from alignkit.evaluate.context import OWN, POLICY, ROWS, Context, Figure, Floats, Groups, Metric, make_figure, mean
from alignkit.evaluate.metrics.best_of import measure_best_of, measure_best_of_kl

MIN_EFFECTIVE = 10.0
_STEP, _WIDEST = 1.15, 20.0


def measure(context: Context) -> list[Figure]:
    frontier, reward, resamples = context.options.frontier, context.reward, context.options.resamples
    assert frontier is not None and reward is not None
    number = max([frontier.answers, *frontier.best_of])
    scores = context.score(reward, context.sample(context.policy, number))
    figures, warnings = measure_optimum(frontier.betas, scores, resamples=resamples)
    for message in warnings:
        context.space.warn(message)
    figures += measure_best_of(frontier.best_of, scores, {}, resamples=resamples)
    figures += measure_best_of_kl(frontier.best_of, scores, resamples=resamples)
    return context.place(figures, reward=reward.name, answers=number, **context.sampling)


_NEEDS = "it needs prompts, evaluate.frontier in the recipe and a reward (--reward)"
METRIC = Metric(measure, (ROWS, POLICY, OWN, (
    lambda context: context.prompts and context.options.frontier and context.reward is not None, _NEEDS
)), key="frontier")  # fmt: skip


@dataclass(frozen=True)
class Optimum:
    """The optimum at one beta, prompt by prompt: reward, KL in nats per answer, value, effective answers; (P,) each.
    `value` is beta log Z = reward - beta KL: no policy has more of it, whatever its KL."""

    reward: Floats
    kl: Floats
    value: Floats
    effective: Floats


def reweight(scores_PM: ArrayLike, beta: float) -> Optimum:
    """Compute the optimum at this beta from the scores of answers sampled from the reference."""
    scores = np.asarray(scores_PM, dtype=np.float64)
    best = scores.max(axis=1, keepdims=True)
    weights = np.exp((scores - best) / beta)  # of the best answer 1: no overflow at any beta
    total = weights.sum(axis=1)
    reward = (weights * scores).sum(axis=1) / total
    value = best[:, 0] + beta * np.log(total / scores.shape[1])
    return Optimum(reward, (reward - value) / beta, value, total**2 / (weights**2).sum(axis=1))


def measure_optimum(betas: Sequence[float], scores: Groups, *, resamples: int) -> tuple[list[Figure], list[str]]:
    """Measure the reference's reward, and reward and KL of the optimum at each beta; warn of what was left out.
    `details` of the reference's reward hold the whole curve, from twenty times the largest beta to the smallest one
    that can be told, with the `effective` answers of the median and of the worst prompt. Intervals are over prompts."""
    low, high = min(betas), _WIDEST * max(betas)
    between = [low * _STEP**power for power in range(1, int(np.log(high / low) / np.log(_STEP)) + 1)]
    found = {beta: reweight(scores, beta) for beta in (*betas, *between)}
    reliable = {beta: at for beta, at in found.items() if float(np.median(at.effective)) >= MIN_EFFECTIVE}
    curve: list[dict[str, float | None]] = []
    for beta, at in sorted(reliable.items(), reverse=True):
        value = mean(at.value.tolist(), resamples=resamples)
        curve.append({
            "beta": float(beta), "kl": float(at.kl.mean()), "reward": float(at.reward.mean()),
            "value": value.value, "low": value.low, "high": value.high,
            "effective": round(float(np.median(at.effective)), 1),
            "effective_lowest": round(float(at.effective.min()), 1),
        })  # fmt: skip
    start = mean([float(np.mean(group)) for group in scores], resamples=resamples)
    figures = [make_figure("reference_reward", start, unit="reward", better="higher", details=curve)]
    for beta in (beta for beta in betas if beta in reliable):
        reward, kl = (mean(each.tolist(), resamples=resamples) for each in (found[beta].reward, found[beta].kl))
        figures.append(make_figure("optimum_reward", reward, unit="reward", better="higher", slice=f"beta={beta:g}"))
        figures.append(make_figure("optimum_kl", kl, unit="nats per answer", slice=f"beta={beta:g}"))
    left_out = [f"{beta:g} ({np.median(found[beta].effective):.1f})" for beta in betas if beta not in reliable]
    warning = (
        f"the optimum at beta {', '.join(left_out)} is left out: in brackets the effective answers of the median "
        f"prompt, of which {MIN_EFFECTIVE:g} are needed; raise evaluate.frontier.answers"
    )
    return figures, [warning] if left_out else []
