"""Charts: where points land, gaps, and bands."""

from __future__ import annotations

import json
import math
from xml.etree import ElementTree

import pytest
from written_runs import WriteRun

from alignkit.report.charts import Line, draw_lines
from alignkit.report.publish import write_report


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    lines = [each for each in parse(svg).iter("polyline")]
    return [[tuple(map(float, pair.split(","))) for pair in each.attrib["points"].split()] for each in lines]  # type: ignore[misc]


def test_points_lie_where_their_values_are() -> None:
    # x: 44 to 370 for steps 0 to 10; y: 0 at 168, the top of 10.6 (ten and 6 % room) at 8.
    (line,) = points_of(draw_lines([Line("", [(0, 0), (5, 5), (10, 10)])], title="t"))
    assert line == [(44.0, 168.0), (207.0, round(168 - 160 * 5 / 10.6, 1)), (370.0, round(168 - 160 * 10 / 10.6, 1))]


def test_a_value_that_is_not_finite_leaves_a_gap() -> None:
    values = [1.0, 2.0, math.nan, 4.0, 5.0]
    assert [len(line) for line in points_of(draw_lines([Line("", list(enumerate(values)))], title="t"))] == [2, 2]


def test_a_hundred_thousand_steps_make_a_small_page(write_run: WriteRun) -> None:
    rows = [{"step": step, "loss": 1 / step, "grad_norm": 1.0} for step in range(1, 100_001)]
    assert write_report(write_run(metrics=rows)).stat().st_size < 120_000


def test_many_steps_become_means_with_a_band_of_their_range() -> None:
    points = [(float(step), float(step % 2)) for step in range(10_000)]
    svg = draw_lines([Line("", points)], title="t")
    (line,) = points_of(svg)
    assert len(line) <= 240
    band = next(parse(svg).iter("polygon")).attrib["points"].split()
    heights = {float(pair.split(",")[1]) for pair in band}
    assert max(heights) - min(heights) > 100  # from 0 to 1, though every mean is about a half
    assert len(svg) < 40_000


def test_titles_and_labels_are_escaped_and_said_in_words() -> None:
    svg = draw_lines([Line('<b>"x"', [(0, 1), (1, 2)])], title="<script>")
    root = parse(svg)
    assert root.attrib["aria-label"] == '<script>: <b>"x" from 1 to 2'
    assert json.loads(root.attrib["data-series"])[0]["label"] == '<b>"x"'


def test_a_path_is_drawn_in_the_order_of_its_points() -> None:
    (line,) = points_of(draw_lines([Line("", [(0, 0), (2, 1), (1, 2)], style="dots")], title="t", in_order=False))
    assert [x for x, _ in line] == [44.0, 370.0, 207.0]


@pytest.mark.parametrize(
    "values",
    [[0.0] * 5, [1e-17, -3e-17, 2e-17], [0.1, 0.1 + 1e-17], [5e-324, 0.0], [1e308, -1e308, 1.0], [7.0], [7.0, 7.0], [],
     [math.nan], [math.nan, math.inf, 1.0], [1e16, 1e16 + 2]],
    ids=str,
)  # fmt: skip
def test_any_finite_value_makes_a_chart(values: list[float]) -> None:
    drawn = draw_lines([Line("a", list(enumerate(values)))], title="t", marks=(0.0,))
    assert bool(drawn) == any(map(math.isfinite, values)) and "nan" not in drawn
