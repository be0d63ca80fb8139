"""Comparisons put to a judge: each in both orders, by a principle drawn for it, with what came of it as a soft label.

Constitutional AI, section 4.1 (arXiv 2212.08073). The mean of both orders takes out that a judge prefers a place; what
it says in each order is kept.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from alignkit.data import DataReport, Rejects, Text, read_rows
from alignkit.data.files import read_file
from alignkit.data.load import read_published
from alignkit.feedback import prompts as asking
from alignkit.feedback.cache import Asker, key_of, seed_of
from alignkit.feedback.constitution import COMPARISON_FRAME, Constitution, Examples
from alignkit.feedback.writer import Decision, Job, Model, Sampling
from alignkit.recipe.schema import DataSource
from alignkit.recipe.stage import Stage
from alignkit.report.text import wilson

_TIE = 1e-6  # from 1/2
_SAME_PLACE = 0.95  # share of verdicts for one place from which a judge is said not to read
_ENOUGH = 20  # verdicts, to say anything of the kind
_LITTLE_MASS = 0.1
_BINS = 10
_ANSWER = "\n\nAssistant: "
_HHH_KEYS = {"prompt", "corrects", "incorrects", "text_correct", "text_incorrect"}
_EXAMPLE_TURNS = 1000  # draws for examples, far from those of anything else
_ARRANGEMENTS = 2  # of the worked examples: few, so that a local judge reads each of them once for many questions


@dataclass(frozen=True)
class Pairing:
    """Two answers to one prompt; `key` tells it from all others of the stage, `turn` the principles drawn for it."""

    prompt: Text
    first: Text
    second: Text
    place: str
    key: str
    question: str | None = None  # its own, instead of a principle's
    turn: int = 0


@dataclass
class Label:
    """The label of a pairing; `orders` are P(first preferred) as asked with it first and with it second.
    `bounds` clamp their mean, not each: a judge that leans to one place would make a tie of every pair."""

    pairing: Pairing
    principle: str
    orders: tuple[float | None, ...]
    decisions: list[Decision] = field(repr=False, default_factory=list)
    problem: str | None = None
    bounds: tuple[float, float] = (0.0, 1.0)

    @property
    def p_first(self) -> float | None:
        """P(first preferred): the clamped mean of the orders; None where the judge abstained in one of them."""
        values = [value for value in self.orders if value is not None]
        if len(values) < len(self.orders):
            return None
        low, high = self.bounds
        return min(max(sum(values) / len(values), low), high)

    @property
    def length_difference(self) -> int:
        return len(asking.read_text(self.pairing.first)) - len(asking.read_text(self.pairing.second))

    @property
    def is_tie(self) -> bool:
        return self.p_first is not None and abs(self.p_first - 0.5) <= _TIE

    @property
    def agrees(self) -> bool | None:
        """Whether both orders prefer the same answer; None where that cannot be said."""
        values = [value for value in self.orders if value is not None and abs(value - 0.5) > _TIE]
        return len({value > 0.5 for value in values}) == 1 if len(values) == 2 else None

    def to_dict(self) -> dict[str, Any]:
        pairing = self.pairing
        return {
            "place": pairing.place, "principle": self.principle, "p_first": self.p_first, "orders": list(self.orders),
            "agrees": self.agrees, "tie": self.is_tie, "problem": self.problem,
            "prompt": pairing.prompt, "first": pairing.first, "second": pairing.second,
        }  # fmt: skip


@dataclass(frozen=True)
class Judge:
    """A model, its principles and how it is asked; `bounds` clamp the mean of the orders (section 4.1: 0.4 to 0.6)."""

    model: Model
    constitution: Constitution
    examples: Examples
    quote: asking.Quoter
    seed: int
    orders: Literal["both", "one"] = "both"
    thinks: bool = False
    thoughts: Sampling = Sampling(1.0, 256)
    bounds: tuple[float, float] = (0.0, 1.0)


def judge_all(
    asker: Asker, judge: Judge, pairings: Sequence[Pairing], *, by: str = "judge", ask: bool = True
) -> list[Label]:
    """Label every pairing; raises what the asker raises. Without `ask` label those that have been judged already."""
    shown = _show_all(judge, pairings)
    about = [{"place": item.pairing.place, "principle": item.principle,
              "order": "second first" if item.turned else "first first"} for item in shown]  # fmt: skip
    thoughts: list[str | None] = [None] * len(shown)
    if judge.thinks and judge.model.takes_prefill:
        if not ask:
            return []
        jobs = []
        for item in shown:
            seed = seed_of(judge.seed, "thoughts", item.number, item.pairing.key)
            jobs.append(Job(_ask(judge, item, only_think=True), seed))
        replies = asker.write(judge.model, jobs, judge.thoughts, kind="thoughts", by=by, about=about)
        thoughts = [reply.text for reply in replies]
    requests = [_ask(judge, item, said) for item, said in zip(shown, thoughts, strict=True)]
    waiting = iter(zip(shown, asker.decide(judge.model, requests, by=by, about=about, ask=ask), strict=True))
    labels = []
    for pairing in pairings:
        own = [next(waiting) for _ in range(2 if judge.orders == "both" else 1)]
        orders: list[float | None] = []
        for item, decision in own:
            p_first = decision.p_first if decision is not None else None
            orders.append(1.0 - p_first if item.turned and p_first is not None else p_first)
        decisions = [decision for _, decision in own if decision is not None]
        if len(decisions) == len(own):
            problem = next((decision.problem for decision in decisions if decision.problem), None)
            labels.append(Label(pairing, own[0][0].principle, tuple(orders), decisions, problem, judge.bounds))
    return labels


@dataclass(frozen=True)
class _Shown:
    """A pairing in one order, with the principle drawn for it; `number` counts the orders of the pairing."""

    pairing: Pairing
    principle: str
    comparison: asking.Comparison
    number: int
    turned: bool


def _show_all(judge: Judge, pairings: Sequence[Pairing]) -> list[_Shown]:
    shown = []
    for pairing in pairings:
        principle = judge.constitution.draw(seed=judge.seed, key=pairing.key, turn=pairing.turn)
        question, turns = pairing.question or str(principle.comparison), tuple(asking.conversation(pairing.prompt))
        answers = asking.read_text(pairing.first).strip(), asking.read_text(pairing.second).strip()
        one = bool(seed_of(judge.seed, "order", pairing.key) % 2)
        for number, turned in enumerate((False, True) if judge.orders == "both" else (one,)):
            first, second = answers[::-1] if turned else answers
            comparison = asking.Comparison(turns, first, second, question)
            shown.append(_Shown(pairing, principle.name, comparison, number, turned))
    return shown


def _ask(judge: Judge, item: _Shown, thoughts: str | None = None, *, only_think: bool = False) -> asking.Request:
    """Ask which answer is better, after the judge's chain of thought where there is one, or for that chain alone."""
    arrangement = seed_of(judge.seed, "arrangement", item.pairing.key) % _ARRANGEMENTS

    def draw(number: int) -> str:
        key, turn = f"arrangement {arrangement}", _EXAMPLE_TURNS + number
        return str(judge.constitution.draw(seed=judge.seed, key=key, turn=turn).comparison)

    if judge.thinks:
        shown = [asking.fill_thought(text, draw(number)) for number, text in enumerate(judge.examples.thoughts)]
        if thoughts is not None:
            return asking.ask_after_thoughts(item.comparison, shown, thoughts, judge.quote)
        request = asking.ask_thoughts(item.comparison, shown, judge.quote)
        return request if only_think else replace(request, room=judge.thoughts.max_new_tokens)  # with its verdict
    examples = []
    for number, pair in enumerate(judge.examples.pairs):  # in the other arrangement the better one has the other place
        right = (seed_of(judge.seed, "example", number) + arrangement) % 2
        answers = (pair.worse, pair.better) if right else (pair.better, pair.worse)
        comparison = asking.Comparison(tuple(asking.conversation(pair.prompt)), *answers, draw(number))
        examples.append((comparison, asking.OPTIONS[right]))
    return asking.ask_comparison(item.comparison, examples, judge.quote)


def pair_key(prompt: Text, first: Text, second: Text) -> str:
    """Hash a comparison's texts, the same for messages and for plain text."""
    turns = [(turn["role"], turn["content"].strip()) for turn in asking.conversation(prompt)]
    return key_of(turns=turns, first=asking.read_text(first).strip(), second=asking.read_text(second).strip())


# The report on a judge: order consistency, a preference for a place or for length, ties, abstentions, calibration. It
# is also held against comparisons whose answer is known; nothing of that becomes a row.


def describe_labels(labels: Sequence[Label]) -> dict[str, Any]:
    """Describe what a judge said: how often it decides, whether both orders agree, what it leans to."""
    done = [label for label in labels if label.p_first is not None]
    decisions = [decision for label in labels for decision in label.decisions]
    answered = [decision.p_first for decision in decisions if decision.p_first is not None]
    longer = [  # whether the longer answer is preferred; 1/2 is no bias of the whole
        (difference > 0) == (label.p_first > 0.5)
        for label in done
        if (difference := label.length_difference) and label.p_first is not None and not label.is_tie
    ]
    return {
        "comparisons": len(labels), "labelled": len(done), "abstained": len(labels) - len(done),
        "abstained_because": count_problems(labels), "ties": sum(label.is_tie for label in done),
        "mean_confidence": mean([abs(label.p_first - 0.5) * 2 for label in done if label.p_first is not None]),
        "order_agreement": _share(_agreeing(labels)),
        "picks_first_place": _share([p > 0.5 for p in answered if p != 0.5]),
        "mean_p_first_place": mean(answered),
        "option_mass": mean([decision.mass for decision in decisions if decision.mass is not None]),
        "length_bias": _share(longer),
        "principles": {
            name: {"n": len(own), "order_agreement": mean(_agreeing(own))}
            for name in sorted({label.principle for label in labels})
            for own in [[label for label in labels if label.principle == name]]
        },
    }  # fmt: skip


def count_problems(labels: Sequence[Label]) -> dict[str, int]:
    """Count the ten most frequent reasons of abstentions; questions that are too long are one, however long."""
    problems = (label.problem or "" for label in labels if label.p_first is None)
    same = (re.sub(r"has \d+ tokens; (\d+) fit", r"has more than the \1 tokens that fit", text) for text in problems)
    return dict(Counter(same).most_common(10))


def find_weakness(report: Mapping[str, Any]) -> str | None:
    """Say by which order consistency a judge is too weak to judge: the verdict of a coin survives half of the swaps."""
    place, agreement = report["picks_first_place"], report["order_agreement"]
    if place and place["n"] >= _ENOUGH and not 1 - _SAME_PLACE <= place["share"] <= _SAME_PLACE:
        which, share = ("first" if place["share"] > 0.5 else "second"), max(place["share"], 1 - place["share"])
        return f"the judge picks the {which} place in {share:.0%} of {place['n']} verdicts: it does not compare"
    if agreement and agreement["n"] >= _ENOUGH and agreement["low"] <= 0.5:
        what = f"both orders prefer the same answer in {agreement['share']:.0%} of {agreement['n']} comparisons"
        return f"{what} ({agreement['low']:.0%} to {agreement['high']:.0%}), no more than by chance (50%)"
    return None


def find_faults(report: Mapping[str, Any]) -> list[str]:
    """List what a person should know of a judge before using its labels."""
    weakness, mass = find_weakness(report), report["option_mass"]
    faults = [weakness] if weakness else []
    if mass is not None and mass < _LITTLE_MASS:
        faults.append(f"(A) and (B) have {mass:.1%} of the judge's probability: it does not answer in this format")
    if report["comparisons"] and report["abstained"] > report["comparisons"] / 5:
        faults.append(f"the judge abstained from {report['abstained']} of {report['comparisons']} comparisons")
    return faults


def _agreeing(labels: Sequence[Label]) -> list[bool]:
    return [label.agrees for label in labels if label.agrees is not None]


def _share(values: Sequence[bool]) -> dict[str, Any] | None:
    if not values:
        return None
    low, high = wilson(sum(values), len(values))
    return {"share": sum(values) / len(values), "n": len(values), "low": low, "high": high}


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def read_labelled(stage: Stage, sources: Sequence[DataSource], rejects: Rejects) -> list[Pairing]:
    """Read comparisons of which the first answer is the better one; an unsure label (1/2) is left out."""
    found: list[Pairing] = []
    for source in sources:
        path = Path(source.path)
        rows = read_file(path) if path.suffix == ".jsonl" and path.is_file() else iter(())
        if next((row.keys() >= _HHH_KEYS for _, row in rows if isinstance(row, dict)), False):
            skip = stage.options.on_bad_row == "skip"
            published = read_published(path, _read_hhh, "HHH comparison", skip=skip, rejects=rejects)
            found += [replace(pairing, place=place) for place, pairing in islice(published, source.max_rows)]
            continue
        for row in read_rows(stage, [source], report=DataReport(), rejects=rejects, method="rm"):
            better, worse = row.completions[0], row.completions[-1]
            if row.label == 0.5 or (row.scores and row.scores[0] == row.scores[-1]):
                rejects.add(row.place, "check: neither answer is better")
                continue
            if row.label is not None and row.label < 0.5:
                better, worse = worse, better
            found.append(Pairing(row.prompt, better, worse, row.place, f"check {row.place}"))
    return found


def _read_hhh(data: Mapping[str, Any]) -> Pairing:
    prompt, _, better = data["text_correct"].rpartition(_ANSWER)
    other, _, worse = data["text_incorrect"].rpartition(_ANSWER)
    head, found, _ = data["prompt"].partition(COMPARISON_FRAME[1] + "\n (A)")
    if prompt != other or not found or not prompt:
        raise ValueError("its two answers are to different prompts, or it has no question")
    return Pairing(asking.conversation(prompt), better, worse, "", key_of(check=data), head.rpartition("\n")[2])


def describe_accuracy(labels: Sequence[Label]) -> dict[str, Any]:
    """Accuracy with its 95 % interval (a tie counts as half right), calibration and order consistency."""
    values = [label.p_first for label in labels if label.p_first is not None]
    low, high = wilson(sum(map(_is_right, values)), len(values))
    gaps, bins = 0.0, list[dict[str, float]]()
    for number in range(_BINS):  # of equal width, from 1/2 to 1 (Guo et al. 2017, arXiv 1706.04599, eq. 3)
        least, most = 0.5 + number / (2 * _BINS), 0.5 + (number + 1) / (2 * _BINS)
        own = [p for p in values if least <= max(p, 1 - p) < most or (most == 1.0 and max(p, 1 - p) == 1.0)]
        if own:
            confidence, accuracy = sum(max(p, 1 - p) for p in own) / len(own), sum(map(_is_right, own)) / len(own)
            gaps += len(own) * abs(confidence - accuracy)
            bins.append({"low": least, "high": most, "n": len(own), "confidence": confidence, "accuracy": accuracy})
    return {
        "n": len(labels), "abstained": len(labels) - len(values), "abstained_because": count_problems(labels),
        "accuracy": mean(list(map(_is_right, values))), "low": low, "high": high,
        "longer_is_better": mean([_is_right(0.5 + label.length_difference) for label in labels]),
        "order_agreement": mean(_agreeing(labels)), "ece": gaps / len(values) if values else None, "bins": bins,
    }  # fmt: skip


def _is_right(p_first: float) -> float:
    return 1.0 if p_first > 0.5 else 0.5 if p_first == 0.5 else 0.0
