"""Reward against KL as a picture and a table: Figure 2 (left) of the DPO paper (arXiv 2305.18290) for a recipe's runs.

Drawn twice, for a screen and for a phone, on a square-root axis: near the reference the best reward grows with the root
of the KL, so this is where the curve is nearly straight and its points are apart. It places; `runs.frontier` computes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from alignkit.runs.frontier import BEST_OF, Estimate, Frontier, Point
from alignkit.runs.report.numbers import figure, nice_ticks, tick_text

_WIDE, _NARROW = (760, 420), (350, 330)
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 16, 12, 44
_CHARACTER, _LINE = 6.2, 12  # of a label, in pixels
_COLOURS = 4
_BEST_OF_COLOUR = 3
_KL_TICKS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 40, 60, 80, 100, 150, 200, 300, 500, 1000)
_TICK_GAP = 34
_NOTE = (
    "Bars and band: 95 % intervals over prompts. Numbers at the points: beta, kl_coef or N. KL axis: square root. "
    "Nothing can lie above the optimum, \u03c0_ref exp(r/\u03b2)/Z of each prompt"
)


@dataclass(frozen=True)
class Row:
    """One line of the table, as text."""

    colour: int
    series: str
    label: str
    run: str
    kl: str
    kl_interval: str
    reward: str
    reward_interval: str
    optimum: str
    gap: str
    gap_interval: str
    above: bool


@dataclass(frozen=True)
class FrontierView:
    """The picture with its words."""

    wide: Markup
    narrow: Markup
    legend: list[tuple[int, str]]  # colour, series
    verdict: str
    note: str
    rows: list[Row]
    start: Row


def view_frontier(frontier: Frontier) -> FrontierView:
    """Return everything the page says about a frontier."""
    colours = _colour(frontier.points)
    settings = frontier.settings
    answers, prompts = settings.get("answers"), settings.get("rows")
    beyond = (
        f"; beyond {figure(frontier.reach, 2)} nats, dashed, the last line above it"
        if _right(frontier) > frontier.reach
        else ""
    )
    return FrontierView(
        wide=_draw(frontier, colours, *_WIDE),
        narrow=_draw(frontier, colours, *_NARROW),
        legend=[(colour, series) for series, colour in colours.items()],
        verdict=judge(frontier),
        note=f"{_NOTE}, estimated from {answers} answers of {frontier.reference} to each of {prompts} prompts{beyond}.",
        rows=[_row(point, colours[point.series]) for point in frontier.points],
        start=Row(
            0, frontier.reference, "", "", "0", "", figure(frontier.start.value, 3), _between(frontier.start),
            figure(frontier.start.value, 3), "0", "", False,
        ),
    )  # fmt: skip


def judge(frontier: Frontier) -> str:
    """Return in a sentence or two whether anything lies above the optimum, and how near the policies come to it."""
    above = [_name(point) for point in frontier.points if point.is_above]
    if above:
        said = f"{', '.join(above)} {'lies' if len(above) == 1 else 'lie'} above the optimum beyond the interval: "
        said += "no policy can, so the estimate of the optimum or of the KL is wrong."
    else:
        said = "No point lies above the optimum beyond its interval."
    policies = [point for point in frontier.points if point.run]
    if policies and not above:
        nearest = min(policies, key=lambda point: point.gap.value)
        said += f" Nearest: {_name(nearest)}, {figure(nearest.gap.value, 2)} below."
    if frontier.left_out:
        said += f" Not drawn, as measured on other prompts or in another way: {', '.join(frontier.left_out)}."
    return said


def draw_alone(frontier: Frontier) -> str:
    """Return the wide picture as a file of its own, with a legend and colours that follow the viewer's scheme."""
    colours = _colour(frontier.points)
    width, height = _WIDE
    entries, x = [], float(_LEFT)
    for series, colour in [("optimum", 0), *colours.items()]:
        entries.append(
            Markup('<circle class="dot c{}" cx="{}" cy="14" r="4"/><text class="label" x="{}" y="18">{}</text>').format(
                colour, x + 4, x + 13, series
            )
        )
        x += 30 + _CHARACTER * len(series)
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -24 {} {}" font-family="system-ui, sans-serif">'
        "<style>{}</style><g transform='translate(0 -24)'>{}</g>{}</svg>\n"
    ).format(width, height + 24, Markup(_STYLE), Markup("").join(entries), _paint(frontier, colours, width, height))


class _Frame:
    """From KL and reward to pixels."""

    def __init__(self, frontier: Frontier, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.right = _right(frontier) * 1.04
        shown = [frontier.start, *(point.reward for point in frontier.points)]
        known = [number for estimate in shown for number in (estimate.low, estimate.high)]
        known += [frontier.bound(self.right).high, frontier.start.value]
        room = (max(known) - min(known)) * 0.05 or 0.5
        self.bottom, self.top = min(known) - room, max(known) + room

    def x(self, kl: float) -> float:
        share = math.sqrt(max(kl, 0.0) / self.right)
        return round(_LEFT + share * (self.width - _LEFT - _RIGHT), 1)

    def y(self, reward: float) -> float:
        share = (reward - self.bottom) / (self.top - self.bottom)
        return round(self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM), 1)


def _right(frontier: Frontier) -> float:
    return max([frontier.reach, *(point.kl.high for point in frontier.points)])


def _draw(frontier: Frontier, colours: dict[str, int], width: int, height: int) -> Markup:
    frame = _Frame(frontier, width, height)
    series = [
        {"label": name, "points": [[frame.x(p.kl.value), frame.y(p.reward.value), figure(p.kl.value, 3),
                                    f"{p.label}: {figure(p.reward.value, 3)}"]
                                   for p in frontier.points if p.series == name]}
        for name in colours
    ]  # fmt: skip
    series.insert(0, {"label": "optimum", "points": [
        [frame.x(kl), frame.y(reward), figure(kl, 3), figure(reward, 3)] for kl, reward, _ in _curve(frontier, frame)
    ]})  # fmt: skip
    said = f"Reward against KL: {judge(frontier)}"
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}" data-x="KL" data-bottom="{}" '
        'data-series="{}">{}</svg>'
    ).format(
        width, height, said, _BOTTOM, json.dumps(series, ensure_ascii=False, separators=(",", ":")),
        _paint(frontier, colours, width, height),
    )  # fmt: skip


def _paint(frontier: Frontier, colours: dict[str, int], width: int, height: int) -> Markup:
    frame = _Frame(frontier, width, height)
    taken: list[tuple[float, float, float, float]] = []
    parts = [_axes(frame), _optimum(frontier, frame)]
    parts += [_bars(point, frame, colours[point.series]) for point in frontier.points]
    parts += [_mark(point, frame, colours[point.series]) for point in frontier.points]
    x, y = frame.x(0), frame.y(frontier.start.value)
    parts.append(Markup('<circle class="start" cx="{}" cy="{}" r="4"/>').format(x, y))
    centres = [(frame.x(point.kl.value), frame.y(point.reward.value)) for point in frontier.points] + [(x, y)]
    taken += [(x - 5, y - 5, x + 5, y + 5) for x, y in centres]
    parts.append(_label(frontier.reference, x, y, 0, frame, taken))
    parts += [
        _label(point.label, *centre, colours[point.series], frame, taken)
        for point, centre in zip(frontier.points, centres[:-1], strict=True)
    ]
    return Markup("").join(parts)


def _axes(frame: _Frame) -> Markup:
    parts = []
    ticks = nice_ticks(frame.bottom, frame.top, 5)
    for tick in ticks:
        y = frame.y(tick)
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/><text class="tick" x="{}" y="{}">{}</text>')
            .format(_LEFT, frame.width - _RIGHT, _LEFT - 6, y + 3.5, tick_text(tick, ticks), y=y)
        )  # fmt: skip
    floor, last = frame.height - _BOTTOM, -math.inf
    for kl in _KL_TICKS:
        x = frame.x(kl)
        if kl > frame.right or x - last < _TICK_GAP:
            continue
        last = x
        parts.append(
            Markup('<line class="grid" x1="{x}" x2="{x}" y1="{}" y2="{}"/>').format(_TOP, floor, x=x)
            + Markup('<text class="tick below" text-anchor="middle" x="{}" y="{}">{:g}</text>').format(
                x, floor + 15, kl
            )
        )
    middle = (_LEFT + frame.width - _RIGHT) / 2
    parts.append(
        Markup('<line class="axis" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(_LEFT, frame.width - _RIGHT, y=floor)
        + Markup('<text class="tick below" text-anchor="middle" x="{}" y="{}">{}</text>').format(
            middle, frame.height - 8, "KL to the reference, nats per answer"
        )
    )
    return Markup("").join(parts)


def _curve(frontier: Frontier, frame: _Frame) -> list[tuple[float, float, Estimate]]:
    """Return KL, reward and band of the optimum: the reference itself, then the bound from the largest beta on."""
    first = min(optimum.kl for optimum in frontier.optima)
    roots = [math.sqrt(first) + (math.sqrt(frame.right) - math.sqrt(first)) * step / 160 for step in range(161)]
    kls = sorted({*(root * root for root in roots), frontier.reach})
    return [(0.0, frontier.start.value, frontier.start)] + [
        (kl, frontier.bound(kl).value, frontier.bound(kl)) for kl in kls
    ]


def _optimum(frontier: Frontier, frame: _Frame) -> Markup:
    curve = _curve(frontier, frame)
    edge = [(kl, band.high) for kl, _, band in curve] + [(kl, band.low) for kl, _, band in reversed(curve)]
    known = [(kl, reward) for kl, reward, _ in curve if kl <= frontier.reach]
    beyond = [(kl, reward) for kl, reward, _ in curve if kl >= frontier.reach]
    parts = Markup('<polygon class="band c0" points="{}"/>').format(_path(frame, edge))
    parts += Markup('<polyline class="line c0" points="{}"/>').format(_path(frame, known))
    if len(beyond) > 1:
        parts += Markup('<polyline class="line c0 beyond" points="{}"/>').format(_path(frame, beyond))
    return parts


def _path(frame: _Frame, points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{frame.x(kl)},{frame.y(reward)}" for kl, reward in points)


def _bars(point: Point, frame: _Frame, colour: int) -> Markup:
    x, y = frame.x(point.kl.value), frame.y(point.reward.value)
    return Markup('<path class="span c{}" d="M{} {}H{}M{} {}V{}"/>').format(
        colour,
        frame.x(point.kl.low),
        y,
        frame.x(point.kl.high),
        x,
        frame.y(point.reward.low),
        frame.y(point.reward.high),
    )


def _mark(point: Point, frame: _Frame, colour: int) -> Markup:
    """Return a marker whose shape tells the series, too: circle, square, diamond, triangle."""
    x, y = frame.x(point.kl.value), frame.y(point.reward.value)
    shapes = {
        2: f"M{x - 3.6} {y - 3.6}h7.2v7.2h-7.2z",
        3: f"M{x} {y - 5}l5 5l-5 5l-5 -5z",
        4: f"M{x} {y - 4.8}l4.8 8.4h-9.6z",
    }
    if colour not in shapes:
        return Markup('<circle class="dot c{}" cx="{}" cy="{}" r="4.2"/>').format(colour, x, y)
    return Markup('<path class="dot c{}" d="{}"/>').format(colour, shapes[colour])


def _label(
    text: str, x: float, y: float, colour: int, frame: _Frame, taken: list[tuple[float, float, float, float]]
) -> Markup:
    """Return the label where it covers nothing; none where there is no such place: the table has it."""
    wide = _CHARACTER * len(text) + 2
    for left, base in (
        (x + 7, y + 13), (x - 7 - wide, y - 6), (x + 7, y - 6), (x - 7 - wide, y + 13), (x - wide / 2, y + 17),
        (x - wide / 2, y - 9), (x + 9, y + 4), (x - 9 - wide, y + 4), (x - wide / 2, y + 28), (x + 12, y + 24),
    ):  # fmt: skip
        box = (left, base - _LINE + 2, left + wide, base + 2)
        inside = box[0] >= _LEFT and box[2] <= frame.width and box[1] >= 0 and box[3] <= frame.height - _BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            return Markup('<text class="label c{}" x="{}" y="{}">{}</text>').format(
                colour, round(left, 1), round(base, 1), text
            )
    return Markup("")


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _colour(points: Sequence[Point]) -> dict[str, int]:
    """Return the colour of each series; best-of-N has its own."""
    names = list(dict.fromkeys(point.series for point in points))
    free = [number for number in range(1, _COLOURS + 1) if number != _BEST_OF_COLOUR or BEST_OF not in names]
    others = [name for name in names if name != BEST_OF]
    colours = {name: free[number % len(free)] for number, name in enumerate(others)}
    return colours | ({BEST_OF: _BEST_OF_COLOUR} if BEST_OF in names else {})


def _row(point: Point, colour: int) -> Row:
    return Row(
        colour, point.series, point.label, point.run, figure(point.kl.value, 3), _between(point.kl),
        figure(point.reward.value, 3), _between(point.reward), figure(point.optimum.value, 3),
        figure(point.gap.value, 2), _between(point.gap), point.is_above,
    )  # fmt: skip


def _between(estimate: Estimate) -> str:
    return f"{figure(estimate.low, 3)} to {figure(estimate.high, 3)}"


def _name(point: Point) -> str:
    return point.run or f"{point.series} {point.label}"


_STYLE = """
:root{--ink:#1c2230;--soft:#5b6472;--line:#e3e4e1;--grid:#ececea;--card:#fff;
--c1:#2f5fd0;--c2:#c8590f;--c3:#0b8074;--c4:#a83279}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7ec;--soft:#98a2b0;--line:#2c323c;--grid:#262b34;--card:#1a1e25;
--c1:#7aa5ff;--c2:#f0955a;--c3:#4fc4b3;--c4:#e484bd}}
svg{background:var(--card)}.c0{--c:var(--ink)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}
.tick{fill:var(--soft);font-size:10.5px}.tick:not(.below){text-anchor:end}
.label{fill:var(--c,var(--ink));font-size:11px}.grid{stroke:var(--grid)}.axis{stroke:var(--line)}
.line{fill:none;stroke:var(--c);stroke-width:1.8}.beyond{stroke-dasharray:5 4}.band{fill:var(--c);opacity:.13}
.dot{fill:var(--c)}.span{fill:none;stroke:var(--c);stroke-width:1.4;opacity:.55}
.start{fill:var(--card);stroke:var(--ink);stroke-width:1.8}
"""
