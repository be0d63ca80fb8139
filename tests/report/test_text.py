"""Numbers as the report writes them, compared character by character (a thin space is written as _)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from alignkit.report.charts import nice_ticks, tick_text
from alignkit.report.text import duration, figure, fold, share, short_count


@pytest.mark.parametrize(
    ("show", "texts"),
    [
        (figure, {0.0652149: "0.06521", 2.839: "2.839", 27.594: "27.59", -1.115: "−1.115", 123456.7: "123_457",
                  1.71e-7: "1.71e−7", 0: "0", 5.0: "5", None: "–", math.nan: "not finite", 0.0053: "0.00530",
                  2.5e9: "2.50e9", -0.25: "−0.2500"}),
        (short_count, {999: "999", 9999: "9_999", 21288: "21.3_k", 1_096_000: "1.1_M", 7.3e12: "7.3_T"}),
        (duration, {2.24: "2.2_s", 59.4: "59_s", 59.7: "1_min 00_s", 74: "1_min 14_s", 7500: "2_h 05_min",
                    200000: "2_d 07_h"}),
        (share, {0.8161: "81.6_%"}),
        (fold, {"\n" * 30 + " people\n": "[30 empty lines]\n people\n", "a\n\n\n\nb": "a\n\n\n\nb",
                "a\n\nb\n \n\n\n\n\nc": "a\n\nb\n[5 empty lines]\nc"}),
    ],
)  # fmt: skip
def test_texts_of_a_page(show: Callable[[Any], str], texts: dict[Any, str]) -> None:
    assert [show(value).replace("\u2009", "_") for value in texts] == list(texts.values())


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
