"""Reward against KL as inline SVG: the optimum with its band, points with bars both ways, each with its label.

The axis of KL is a square root: near the reference the best reward grows with the root of the KL, so this is where the
curve is nearly straight and points lie apart. It places what it is given; legend and words are the page's business.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from alignkit.report.frontier import Estimate, Frontier, Point
from alignkit.report.numbers import figure, nice_ticks, tick_text

WIDE, NARROW = (760, 420), (350, 330)
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 16, 12, 44
_CHARACTER, _LINE = 6.2, 12  # of a label, in pixels
_KL_TICKS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 40, 60, 80, 100, 150, 200, 300, 500, 1000)
_TICK_GAP = 34


def draw_alone(frontier: Frontier, colours: Mapping[str, int]) -> str:
    """Return the wide picture as a file of its own, with a legend and colours that follow the viewer's scheme."""
    width, height = WIDE
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
        self.right = right(frontier) * 1.04
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


def right(frontier: Frontier) -> float:
    """Return the largest KL that is drawn: that of the farthest policy, or a part of the curve beyond it."""
    far = max((point.kl.high for point in frontier.points), default=frontier.reach)
    return max(far, min(frontier.reach, 1.5 * far)) or 1.0


def draw(frontier: Frontier, colours: Mapping[str, int], width: int, height: int, *, said: str) -> Markup:
    """Return the chart; `colours` has a number for each series, `said` is what it shows in words."""
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
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}" data-x="KL" data-bottom="{}" '
        'data-series="{}">{}</svg>'
    ).format(
        width, height, said, _BOTTOM, json.dumps(series, ensure_ascii=False, separators=(",", ":")),
        _paint(frontier, colours, width, height),
    )  # fmt: skip


def _paint(frontier: Frontier, colours: Mapping[str, int], width: int, height: int) -> Markup:
    frame = _Frame(frontier, width, height)
    taken: list[tuple[float, float, float, float]] = []
    parts = [_axes(frame), _optimum(frontier, frame)]
    parts += [_bars(point, frame, colours[point.series]) for point in frontier.points]
    parts += [_mark(point, frame, colours[point.series]) for point in frontier.points]
    x, y = frame.x(0), frame.y(frontier.start.value)
    parts.append(Markup('<circle class="start" cx="{}" cy="{}" r="4"/>').format(x, y))
    centres = [(frame.x(point.kl.value), frame.y(point.reward.value)) for point in frontier.points] + [(x, y)]
    taken += [(x - 5, y - 5, x + 5, y + 5) for x, y in centres]
    curve = [(frame.x(kl), frame.y(reward)) for kl, reward, _ in _curve(frontier, frame)]
    taken += [(x - 1, y - 1, x + 1, y + 1) for x, y in curve]
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
    first = min([frame.right, *(optimum.kl for optimum in frontier.optima)])
    roots = [math.sqrt(first) + (math.sqrt(frame.right) - math.sqrt(first)) * step / 160 for step in range(161)]
    kls = sorted({*(root * root for root in roots), min(frontier.reach, frame.right)})
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
