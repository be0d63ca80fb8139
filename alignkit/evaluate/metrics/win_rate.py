"""Win rate of one model's answers against another's: both orders asked, and what length alone explains."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from alignkit.data import Text
from alignkit.data.rows import count_chars
from alignkit.evaluate.context import (
    POLICY,
    ROWS,
    Better,
    Context,
    Figure,
    Floats,
    Metric,
    as_completion,
    compare_rows,
    make_figure,
    share,
)
from alignkit.feedback.prompts import read_text
from alignkit.rewards.kinds.judge import Comparer

_SHOWN = 8
_FIT_RESAMPLES = 200  # each one is a fit
_RIDGE = 1e-3  # keeps the fit finite where length separates the wins


def measure(context: Context) -> list[Figure]:
    judge, prompts = context.judge, context.prompts
    ours, theirs = (
        [as_completion(prompt, group[0].text) for prompt, group in zip(prompts, answers, strict=True)]
        for answers in (context.sampled, context.sample(context.rival, 1))
    )
    figures = measure_win_rate(judge, prompts, ours, theirs, resamples=context.options.resamples)
    settings = {"against": context.options.against, "judge": judge.name, **judge.settings, **context.sampling}
    return context.place(figures, **settings)


METRIC = Metric(measure, (ROWS, POLICY, (
    lambda context: context.prompts and context.options.against is not None,
    "it needs prompts and another model (--against)",
)), key="against", prepare=lambda context: (context.rival, context.judge))  # fmt: skip


def measure_win_rate(
    judge: Comparer, prompts: Sequence[Text], ours: Sequence[Text], theirs: Sequence[Text], *, resamples: int
) -> list[Figure]:
    """Measure the share of prompts on which our answer wins, a tie counting one half, and the length-controlled share.
    The verdicts of a judge that reads the order are averaged over both; each order, the share of comparisons in which
    both prefer the same answer, and that of abstentions, which are in no other figure, are figures of their own."""
    if not prompts:
        return []
    verdicts = judge.compare(prompts, ours, theirs)
    decided = [(place, [p for p in orders if p is not None]) for place, orders in enumerate(verdicts)]
    decided = [(place, orders) for place, orders in decided if len(orders) == len(verdicts[place])]
    wins = [sum(orders) / len(orders) for _, orders in decided]
    cases = [
        {"prompt": read_text(prompts[place]), "answer": read_text(ours[place]), "other": read_text(theirs[place]),
         "win": win}
        for (place, _), win in list(zip(decided, wins, strict=True))[:_SHOWN]
    ]  # fmt: skip

    def make(metric: str, outcomes: Sequence[float], **extra: Any) -> Figure:
        found = share([[outcome] for outcome in outcomes], resamples=resamples)
        better: Better | None = "higher" if metric == "win_rate" else None
        return make_figure(metric, found, unit="share", better=better, **extra)

    lead, even = make("win_rate", wins, details=cases), make("win_rate", [0.5] * len(wins))
    figures = [compare_rows(lead, even, "an even score", resamples=resamples)]
    if asked := [orders for orders in verdicts if len(orders) == 2]:  # else the order was never read
        both = [(a, b) for a, b in asked if a is not None and b is not None]
        agree = [float((a > 0.5) == (b > 0.5) and (a < 0.5) == (b < 0.5)) for a, b in both]
        figures += [
            make("win_rate", [a for a, _ in both], slice="ours first"),
            make("win_rate", [b for _, b in both], slice="ours second"),
            make("judge_agreement", agree, details=[judge.report] if judge.report else None),
            make("judge_abstained", [float(None in orders) for orders in asked]),
        ]
    if same := judge.report.get("agreement"):
        figures.append(make_figure("rater_agreement", share(same, resamples=resamples), unit="share"))
    controlled = control_length(wins, [(count_chars(ours[at]), count_chars(theirs[at])) for at, _ in decided])
    return [*figures, make_figure("win_rate_length_controlled", controlled, unit="share", better="higher")]


def control_length(wins: Sequence[float], lengths: Sequence[tuple[int, int]]) -> Figure:
    """Estimate the win rate that answers of equal length would have. A logistic regression of wins on tanh of the
    length difference in standard deviations, read at 0; of length- controlled AlpacaEval (Dubois et al. 2024, arXiv
    2404.04475, eq. 1) it has the model and length terms, not the instruction's difficulty. The bootstrap refits."""
    if (n := len(wins)) < 2:
        return Figure("", None, None, None, n)
    difference_N = np.asarray([ours - theirs for ours, theirs in lengths], dtype=np.float64)
    spread = difference_N.std()
    length_N = np.tanh(difference_N / spread) if spread > 0 else np.zeros(n)
    design_N2 = np.stack([np.ones(n), length_N], axis=1)
    wins_N = np.asarray(wins, dtype=np.float64)
    value = _fit_at_zero(design_N2, wins_N, np.ones(n))
    random = np.random.default_rng(0)
    weights = random.multinomial(n, np.full(n, 1 / n), size=_FIT_RESAMPLES).astype(np.float64)
    low, high = np.percentile([_fit_at_zero(design_N2, wins_N, drawn) for drawn in weights], [2.5, 97.5])
    return Figure("", value, float(low), float(high), n, interval="bootstrap")


def _fit_at_zero(design_N2: Floats, wins_N: Floats, weights_N: Floats) -> float:
    """Fit by Newton's method and return the probability where the length difference is 0."""
    theta = np.zeros(2)
    for _ in range(50):
        p_N = 1 / (1 + np.exp(-np.clip(design_N2 @ theta, -30, 30)))
        gradient = design_N2.T @ (weights_N * (wins_N - p_N)) - _RIDGE * theta
        curvature = (design_N2 * (weights_N * p_N * (1 - p_N))[:, None]).T @ design_N2 + _RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        theta = theta + np.clip(step, -4, 4)
        if np.abs(step).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-theta[0])))
