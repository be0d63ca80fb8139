"""Best-of-N: what picking the best of N sampled answers by a reward brings, the cheap rival of training on it.

Every N is estimated without bias from the same M answers of a prompt (WebGPT, arXiv 2112.09332, appendix I): the answer
with rank i is the best of N drawn without replacement with probability C(i - 1, N - 1) / C(M, N).
"""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from alignkit.evaluate.context import OWN, POLICY, ROWS, Context, Figure, Groups, Metric, make_figure, mean


def measure(context: Context) -> list[Figure]:
    options, reward = context.options, context.reward
    assert reward is not None
    scores, watched = context.score(reward, context.sampled), {}
    if context.is_toy and reward.name != "true_reward":
        watched["true_reward"] = context.score(context.true_reward, context.sampled)
    figures = measure_best_of(options.best_of, scores, watched, resamples=options.resamples)
    return context.place(figures, reward=reward.name, answers=max(options.best_of), **context.sampling)


_NEEDS = "it needs prompts, numbers (--best-of) and a reward (--reward)"
METRIC = Metric(measure, (ROWS, POLICY, OWN, (
    lambda context: context.prompts and context.options.best_of and context.reward is not None, _NEEDS
)), key="best_of")  # fmt: skip


def measure_best_of(
    counts: Sequence[int], scores: Groups, watched: Mapping[str, Groups], *, resamples: int
) -> list[Figure]:
    """Estimate the expected score of the best of N by `scores`, one figure per N, and of other rewards of that answer.
    `scores` and each entry of `watched` (true reward, gold) hold M >= N numbers per prompt. `kl` in the settings bounds
    the KL to the policy: log N - (N - 1) / N nats per answer (HH-RLHF, section 4.3; arXiv 2401.01879)."""
    figures = []
    for number in counts:
        shown: dict[str, Any] = {"unit": "reward", "better": "higher", "settings": {"kl": round(best_of_kl(number), 6)}}
        for name, values in {"best_of_n": scores, **{f"best_of_n_{key}": of for key, of in watched.items()}}.items():
            means = [expected_best(number, ranked_by, of) for ranked_by, of in zip(scores, values, strict=True)]
            figures.append(make_figure(name, mean(means, resamples=resamples), slice=f"N={number}", **shown))
    return figures


def expected_best(number: int, scores: Sequence[float], values: Sequence[float]) -> float:
    """Average `values` at the highest of `scores` over all subsets of this size; ties share their ranks."""
    total = len(scores)
    if not 1 <= number <= total:
        raise ValueError(f"best of {number} needs as many answers, there are {total}")
    order = sorted(range(total), key=lambda place: scores[place])
    weights = [math.comb(rank, number - 1) / math.comb(total, number) for rank in range(total)]
    expected, start = 0.0, 0
    for _, group in groupby(order, key=lambda place: scores[place]):
        tied = list(group)
        expected += sum(weights[start : start + len(tied)]) * sum(values[place] for place in tied) / len(tied)
        start += len(tied)
    return expected


def measure_best_of_kl(counts: Sequence[int], scores: Groups, *, resamples: int) -> list[Figure]:
    """Measure the KL of the best of N to its policy, in nats per answer; unlike the bound it picks nothing in a tie."""
    found = {number: mean([tied_kl(number, group) for group in scores], resamples=resamples) for number in counts}
    return [make_figure("best_of_n_kl", kl, unit="nats per answer", slice=f"N={n}") for n, kl in found.items()]


def tied_kl(number: int, scores: Sequence[float]) -> float:
    """Sum over scores s of q(s) log(q(s) / p(s)): p is the share of s, q its chance to be the best of N."""
    total, kl, below = len(scores), 0.0, 0
    for size in (len(list(tied)) for _, tied in groupby(sorted(scores))):
        chance = (math.comb(below + size, number) - math.comb(below, number)) / math.comb(total, number)
        kl += chance * math.log(chance * total / size) if chance > 0 else 0.0
        below += size
    return kl


def best_of_kl(number: int) -> float:
    """Compute log N - (N - 1) / N, in nats."""
    return math.log(number) - (number - 1) / number
