"""Reward against KL of the runs of a recipe, beside the most that any policy can have, from their eval.json files.

It measures nothing and draws nothing: `alignkit eval` measures, `report.frontier` draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignkit.report.facts import Facts

_SAME = ("rows", "temperature", "max_new_tokens")  # what two figures must share to be compared
_METHODS = {"dpo": "DPO", "ppo": "PPO"}
BEST_OF = "best of N"


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Return half of the interval's width."""
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
        """Whether it lies above the optimum beyond its interval."""
        return self.gap.high < 0


@dataclass(frozen=True)
class Frontier:
    """The optimum of one reference, and the policies that were measured on the same prompts in the same way."""

    reference: str
    reward_name: str
    data: str
    settings: dict[str, Any]
    start: Estimate  # the reference's own reward, at KL 0
    optima: list[Optimum]  # by falling beta
    points: list[Point]
    left_out: list[str]  # runs that were measured otherwise

    def bound(self, kl: float) -> Estimate:
        """Return the most reward at this KL: the lowest of the lines value + beta KL, each above every policy.

        Between two betas it is a little above the optimum; beyond the last it is that beta's line.
        """
        best = min(self.optima, key=lambda optimum: optimum.value.value + optimum.beta * kl)
        shift, value = best.beta * kl, best.value
        return Estimate(value.value + shift, value.low + shift, value.high + shift)

    def slope(self, kl: float) -> float:
        """Return the beta whose line is the bound at this KL: reward per nat."""
        return min(self.optima, key=lambda optimum: optimum.value.value + optimum.beta * kl).beta

    @property
    def reach(self) -> float:
        """Return the largest KL at which the optimum itself was estimated."""
        return max(optimum.kl for optimum in self.optima)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as frontier.json holds it."""
        plain = {key: value for key, value in asdict(self).items() if key != "points"}
        return plain | {"points": [asdict(point) | {"above": point.is_above} for point in self.points]}


def read_frontiers(runs: Sequence[Facts]) -> list[Frontier]:
    """Return a frontier for each optimum that the evaluations of these runs hold; mostly there is none or one."""
    found: list[Frontier | None] = []
    for run in runs:
        results = run.evaluation.get("results", [])
        starts = [result for result in results if result.get("metric") == "reference_reward"]
        found += [_read(run, start, results, runs) for start in starts]
    return [frontier for frontier in found if frontier is not None]


def _read(
    reference: Facts, start: dict[str, Any], results: Sequence[dict[str, Any]], runs: Sequence[Facts]
) -> Frontier | None:
    same = [each for each in results if _alike(each, start, (*_SAME, "reward", "answers"))]
    begin = _estimate(start)
    read = [_read_optimum(each) for each in start.get("details") or []]
    optima = sorted((each for each in read if each is not None), key=lambda optimum: -optimum.beta)
    if begin is None or not optima:
        return None
    name = str(start["settings"].get("reward"))
    settings = {**start["settings"], "prompts": start.get("n")}
    frontier = Frontier(reference.name, name, str(start["data"]), settings, begin, optima, points=[], left_out=[])
    policies, left_out = list[Point](), list[str]()
    for run in runs:
        if not _starts_from(run, reference):
            continue
        if (point := _read_policy(run, start, frontier)) is not None:
            policies.append(point)
        elif run.evaluation:
            left_out.append(run.name)
    series = {point.series for point in policies}
    plain = [_shorten(point, series) for point in policies]
    points = sorted([*plain, *_read_best_of(same, frontier)], key=lambda point: (point.series, point.kl.value))
    return Frontier(**{**vars(frontier), "points": points, "left_out": left_out})


def _read_optimum(details: dict[str, Any]) -> Optimum | None:
    keys, value = ("beta", "kl", "reward", "effective"), _estimate(details)
    if value is None or not all(isinstance(details.get(key), int | float) for key in keys):
        return None
    beta, kl, reward, effective = (float(details[key]) for key in keys)
    return Optimum(beta, kl, reward, value, effective)


def _read_policy(run: Facts, start: dict[str, Any], frontier: Frontier) -> Point | None:
    """Return where a policy lies; None when it was not measured on the prompts of the optimum in the same way."""
    name = frontier.reward_name
    metric = name if name == "true_reward" else f"reward/{name}"
    found: dict[str, Estimate] = {}
    for result in run.evaluation.get("results", []):
        asked = result.get("metric") in (metric, "kl") and result.get("slice") is None
        if asked and _alike(result, start, _SAME) and (estimate := _estimate(result)) is not None:
            found[result["metric"]] = estimate
    if metric not in found or "kl" not in found:
        return None
    return _place(run.name, _series(run), _label(run), found["kl"], found[metric], frontier)


def _read_best_of(results: Sequence[dict[str, Any]], frontier: Frontier) -> Iterator[Point]:
    kls = {each.get("slice"): _estimate(each) for each in results if each.get("metric") == "best_of_n_kl"}
    for result in results:
        if result.get("metric") == "best_of_n":
            reward, kl = _estimate(result), kls.get(result.get("slice"))
            if reward is not None and kl is not None:
                yield _place("", BEST_OF, str(result["slice"]).removeprefix("N="), kl, reward, frontier)


def _place(run: str, series: str, label: str, kl: Estimate, reward: Estimate, frontier: Frontier) -> Point:
    bound = frontier.bound(kl.value)
    gap = bound.value - reward.value
    half = math.hypot(reward.half, bound.half, frontier.slope(kl.value) * kl.half)
    return Point(run, series, label, kl, reward, bound, Estimate(gap, gap - half, gap + half))


def _starts_from(run: Facts, reference: Facts) -> bool:
    """Tell whether a run's KL is to this reference, as its evaluation says; else whether it started from it."""
    for result in run.evaluation.get("results", []):
        if result.get("metric") == "kl":
            path = Path(str((result.get("settings") or {}).get("reference", "")))
            return (path.parent if path.name == "model" else path).name == reference.path.name
    return run.method in _METHODS and run.stage.get("start_stage") == reference.name


def _series(run: Facts) -> str:
    """Return what runs share that differ in the strength of the KL only."""
    method = _METHODS.get(run.method, run.method)
    if run.method == "dpo":
        loss = run.stage.get("trainer", {}).get("loss_type")
        loss = "+".join(map(str, loss)) if isinstance(loss, list) else loss
        return method if loss in (None, "sigmoid") else f"{method}, {loss}"
    if run.method == "ppo":
        rewards = run.stage.get("options", {}).get("reward") or []
        names = [_name_reward(each) for each in rewards if isinstance(each, dict)]
        return f"{method}, {' + '.join(names)}" if names else method
    return method


def _name_reward(reward: dict[str, Any]) -> str:
    name = str(reward.get("model") or reward.get("function") or "judge").removeprefix("builtin:").replace("-", " ")
    path = Path(name)
    return path.parent.name if path.name == "model" else path.name


def _shorten(point: Point, series: set[str]) -> Point:
    """Return the point with its method alone as its series, where no other series has that method."""
    method = point.series.split(",")[0]
    alone = sum(each.split(",")[0] == method for each in series) == 1
    return Point(**{**vars(point), "series": method}) if alone else point


def _label(run: Facts) -> str:
    """Return what tells a run from others of its series: what a sweep gave it, else how strongly it was held."""
    if point := run.stage.get("point"):
        return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in point.values())
    options, trainer = run.stage.get("options", {}), run.stage.get("trainer", {})
    if options.get("kl_target") is not None:
        return f"target {options['kl_target']:g}"
    strength = trainer.get("beta", 0.1) if run.method == "dpo" else options.get("kl_coef")
    return f"{strength:g}" if isinstance(strength, int | float) else run.name


def _alike(one: dict[str, Any], other: dict[str, Any], keys: Sequence[str]) -> bool:
    """Tell whether two figures are of the same data, and agree in these settings."""
    ours, theirs = one.get("settings") or {}, other.get("settings") or {}
    return one.get("data") == other.get("data") and all(ours.get(key) == theirs.get(key) for key in keys)


def _estimate(result: dict[str, Any]) -> Estimate | None:
    numbers = [result.get(key) for key in ("value", "low", "high")]
    known = [float(number) for number in numbers if isinstance(number, int | float)]
    return Estimate(*known) if len(known) == len(numbers) else None
