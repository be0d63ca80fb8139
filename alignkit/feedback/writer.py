"""Models that write and judge (local, vLLM, a server): what is asked, what comes back, how it is read, its cost."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol, Self, TypeVar

from alignkit.errors import JudgeError
from alignkit.feedback.prompts import Request
from alignkit.recipe.schema import FeedbackModel

_WRAP = r"[\s*_`\"'\[(]*"
_VERDICT = re.compile(rf"answer is\s*:?{_WRAP}(?:option|response|answer)?{_WRAP}([AB])(?![A-Za-z'])", re.I)
_ALONE = re.compile(rf"{_WRAP}(?:(?:option|response|answer)\s*:?{_WRAP})?([AB])[\s*_`\"'\])]*[.:!]?\s*\Z", re.I)
_LEADING = re.compile(rf"{_WRAP}([AB])\s*(?:\)|\]|:|\.\s|\n)")
_MARKED = re.compile(r"\(([AB])\)")
_LETTERS = ("A", "B")


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling. Temperature 0 takes the likeliest token each time."""

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    top_k: int = 0

    @classmethod
    def of(cls, options: Any, *, max_new_tokens: int | None = None) -> Sampling:
        """Take the settings of a stage, with another length where one is given."""
        return cls(options.temperature, max_new_tokens or options.max_new_tokens, options.top_p, options.top_k)

    @property
    def settings(self) -> dict[str, Any]:
        """What is not a default: names what was asked as it was named before there were top_p and top_k."""
        return {key: value for key, value in asdict(self).items() if (key, value) not in (("top_p", 1.0), ("top_k", 0))}


@dataclass(frozen=True)
class Job:
    """A text to be written; the same request with another seed gives another text."""

    request: Request
    seed: int


@dataclass
class Answered:
    """The cost of an answer, and its record: `retries` counts failed tries of a server by cause."""

    input_tokens: int = field(default=0, kw_only=True)
    output_tokens: int = field(default=0, kw_only=True)
    retries: dict[str, int] = field(default_factory=dict, kw_only=True)

    def to_record(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in (None, {})}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        return cls(**{name: record[name] for name in cls.__dataclass_fields__ if name in record})


@dataclass
class Reply(Answered):
    """A text that a model wrote, or the reason why there is none."""

    text: str = ""
    ended: bool = True  # False: cut off by max_new_tokens
    problem: str | None = None
    places: list[dict[str, Any] | None] | None = None  # the likeliest tokens of each place of a prompt, by their ids


@dataclass
class Decision(Answered):
    """A judge's decision between two options: the probability of the first, or the reason for abstaining.
    `logps` are those of the options (of the deciding letter, from a server); `mass` is the share of probability that
    the two have at the place where they part: little of it means that the judge does not answer in this format."""

    p_first: float | None = None
    logps: tuple[float, float] | None = None
    mass: float | None = None
    text: str | None = None
    problem: str | None = None


_Answer = TypeVar("_Answer")
Batches = Iterator[list[tuple[int, _Answer]]]  # answers that came together, each with the place of its question


class Model(Protocol):
    """A model that writes texts and decides between options; every answer is given out as soon as it is there. Both
    methods end early when the run is being stopped, and raise JudgeError when no more is to be had. Places in `known`
    are answered already; a local model's batches, on which last bits depend, are those of all places all the same."""

    identity: dict[str, Any]  # tells this model's answers from those of another one; part of every key
    control_tokens: Sequence[str]  # texts that the model takes for more than text
    takes_prefill: bool  # whether the model's turn can be begun for it
    spending: Spending | None  # of a server

    def write(self, jobs: Sequence[Job], sampling: Sampling, known: Collection[int] = ()) -> Batches[Reply]:
        """Write a text for each job."""

    def decide(self, requests: Sequence[Request], known: Collection[int] = ()) -> Batches[Decision]:
        """Decide each question between prompts.OPTIONS."""


def share_of_first(logps: tuple[float, float]) -> float:
    """Compute the probability of the first of two options: the softmax of their log-probs (CAI section 4.1)."""
    return 1.0 / (1.0 + math.exp(min(max(logps[1] - logps[0], -700.0), 700.0)))


class BudgetSpent(JudgeError):
    """The next request would exceed the budget."""


class Spending:
    """Tokens, requests and money of one server, earlier sittings included, with the limits of the recipe."""

    def __init__(self, source: FeedbackModel, answered: Iterable[Mapping[str, Any]] = ()) -> None:
        """`answered` are the records of earlier sittings."""
        self._source = source
        self._reserved = Counter({"input": 0, "output": 0})  # tokens that requests under way may take
        self._next = 0.0
        self.requests = self.input_tokens = self.output_tokens = 0
        self.retries: Counter[str] = Counter()
        for record in answered:
            self.add(record.get("input_tokens", 0), record.get("output_tokens", 0))
            self.retries.update(record.get("retries", {}))
            self.requests += 1 + sum(record.get("retries", {}).values())

    def add(self, input_tokens: int, output_tokens: int) -> None:
        self.input_tokens += input_tokens
        self.output_tokens += output_tokens

    @contextmanager
    def reserve(self, input_tokens: int, output_tokens: int) -> Iterator[None]:
        """Hold room in the budget for what a request under way may take; raises BudgetSpent where there is none."""
        most, limit = self._source.max_tokens_total, self._source.max_cost
        spent = self.input_tokens + self.output_tokens
        if most is not None and spent + self._reserved.total() + input_tokens + output_tokens > most:
            next_one = f"and the next request may take {input_tokens + output_tokens}"
            raise BudgetSpent(f"{spent} of max_tokens_total {most} tokens are spent, {next_one}")
        held = self._cost(self._reserved["input"] + input_tokens, self._reserved["output"] + output_tokens)
        if limit is not None and self.cost + held > limit:
            raise BudgetSpent(f"{self.cost:.4f} of max_cost {limit:g} is spent, and the next request may exceed it")
        mine = {"input": input_tokens, "output": output_tokens}
        self._reserved.update(mine)
        self.requests += 1
        try:
            yield
        finally:
            self._reserved.subtract(mine)

    @property
    def cost(self) -> float:
        return self._cost(self.input_tokens, self.output_tokens)

    def seconds_to_turn(self) -> float:
        """Take the next place that `requests_per_minute` leaves, and say how long it is until then."""
        rate, now = self._source.requests_per_minute, time.monotonic()
        if rate is None:
            return 0.0
        at = max(self._next, now)
        self._next = at + 60.0 / rate
        return at - now

    def to_dict(self) -> dict[str, Any]:
        return {
            "requests": self.requests, "retries": dict(self.retries), "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens, "cost": None if self._source.price is None else self.cost,
        }  # fmt: skip

    def _cost(self, input_tokens: float, output_tokens: float) -> float:
        price = self._source.price
        return 0.0 if price is None else (input_tokens * price.input + output_tokens * price.output) / 1e6


# Which of two options a server's reply chooses, from its text and, where it gives them, its log-probabilities. Only the
# reply is read, never the prompt; one that names both options or neither is an abstention.


class TokenChances(NamedTuple):
    """A token of a reply with the likeliest tokens at its place and their log-probs."""

    token: str
    top: Mapping[str, float]


def parse_choice(text: str) -> tuple[str, int] | None:
    """Find the letter that a reply chooses and where it stands; None for an abstention."""
    if alone := _ALONE.match(text):
        return alone[1].upper(), alone.start(1)
    lines = [line for line in text.splitlines() if line.strip()]
    start = text.rfind(lines[-1]) if lines else 0
    leading = _LEADING.match(text)
    # A verdict of the last line before one of any line, before a letter in brackets, before one that begins the text.
    kinds = (_VERDICT.finditer(text, start), _VERDICT.finditer(text), _MARKED.finditer(text), [leading] * bool(leading))
    found = next((matches for kind in kinds if (matches := list(kind))), [])
    letters = {match[1].upper() for match in found if match}
    return (letters.pop(), found[-1].start(1)) if len(letters) == 1 and found[-1] else None


def read_decision(text: str, tokens: Sequence[TokenChances]) -> Decision:
    """Read a reply: a probability from the tokens at the deciding letter, else 0 or 1 from the text."""
    choice, places, end = parse_choice(text), list[TokenChances](), 0
    if choice is None:  # the first token that says anything decides
        places = [token for token in tokens if _letter(token.token)]
    elif "".join(token.token for token in tokens)[: len(text)] != text:
        places = [token for token in tokens if _letter(token.token) == choice[0]]
    else:  # the one that holds the chosen letter
        for token in tokens:
            end += len(token.token)
            places += [token] if choice[1] < end else []
    top = places[0].top if places else {}
    found = [[logp for token, logp in top.items() if _letter(token) == letter] for letter in _LETTERS]
    if any(found):
        # One that is not among the likeliest is taken to be as likely as the least of those: the most it can be.
        sums, least = [sum(map(math.exp, logps)) for logps in found], min(top.values())
        logp_a, logp_b = (
            math.log(total) if total else max([least, *own]) for total, own in zip(sums, found, strict=True)
        )
        return Decision(share_of_first((logp_a, logp_b)), (logp_a, logp_b), sum(sums), text)
    if choice is None:
        return Decision(text=text, problem="the reply names neither option, or both" if text.strip() else "empty reply")
    return Decision(1.0 if choice[0] == "A" else 0.0, text=text)


def _letter(token: str) -> str | None:
    bare = token.strip().strip("()[]*_`\"'.:")
    return bare if bare in _LETTERS else None
