"""Whether a stage did what it was for, in a sentence or two: what decides comes first, and what is missing is named.

A stage is called better only where its figure has moved the right way by more than its 95 % interval: of answers and
likelihoods the paired difference to what it started from, of a reward model the accuracy against chance and length.
Without an evaluation sft's held-out loss is compared by itself, ppo's reward by the spread of its rollouts.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, variance
from typing import Any, Literal, NamedTuple

from alignkit.report.facts import Facts, describe_status, gather_warnings
from alignkit.report.text import THIN, WORDS, figure, share, short_name, wilson, window
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
    return [judge(Facts(run)).to_dict() for run in runs if RunDir(run).stage.is_file()]


def judge(run: Facts) -> Verdict:
    """Judge a run in any state by its own files."""
    # The newest figure of each name of the run itself, without slices.
    tone: Tone
    found: dict[str, _Result] = {
        str(each.get("metric")): each for each in run.evaluation.get("results", [])
        if each.get("slice") is None and each.get("value") is not None
        and ", by its start " not in str(each.get("data"))
    }  # fmt: skip
    if not run.is_finished:
        tone, says, missing = "not better" if run.error else "undecided", f"{run.name} is {describe_status(run)}", ""
    elif run.method in ("dpo", "ppo"):
        tone, says, missing = _judge_policy(run, found)
    elif run.method == "rm" or run.task:
        tone, says, missing = _judge_classifier(run, found)
    else:
        tone, says, missing = _judge_sft(run, found) if run.method == "sft" else _judge_rows(run)
    if run.error:
        says += f": {run.error.strip().splitlines()[-1]}"
    says = says if says.startswith(run.name) else f"{run.name}: {says}"
    warnings = [text.removeprefix(f"{run.name}: ") for text, _ in gather_warnings(run)]
    return Verdict(run.name, tone, says.replace(THIN, " "), missing, warnings)


def _judge_policy(run: Facts, found: Mapping[str, _Result]) -> tuple[Tone, str, str]:
    start, missing = run.start, ""
    scored = [name for name in found if name == "true_reward" or name.startswith("reward/")]
    measured = [_win(run, found["win_rate"])] if "win_rate" in found else []
    measured += [_change(found[name], start) for name in scored if found[name].get("change")]
    if not measured:
        missing = f"no answer was compared with those of {start}: `evaluate: {{against: {start}, judge: ...}}` does so"
        measured = [_implicit(run, found) if run.method == "dpo" else _rollouts(run)]
    (tone, says), *others = measured
    others = [each for each in others if each[0] != "undecided"]
    if tone == "better" and any(other == "not better" for other, _ in others):
        tone = "undecided"
    sides = [says, *(text for _, text in others)]
    if (result := found.get("kl")) is not None:
        reference = short_name(str((result.get("settings") or {}).get("reference") or start))
        nats = figure(max(round(result["value"], 3), 0.0), 2)
        sides.append(f"it drifted {nats} nats an answer from {reference}")
    elif late := _values(run, "objective/kl")[-_WINDOW:]:
        sides.append(f"KL to {start} {figure(fmean(late), 2)} nats ({window(len(late), 'rollout', last=True)})")
    ended, length = (found.get(name, {}).get("change") or {} for name in ("ended_share", "response_length"))
    if _sign(ended):
        sides.append(f"{100 * abs(ended['value']):.0f} % {'more' if ended['value'] > 0 else 'fewer'} answers end")
    if _sign(length) and abs(length["value"]) > 0.1 * length["from"] > 0:
        longer = "longer" if length["value"] > 0 else "shorter"
        sides.append(f"answers are {100 * abs(length['value'] / length['from']):.0f} % {longer}")
    seen = next((found[name] for name in ("win_rate", *scored) if name in found), {})
    return *_mind_training(tone, "; ".join(sides), seen), missing


def _win(run: Facts, result: _Result) -> tuple[Tone, str]:
    settings, change, n = result.get("settings") or {}, result.get("change"), int(result.get("n") or 0)
    other, tone = short_name(str(settings.get("against"))), _TONES[_sign(result, 0.5)]
    ties = n - change["rose"] - change["fell"] if change else 0
    verb = {"better": f"beats {other} on", "not better": f"loses to {other}: it wins on",
            "undecided": f"is not told apart from {other}: it wins on"}[tone]  # fmt: skip
    return tone, (f"{run.name} {verb} {result['value'] * n:.3g} of {n} prompts{_between(result)}"
                  f"{f', {ties} ties counted half' if ties else ''}, judged by {settings.get('judge')}")  # fmt: skip


def _change(result: _Result, start: str) -> tuple[Tone, str]:
    """Say how a figure differs from that of the start, and on how many rows."""
    change, metric, n = result["change"], str(result["metric"]), result.get("n")
    tone = _TONES[_sign(change) * (-1 if result.get("better") == "lower" else 1)]
    name = WORDS["metrics"].get(metric, f"reward by {metric[7:]}").lower()
    size = f"{figure(change['from'], 3)} to {figure(result['value'], 3)}"
    if change.get("low") != change.get("high"):
        size += f" (difference {figure(change['low'], 3)} to {figure(change['high'], 3)})"
    if tone == "undecided":
        return tone, f"{name} is not told apart from that of {start}: {size}, n {n}"
    side = "rose" if change["value"] > 0 else "fell"
    return tone, f"{name} {side} from {size}, on {change[side]} of {n} rows, against {start}"


def _implicit(run: Facts, found: Mapping[str, _Result]) -> tuple[Tone, str]:
    """Judge dpo by its preference on held-out pairs, or say what its training rows show."""
    result = found.get("implicit_reward_accuracy") or _held_out(run, "eval_rewards/accuracies")
    if result is None:
        return "undecided", _untested(run)
    tone: Tone = "better" if _sign(result, 0.5) > 0 else "undecided"
    learnt = "has learnt the preference" if tone == "better" else "has not shown that it learnt the preference"
    pairs = f"{share(result['value'])} of {result['n']} pairs of {result['data']} in order{_between(result)}"
    return _mind_training(tone, f"{run.name} {learnt}: its implicit reward puts {pairs}", result)


def _rollouts(run: Facts) -> tuple[Tone, str]:
    """Judge ppo by its own reward, over its first and its last rollouts."""
    for name, label in (("gold", "gold reward"), ("reward", "the reward it trains on")):
        values = _values(run, name)
        if (size := min(_WINDOW, len(values) // 2)) < 2:
            continue
        early, late = values[:size], values[-size:]
        rise, error = fmean(late) - fmean(early), 1.96 * math.sqrt((variance(early) + variance(late)) / size)
        tone = _TONES[_sign({"low": rise - error, "high": rise + error})]
        word = {"undecided": "did not clearly move", "better": "rose", "not better": "fell"}[tone]
        ends = f"{figure(fmean(early), 3)} to {figure(fmean(late), 3)}"
        return tone, f"{label} {word}: {ends}, means of the first and the last {window(size, 'rollout')}"
    return "undecided", f"{run.name} made too few rollouts to tell whether its reward rose"


def _judge_classifier(run: Facts, found: Mapping[str, _Result]) -> tuple[Tone, str, str]:
    """Judge a reward model against chance and length, a classifier against its baselines."""
    is_reward, missing = run.method == "rm", ""
    name, unit, kin = ("reward_accuracy", "pairs", "pair_accuracy_") if is_reward else (
        "accuracy", "texts", "accuracy_")  # fmt: skip
    if (result := found.get(name)) is None:
        missing = f"`evaluate:` in the recipe, or `alignkit eval {run.path}`, measures baselines too"
        result = _held_out(run, "eval_accuracy")
    loss, late = run.result.get("metrics", {}).get("eval_loss"), _values(run, "loss")[-_WINDOW:]
    where = "held-out loss" if loss is not None else f"training loss, {window(len(late), last=True)},"
    loss = fmean(late) if loss is None and late else loss
    at_chance = is_reward and loss is not None and not loss < _LN2
    lost = f"; its {where} {figure(loss, 3)} is not below ln 2 (0.693), that of a coin toss" if at_chance else ""
    if result is None:
        told, says = _values(run, "accuracy")[-_WINDOW:], f"{run.name}: none of its rows was held out"
        says += f"; accuracy on training rows {share(fmean(told))}, {window(len(told), last=True)}" if told else ""
        bad = at_chance or (is_reward and bool(told) and fmean(told) <= 0.5)
        holds = f"`{run.name}: {{eval: 0.1}}` holds rows out; {missing}"
        return "not better" if bad else "undecided", says + lost, holds
    bases = {WORDS["metrics"][each].removeprefix("Baseline: "): found[each]["value"] for each in found
             if each.startswith(kin)}  # fmt: skip
    best = max(bases, key=lambda each: bases[each], default="chance")
    rival, change = bases.get(best, 0.5), result.get("change")
    above = _sign(change) > 0 if change else _sign(result, rival) > 0
    tone: Tone = "undecided"
    does = "puts" if is_reward else "is right on"
    lead = does if above else f"is not clearly above {best}: it {does}"
    if is_reward and _sign(result, 0.5) < 1:
        tone, lead = "not better", f"is no better than chance: it {does}"
    elif result["value"] <= rival:
        tone, lead = "not better", f"is not above {best}: it {does}"
    elif above and not at_chance:
        tone = "better"
    says = f"{run.name} {lead} {share(result['value'])} of {result['n']} {unit} of {result['data']}"
    says += f"{' in order' if is_reward else ''}{_between(result)}"
    says += f"; {best} gets {share(rival)}" if bases else ""
    return *_mind_training(tone, says + lost, result), missing


def _judge_sft(run: Facts, found: Mapping[str, _Result]) -> tuple[Tone, str, str]:
    if (result := found.get("perplexity", {})).get("change"):
        tone, says = _change(result, run.start)
        return *_mind_training(tone, f"{says}, of {result['data']}", result), ""
    points, n = run.series("eval_loss"), (run.stage.get("eval_lengths") or {}).get("num_rows")
    if not (n and points):
        missing = f"whether it learnt more than these rows: `{run.name}: {{eval: 0.1}}` holds some out"
        return "undecided", _untested(run), missing
    (first, before), (last, after) = points[0], points[-1]
    held = f"{run.name}'s loss on its {n} held-out rows"
    if len(points) == 1:
        missing = f"it was measured once: `{run.name}: {{eval_steps: 0.5}}` measures it on the way too"
        return "undecided", f"{held} is {figure(after, 3)} at step {figure(last)}", missing
    went = "fell" if after < before else "did not fall"
    says = f"{held} {went}: {figure(before, 3)} at step {figure(first)}, {figure(after, 3)} at step {figure(last)}"
    return "better" if after < before else "not better", says, ""


def _judge_rows(run: Facts) -> tuple[Tone, str, str]:
    """Say what a critique or label stage made, and how a judge did on comparisons with known answers."""
    made, check = f"{run.name} made {figure(run.step)} rows", run.feedback.get("check") or {}
    if check.get("accuracy") is None:
        missing = "" if run.method == "critique" else f"`{run.name}: {{check: ...}}` asks the judge what is known"
        return "undecided", f"{made}; nothing says how good they are", missing
    longer = check.get("longer_is_better") or 0.5
    tone = "not better" if check["accuracy"] <= 0.5 else _TONES[max(_sign(check, max(longer, 0.5)), 0)]
    known = f"{check['n'] - check['abstained']} known comparisons{_between(check)}"
    says = f"{made}; its judge is right on {share(check['accuracy'])} of {known}; longer is better gets {share(longer)}"
    return tone, says, ""


def _values(run: Facts, name: str) -> list[float]:
    return [value for _, value in run.series(name) if math.isfinite(value)]


def _held_out(run: Facts, name: str) -> _Result | None:
    """Make a figure, with its interval, of a share that training measured on its held-out rows; None without any."""
    value, n = run.result.get("metrics", {}).get(name), (run.stage.get("eval_lengths") or {}).get("num_rows")
    if value is None or not n:
        return None
    low, high = wilson(value * n, n)
    return {"value": value, "low": low, "high": high, "n": n, "data": "its held-out rows"}


def _untested(run: Facts) -> str:
    values, rows = _values(run, "loss"), figure((run.stage.get("lengths") or {}).get("num_rows"))
    size = max(min(_WINDOW, len(values) // 2), 1)
    loss = f"{figure(fmean(values[:size]), 3)} to {figure(fmean(values[-size:]), 3)}" if values else "not logged"
    over = f", {'the' if size == 1 else 'means of the'} first and last {window(size)}" if values else ""
    return f"{run.name} trained on {rows} rows and none was held out: training loss {loss}{over}"


def _between(result: _Result) -> str:
    low, high = result.get("low"), result.get("high")
    return "" if low is None or high is None or low == high else f" ({100 * low:.0f} to {100 * high:.0f} %)"


def _sign(result: Mapping[str, Any], even: float = 0.0) -> int:
    """Tell on which side of `even` a value is, 0 where its interval holds that or there is none."""
    low, high = result.get("low"), result.get("high")
    return 0 if low is None or high is None else (low > even) - (high < even)


def _mind_training(tone: Tone, says: str, result: _Result) -> tuple[Tone, str]:
    """Name the rows that were trained on: nothing is called better by them."""
    if not (trained := result.get("trained")):
        return tone, says
    by = ", ".join(trained["by"])
    says += f"; not held out: {trained['rows']} of {trained['of']} prompts were trained on by {by}"
    return "undecided" if tone == "better" else tone, says
