"""Whether a stage did what it was for, in a sentence or two: what decides comes first, and what is missing is named.

A stage is called better only where its figure has moved the right way by more than its 95 % interval: of answers and
likelihoods the paired difference to what it started from, of a reward model the accuracy against chance and length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, variance
from typing import Any, Literal, NamedTuple

from alignkit.report.evaluation import NAMES
from alignkit.report.facts import Facts, read_facts
from alignkit.report.sections import describe_status, gather_warnings
from alignkit.report.text import THIN, figure, share, short_name, wilson, window
from alignkit.runs.directory import RunDir

Tone = Literal["better", "not better", "undecided"]
_Result = Mapping[str, Any]
_TONES: dict[int, Tone] = {-1: "not better", 0: "undecided", 1: "better"}
_LN2 = math.log(2)
_WINDOW = 10  # logged values that a mean at an end of a curve is over, at most


class Verdict(NamedTuple):
    """What is said of a stage; `missing` is what would decide, and the key that gives it."""

    stage: str
    tone: Tone
    says: str
    missing: str
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "verdict": self.tone, "says": self.says, "missing": self.missing or None,
                "warnings": self.warnings}  # fmt: skip


def judge_all(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Judge the runs of these directories that have begun, as plain data."""
    return [judge(read_facts(run)).to_dict() for run in runs if RunDir(run).stage.is_file()]


def judge(run: Facts) -> Verdict:
    """Judge a run in any state by its own files."""
    tone, says, missing = _judge(run)
    if run.error:
        says += f": {run.error.strip().splitlines()[-1]}"
    says = says if says.startswith(run.name) else f"{run.name}: {says}"
    warnings = [text.removeprefix(f"{run.name}: ") for text, _ in gather_warnings(run)]
    return Verdict(run.name, tone, says.replace(THIN, " "), missing, warnings)


def _judge(run: Facts) -> tuple[Tone, str, str]:
    if not run.is_finished:
        return "not better" if run.error else "undecided", f"{run.name} is {describe_status(run)}", ""
    found = _whole(run)
    if run.method in ("dpo", "ppo"):
        return _judge_policy(run, found)
    if run.method == "rm" or run.task:
        return _judge_classifier(run, found)
    return _judge_sft(run, found) if run.method == "sft" else _judge_rows(run)


def _whole(run: Facts) -> dict[str, _Result]:
    """Map the names of the figures of the run itself, without slices, to the newest of each."""
    results = [each for each in run.evaluation.get("results", []) if ", by its start " not in str(each.get("data"))]
    return {str(each.get("metric")): each for each in results
            if each.get("slice") is None and each.get("value") is not None}  # fmt: skip


def _judge_policy(run: Facts, found: Mapping[str, _Result]) -> tuple[Tone, str, str]:
    start = _start(run)
    scored = ["true_reward", *sorted(name for name in found if name.startswith("reward/"))]
    measured = [_win(run, found["win_rate"])] if "win_rate" in found else []
    measured += [_change(found[name], start) for name in scored if (found.get(name) or {}).get("change")]
    missing = ""
    if not measured:
        missing = (f"no answer was compared with those of {start}: `evaluate: {{against: {start}, judge: ...}}` in the "
                   "recipe, or `alignkit eval --against`")  # fmt: skip
        measured = [_implicit(run, found) if run.method == "dpo" else _rollouts(run)]
    sides = [_drift(run, found, start)]
    ended, length = (found.get(name, {}).get("change") for name in ("ended_share", "response_length"))
    if ended and _sign(ended):
        sides.append(f"{100 * abs(ended['value']):.0f} % {'more' if ended['value'] > 0 else 'fewer'} answers end")
    if length and length["from"] and _sign(length) and abs(length["value"]) > 0.1 * length["from"]:
        longer = "longer" if length["value"] > 0 else "shorter"
        sides.append(f"answers are {100 * abs(length['value'] / length['from']):.0f} % {longer}")
    measured = [measured[0], *(each for each in measured[1:] if each[0] != "undecided")]
    says = "; ".join(filter(None, [*(text for _, text in measured), *sides]))
    tones = [tone for tone, _ in measured]
    tone: Tone = "undecided" if tones[0] == "better" and "not better" in tones else tones[0]
    seen = next((found[name] for name in ("win_rate", *scored) if name in found), None)
    return _temper(tone, seen), says + _trained(seen), missing


def _win(run: Facts, result: _Result) -> tuple[Tone, str]:
    settings, n = result.get("settings") or {}, int(result.get("n") or 0)
    other, judged = short_name(str(settings.get("against"))), f", judged by {settings.get('judge')}"
    wins = float(result["value"]) * n
    between = _between(result)
    ties = n - sum(change.get(side, 0) for side in ("rose", "fell")) if (change := result.get("change")) else 0
    between += f", {ties} ties counted half" if ties else ""
    tone = _TONES[_sign(result, 0.5)]
    verb = {"better": f"beats {other} on", "not better": f"loses to {other}: it wins on",
            "undecided": f"is not told apart from {other}: it wins on"}[tone]  # fmt: skip
    return tone, f"{run.name} {verb} {wins:.3g} of {n} prompts{between}{judged}"


def _change(result: _Result, start: str) -> tuple[Tone, str]:
    """Say how a figure differs from that of the start, and on how many rows."""
    change, metric = result["change"], str(result.get("metric"))
    name = NAMES.get(metric, f"Reward by {metric[7:]}" if metric.startswith("reward/") else metric).lower()
    sign = _sign(change) * (-1 if result.get("better") == "lower" else 1)
    size = f"{figure(change['from'], 3)} to {figure(result['value'], 3)}"
    known = change.get("low") is not None and change["low"] != change["high"]
    between = f" (difference {figure(change['low'], 3)} to {figure(change['high'], 3)})" if known else ""
    side = "rose" if change["value"] > 0 else "fell"
    if not sign:
        return "undecided", f"{name} is not told apart from that of {start}: {size}{between}, n {result.get('n')}"
    return _TONES[
        sign
    ], f"{name} {side} from {size}{between}, on {change[side]} of {result.get('n')} rows, against {start}"


def _drift(run: Facts, found: Mapping[str, _Result], start: str) -> str:
    if (result := found.get("kl")) is not None:
        reference = short_name(str((result.get("settings") or {}).get("reference") or start))
        return f"it drifted {figure(max(round(result['value'], 3), 0.0), 2)} nats an answer from {reference}"
    late = [value for _, value in run.series("objective/kl")][-_WINDOW:]
    return f"KL to {start} {figure(fmean(late), 2)} nats ({window(len(late), 'rollout', last=True)})" if late else ""


def _implicit(run: Facts, found: Mapping[str, _Result]) -> tuple[Tone, str]:
    """Judge dpo by its preference on held-out pairs, or say what its training rows show."""
    result, n = found.get("implicit_reward_accuracy"), (run.stage.get("eval_lengths") or {}).get("num_rows")
    value = run.result.get("metrics", {}).get("eval_rewards/accuracies")
    if result is None and value is not None and n:
        low, high = wilson(value * n, n)
        result = {"value": value, "low": low, "high": high, "n": n, "data": "its held-out rows"}
    if result is not None:
        tone: Tone = "better" if (result.get("low") or 0) > 0.5 else "undecided"
        learnt = "has learnt the preference" if tone == "better" else "has not shown that it learnt the preference"
        pairs = f"{share(result['value'])} of {result['n']} pairs of {result['data']} in order{_between(result)}"
        return _temper(tone, result), f"{run.name} {learnt}: its implicit reward puts {pairs}"
    curve = _curve(run, "loss", "training loss")
    return "undecided", f"{run.name} trained on {_rows(run)} and none was held out: {curve}"


def _rollouts(run: Facts) -> tuple[Tone, str]:
    """Judge ppo by its own reward, over its first and its last rollouts."""
    for name, label in (("gold", "gold reward"), ("reward", "the reward it trains on")):
        values = [value for _, value in run.series(name) if math.isfinite(value)]
        size = min(_WINDOW, len(values) // 2)
        if size < 2:
            continue
        early, late = values[:size], values[-size:]
        rise, error = fmean(late) - fmean(early), math.sqrt((variance(early) + variance(late)) / size)
        tone: Tone = "undecided" if abs(rise) <= 1.96 * error else "better" if rise > 0 else "not better"
        word = {"undecided": "did not clearly move", "better": "rose", "not better": "fell"}[tone]
        return tone, (f"{label} {word}: {figure(fmean(early), 3)} to {figure(fmean(late), 3)}, means of the first and "
                      f"the last {window(size, 'rollout')}")  # fmt: skip
    return "undecided", f"{run.name} made too few rollouts to tell whether its reward rose"


def _judge_classifier(run: Facts, found: Mapping[str, _Result]) -> tuple[Tone, str, str]:
    """Judge a reward model, or a classifier, against chance and its baselines; a loss above ln 2 is no better."""
    is_reward = run.method == "rm"
    name, unit = ("reward_accuracy", "pairs") if is_reward else ("accuracy", "texts")
    result, n = found.get(name), (run.stage.get("eval_lengths") or {}).get("num_rows")
    missing = "" if result else f"`evaluate:` in the recipe, or `alignkit eval {run.path}`, measures baselines too"
    value = run.result.get("metrics", {}).get("eval_accuracy")
    if result is None and value is not None and n:
        low, high = wilson(value * n, n)
        result = {"value": value, "low": low, "high": high, "n": n, "data": "its held-out rows"}
    loss = run.result.get("metrics", {}).get("eval_loss")
    late = [each for _, each in run.series("loss")][-_WINDOW:]
    where = "held-out loss" if loss is not None else f"training loss, {window(len(late), last=True)},"
    loss = loss if loss is not None else fmean(late) if late else None
    at_chance = is_reward and loss is not None and not loss < _LN2
    lost = f"; its {where} {figure(loss, 3)} is not below ln 2 (0.693), that of a coin toss" if at_chance else ""
    if result is None:
        told = [each for _, each in run.series("accuracy")][-_WINDOW:]
        says = f"{run.name}: none of its rows was held out"
        says += f"; accuracy on training rows {share(fmean(told))}, {window(len(told), last=True)}" if told else ""
        bad = at_chance or (is_reward and bool(told) and fmean(told) <= 0.5)
        missing = f"`{run.name}: {{eval: 0.1}}` holds rows out; {missing}"
        return "not better" if bad else "undecided", says + lost, missing
    low, kin = result.get("low") or 0.0, "pair_accuracy_" if is_reward else "accuracy_"
    bases = {NAMES[each].removeprefix("Baseline: "): found[each] for each in found if each.startswith(kin)}
    best = max(bases, key=lambda each: bases[each]["value"], default=None)
    rival = bases[best]["value"] if best else 0.5
    change = result.get("change")
    above = change["low"] > 0 if change and change.get("low") is not None else low > rival
    chance = is_reward and low <= 0.5
    does = "puts" if is_reward else "is right on"
    tone: Tone = "better" if above and not at_chance else "undecided"
    tone = "not better" if chance or result["value"] <= rival else tone
    worse = "no better than chance" if chance else f"not above {best}"
    lead = {
        "better": does,
        "undecided": does if above else f"is not clearly above {best or 'chance'}: it {does}",
        "not better": f"is {worse}: it {does}",
    }
    says = f"{run.name} {lead[tone]} {share(result['value'])} of {result['n']} {unit} of {result['data']}"
    says += f"{' in order' if is_reward else ''}{_between(result)}"
    says += f"; {best} gets {share(rival)}" if best else ""
    return _temper(tone, result), says + lost + _trained(result), missing


def _judge_sft(run: Facts, found: Mapping[str, _Result]) -> tuple[Tone, str, str]:
    result, start = found.get("perplexity"), _start(run)
    if result is not None and result.get("change"):
        tone, says = _change(result, start)
        says = f"{says}, of {result['data']}"
        return _temper(tone, result), says + _trained(result), ""
    points, n = run.series("eval_loss"), (run.stage.get("eval_lengths") or {}).get("num_rows")
    if n and len(points) > 1:
        (first, before), (last, after) = points[0], points[-1]
        went = "fell" if after < before else "did not fall"
        says = f"{run.name}'s loss on its {n} held-out rows {went}: {figure(before, 3)} at step {figure(first)}"
        says += f", {figure(after, 3)} at step {figure(last)}"
        return "better" if after < before else "not better", says, ""
    curve = _curve(run, "loss", "training loss")
    if n:
        held = f"{run.name}'s loss on its {n} held-out rows is {figure(run.last('eval_loss'), 3)} at the end; {curve}"
        return "undecided", held, f"it was measured once: `{run.name}: {{eval_steps: 0.5}}` measures it on the way too"
    says = f"{run.name} trained on {_rows(run)} and none was held out: {curve}"
    return "undecided", says, f"whether it learnt more than these rows: `{run.name}: {{eval: 0.1}}` holds some out"


def _judge_rows(run: Facts) -> tuple[Tone, str, str]:
    """Say what a critique or label stage made, and how a judge did on comparisons with known answers."""
    made, check = f"{run.name} made {figure(run.step)} rows", run.feedback.get("check") or {}
    if check.get("accuracy") is None:
        missing = "" if run.method == "critique" else f"`{run.name}: {{check: ...}}` asks the judge what is known"
        return "undecided", f"{made}; nothing says how good they are", missing
    n, low, longer = check["n"] - check["abstained"], check.get("low") or 0.0, check.get("longer_is_better") or 0.5
    tone: Tone = "better" if low > max(longer, 0.5) else "not better" if check["accuracy"] <= 0.5 else "undecided"
    between = _between({"low": check.get("low"), "high": check.get("high")})
    says = f"its judge is right on {share(check['accuracy'])} of {n} known comparisons{between}"
    return tone, f"{made}; {says}; longer is better gets {share(longer)}", ""


def _start(run: Facts) -> str:
    return str(run.stage.get("start_stage") or short_name(str((run.stage.get("model") or {}).get("path", "its start"))))


def _rows(run: Facts) -> str:
    return f"{figure((run.stage.get('lengths') or {}).get('num_rows'))} rows"


def _curve(run: Facts, name: str, label: str) -> str:
    values = [value for _, value in run.series(name) if math.isfinite(value)]
    size = max(min(_WINDOW, len(values) // 2), 1)
    if not values:
        return f"no {label} was logged"
    ends = figure(fmean(values[:size]), 3), figure(fmean(values[-size:]), 3)
    return f"{label} {ends[0]} to {ends[1]}, {'the' if size == 1 else 'means of the'} first and last {window(size)}"


def _between(result: _Result) -> str:
    low, high = result.get("low"), result.get("high")
    return "" if low is None or high is None or low == high else f" ({100 * low:.0f} to {100 * high:.0f} %)"


def _sign(change: Mapping[str, Any], even: float = 0.0) -> int:
    """Tell on which side of `even` a value is, 0 where its interval holds that or there is none."""
    low, high = change.get("low"), change.get("high")
    return 0 if low is None or high is None else (low > even) - (high < even)


def _temper(tone: Tone, result: _Result | None) -> Tone:
    """Nothing is called better by rows that were trained on."""
    return "undecided" if tone == "better" and result and result.get("trained") else tone


def _trained(result: _Result | None) -> str:
    trained = (result or {}).get("trained")
    if not trained:
        return ""
    return f"; not held out: {trained['rows']} of {trained['of']} prompts were trained on by {', '.join(trained['by'])}"
