"""Numbers as the report writes them, compared character by character (a thin space is written as _)."""

from __future__ import annotations

import math

import pytest

from alignkit.report.charts import nice_ticks, tick_text
from alignkit.report.text import duration, figure, share, short_count


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0652149, "0.06521"), (2.839, "2.839"), (27.594, "27.59"), (-1.115, "−1.115"), (123456.7, "123_457"),
        (1.71e-7, "1.71e−7"), (0, "0"), (5.0, "5"), (None, "–"), (math.nan, "not finite"), (0.0053, "0.00530"),
        (2.5e9, "2.50e9"), (-0.25, "−0.2500"),
    ],
)  # fmt: skip
def test_figure(value: float | None, text: str) -> None:
    assert figure(value).replace("\u2009", "_") == text


@pytest.mark.parametrize(
    ("value", "text"), [(999, "999"), (9999, "9_999"), (21288, "21.3_k"), (1_096_000, "1.1_M"), (7.3e12, "7.3_T")]
)
def test_short_count(value: float, text: str) -> None:
    assert short_count(value).replace("\u2009", "_") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.24, "2.2_s"),
        (59.4, "59_s"),
        (59.7, "1_min 00_s"),
        (74, "1_min 14_s"),
        (7500, "2_h 05_min"),
        (200000, "2_d 07_h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds).replace("\u2009", "_") == text


def test_share() -> None:
    assert share(0.8161).replace("\u2009", "_") == "81.6_%"


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0, 40, ["0", "10", "20", "30", "40"]),
        (26, 35.6, ["27.5", "30.0", "32.5", "35.0"]),
        (-0.05, 0.081, ["−0.050", "−0.025", "0", "0.025", "0.050", "0.075"]),
        (0, 1.05e-4, ["0", "2.5e−5", "5e−5", "7.5e−5", "1e−4"]),
        (0, 52000, ["0", "10_k", "20_k", "30_k", "40_k", "50_k"]),
        (3, 3, ["3"]),
        (0, 1e18, ["0", "2.5e17", "5.0e17", "7.5e17", "1.0e18"]),
    ],
)
def test_ticks_are_round_and_told_apart(low: float, high: float, texts: list[str]) -> None:
    ticks = nice_ticks(low, high)
    assert [tick_text(tick, ticks).replace("\u2009", "_") for tick in ticks] == texts
