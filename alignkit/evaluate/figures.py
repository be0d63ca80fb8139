"""One measured figure, as eval.json keeps it and tables show it; data only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Better = Literal["higher", "lower"]
Method = Literal["bootstrap", "wilson", "normal", "none"]


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval over `n` independent rows; no interval where `low` is None."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    method: Method


@dataclass(frozen=True)
class Figure:
    """One figure; `slice` is None for all rows, else which of them; a share lies in [0, 1]."""

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

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; JSON has no NaN and no infinity, so such a figure has no value."""
        plain = asdict(self)
        for key in ("value", "low", "high"):
            if plain[key] is not None:
                plain[key] = float(plain[key]) if math.isfinite(plain[key]) else None  # a library's own type is no JSON
        return plain

    @property
    def identity(self) -> str:
        """What a later measurement of the same thing replaces."""
        return repr((self.metric, self.slice, self.data, sorted(self.settings.items(), key=str)))


def make_figure(
    metric: str,
    found: Interval,
    *,
    unit: str = "",
    better: Better | None = None,
    slice: str | None = None,
    details: list[dict[str, Any]] | None = None,
    **settings: Any,
) -> Figure:
    """Return a figure from an interval; data and common settings are added by `place_figures`."""
    return Figure(
        metric, found.value, found.low, found.high, found.n, unit, better, found.method, slice, "", settings, details
    )


def place_figures(figures: Iterable[Figure], *, data: str, **settings: Any) -> list[Figure]:
    """Return the figures with what they were measured on."""
    return [replace(figure, data=data, settings={**settings, **figure.settings}) for figure in figures]
