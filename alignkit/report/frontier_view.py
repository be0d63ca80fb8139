"""Reward against KL as words and a table: Figure 2 (left) of the DPO paper (arXiv 2305.18290) for a recipe's runs.

`runs.frontier` computes, `frontier_chart` draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from alignkit.report.frontier import BEST_OF, Estimate, Frontier, Point
from alignkit.report.frontier_chart import NARROW, WIDE, draw, draw_alone, right
from alignkit.report.numbers import figure

_COLOURS = 4
_BEST_OF_COLOUR = 3
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
    colours, said = _colour(frontier.points), f"Reward against KL: {judge(frontier)}"
    settings = frontier.settings
    answers, prompts = settings.get("answers"), settings.get("prompts")
    beyond = (
        f"; beyond {figure(frontier.reach, 2)} nats, dashed, the last line above it"
        if right(frontier) > frontier.reach
        else ""
    )
    return FrontierView(
        wide=draw(frontier, colours, *WIDE, said=said),
        narrow=draw(frontier, colours, *NARROW, said=said),
        legend=[(colour, series) for series, colour in colours.items()],
        verdict=judge(frontier),
        note=f"{_NOTE}, estimated from {answers} answers of {frontier.reference} to each of {prompts} prompts{beyond}.",
        rows=[_row(point, colours[point.series]) for point in frontier.points],
        start=Row(
            0, frontier.reference, "", "", "0", "", _fixed(frontier.start.value), _between(frontier.start),
            _fixed(frontier.start.value), "0", "", False,
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
        said += f" Nearest: {_name(nearest)}, {_fixed(nearest.gap.value)} below."
    if frontier.left_out:
        said += f" Not drawn, as measured on other prompts or in another way: {', '.join(frontier.left_out)}."
    return said


def draw_file(frontier: Frontier) -> str:
    """Return the picture as a file of its own, with a legend and colours that follow the viewer's scheme."""
    return draw_alone(frontier, _colour(frontier.points))


def _colour(points: Sequence[Point]) -> dict[str, int]:
    """Return the colour of each series; best-of-N has its own."""
    names = list(dict.fromkeys(point.series for point in points))
    free = [number for number in range(1, _COLOURS + 1) if number != _BEST_OF_COLOUR or BEST_OF not in names]
    others = [name for name in names if name != BEST_OF]
    colours = {name: free[number % len(free)] for number, name in enumerate(others)}
    return colours | ({BEST_OF: _BEST_OF_COLOUR} if BEST_OF in names else {})


def _row(point: Point, colour: int) -> Row:
    return Row(
        colour, point.series, point.label, point.run, _fixed(point.kl.value), _between(point.kl),
        _fixed(point.reward.value), _between(point.reward), _fixed(point.optimum.value),
        _fixed(point.gap.value), _between(point.gap), point.is_above,
    )  # fmt: skip


def _between(estimate: Estimate) -> str:
    return f"{_fixed(estimate.low)} to {_fixed(estimate.high)}"


def _fixed(value: float) -> str:
    """Return a number whose column is read from top to bottom: as many decimals as its neighbours."""
    return f"{value:.3f}".replace("-", "\u2212") if abs(value) < 100 else figure(value, 3)


def _name(point: Point) -> str:
    return point.run or f"{point.series} {point.label}"
