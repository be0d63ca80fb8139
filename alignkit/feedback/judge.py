"""Comparisons put to a judge: each in both orders, by a principle drawn for it, with what came of it as a soft label.

Constitutional AI, section 4.1 (arXiv 2212.08073). The mean of both orders takes out that a judge prefers a place; what
it says in each order is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from alignkit.data import Text
from alignkit.feedback.cache import Asker, key_of, seed_of
from alignkit.feedback.constitution import Constitution, Examples
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
)  # fmt: skip
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
    def length_difference(self) -> int:
        """Characters that the first answer has more than the second."""
        return len(read_text(self.pairing.first)) - len(read_text(self.pairing.second))

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
    quote: Quoter
    seed: int
    orders: Literal["both", "one"] = "both"
    thinks: bool = False
    thoughts: Sampling = Sampling(1.0, 256)
    bounds: tuple[float, float] = (0.0, 1.0)


def judge_all(asker: Asker, judge: Judge, pairings: Sequence[Pairing], *, by: str = "judge") -> list[Label]:
    """Label every pairing; raises what the asker raises."""
    shown = _show_all(judge, pairings)
    about = [{"place": item.pairing.place, "principle": item.principle,
              "order": "second first" if item.turned else "first first"} for item in shown]  # fmt: skip
    thoughts: list[str | None] = [None] * len(shown)
    if judge.thinks and judge.model.takes_prefill:
        jobs = []
        for item in shown:
            request = ask_thoughts(item.comparison, _fill_thoughts(judge, item), judge.quote)
            jobs.append(Job(request, seed_of(judge.seed, "thoughts", item.number, item.pairing.key)))
        replies = asker.write(judge.model, jobs, judge.thoughts, kind="thoughts", by=by, about=about)
        thoughts = [reply.text for reply in replies]
    requests = [_ask(judge, item, said) for item, said in zip(shown, thoughts, strict=True)]
    return _collect(judge, pairings, shown, asker.decide(judge.model, requests, by=by, about=about))


def list_requests(judge: Judge, pairings: Sequence[Pairing]) -> list[Request]:
    """List the questions that `judge_all` would ask of a judge that does not think, one for each order."""
    return [_ask(judge, item, None) for item in _show_all(judge, pairings)]


def known_labels(asker: Asker, judge: Judge, pairings: Sequence[Pairing]) -> list[Label]:
    """Label those pairings that have been judged; nobody is asked. Not for a judge that thinks."""
    if judge.thinks and judge.model.takes_prefill:
        return []
    decisions = asker.known(judge.model, list_requests(judge, pairings))
    labels = _collect(judge, pairings, _show_all(judge, pairings), decisions)
    return [label for label in labels if None not in label.decisions]


@dataclass(frozen=True)
class _Shown:
    """A pairing in one order, with the principle drawn for it; `number` counts the orders of the pairing."""

    pairing: Pairing
    principle: str
    comparison: Comparison
    number: int
    turned: bool


def _show_all(judge: Judge, pairings: Sequence[Pairing]) -> list[_Shown]:
    shown = []
    for pairing in pairings:
        principle = judge.constitution.draw(seed=judge.seed, key=pairing.key, turn=pairing.turn)
        question, turns = pairing.question or str(principle.comparison), tuple(conversation(pairing.prompt))
        answers = read_text(pairing.first).strip(), read_text(pairing.second).strip()
        one = bool(seed_of(judge.seed, "order", pairing.key) % 2)
        for number, turned in enumerate((False, True) if judge.orders == "both" else (one,)):
            first, second = answers[::-1] if turned else answers
            comparison = Comparison(turns, first, second, question)
            shown.append(_Shown(pairing, principle.name, comparison, number, turned))
    return shown


def _ask(judge: Judge, item: _Shown, thoughts: str | None) -> Request:
    """Ask which answer is better, after the judge's chain of thought where there is one."""
    if thoughts is not None:
        return ask_after_thoughts(item.comparison, _fill_thoughts(judge, item), thoughts, judge.quote)
    if judge.thinks:  # thoughts and decision in one reply
        request = ask_thoughts(item.comparison, _fill_thoughts(judge, item), judge.quote)
        return replace(request, room=judge.thoughts.max_new_tokens)
    examples = []
    for number, pair in enumerate(judge.examples.pairs):  # each with a place for its better answer of its own
        right = seed_of(judge.seed, "example", number, item.pairing.key) % 2
        answers = (pair.worse, pair.better) if right else (pair.better, pair.worse)
        question = _draw_for_example(judge, item, number)
        examples.append((Comparison(tuple(conversation(pair.prompt)), *answers, question), OPTIONS[right]))
    return ask_comparison(item.comparison, examples, judge.quote)


def _fill_thoughts(judge: Judge, item: _Shown) -> list[str]:
    thoughts = enumerate(judge.examples.thoughts)
    return [fill_thought(text, _draw_for_example(judge, item, number)) for number, text in thoughts]


def _draw_for_example(judge: Judge, item: _Shown, number: int) -> str:
    """Draw the question of a worked example, a principle of its own."""
    turn = _EXAMPLE_TURNS + number
    return str(judge.constitution.draw(seed=judge.seed, key=item.pairing.key, turn=turn).comparison)


def _collect(
    judge: Judge, pairings: Sequence[Pairing], shown: Sequence[_Shown], decisions: Sequence[Decision | None]
) -> list[Label]:
    waiting = iter(zip(shown, decisions, strict=True))
    labels = []
    for pairing in pairings:
        own = [next(waiting) for _ in range(2 if judge.orders == "both" else 1)]
        orders: list[float | None] = []
        for item, decision in own:
            p_first = decision.p_first if decision is not None else None
            orders.append(1.0 - p_first if item.turned and p_first is not None else p_first)
        said = [decision for _, decision in own]
        problem = next((decision.problem for decision in said if decision is not None and decision.problem), None)
        labels.append(Label(pairing, own[0][0].principle, tuple(orders), said, problem, judge.bounds))
    return labels


def pair_key(prompt: Text, first: Text, second: Text) -> str:
    """Hash a comparison's texts, the same for messages and for plain text."""
    turns = [(turn["role"], turn["content"].strip()) for turn in conversation(prompt)]
    return key_of(turns=turns, first=read_text(first).strip(), second=read_text(second).strip())
