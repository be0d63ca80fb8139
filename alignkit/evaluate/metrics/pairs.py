"""Accuracy of a reward on pairs of answers, and whether its margins mean what Bradley-Terry says.

The reward may be a reward model's or a policy's implicit one (DPO, arXiv 2305.18290, eq. 5); here both are margins.
Beside them stands what the length alone would get. A tie counts one half. Calibration: HH-RLHF (arXiv 2204.05862),
section 2.3 and figure 9; expected calibration error: Naeini et al. 2015.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignkit.data.rows import Row, Text, count_chars
from alignkit.evaluate.context import ROWS, Context, Figure, Floats, Metric, bootstrap, compare_rows, make_figure, share
from alignkit.recipe.schema import RewardSource
from alignkit.rewards import Answers
from alignkit.rewards.kinds.model import ClassifierReward

_MARGIN_BINS = 4
_MIN_SLICE = 2  # a slice of one pair says nothing
_BINS = 10
_NO_MEANS = {"confidence": None, "accuracy": None}


def measure(context: Context) -> list[Figure]:
    target, resamples = context.target, context.options.resamples
    pairs = list_pairs(context.rows)
    prompts = [pair.prompt for pair in pairs for _ in range(2)]
    completions = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    settings: dict[str, Any] = {}
    if target.reward:
        metric, reward = "reward_accuracy", ClassifierReward(RewardSource(model=target.source), context.space)
        rewards = reward.score_fitting(Answers(prompts, completions))
    else:
        metric, beta = "implicit_reward_accuracy", target.beta
        policies = context.policy, context.reference
        both = zip(*(policy.score_completions(prompts, completions) for policy in policies), strict=True)
        rewards = [beta * (a.logp - b.logp) if a.tokens and b.tokens else None for a, b in both]
        settings = {"reference": context.reference_source, "beta": beta}
    sides = list(zip(rewards[::2], rewards[1::2], strict=True))
    kept = [(pair, a - b) for pair, (a, b) in zip(pairs, sides, strict=True) if a is not None and b is not None]
    if len(kept) < len(pairs):
        context.space.warn(f"{len(pairs) - len(kept)} of {len(pairs)} pairs are too long for {target.name}")
    pairs, margins = [pair for pair, _ in kept], [margin for _, margin in kept]
    lengths = measure_length_baselines(pairs, resamples=resamples)
    whole, *slices = measure_accuracy(metric, pairs, margins, resamples=resamples)
    best = max(lengths, key=lambda figure: figure.value or 0.0)
    name = best.metric.replace("pair_accuracy_", "") + " is better"
    measured = [compare_rows(whole, best, name, resamples=resamples), *slices]
    measured += measure_calibration(margins, [pair.group for pair in pairs], resamples=resamples)
    return [*context.place(measured, **settings), *context.place(lengths)]


METRIC = Metric(measure, (
    ROWS, (lambda context: list_pairs(context.rows), "the rows hold no pairs of answers"),
    (lambda context: context.target.reward or context.reference_source is not None,
     "an implicit reward needs a reference (--reference)"),
))  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the better one as chosen; pairs of one `group` (a ranked list) are not independent."""

    prompt: Text
    chosen: Text
    rejected: Text
    group: int

    @property
    def length_difference(self) -> int:
        """Characters that chosen has more than rejected."""
        return count_chars(self.chosen) - count_chars(self.rejected)


def list_pairs(rows: Sequence[Row]) -> list[Pair]:
    """List the comparisons of rows: ranked lists as all pairs but ties, pairs by their label; one half is none."""
    pairs = []
    for number, row in enumerate(rows):
        if row.kind == "pair" and row.label != 0.5:
            chosen, rejected = row.completions if (row.label is None or row.label > 0.5) else row.completions[::-1]
            pairs.append(Pair(row.prompt, chosen, rejected, number))
        elif row.kind == "ranked":
            scores = row.scores or tuple(-float(rank) for rank in range(len(row.completions)))
            pairs += [
                Pair(row.prompt, row.completions[better], row.completions[worse], number)
                for better in range(len(scores))
                for worse in range(better + 1, len(scores))
                if scores[better] > scores[worse]
            ]
    return pairs


def measure_accuracy(metric: str, pairs: Sequence[Pair], margins: Sequence[float], *, resamples: int) -> list[Figure]:
    """Measure the share of pairs with a positive margin, and its slices: quarters by |margin|, and which is longer."""
    slices: list[tuple[str | None, Sequence[int]]] = [(None, range(len(pairs)))]
    order = sorted(range(len(margins)), key=lambda place: abs(margins[place]))
    for part in range(_MARGIN_BINS if len(order) >= _MARGIN_BINS * _MIN_SLICE else 0):
        places = order[part * len(order) // _MARGIN_BINS : (part + 1) * len(order) // _MARGIN_BINS]
        low, high = abs(margins[places[0]]), abs(margins[places[-1]])
        slices.append((f"margin {low:.3g} to {high:.3g}", places))
    signs = np.sign([pair.length_difference for pair in pairs])
    for side, sign in (("chosen longer", 1), ("chosen shorter", -1), ("equal length", 0)):
        slices.append((side, np.flatnonzero(signs == sign).tolist()))
    figures = []
    for name, where in slices:
        if name is None or _MIN_SLICE <= len(where) < len(pairs):
            kept = [pairs[place] for place in where]
            figures.append(_accuracy(metric, [margins[place] for place in where], kept, resamples, slice=name))
    return figures


def measure_length_baselines(pairs: Sequence[Pair], *, resamples: int) -> list[Figure]:
    """Measure the accuracy of preferring the longer answer, and of preferring the shorter one."""
    by_length = [pair.length_difference for pair in pairs]
    sides = {"longer": by_length, "shorter": [-difference for difference in by_length]}
    return [_accuracy(f"pair_accuracy_{side}", margins, pairs, resamples) for side, margins in sides.items()]


def _accuracy(
    metric: str, margins: Sequence[float], pairs: Sequence[Pair], resamples: int, *, slice: str | None = None
) -> Figure:
    groups: dict[int, list[float]] = {}
    for margin, pair in zip(margins, pairs, strict=True):
        groups.setdefault(pair.group, []).append(0.5 if margin == 0 else float(margin > 0))
    found = share(list(groups.values()), resamples=resamples)
    return make_figure(metric, found, unit="share", better="higher", slice=slice)


def measure_calibration(margins: Sequence[float], groups: Sequence[int], *, resamples: int) -> list[Figure]:
    """Measure the expected calibration error of margins (chosen - rejected), with the bins as details: the mean over
    pairs of |accuracy - confidence| of ten equal bins of the probability, in [0.5, 1], of the answer that the reward
    prefers. Above 0 for a perfect reward too, the more so for few pairs."""
    if not margins:
        return []
    margins_P = np.asarray(margins, dtype=np.float64)
    confidence_P = 1 / (1 + np.exp(-np.abs(margins_P)))
    right_P = np.where(margins_P == 0, 0.5, margins_P > 0).astype(np.float64)
    members_PB = np.eye(_BINS)[np.minimum(((confidence_P - 0.5) * 2 * _BINS).astype(int), _BINS - 1)]
    sums_P3B = np.concatenate([members_PB, members_PB * confidence_P[:, None], members_PB * right_P[:, None]], axis=1)
    _, cluster_P = np.unique(np.asarray(groups), return_inverse=True)
    sums_N = np.zeros((cluster_P.max() + 1, 3 * _BINS))
    np.add.at(sums_N, cluster_P, sums_P3B)

    def error(sums_R: Floats) -> Floats:
        counts_RB, confidence_RB, right_RB = np.split(sums_R, 3, axis=1)
        return np.asarray(np.abs(right_RB - confidence_RB).sum(axis=1) / counts_RB.sum(axis=1))

    found = bootstrap(sums_N, error, resamples=resamples)
    details: list[dict[str, float | int | None]] = []
    for number, (count, confidence, right) in enumerate(sums_N.sum(axis=0).reshape(3, _BINS).T.tolist()):
        low, high = 0.5 + number / (2 * _BINS), 0.5 + (number + 1) / (2 * _BINS)
        means = {"confidence": confidence / count, "accuracy": right / count} if count else _NO_MEANS
        details.append({"low": low, "high": high, "n": int(count), **means})
    return [make_figure("calibration_error", found, unit="share", better="lower", details=details)]
