"""Line charts as inline SVG: axes, lines, a band where many steps share a pixel, dots for held-out values.

Our own instead of matplotlib's: no import of two seconds at the end of every stage, a twentieth of the bytes, text that
can be selected and read aloud, and colours that follow the reader's light or dark scheme through CSS. Colours, legend
and title are the page's business, and the small script of the page reads `data-series` to say values under a pointer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from alignkit.report.numbers import figure, nice_ticks, tick_text

Point = tuple[float, float]
_WIDTH, _HEIGHT = 380, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 8, 22
_MAX_POINTS = 240


@dataclass(frozen=True)
class Line:
    """One line of a chart; `dots` marks every point, for few or unevenly spaced ones."""

    label: str
    points: Sequence[Point]
    dots: bool = False


@dataclass(frozen=True)
class _Bucket:
    """Neighbouring points drawn as one: mean position, and the range of their values."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class _Frame:
    """From values to pixels."""

    left: float
    right: float
    bottom: float
    top: float

    def x(self, value: float) -> float:
        return round(_LEFT + (value - self.left) / (self.right - self.left) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        height = (value - self.bottom) / (self.top - self.bottom) * (_HEIGHT - _TOP - _BOTTOM)
        return round(_HEIGHT - _BOTTOM - height, 1)


def draw_lines(
    lines: Sequence[Line], *, title: str, x_label: str = "step", marks: Sequence[float] = (), in_order: bool = True
) -> Markup:
    """Return a chart of lines over one x axis; `marks` are values that get a dashed line across.

    Values that are not finite leave a gap. With `in_order` false the points are a path, drawn as they come.
    """
    buckets = [_condense(line.points) if in_order else [_Bucket(x, y, y, y) for x, y in line.points] for line in lines]
    known = [bucket for row in buckets for bucket in row if _ok(bucket)]
    if not known:
        return Markup("")
    frame = _frame(known, marks)
    body = [_axes(frame, x_label)]
    body += [
        Markup('<line class="mark" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(_LEFT, _WIDTH - _RIGHT, y=frame.y(mark))
        for mark in marks
    ]
    for number, (line, row) in enumerate(zip(lines, buckets, strict=True), 1):
        body.append(_draw(frame, row, number, dots=line.dots or len(row) < 3))
    series = [
        {"label": line.label, "points": [[frame.x(b.x), frame.y(b.y), figure(b.x), figure(b.y)] for b in row if _ok(b)]}
        for line, row in zip(lines, buckets, strict=True)
    ]
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}" data-x="{}" data-series="{}">{}</svg>'
    ).format(
        _WIDTH, _HEIGHT, _describe(title, lines), x_label,
        json.dumps(series, ensure_ascii=False, separators=(",", ":")), Markup("").join(body),
    )  # fmt: skip


def _ok(bucket: _Bucket) -> bool:
    return _drawable(bucket.x) and _drawable(bucket.y)


def _drawable(value: float) -> bool:
    """Tell whether differences of such values are finite, too; NaN is not."""
    return abs(value) < 1e150


def _condense(points: Sequence[Point]) -> list[_Bucket]:
    """Return at most _MAX_POINTS means of neighbouring points, with the range of what each stands for."""
    size = math.ceil(len(points) / _MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)] if size else []
    found = []
    for group in groups:
        values = [y for _, y in group if _drawable(y)]
        x = sum(x for x, _ in group) / len(group)
        mean = sum(values) / len(values) if values else math.nan
        found.append(_Bucket(x, mean, min(values, default=mean), max(values, default=mean)))
    return found


def _frame(known: Sequence[_Bucket], marks: Sequence[float]) -> _Frame:
    left, right = min(bucket.x for bucket in known), max(bucket.x for bucket in known)
    if left == right:
        left, right = left - 0.5, right + 0.5
    values = [value for bucket in known for value in (bucket.low, bucket.high)]
    low, high = min(values), max(values)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-150):  # flat but for rounding
        low = high = (low + high) / 2
    for mark in marks:  # a line far outside would flatten the curve
        if low - (high - low) <= mark <= high + (high - low):
            low, high = min(low, mark), max(high, mark)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    bottom = 0.0 if 0 <= low <= 0.35 * high else low - room
    return _Frame(left, right, bottom, high + room)


def _axes(frame: _Frame, x_label: str) -> Markup:
    parts = []
    ticks = nice_ticks(frame.bottom, frame.top)
    for tick in ticks:
        y = frame.y(tick)
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/><text class="tick" x="{}" y="{}">{}</text>')
            .format(_LEFT, _WIDTH - _RIGHT, _LEFT - 6, y + 3.5, tick_text(tick, ticks), y=y)
        )  # fmt: skip
    ticks = nice_ticks(frame.left, frame.right)
    for tick in ticks:
        anchor = "end" if frame.x(tick) > _WIDTH - 30 else "middle"
        parts.append(
            Markup('<text class="tick below" text-anchor="{}" x="{}" y="{}">{}</text>').format(
                anchor, min(frame.x(tick), _WIDTH - 2), _HEIGHT - 7, tick_text(tick, ticks)
            )
        )
    parts.append(
        Markup('<line class="axis" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(
            _LEFT, _WIDTH - _RIGHT, y=_HEIGHT - _BOTTOM
        )
    )
    return Markup("").join(parts)


def _draw(frame: _Frame, row: Sequence[_Bucket], number: int, *, dots: bool) -> Markup:
    parts = []
    for piece in _pieces(row):
        if any(bucket.high > bucket.low for bucket in piece):
            edge = [(bucket.x, bucket.high) for bucket in piece] + [(b.x, b.low) for b in reversed(piece)]
            outline = " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y in edge)
            parts.append(Markup('<polygon class="band c{}" points="{}"/>').format(number, outline))
        path = " ".join(f"{frame.x(bucket.x)},{frame.y(bucket.y)}" for bucket in piece)
        parts.append(Markup('<polyline class="line c{}" points="{}"/>').format(number, path))
    marked = [bucket for bucket in row if _ok(bucket)]
    for bucket in marked if dots else marked[-1:]:
        parts.append(
            Markup('<circle class="dot c{}" cx="{}" cy="{}" r="{}"/>').format(
                number, frame.x(bucket.x), frame.y(bucket.y), 2.6 if dots else 3
            )
        )
    return Markup("").join(parts)


def _pieces(row: Sequence[_Bucket]) -> list[list[_Bucket]]:
    """Return the runs of finite points."""
    pieces: list[list[_Bucket]] = [[]]
    for bucket in row:
        if _ok(bucket):
            pieces[-1].append(bucket)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _describe(title: str, lines: Sequence[Line]) -> str:
    """Return what the chart shows in words, for who does not see it."""
    said = []
    for line in lines:
        known = [y for _, y in line.points if math.isfinite(y)]
        if known:
            said.append(f"{line.label or title} from {figure(known[0])} to {figure(known[-1])}")
    return f"{title}: {'; '.join(said)}"
