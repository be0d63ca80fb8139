"""Which metrics make which chart, in the words of the papers; every metric that was logged is drawn somewhere.

It knows names and what they mean, not how a line is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from alignkit.report.charts import Line, draw_lines
from alignkit.report.facts import Facts
from alignkit.report.numbers import figure

_HELD_OUT = "held out"
_LN2 = math.log(2)


@dataclass(frozen=True)
class Curve:
    """A chart with its words; `legend` names the lines in the order of their colours, empty for a single one."""

    title: str
    note: str
    chart: Markup
    legend: list[str]
    last: str


@dataclass(frozen=True)
class _Plan:
    """A chart to draw when any of its metrics was logged."""

    title: str
    note: str
    metrics: dict[str, str]  # name -> label
    marks: tuple[float, ...] = ()
    methods: tuple[str, ...] = ()  # empty: all


_PLANS = (
    _Plan("Loss", "nats; ln 2, dashed, is a coin toss", {"loss": "training"}, marks=(_LN2,), methods=("rm", "dpo")),
    _Plan("Loss", "nats per trained token", {"loss": "training"}, methods=("sft",)),
    _Plan("Loss", "policy and critic together", {"loss": "training"}),
    _Plan("Reward", "mean over answers", {"reward": "training"}),
    _Plan("Gold reward", "watched, never trained on", {"gold": "training"}),
    _Plan("KL to the reference", "nats per sequence", {"objective/kl": "training"}),
    _Plan("Pair accuracy", "share of pairs in the right order; dashed: chance", {"accuracy": "training"}, (0.5,)),
    _Plan(
        "Pair accuracy", "of the implicit reward; dashed: chance", {"rewards/accuracies": "training"}, (0.5,)
    ),
    _Plan("Margin", "chosen minus rejected reward", {"margin": "training"}, (0.0,)),
    _Plan("Margin", "chosen minus rejected implicit reward", {"rewards/margins": "training"}, (0.0,)),
    _Plan(
        "Implicit reward", "beta times the log-ratio to the reference",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}, (0.0,),
    ),
    _Plan(
        "Log-probability", "nats per answer", {"logps/chosen": "chosen", "logps/rejected": "rejected"}
    ),
    _Plan("Mean reward", "over all answers", {"mean_reward": "training"}, (0.0,)),
    _Plan("Token accuracy", "share of tokens ranked first", {"mean_token_accuracy": "training"}),
    _Plan("Length of answers", "tokens", {"response_length": "training"}),
    _Plan("Entropy", "nats per token", {"entropy": "training"}),
    _Plan("Learning rate", "", {"learning_rate": ""}),
    _Plan("Gradient norm", "before clipping", {"grad_norm": "model", "critic_grad_norm": "critic"}),
)  # fmt: skip


def draw_curves(run: Facts) -> tuple[list[Curve], list[Curve]]:
    """Return the charts of a run: those a reader looks for first, and one for each metric that is left."""
    main, used = list[Curve](), set[str]()
    for plan in _PLANS:
        if plan.methods and run.method not in plan.methods or used & plan.metrics.keys():
            continue
        if curve := _draw(run, plan):
            main.append(curve)
            used |= plan.metrics.keys()
            if "objective/kl" in plan.metrics:
                main += _draw_frontier(run)
    others = [name for name in run.metric_names() if name not in used]
    rest = [_draw(run, _Plan(name, "", {name: "training"})) for name in others]
    return main, [curve for curve in rest if curve]


def _draw(run: Facts, plan: _Plan) -> Curve | None:
    lines = []
    for metric, label in plan.metrics.items():
        held_out = _HELD_OUT if len(plan.metrics) == 1 else f"{label}, {_HELD_OUT}"
        if points := run.series(metric):
            lines.append(Line(label, points))
        if points := run.series(f"eval_{metric}"):
            lines.append(Line(held_out, points, dots=True))
    if not any(len(line.points) > 1 for line in lines):
        return None
    return _curve(plan.title, plan.note, lines, draw_lines(lines, title=plan.title, marks=plan.marks))


def _draw_frontier(run: Facts) -> list[Curve]:
    """Return each reward against the square root of the KL (Bai et al. 2022a, arXiv:2204.05862, section 4.3)."""
    distance = dict(run.series("sqrt_kl"))
    curves = []
    for metric, name in (("reward", "Reward"), ("gold", "Gold reward")):
        points = [(distance[step], value) for step, value in run.series(metric) if step in distance]
        if len(points) > 1:
            title, line = f"{name} against \u221aKL", Line("", points, dots=True)
            chart = draw_lines([line], title=title, x_label="\u221aKL", in_order=False)
            curves.append(_curve(title, "one dot per rollout, in order", [line], chart))
    return curves


def _curve(title: str, note: str, lines: Sequence[Line], chart: Markup) -> Curve:
    legend = [line.label for line in lines] if len(lines) > 1 else []
    return Curve(title, note, chart, legend, figure(lines[0].points[-1][1]))
