"""Measured figures and their 95 % intervals, as eval.json keeps them and tables show them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alignkit.report.text import wilson as score_interval

Better = Literal["higher", "lower"]
Method = Literal["bootstrap", "wilson", "normal", "none"]
Floats = NDArray[np.float64]
Groups = Sequence[Sequence[float]]  # the values of each group; those of a group are not independent
RESAMPLES = 1000
Z = 1.959963984540054  # the 97.5 % point of the normal distribution
_CHUNK = 4_000_000  # weights held at once


class Sums(NamedTuple):
    """What a statistic was made of: the sums of each independent row, and how sums over rows become the statistic."""

    sums_NK: Floats
    combine: Callable[[Floats], Floats]


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval over `n` independent rows, unnamed at first; no interval where `low` is None.
    `slice` is None for all rows, else which of them. `change` is the paired difference to another model on the same
    rows (`compare_rows`); `trained` names the stages that saw some of the prompts. eval.json has these two where they
    are."""

    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    unit: str = ""
    better: Better | None = None
    interval: Method = "none"
    slice: str | None = None
    data: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    details: list[dict[str, Any]] | None = None
    change: dict[str, Any] | None = None
    trained: dict[str, Any] | None = None
    sums: Sums | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Turn it into plain data; JSON has no NaN and no infinity, so such a figure has no value."""
        plain = {key: value for key, value in vars(self).items() if key != "sums"}
        plain = {key: value for key, value in plain.items() if value is not None or key not in ("change", "trained")}
        for key in ("value", "low", "high"):
            if plain[key] is not None:
                plain[key] = float(plain[key]) if math.isfinite(plain[key]) else None  # a library's own type is no JSON
        return plain


def make_figure(metric: str, found: Figure, *, settings: dict[str, Any] | None = None, **facts: Any) -> Figure:
    """Name an interval, with what is known of it; `Context.place` adds data and common settings."""
    return replace(found, metric=metric, settings=settings or {}, **facts)


def wilson(successes: float, n: int) -> Figure:
    """Wilson's interval of the share successes / n; `successes` may have halves, where a tie counts as one half."""
    if n == 0:
        return Figure("", None, None, None, 0)
    low, high = score_interval(successes, n)
    return Figure("", successes / n, low, high, n, interval="wilson")


def bootstrap(sums_NK: ArrayLike, combine: Callable[[Floats], Floats], *, resamples: int = RESAMPLES) -> Figure:
    """Percentile bootstrap interval of a statistic of N rows (Efron 1979).
    `combine` maps sums over rows, (R, K), to the statistic, (R,). Rows are drawn with replacement; rows that belong
    together (answers to one prompt) must have been added up before. One row has a value and no interval."""
    rows_NK = np.asarray(sums_NK, dtype=np.float64)
    if (n := len(rows_NK)) == 0:
        return Figure("", None, None, None, 0)
    value, sums = float(combine(rows_NK.sum(axis=0, keepdims=True))[0]), Sums(rows_NK, combine)
    if n == 1:
        return Figure("", value, None, None, 1, sums=sums)
    random = np.random.default_rng(0)
    chunk = max(_CHUNK // n, 1)
    drawn: list[Floats] = []
    for start in range(0, resamples, chunk):
        weights_RN = random.multinomial(n, np.full(n, 1 / n), size=min(chunk, resamples - start))
        with np.errstate(divide="ignore", invalid="ignore"):  # a resample may leave a bin empty
            drawn.append(combine(weights_RN @ rows_NK))
    low, high = np.nanpercentile(np.concatenate(drawn), [2.5, 97.5])
    return Figure("", value, float(low), float(high), n, interval="bootstrap", sums=sums)


def compare_rows(figure: Figure, other: Figure | None, start: str, *, resamples: int = RESAMPLES) -> Figure:
    """Add the paired difference to the same figure of `start`: rows are drawn together, so what they share cancels.
    `rose` and `fell` count the rows on which it is larger and smaller. With another number of rows it stays as it
    was."""
    mine, theirs = figure.sums, other.sums if other else None
    if other is None or mine is None or theirs is None or len(mine.sums_NK) != len(theirs.sums_NK):
        return figure
    width = mine.sums_NK.shape[1]

    def subtract(sums_RK: Floats) -> Floats:
        return mine.combine(sums_RK[:, :width]) - theirs.combine(sums_RK[:, width:])

    both_NK = np.hstack([mine.sums_NK, theirs.sums_NK])
    found = bootstrap(both_NK, subtract, resamples=resamples)
    with np.errstate(all="ignore"):
        rows_N = subtract(both_NK)
    change = {"start": start, "from": other.value, "value": found.value, "low": found.low, "high": found.high,
              "rose": int((rows_N > 0).sum()), "fell": int((rows_N < 0).sum())}  # fmt: skip
    return replace(figure, change=change)


def mean(values: Sequence[float], *, resamples: int = RESAMPLES) -> Figure:
    """Mean of independent rows."""
    return mean_of_groups([[value] for value in values], resamples=resamples)


def mean_of_groups(groups: Groups, *, resamples: int = RESAMPLES) -> Figure:
    """Mean over all values; n counts the groups."""
    rows = [(float(sum(group)), float(len(group))) for group in groups if len(group)]
    return bootstrap(rows, divide, resamples=resamples)


def share(outcomes: Groups, *, resamples: int = RESAMPLES) -> Figure:
    """Share of successes (a tie is 0.5): Wilson's interval where each group has one outcome, else the bootstrap."""
    flat = [value for group in outcomes for value in group]
    if all(len(group) == 1 for group in outcomes) and set(flat) <= {0.0, 0.5, 1.0}:
        sums = Sums(np.asarray([(value, 1.0) for value in flat]).reshape(-1, 2), divide)
        return replace(wilson(sum(flat), len(flat)), sums=sums)
    return mean_of_groups(outcomes, resamples=resamples)


def divide(sums_R2: Floats) -> Floats:
    """Divide the first sum by the second, (R,)."""
    quotient: Floats = sums_R2[:, 0] / sums_R2[:, 1]
    return quotient
