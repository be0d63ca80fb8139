"""Comparisons put to a judge: each in both orders, by a principle drawn for it, with what came of it as a soft label.

Constitutional AI, section 4.1 (arXiv 2212.08073). The mean of both orders takes out that a judge prefers a place; what
it says in each order is kept. No rows and no reports here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from alignkit.data import Text
from alignkit.feedback.cache import Asker, key_of, seed_of
from alignkit.feedback.constitution import Constitution, Principle
from alignkit.feedback.examples import Examples
from alignkit.feedback.prompts import (
    OPTIONS,
    Comparison,
    Quoter,
    Request,
    ask_after_thoughts,
    ask_comparison,
    ask_thoughts,
    conversation,
    fill_thought,
    read_text,
)
from alignkit.feedback.writer import Decision, Job, Model, Sampling

_TIE = 1e-6  # from 1/2
_EXAMPLE_TURNS = 1000  # draws for examples, far from those of anything else


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

    `bounds` clamp their mean, not each: a judge that leans to one place would make a tie of every pair.
    """

    pairing: Pairing
    principle: str
    orders: tuple[float | None, ...]
    decisions: list[Decision | None] = field(repr=False, default_factory=list)
    problem: str | None = None
    bounds: tuple[float, float] = (0.0, 1.0)

    @property
    def p_first(self) -> float | None:
        """P(first preferred): the clamped mean of the orders; None where the judge abstained in one of them."""
        values = [value for value in self.orders if value is not None]
        if not values or len(values) < len(self.orders):
            return None
        low, high = self.bounds
        return min(max(sum(values) / len(values), low), high)

    @property
    def is_tie(self) -> bool:
        return self.p_first is not None and abs(self.p_first - 0.5) <= _TIE

    @property
    def agrees(self) -> bool | None:
        """Whether both orders prefer the same answer; None where that cannot be said."""
        if len(self.orders) < 2 or any(value is None or abs(value - 0.5) <= _TIE for value in self.orders):
            return None
        return len({value > 0.5 for value in self.orders if value is not None}) == 1

    def to_dict(self) -> dict[str, Any]:
        return {
            "place": self.pairing.place,
            "principle": self.principle,
            "p_first": self.p_first,
            "orders": list(self.orders),
            "agrees": self.agrees,
            "tie": self.is_tie,
            "problem": self.problem,
            "prompt": self.pairing.prompt,
            "first": self.pairing.first,
            "second": self.pairing.second,
        }


@dataclass(frozen=True)
class Judge:
    """A model, its principles and how it is asked; `bounds` clamp the mean of the orders (section 4.1: 0.4 to 0.6)."""

    model: Model
    constitution: Constitution
    examples: Examples
    quote: Quoter
    seed: int
    orders: Literal["both", "one"] = "both"
    thinks: bool = False
    thoughts: Sampling = Sampling(1.0, 256)
    bounds: tuple[float, float] = (0.0, 1.0)


def judge_all(asker: Asker, judge: Judge, pairings: Sequence[Pairing], *, by: str = "judge") -> list[Label]:
    """Return a label for every pairing; raises what the asker raises."""
    asked = [_Asked(judge, pairing) for pairing in pairings]
    return _collect(judge, asked, _decide(asker, judge, asked, by=by))


def list_requests(judge: Judge, pairings: Sequence[Pairing]) -> list[Request]:
    """Return the questions that `judge_all` would ask of a judge that does not think, one for each order."""
    return [request for pairing in pairings for request in _Asked(judge, pairing).requests(None)]


def known_labels(asker: Asker, judge: Judge, pairings: Sequence[Pairing]) -> list[Label]:
    """Return the labels of those pairings that have been judged; nobody is asked. Not for a judge that thinks."""
    if judge.thinks and judge.model.takes_prefill:
        return []
    asked = [_Asked(judge, pairing) for pairing in pairings]
    decisions = asker.known(judge.model, list_requests(judge, pairings))
    return [label for label in _collect(judge, asked, decisions) if None not in label.decisions]


class _Asked:
    """A pairing with its principle and the orders it is shown in."""

    def __init__(self, judge: Judge, pairing: Pairing) -> None:
        self.judge, self.pairing = judge, pairing
        self.principle = judge.constitution.draw(seed=judge.seed, key=pairing.key, turn=pairing.turn)
        question = pairing.question or _question(self.principle)
        turns = tuple(conversation(pairing.prompt))
        first, second = read_text(pairing.first).strip(), read_text(pairing.second).strip()
        forward = Comparison(turns, first, second, question)
        backward = Comparison(turns, second, first, question)
        turned = seed_of(judge.seed, "order", pairing.key) % 2
        self.turned = (False, True) if judge.orders == "both" else (bool(turned),)
        self.shown = [backward if is_turned else forward for is_turned in self.turned]

    def thoughts(self) -> list[Request]:
        """Return the requests for chains of thought, one for each order."""
        return [ask_thoughts(comparison, self._filled(), self.judge.quote) for comparison in self.shown]

    def requests(self, thoughts: Sequence[str] | None) -> list[Request]:
        """Return the questions, one for each order, after the chains of thought where there are any."""
        judge = self.judge
        if thoughts is not None:
            pairs = zip(self.shown, thoughts, strict=True)
            return [ask_after_thoughts(shown, self._filled(), said, judge.quote) for shown, said in pairs]
        if judge.thinks:  # thoughts and decision in one reply
            return [replace(request, room=judge.thoughts.max_new_tokens) for request in self.thoughts()]
        return [ask_comparison(comparison, self._examples(), judge.quote) for comparison in self.shown]

    def about(self) -> list[dict[str, Any]]:
        facts = {"place": self.pairing.place, "principle": self.principle.name}
        return [{**facts, "order": "second first" if turned else "first first"} for turned in self.turned]

    def _examples(self) -> list[tuple[Comparison, str]]:
        """Return the worked examples, each with a principle and a place for its better answer of its own."""
        judge, key = self.judge, self.pairing.key
        shown = []
        for number, pair in enumerate(judge.examples.pairs):
            question = _question(judge.constitution.draw(seed=judge.seed, key=key, turn=_EXAMPLE_TURNS + number))
            right = seed_of(judge.seed, "example", number, key) % 2
            answers = (pair.worse, pair.better) if right else (pair.better, pair.worse)
            shown.append((Comparison(tuple(conversation(pair.prompt)), *answers, question), OPTIONS[right]))
        return shown

    def _filled(self) -> list[str]:
        judge, key = self.judge, self.pairing.key
        return [
            fill_thought(
                text, _question(judge.constitution.draw(seed=judge.seed, key=key, turn=_EXAMPLE_TURNS + number))
            )
            for number, text in enumerate(judge.examples.thoughts)
        ]


def _decide(asker: Asker, judge: Judge, asked: Sequence[_Asked], *, by: str) -> list[Decision]:
    thoughts: list[list[str] | None] = [None] * len(asked)
    if judge.thinks and judge.model.takes_prefill:
        jobs = [
            Job(request, seed_of(judge.seed, "thoughts", number, item.pairing.key))
            for item in asked
            for number, request in enumerate(item.thoughts())
        ]
        about = [facts for item in asked for facts in item.about()]
        replies = iter(asker.write(judge.model, jobs, judge.thoughts, kind="thoughts", by=by, about=about))
        thoughts = [[next(replies).text for _ in item.shown] for item in asked]
    requests = [request for item, said in zip(asked, thoughts, strict=True) for request in item.requests(said)]
    about = [facts for item in asked for facts in item.about()]
    return asker.decide(judge.model, requests, by=by, about=about)


def _collect(judge: Judge, asked: Sequence[_Asked], decisions: Sequence[Decision | None]) -> list[Label]:
    waiting = iter(decisions)
    labels = []
    for item in asked:
        own = [next(waiting) for _ in item.shown]
        values = tuple(_first_preferred(decision, turned) for decision, turned in zip(own, item.turned, strict=True))
        problem = next((decision.problem for decision in own if decision is not None and decision.problem), None)
        labels.append(Label(item.pairing, item.principle.name, values, own, problem, judge.bounds))
    return labels


def _first_preferred(decision: Decision | None, turned: bool) -> float | None:
    """P(first preferred) by one order."""
    if decision is None or decision.p_first is None:
        return None
    return 1.0 - decision.p_first if turned else decision.p_first


def _question(principle: Principle) -> str:
    assert principle.comparison is not None  # load_constitution(needs="comparison") saw to it
    return principle.comparison


def pair_key(prompt: Text, first: Text, second: Text) -> str:
    """Hash a comparison's texts, the same for messages and for plain text."""
    turns = [(turn["role"], turn["content"].strip()) for turn in conversation(prompt)]
    return key_of(turns=turns, first=read_text(first).strip(), second=read_text(second).strip())
