"""Charts as inline SVG: which metrics make which chart, and the one routine that draws lines, bands and points.

Our own instead of matplotlib's: no import of two seconds at the end of every stage, a twentieth of the bytes, text that
can be selected and read aloud, and colours that follow the reader's light or dark scheme through CSS. The script of the
page reads `data-series` to show the values under the pointer.
"""

import json
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

from markupsafe import Markup

from alignkit.report.facts import Facts
from alignkit.report.text import MINUS, WORDS, figure, short_count

WIDTH, HEIGHT = 380, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 8, 22
_MAX_POINTS = 240


class Point(NamedTuple):
    """A value with the ends of its interval, or of the values it stands for, where there are any."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    left: float | None = None
    right: float | None = None
    label: str = ""

    @property
    def is_drawn(self) -> bool:
        """Whether differences of such values are finite, too; NaN is not drawn."""
        return abs(self.x) < 1e150 and abs(self.y) < 1e150

    def ends(self) -> tuple[float, float, float, float]:
        """List the lowest and highest x, then y, that are drawn."""
        xs, ys = (self.left, self.right), (self.low, self.high)
        return (*(self.x if x is None else x for x in xs), *(self.y if y is None else y for y in ys))  # type: ignore[return-value]


class Line(NamedTuple):
    """A series of a chart: a line with a dot at its end or at every point, a bare curve, or points with bars."""

    label: str
    points: Sequence[Point | tuple[float, float]]
    style: Literal["line", "dots", "curve", "bars"] = "line"


class _Frame(NamedTuple):
    """From values to pixels."""

    left: float
    right: float
    bottom: float
    top: float
    height: float

    def x(self, value: float) -> float:
        return round(_LEFT + (value - self.left) / (self.right - self.left) * (WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.bottom) / (self.top - self.bottom)
        return round(self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM), 1)


def _tag(name: str, content: Any = "", **attributes: Any) -> Markup:
    """Make an SVG element; every text is escaped, `_` is `-` in a name, and `class_` loses its last character."""
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    said = Markup("").join(Markup(' {}="{}"').format(*pair) for pair in pairs)
    return Markup("<{}{}>{}</{}>").format(Markup(name), said, content, Markup(name))


def colour(number: int) -> int:
    """Map the number of a series to one of the four colours of the page; 0 is that of the text."""
    return 1 + (number - 1) % 4 if number else 0


def draw_lines(
    lines: Sequence[Line], *, title: str, x_label: str = "step", marks: Sequence[float] = (), in_order: bool = True,
    height: int = HEIGHT, first_colour: int = 1,
) -> Markup:  # fmt: skip
    """Draw lines over one x axis; `marks` are values that get a dashed line across. Empty where nothing is finite.

    Values that are not finite leave a gap. With `in_order` false the points are a path, drawn as they come.
    """
    series = [_condense([Point(*point) for point in line.points], in_order) for line in lines]
    known = [point for points in series for point in points if point.is_drawn]
    if not known:
        return Markup("")
    frame = _fit(known, marks, height)
    body = [*_draw_axes(frame, "" if x_label == "step" else x_label)]
    body += [_tag("line", class_="mark", x1=_LEFT, x2=WIDTH - _RIGHT, y1=frame.y(at), y2=frame.y(at)) for at in marks]
    told, said = [], []
    for number, (line, points) in enumerate(zip(lines, series, strict=True)):
        body += _draw_line(frame, points, line.style, colour(number + first_colour))
        named = [(point, f"{point.label}: " if point.label else "") for point in points if point.is_drawn]
        told.append({"label": line.label, "points": [
            [frame.x(point.x), frame.y(point.y), figure(point.x), name + figure(point.y)] for point, name in named
        ]})  # fmt: skip
        if finite := [point[1] for point in line.points if math.isfinite(point[1])]:
            said.append(f"{line.label or title} from {figure(finite[0])} to {figure(finite[-1])}")
    return _tag(
        "svg", Markup("").join(body), class_="chart", viewBox=f"0 0 {WIDTH} {height}", role="img",
        aria_label=f"{title}: {'; '.join(said)}", data_x=x_label,
        data_series=json.dumps(told, ensure_ascii=False, separators=(",", ":")),
    )  # fmt: skip


def _condense(points: list[Point], in_order: bool) -> list[Point]:
    """Put means, of a curve with the range of each, in place of more points than there are pixels."""
    size = math.ceil(len(points) / _MAX_POINTS)
    found = []
    for start in range(0, len(points), size) if size > 1 else ():
        group = points[start : start + size]
        values = [point.y for point in group if abs(point.y) < 1e150]
        mean = sum(values) / len(values) if values else math.nan
        x = sum(point.x for point in group) / len(group)
        band = (min(values, default=mean), max(values, default=mean)) if in_order else ()
        found.append(Point(x, mean, *band))
    return found or points


def _fit(known: Sequence[Point], marks: Sequence[float], height: float) -> _Frame:
    lefts, rights, lows, highs = zip(*(point.ends() for point in known), strict=True)
    left, right, low, high = min(lefts), max(rights), min(lows), max(highs)
    if left == right:
        left, right = left - 0.5, right + 0.5
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-150):  # flat but for rounding
        low = high = (low + high) / 2
    for mark in marks:  # a line far outside would flatten the curve
        if low - (high - low) <= mark <= high + (high - low):
            low, high = min(low, mark), max(high, mark)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return _Frame(left, right, 0.0 if 0 <= low <= 0.35 * high else low - room, high + room, height)


def _draw_axes(frame: _Frame, x_label: str) -> Iterator[Markup]:
    end, floor = WIDTH - _RIGHT, frame.height - _BOTTOM
    ticks = nice_ticks(frame.bottom, frame.top)
    for tick in ticks:
        y = frame.y(tick)
        yield _tag("line", class_="grid", x1=_LEFT, x2=end, y1=y, y2=y)
        yield _tag("text", tick_text(tick, ticks), class_="tick", x=_LEFT - 6, y=y + 3.5)
    yield _tag("line", class_="axis", x1=_LEFT, x2=end, y1=floor, y2=floor)
    ticks = nice_ticks(frame.left, frame.right)
    for x, tick in ((frame.x(tick), tick) for tick in ticks):
        place = {"text_anchor": "end" if x > WIDTH - 30 else "middle", "x": min(x, WIDTH - 2), "y": frame.height - 7}
        yield _tag("text", tick_text(tick, ticks), class_="tick below", **place)
    if x_label:
        yield _tag("text", x_label, class_="tick below", text_anchor="end", x=end, y=floor - 5)


def _draw_line(frame: _Frame, points: Sequence[Point], style: str, colour: int) -> Iterator[Markup]:
    drawn = [point for point in points if point.is_drawn]

    def path_of(places: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y in places)

    if style == "bars":
        for point in drawn:
            left, right, low, high = point.ends()
            path = f"M{frame.x(left)} {frame.y(point.y)}H{frame.x(right)}"
            path += f"M{frame.x(point.x)} {frame.y(low)}V{frame.y(high)}"
            yield _tag("path", class_=f"span c{colour}", d=path)
    else:
        for is_drawn, group in groupby(points, key=lambda point: point.is_drawn):  # between gaps
            ends = [(point, *point.ends()[2:]) for point in group if is_drawn]
            if any(high > low for _, low, high in ends):
                edge = [(point.x, high) for point, _, high in ends]
                edge += [(point.x, low) for point, low, _ in reversed(ends)]
                yield _tag("polygon", class_=f"band c{colour}", points=path_of(edge))
            if ends:
                path = path_of([(point.x, point.y) for point, _, _ in ends])
                yield _tag("polyline", class_=f"line c{colour}", points=path)
    all_dots = style in ("dots", "bars") or len(points) < 3
    for point in drawn if all_dots else drawn[-1:] if style == "line" else ():
        title = _tag("title", point.label) if point.label else ""
        x, y, r = frame.x(point.x), frame.y(point.y), 2.6 if all_dots else 3
        yield _tag("circle", title, class_=f"dot c{colour}", cx=x, cy=y, r=r)


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """List about `wanted` round numbers within [low, high]: steps of 1, 2, 2.5 or 5 times a power of ten."""
    span = high - low
    # A span that rounding made has no steps to count in; nor has one beyond the range of floats.
    if not max(1e-9 * max(abs(low), abs(high)), 1e-300) < span < math.inf:
        return [low]
    rough = span / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda step: abs(step - rough))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """Format a tick with as many decimals as tell it from its neighbours."""
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else abs(value) or 1.0
    largest = max(abs(tick) for tick in ticks)
    if abs(value) < step * 1e-6:
        return "0"
    if largest >= 1e15:
        return figure(value, 3)
    if largest >= 1e4 and step >= 100:
        return short_count(value).replace(".0\u2009", "\u2009") if abs(value) >= 1e4 else figure(value)
    if largest < 1e-2:
        is_round = math.isclose(value, float(f"{value:.0e}"), rel_tol=1e-9)
        return f"{value:.0e}".replace("e-0", "e-").replace("-", MINUS) if is_round else figure(value, 3)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if not math.isclose(step * 10**decimals, round(step * 10**decimals), abs_tol=1e-6):
        decimals += 1  # a step of 2.5 times a power of ten
    return f"{value:.{decimals}f}".replace("-", MINUS)


class _Plan(NamedTuple):
    """A chart to draw when any of its metrics was logged."""

    title: str
    note: str
    metrics: dict[str, str]  # name -> label
    marks: Sequence[float] = ()
    methods: Sequence[str] = ()  # empty: all


_PLANS = [_Plan(**plan) for plan in WORDS["curves"]]


def draw_curves(run: Facts) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Draw what a reader looks for first, and a chart for each metric that is left.

    Each is a title, a note, the SVG, `last`, its newest value, and a `legend` of several lines in their colours' order.
    """
    main, used = list[dict[str, Any]](), set[str]()
    for plan in _PLANS:
        if (plan.methods and run.method not in plan.methods) or used & plan.metrics.keys():
            continue
        if chart := _draw_plan(run, plan):
            main.append(chart)
            used |= plan.metrics.keys()
            main += _draw_against_kl(run) if "objective/kl" in plan.metrics else ()
    rest = [_draw_plan(run, _Plan(name, "", {name: "training"})) for name in run.metric_names() if name not in used]
    return main, [chart for chart in rest if chart]


def _draw_plan(run: Facts, plan: _Plan) -> dict[str, Any] | None:
    lines = []
    for metric, label in plan.metrics.items():
        if points := run.series(metric):
            lines.append(Line(label, points))
        if points := run.series(f"eval_{metric}"):
            lines.append(Line("held out" if len(plan.metrics) == 1 else f"{label}, held out", points, style="dots"))
    if not any(len(line.points) > 1 for line in lines):
        return None
    return describe_chart(lines, plan.title, plan.note, marks=plan.marks)


def _draw_against_kl(run: Facts) -> Iterator[dict[str, Any]]:
    """Draw each reward against the square root of the KL (Bai et al. 2022a, arXiv:2204.05862, section 4.3)."""
    distance = dict(run.series("sqrt_kl"))
    for metric, name in (("reward", "Reward"), ("gold", "Gold reward")):
        points = [(distance[step], value) for step, value in run.series(metric) if step in distance]
        if len(points) > 1:
            lines, note = [Line("", points, style="dots")], "one dot per rollout, in order"
            yield describe_chart(lines, f"{name} against \u221aKL", note, x_label="\u221aKL", in_order=False)


def describe_chart(lines: Sequence[Line], title: str, note: str, **how: Any) -> dict[str, Any]:
    """Draw a chart as the pages show it; thinned curves say so."""
    legend = [line.label for line in lines] if len(lines) > 1 else []
    svg, last = draw_lines(lines, title=title, **how), figure(lines[0].points[-1][1])
    size = math.ceil(max(len(line.points) for line in lines) / _MAX_POINTS)
    if size > 1:
        band = ", the band their range" if how.get("in_order", True) else ""
        note += f"{'; ' if note else ''}a point is the mean of {size} values{band}"
    return {"title": title, "note": note, "svg": svg, "legend": legend, "last": last}
