"""Charts: where points land, gaps, bands, and the lineage drawing."""

from __future__ import annotations

import json
import math
import re
from xml.etree import ElementTree

import pytest

from alignkit.report.charts import Line, draw_lines
from alignkit.report.lineage import Node, draw_lineage


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


def test_many_steps_become_means_with_a_band_of_their_range() -> None:
    points = [(float(step), float(step % 2)) for step in range(10_000)]
    svg = draw_lines([Line("", points)], title="t")
    (line,) = points_of(svg)
    assert len(line) <= 240
    band = next(parse(svg).iter("polygon")).attrib["points"].split()
    heights = {float(pair.split(",")[1]) for pair in band}
    assert max(heights) - min(heights) > 100  # from 0 to 1, though every mean is about a half
    assert len(svg) < 40_000


def test_nothing_finite_is_no_chart() -> None:
    assert draw_lines([Line("", [(1, math.nan)])], title="t") == ""
    assert draw_lines([], title="t") == ""


def test_one_point_and_a_flat_line_have_a_frame() -> None:
    for points in ([(3.0, 2.0)], [(1.0, 7.0), (2.0, 7.0)], [(1.0, 0.0), (2.0, 0.0)]):
        assert "nan" not in draw_lines([Line("", points)], title="t").lower()


def test_titles_and_labels_are_escaped_and_said_in_words() -> None:
    svg = draw_lines([Line('<b>"x"', [(0, 1), (1, 2)])], title="<script>")
    root = parse(svg)
    assert root.attrib["aria-label"] == '<script>: <b>"x" from 1 to 2'
    assert json.loads(root.attrib["data-series"])[0]["label"] == '<b>"x"'


def test_a_path_is_drawn_in_the_order_of_its_points() -> None:
    (line,) = points_of(draw_lines([Line("", [(0, 0), (2, 1), (1, 2)], dots=True)], title="t", in_order=False))
    assert [x for x, _ in line] == [44.0, 370.0, 207.0]


TREE = [
    Node("base", "base", kind="base"),
    Node("sft", "sft", parents=("base",)),
    Node("rm", "rm", parents=("sft",)),
    Node("dpo", "dpo", parents=("sft",)),
    Node("ppo", "ppo", parents=("sft",), advisers=("rm",)),
]


def boxes(svg: str) -> dict[str, tuple[float, float, float, float]]:
    found = {}
    for group in parse(svg).iter("g"):
        rect, name = next(group.iter("rect")).attrib, next(group.iter("text")).text
        found[name or ""] = tuple(float(rect[key]) for key in ("x", "y", "width", "height"))
    return found  # type: ignore[return-value]


def svgs_of(markup: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", markup)


def test_every_stage_is_right_of_what_it_was_made_from() -> None:
    wide, narrow = svgs_of(draw_lineage(TREE))
    place = boxes(wide)
    assert place["base"][0] < place["sft"][0] < place["rm"][0] == place["dpo"][0] < place["ppo"][0]
    indents = boxes(narrow)
    assert indents["base"][0] < indents["sft"][0] < indents["rm"][0] == indents["ppo"][0]
    assert "rewarded by rm" in narrow


def test_no_edge_crosses_a_box() -> None:
    wide = svgs_of(draw_lineage(TREE))[0]
    rects = list(boxes(wide).values())
    for path in parse(wide).iter("path"):
        if not path.attrib["class"].startswith("edge"):
            continue
        for x, y in _along(path.attrib["d"]):
            inside = [r for r in rects if r[0] + 2 < x < r[0] + r[2] - 2 and r[1] + 2 < y < r[1] + r[3] - 2]
            assert inside == [], (path.attrib["d"], x, y)


def _along(path: str) -> list[tuple[float, float]]:
    """Return points along an SVG path of M, C and H."""
    found: list[tuple[float, float]] = []
    for letter, text in re.findall(r"([MCH])([^MCH]*)", path):
        numbers = [float(number) for number in text.split()]
        if letter == "M":
            found.append((numbers[0], numbers[1]))
        elif letter == "H":
            x, y = found[-1]
            found += [(x + (numbers[0] - x) * part / 40, y) for part in range(41)]
        else:
            (x0, y0), (x1, y1, x2, y2, x3, y3) = found[-1], numbers
            for part in range(41):
                t = part / 40
                a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
                found.append((a * x0 + b * x1 + c * x2 + d * x3, a * y0 + b * y1 + c * y2 + d * y3))
    return found


def test_a_long_line_is_shown_as_a_tree_on_every_screen() -> None:
    nodes = [Node(str(n), f"stage {n}", parents=(str(n - 1),) if n else ()) for n in range(8)]
    markup = draw_lineage(nodes)
    assert 'class="lineage wide"' not in markup and "narrow only" in markup


def test_a_wide_fan_out_keeps_every_box_apart() -> None:
    nodes = [Node("sft", "sft"), *(Node(f"dpo-{n}", f"dpo-{n}", parents=("sft",)) for n in range(12))]
    for svg in svgs_of(draw_lineage(nodes)):
        tops = sorted(box[1] for box in boxes(svg).values() if box[0] > 3)
        assert len(tops) == 12 and all(b - a > 50 for a, b in zip(tops, tops[1:], strict=False))


@pytest.mark.parametrize(
    "values",
    [[0.0] * 5, [1e-17, -3e-17, 2e-17], [0.1, 0.1 + 1e-17], [5e-324, 0.0], [1e308, -1e308, 1.0], [7.0], [],
     [float("nan"), float("inf"), 1.0], [1e16, 1e16 + 2]],
    ids=str,
)  # fmt: skip
def test_no_values_keep_a_chart_from_being_drawn(values: list[float]) -> None:
    drawn = draw_lines([Line("a", list(enumerate(values)))], title="t", marks=(0.0,))
    assert bool(drawn) == bool(values) and "nan" not in drawn
