"""How often one model's answers are preferred to another's: both orders asked, and what length alone explains.

The judge is anything that compares two answers (`judges`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from alignkit.data import Text
from alignkit.data.rows import count_chars
from alignkit.evaluate.figures import Figure, Interval, make_figure
from alignkit.evaluate.intervals import Floats, share
from alignkit.evaluate.judges import Judge
from alignkit.evaluate.rewards import read_text

_SHOWN = 8
_FIT_RESAMPLES = 200  # each one is a fit
_RIDGE = 1e-3  # keeps the fit finite where length separates the wins


def measure_win_rate(
    judge: Judge, prompts: Sequence[Text], ours: Sequence[Text], theirs: Sequence[Text], *, resamples: int
) -> list[Figure]:
    """Return the share of prompts on which our answer wins, a tie counting one half, and the length-controlled share.

    A judge that reads the order is asked both ways and its two verdicts are averaged; the two orders and the share of
    equal verdicts are figures of their own.
    """
    if not prompts:
        return []
    first = judge.prefer(prompts, ours, theirs)
    wins, figures = first, []
    if judge.reads_order:
        second = [1 - p for p in judge.prefer(prompts, theirs, ours)]
        wins = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
        agree = [float((a > 0.5) == (b > 0.5) and (a < 0.5) == (b < 0.5)) for a, b in zip(first, second, strict=True)]
        for name, outcomes in (("ours first", first), ("ours second", second)):
            figures.append(_figure("win_rate", _share(outcomes, resamples), slice=name))
        figures.append(_figure("judge_agreement", _share(agree, resamples)))
    details = [_show(*row) for row in list(zip(prompts, ours, theirs, wins, strict=True))[:_SHOWN]]
    whole = _figure("win_rate", _share(wins, resamples), details=details)
    lengths = [(count_chars(a), count_chars(b)) for a, b in zip(ours, theirs, strict=True)]
    return [whole, *figures, _figure("win_rate_length_controlled", control_length(wins, lengths))]


def control_length(wins: Sequence[float], lengths: Sequence[tuple[int, int]]) -> Interval:
    """Return the win rate that answers of equal length would have.

    A logistic regression of wins on tanh of the length difference in standard deviations, read at 0; of length-
    controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475, eq. 1) it has the model and length terms, not the
    instruction's difficulty. The bootstrap refits.
    """
    n = len(wins)
    if n < 2:
        return Interval(None, None, None, n, "none")
    difference_N = np.asarray([ours - theirs for ours, theirs in lengths], dtype=np.float64)
    spread = difference_N.std()
    length_N = np.tanh(difference_N / spread) if spread > 0 else np.zeros(n)
    design_N2 = np.stack([np.ones(n), length_N], axis=1)
    wins_N = np.asarray(wins, dtype=np.float64)
    value = _fit_at_zero(design_N2, wins_N, np.ones(n))
    random = np.random.default_rng(0)
    weights = random.multinomial(n, np.full(n, 1 / n), size=_FIT_RESAMPLES).astype(np.float64)
    low, high = np.percentile([_fit_at_zero(design_N2, wins_N, drawn) for drawn in weights], [2.5, 97.5])
    return Interval(value, float(low), float(high), n, "bootstrap")


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


def _share(outcomes: Sequence[float], resamples: int) -> Interval:
    return share([[outcome] for outcome in outcomes], resamples=resamples)


def _figure(metric: str, found: Interval, **extra: Any) -> Figure:
    return make_figure(metric, found, unit="share", better=None if metric == "judge_agreement" else "higher", **extra)


def _show(prompt: Text, ours: Text, theirs: Text, win: float) -> dict[str, Any]:
    return {"prompt": read_text(prompt), "answer": read_text(ours), "other": read_text(theirs), "win": win}
