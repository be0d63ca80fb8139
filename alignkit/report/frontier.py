"""Reward against KL of a recipe's runs, and the most that any policy can have: Figure 2 (left) of arXiv:2305.18290.

`alignkit eval` estimates the optimum, pi_ref exp(r / beta) / Z of each prompt. Its figures in eval.json, and those of
policies and best-of-N on the same prompts in the same way, are put side by side here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from alignkit.report.charts import Line, colour, draw_lines
from alignkit.report.charts import Point as Place
from alignkit.report.facts import Facts
from alignkit.report.text import MINUS, figure

_SAME = ("rows", "temperature", "max_new_tokens")  # what two figures must share to be compared
_METHODS = {"dpo": "DPO", "ppo": "PPO"}
_HEIGHT = 240


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Optimum:
    """The best policy at one beta; `value` is reward - beta KL, which no policy exceeds. KL in nats per answer."""

    beta: float
    kl: float
    reward: float
    value: Estimate
    effective: float


@dataclass(frozen=True)
class Point:
    """A policy: where it lies, the optimum's reward at its KL, and how far it stays below.

    `run` is empty for best-of-N. `gap` combines the intervals of reward, KL (times the slope) and optimum as if they
    were independent. All of them are over the same prompts, which makes the true interval narrower, not wider.
    """

    run: str
    series: str
    label: str
    kl: Estimate
    reward: Estimate
    optimum: Estimate
    gap: Estimate

    @property
    def is_above(self) -> bool:
        return self.gap.high < 0


@dataclass
class Frontier:
    """The optimum of one reference, and the policies that were measured on the same prompts in the same way."""

    reference: str
    reward_name: str
    data: str
    settings: dict[str, Any]
    start: Estimate  # the reference's own reward, at KL 0
    optima: list[Optimum]  # by falling beta
    points: list[Point] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # runs that were measured otherwise

    def __post_init__(self) -> None:
        self.reach = max(optimum.kl for optimum in self.optima)  # the largest KL at which it was estimated itself

    def touching(self, kl: float) -> Optimum:
        """Find the optimum whose line value + beta KL is lowest at this KL; each line is above every policy."""
        return min(self.optima, key=lambda optimum: optimum.value.value + optimum.beta * kl)

    def bound(self, kl: float) -> Estimate:
        """Find the most reward at this KL: between two betas a little above the optimum, beyond the last its line."""
        best = self.touching(kl)
        return Estimate(*(end + best.beta * kl for end in (best.value.value, best.value.low, best.value.high)))

    @property
    def right(self) -> float:
        """The largest KL that is drawn: that of the farthest policy, or a part of the curve beyond it."""
        far = max((point.kl.high for point in self.points), default=self.reach)
        return max(far, min(self.reach, 1.5 * far)) or 1.0

    @property
    def series(self) -> list[str]:
        return list(dict.fromkeys(point.series for point in self.points))

    def place(self, run: str, series: str, label: str, kl: Estimate, reward: Estimate) -> None:
        bound = self.bound(kl.value)
        gap, slope = bound.value - reward.value, self.touching(kl.value).beta
        half = math.hypot(reward.half, bound.half, slope * kl.half)
        self.points.append(Point(run, series, label, kl, reward, bound, Estimate(gap, gap - half, gap + half)))

    def to_dict(self) -> dict[str, Any]:
        """Make plain data, as frontier.json holds it."""
        return asdict(self) | {"points": [asdict(point) | {"above": point.is_above} for point in self.points]}


def read_frontiers(runs: Sequence[Facts]) -> list[Frontier]:
    """Read a frontier for each optimum that the evaluations of these runs hold; mostly there is none or one."""
    starts = [(run, start) for run in runs for start in run.evaluation.get("results", [])]
    found = [_read(run, start, runs) for run, start in starts if start.get("metric") == "reference_reward"]
    return [frontier for frontier in found if frontier is not None]


def _read(reference: Facts, start: dict[str, Any], runs: Sequence[Facts]) -> Frontier | None:
    begin, settings, optima = _estimate(start), start["settings"], []
    for each in start.get("details") or []:
        value, (beta, kl, reward, effective) = _estimate(each), map(each.get, ("beta", "kl", "reward", "effective"))
        if value is not None and all(isinstance(number, int | float) for number in (beta, kl, reward, effective)):
            optima.append(Optimum(beta, kl, reward, value, effective))
    if begin is None or not optima:
        return None
    optima.sort(key=lambda optimum: -optimum.beta)
    name, settings = str(settings.get("reward")), {**settings, "prompts": start.get("n")}
    frontier = Frontier(reference.name, name, str(start["data"]), settings, begin, optima)
    metric = name if name == "true_reward" else f"reward/{name}"
    for run in (run for run in runs if _starts_from(run, reference)):
        found = {each.get("metric"): _estimate(each) for each in _alike(run, start, _SAME) if each.get("slice") is None}
        kl, reward = found.get("kl"), found.get(metric)
        if kl is not None and reward is not None:
            frontier.place(run.name, *_name(run), kl, reward)
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
    return frontier


def _starts_from(run: Facts, reference: Facts) -> bool:
    """Tell whether a run's KL is to this reference, as its evaluation says; else whether it started from it."""
    for result in run.evaluation.get("results", []):
        if result.get("metric") == "kl":
            path = Path(str((result.get("settings") or {}).get("reference", "")))
            return (path.parent if path.name == "model" else path).name == reference.path.name
    return run.method in _METHODS and run.stage.get("start_stage") == reference.name


def _alike(run: Facts, start: Mapping[str, Any], keys: Sequence[str]) -> list[dict[str, Any]]:
    """List the figures of a run that are of the same data as `start`, and agree with it in these settings."""
    wanted = [start.get("data"), *((start.get("settings") or {}).get(key) for key in keys)]
    return [
        each for each in run.evaluation.get("results", [])
        if [each.get("data"), *((each.get("settings") or {}).get(key) for key in keys)] == wanted
    ]  # fmt: skip


def _name(run: Facts) -> tuple[str, str]:
    """Name the series of a run, which differs in the strength of the KL only, and what tells it from the others."""
    options, trainer = run.stage.get("options", {}), run.stage.get("trainer", {})
    series, strength = _METHODS.get(run.method, run.method), options.get("kl_coef")
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


def judge(frontier: Frontier) -> str:
    """Say in a sentence or two whether anything lies above the optimum, and how near the policies come to it."""
    above = [point.run or f"{point.series} {point.label}" for point in frontier.points if point.is_above]
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
    """Draw the optimum with its band, and the points with bars both ways, over the square root of the KL.

    Near the reference the best reward grows with the root of the KL: there the curve is nearly straight.
    """
    low, high = math.sqrt(min(frontier.right, *(optimum.kl for optimum in frontier.optima))), math.sqrt(frontier.right)
    roots = [low + (high - low) * step / 160 for step in range(161)]
    curve = [(0.0, frontier.start), *((root, frontier.bound(root * root)) for root in roots)]
    lines = [Line("optimum", [Place(x, at.value, at.low, at.high) for x, at in curve], style="curve")]
    places: dict[str, list[Place]] = {}
    for point in frontier.points:
        x, left, right = (math.sqrt(max(kl, 0.0)) for kl in (point.kl.value, point.kl.low, point.kl.high))
        reward = point.reward
        place = Place(x, reward.value, reward.low, reward.high, left, right, label=point.label)
        places.setdefault(point.series, []).append(place)
    lines += [Line(series, found, style="bars") for series, found in places.items()]
    title = f"Reward against KL: {judge(frontier)}"
    return draw_lines(lines, title=title, x_label="\u221aKL", height=_HEIGHT, first_colour=0)


def draw_file(frontier: Frontier, style: str) -> str:
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
    ).format(max(380, round(x)), _HEIGHT + 22, Markup(style), Markup("").join(legend), inner)


def fixed(value: float) -> str:
    """Format a number whose column is read from top to bottom: as many decimals as its neighbours."""
    return f"{value:.3f}".replace("-", MINUS) if abs(value) < 100 else figure(value, 3)


def between(estimate: Estimate) -> str:
    return f"{fixed(estimate.low)} to {fixed(estimate.high)}"
