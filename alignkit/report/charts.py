"""Charts as inline SVG: which metrics make which chart, the frontier, and where lines, bands and points lie.

Our own instead of matplotlib's: no import of two seconds at the end of every stage, a twentieth of the bytes, text that
can be selected and read aloud, and colours that follow the reader's light or dark scheme through CSS. The script of the
page reads `data-series` to show the values under the pointer.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from markupsafe import Markup

from alignkit.report.facts import Facts
from alignkit.report.text import MINUS, WORDS, figure, fixed, open_templates, short_count

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

    @property
    def has_band(self) -> bool:
        return self.low is not None and self.high is not None and self.high > self.low

    @property
    def ends(self) -> tuple[float, float, float, float]:
        """The lowest and highest x, then y, that are drawn."""
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


def colour(number: int) -> int:
    """Map the number of a series to one of the four colours of the page; 0 is that of the text."""
    return 1 + (number - 1) % 4 if number else 0


def draw_lines(
    lines: Sequence[Line], *, title: str, x_label: str = "step", marks: Sequence[float] = (), in_order: bool = True,
    height: int = HEIGHT, first_colour: int = 1,
) -> Markup:  # fmt: skip
    """Draw lines over one x axis, with gaps where values are not finite; `marks` get a dashed line across."""
    series = [_condense([Point(*point) for point in line.points], in_order) for line in lines]
    known = [point for points in series for point in points if point.is_drawn]
    if not known:
        return Markup("")
    lefts, rights, lows, highs = zip(*(point.ends for point in known), strict=True)
    left, right, low, high = min(lefts), max(rights), min(lows), max(highs)
    if left == right:
        left, right = left - 0.5, right + 0.5
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-150):  # flat but for rounding
        low = high = (low + high) / 2
    for mark in marks:  # a line far outside would flatten the curve
        if low - (high - low) <= mark <= high + (high - low):
            low, high = min(low, mark), max(high, mark)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    frame = _Frame(left, right, 0.0 if 0 <= low <= 0.35 * high else low - room, high + room, height)
    told, said, drawn = [], [], []
    for number, (line, points) in enumerate(zip(lines, series, strict=True)):
        shown = [point for point in points if point.is_drawn]
        named = [(point, f"{point.label}: " if point.label else "") for point in shown]
        told.append({"label": line.label, "points": [
            [frame.x(point.x), frame.y(point.y), figure(point.x), name + figure(point.y)] for point, name in named
        ]})  # fmt: skip
        if finite := [point[1] for point in line.points if math.isfinite(point[1])]:
            said.append(f"{line.label or title} from {figure(finite[0])} to {figure(finite[-1])}")
        pieces = [list(piece) for is_drawn, piece in groupby(points, key=lambda point: point.is_drawn) if is_drawn]
        all_dots = line.style in ("dots", "bars") or len(points) < 3
        drawn.append({
            "colour": colour(number + first_colour), "style": line.style, "points": shown, "pieces": pieces,
            "dots": shown if all_dots else shown[-1:] if line.style == "line" else (), "radius": 2.6 if all_dots else 3,
        })  # fmt: skip
    x_ticks, y_ticks = nice_ticks(frame.left, frame.right), nice_ticks(frame.bottom, frame.top)
    return Markup(open_templates().get_template("chart.svg.jinja").render(
        frame=frame, lines=drawn, marks=marks, label=f"{title}: {'; '.join(said)}", x_label=x_label, width=WIDTH,
        height=height, start=_LEFT, end=WIDTH - _RIGHT, floor=height - _BOTTOM,
        x_ticks=[(tick, tick_text(tick, x_ticks)) for tick in x_ticks],
        y_ticks=[(tick, tick_text(tick, y_ticks)) for tick in y_ticks],
        told=json.dumps(told, ensure_ascii=False, separators=(",", ":")),
    ))  # fmt: skip


def _condense(points: list[Point], in_order: bool) -> list[Point]:
    """Put means, of a curve with the range of each, in place of more points than there are pixels."""
    if (size := math.ceil(len(points) / _MAX_POINTS)) < 2:
        return points
    found = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        values = [point.y for point in group if abs(point.y) < 1e150]
        mean = sum(values) / len(values) if values else math.nan
        x = sum(point.x for point in group) / len(group)
        band = (min(values, default=mean), max(values, default=mean)) if in_order else ()
        found.append(Point(x, mean, *band))
    return found


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


def draw_curves(run: Facts) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Draw what a reader looks for first, and a chart for each metric that is left, as `describe_chart` gives them."""
    main, used = list[dict[str, Any]](), set[str]()
    for plan in WORDS["curves"]:  # each drawn where any of its metrics (name -> label) was logged
        metrics = plan["metrics"]
        if run.method not in plan.get("methods", [run.method]) or used & metrics.keys():
            continue
        if chart := _draw_metrics(run, plan["title"], plan["note"], metrics, plan.get("marks", ())):
            main.append(chart)
            used |= metrics.keys()
            # Each reward against the square root of the KL (Bai et al. 2022a, arXiv:2204.05862, section 4.3).
            distance = dict(run.series("sqrt_kl")) if "objective/kl" in metrics else {}
            for metric, name in (("reward", "Reward"), ("gold", "Gold reward")):
                points = [(distance[step], value) for step, value in run.series(metric) if step in distance]
                if len(points) > 1:
                    lines, title = [Line("", points, style="dots")], f"{name} against \u221aKL"
                    note = "one dot per rollout, in order"
                    main.append(describe_chart(lines, title, note, x_label="\u221aKL", in_order=False))
    rest = [_draw_metrics(run, name, "", {name: "training"}) for name in run.metric_names if name not in used]
    return main, [chart for chart in rest if chart]


def _draw_metrics(
    run: Facts, title: str, note: str, metrics: Mapping[str, str], marks: Sequence[float] = ()
) -> dict[str, Any] | None:
    lines = []
    for metric, label in metrics.items():
        if points := run.series(metric):
            lines.append(Line(label, points))
        if points := run.series(f"eval_{metric}"):
            lines.append(Line("held out" if len(metrics) == 1 else f"{label}, held out", points, style="dots"))
    if not any(len(line.points) > 1 for line in lines):
        return None
    return describe_chart(lines, title, note, marks=marks)


def describe_chart(lines: Sequence[Line], title: str, note: str, **how: Any) -> dict[str, Any]:
    """Draw a chart as the pages show it; thinned curves say so."""
    legend = [line.label for line in lines] if len(lines) > 1 else []
    svg, last = draw_lines(lines, title=title, **how), figure(lines[0].points[-1][1])
    size = math.ceil(max(len(line.points) for line in lines) / _MAX_POINTS)
    if size > 1:
        band = ", the band their range" if how.get("in_order", True) else ""
        note += f"{'; ' if note else ''}a point is the mean of {size} values{band}"
    return {"title": title, "note": note, "svg": svg, "legend": legend, "last": last}


# Reward against KL of a recipe's runs, and the most that any policy can have: Figure 2 (left) of arXiv:2305.18290.
# `alignkit eval` estimates the optimum, pi_ref exp(r / beta) / Z of each prompt. Its figures in eval.json, and those of
# policies and best-of-N on the same prompts in the same way, are put side by side.

_SAME = ("rows", "temperature", "max_new_tokens")  # what two figures must share to be compared
_SERIES = {"dpo": "DPO", "ppo": "PPO"}
_FRONTIER_HEIGHT = 240


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Optimum:
    """The best policy at one beta; no policy exceeds `value`, reward - beta KL. KL in nats per answer."""

    beta: float
    kl: float
    reward: float
    value: Estimate
    effective: float


@dataclass(frozen=True)
class Policy:
    """A policy: where it lies, the optimum's reward at its KL, and how far it stays below.
    `run` is empty for best-of-N. `gap` combines the intervals of reward, KL (times the slope) and optimum as if they
    were independent. All of them are over the same prompts, which makes the true interval narrower, not wider."""

    run: str
    series: str
    label: str
    kl: Estimate
    reward: Estimate
    optimum: Estimate
    gap: Estimate
    above: bool


@dataclass
class Frontier:
    """The optimum of one reference, and the policies that were measured on the same prompts in the same way."""

    reference: str
    reward_name: str
    data: str
    settings: dict[str, Any]
    start: Estimate  # the reference's own reward, at KL 0
    optima: list[Optimum]  # by falling beta
    points: list[Policy] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # runs that were measured otherwise

    def __post_init__(self) -> None:
        self.reach = max(optimum.kl for optimum in self.optima)  # the largest KL at which it was estimated itself

    def bound(self, kl: float) -> tuple[Estimate, float]:
        """Find the most reward at this KL and the slope there: the lowest of the lines value + beta KL, each of which
        is above every policy; between two betas it is a little above the optimum."""
        best = min(self.optima, key=lambda optimum: optimum.value.value + optimum.beta * kl)
        ends = (end + best.beta * kl for end in (best.value.value, best.value.low, best.value.high))
        return Estimate(*ends), best.beta

    @property
    def right(self) -> float:
        """The largest KL that is drawn: that of the farthest policy, or a part of the curve beyond it."""
        far = max((point.kl.high for point in self.points), default=self.reach)
        return max(far, min(self.reach, 1.5 * far)) or 1.0

    @property
    def series(self) -> list[str]:
        return list(dict.fromkeys(point.series for point in self.points))

    def place(self, run: str, series: str, label: str, kl: Estimate, reward: Estimate) -> None:
        bound, slope = self.bound(kl.value)
        gap = bound.value - reward.value
        widths = reward.high - reward.low, bound.high - bound.low, slope * (kl.high - kl.low)
        half = math.hypot(*widths) / 2
        ends = Estimate(gap, gap - half, gap + half)
        self.points.append(Policy(run, series, label, kl, reward, bound, ends, above=ends.high < 0))


def read_frontiers(runs: Sequence[Facts]) -> list[Frontier]:
    """Read a frontier for each optimum that the evaluations of these runs hold; mostly there is none or one."""
    found = []
    for run in runs:
        for start in run.evaluation.get("results", []):
            if start.get("metric") == "reference_reward" and (begin := _estimate(start)) is not None:
                optima = [Optimum(each["beta"], each["kl"], each["reward"], value, each["effective"])
                          for each in start.get("details") or [] if (value := _estimate(each)) is not None]  # fmt: skip
                optima.sort(key=lambda optimum: -optimum.beta)
                settings = {**start["settings"], "prompts": start.get("n")}
                name, data = str(settings.get("reward")), str(start["data"])
                if optima:
                    found.append(Frontier(run.name, name, data, settings, begin, optima))
                    _place_policies(found[-1], run, start, runs)
    return found


def _place_policies(frontier: Frontier, reference: Facts, start: dict[str, Any], runs: Sequence[Facts]) -> None:
    """Place the runs that were measured as the optimum was, and best-of-N of the reference."""
    name = frontier.reward_name
    metric = name if name == "true_reward" else f"reward/{name}"
    for run in runs:
        # Its KL is to this reference, as its evaluation says; else it started from it.
        kls_to = [Path(str((each.get("settings") or {}).get("reference", ""))) for each in
                  run.evaluation.get("results", []) if each.get("metric") == "kl"]  # fmt: skip
        started = run.method in _SERIES and run.stage.get("start_stage") == reference.name
        names = [(path.parent if path.name == "model" else path).name for path in kls_to[:1]]
        if reference.path.name not in names if names else not started:
            continue
        found = {each.get("metric"): _estimate(each) for each in _alike(run, start, _SAME) if each.get("slice") is None}
        kl, reward = found.get("kl"), found.get(metric)
        if kl is not None and reward is not None:
            frontier.place(run.name, *_name_series(run), kl, reward)
        elif run.evaluation:
            frontier.left_out.append(run.name)
    # A series is called by its method alone where no other series has that method.
    methods = [series.split(",")[0] for series in frontier.series]
    for number, point in enumerate(frontier.points):
        if methods.count(method := point.series.split(",")[0]) == 1:
            frontier.points[number] = replace(point, series=method)
    best_of = _alike(reference, start, (*_SAME, "reward", "answers"))
    kls = {each.get("slice"): _estimate(each) for each in best_of if each.get("metric") == "best_of_n_kl"}
    for each in best_of:
        reward, kl = _estimate(each), kls.get(each.get("slice"))
        if each.get("metric") == "best_of_n" and reward is not None and kl is not None:
            frontier.place("", "best of N", str(each["slice"]).removeprefix("N="), kl, reward)
    frontier.points.sort(key=lambda point: (point.series, point.kl.value))


def _alike(run: Facts, start: Mapping[str, Any], keys: Sequence[str]) -> list[dict[str, Any]]:
    """List the figures of a run that are of the same data as `start`, and agree with it in these settings."""
    wanted = [start.get("data"), *((start.get("settings") or {}).get(key) for key in keys)]
    return [
        each for each in run.evaluation.get("results", [])
        if [each.get("data"), *((each.get("settings") or {}).get(key) for key in keys)] == wanted
    ]  # fmt: skip


def _name_series(run: Facts) -> tuple[str, str]:
    """Name the series of a run, which differs in the strength of the KL only, and what tells it from the others."""
    options, trainer = run.stage.get("options", {}), run.stage.get("trainer", {})
    series, strength = _SERIES.get(run.method, run.method), options.get("kl_coef")
    if run.method == "dpo":
        loss, strength = trainer.get("loss_type"), trainer.get("beta", 0.1)
        loss = "+".join(map(str, loss)) if isinstance(loss, list) else loss
        series += f", {loss}" if loss not in (None, "sigmoid") else ""
    elif run.method == "ppo":
        names = []
        for reward in options.get("reward") or []:
            name = str(reward.get("model") or reward.get("function") or "judge").removeprefix("builtin:")
            path = Path(name.replace("-", " "))
            names.append(path.parent.name if path.name == "model" else path.name)
        series += f", {' + '.join(names)}" if names else ""
    if point := run.stage.get("point"):  # what a sweep gave it
        return series, ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in point.values())
    if options.get("kl_target") is not None:
        return series, f"target {options['kl_target']:g}"
    return series, f"{strength:g}" if isinstance(strength, int | float) else run.name


def _estimate(result: Mapping[str, Any]) -> Estimate | None:
    numbers = [float(each) for key in ("value", "low", "high") if isinstance(each := result.get(key), int | float)]
    return Estimate(*numbers) if len(numbers) == 3 else None


def judge_frontier(frontier: Frontier) -> str:
    """Say in a sentence or two whether anything lies above the optimum, and how near the policies come to it."""
    above = [point.run or f"{point.series} {point.label}" for point in frontier.points if point.above]
    policies = [point for point in frontier.points if point.run]
    if above:
        said = f"{', '.join(above)} {'lies' if len(above) == 1 else 'lie'} above the optimum beyond the interval: "
        said += "no policy can, so the estimate of the optimum or of the KL is wrong."
    else:
        said = "No point lies above the optimum beyond its interval."
        if policies:
            nearest = min(policies, key=lambda point: point.gap.value)
            said += f" Nearest: {nearest.run}, {fixed(nearest.gap.value)} below."
    if frontier.left_out:
        said += f" Not drawn, as measured on other prompts or in another way: {', '.join(frontier.left_out)}."
    return said


def draw_frontier(frontier: Frontier) -> Markup:
    """Draw the optimum with its band and points with bars over the root of the KL, where it is nearly straight."""
    low, high = math.sqrt(min(frontier.right, *(optimum.kl for optimum in frontier.optima))), math.sqrt(frontier.right)
    roots = [low + (high - low) * step / 160 for step in range(161)]
    curve = [(0.0, frontier.start), *((root, frontier.bound(root * root)[0]) for root in roots)]
    lines = [Line("optimum", [Point(x, at.value, at.low, at.high) for x, at in curve], style="curve")]
    places: dict[str, list[Point]] = {}
    for point in frontier.points:
        x, left, right = (math.sqrt(max(kl, 0.0)) for kl in (point.kl.value, point.kl.low, point.kl.high))
        reward = point.reward
        place = Point(x, reward.value, reward.low, reward.high, left, right, label=point.label)
        places.setdefault(point.series, []).append(place)
    lines += [Line(series, found, style="bars") for series, found in places.items()]
    title = f"Reward against KL: {judge_frontier(frontier)}"
    return draw_lines(lines, title=title, x_label="\u221aKL", height=_FRONTIER_HEIGHT, first_colour=0)


def draw_frontier_file(frontier: Frontier, style: str) -> str:
    """Draw the picture as a file of its own, with a legend and the colours of the page."""
    x, legend = 44.0, []
    for number, series in enumerate(["optimum", *frontier.series]):
        legend.append(Markup('<text class="label c{}" x="{}" y="14">{}</text>').format(colour(number), x, series))
        x += 18 + 6.2 * len(series)
    chart = draw_frontier(frontier)
    inner = chart[chart.index(">") + 1 : -len("</svg>")]
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -22 {} {}" font-family="system-ui, sans-serif">'
        '<style>{}</style><g transform="translate(0 -22)">{}</g>{}</svg>\n'
    ).format(max(380, round(x)), _FRONTIER_HEIGHT + 22, Markup(style), Markup("").join(legend), inner)
