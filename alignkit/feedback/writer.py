"""Whoever writes and decides (a local model, vLLM, a server): what is asked, what comes back, and its budget."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

from alignkit.errors import JudgeError, UsageError
from alignkit.feedback.prompts import Request
from alignkit.recipe.schema import FeedbackModel
from alignkit.recipe.stage import Stage
from alignkit.runs.stop import Stop


@dataclass(frozen=True)
class Sampling:
    """How a text is sampled. Temperature 0 takes the likeliest token each time."""

    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class Job:
    """A text to be written; the same request with another seed gives another text."""

    request: Request
    seed: int


@dataclass
class _Kept:
    """A record of the store: what an answer cost, and how to write and read it."""

    input_tokens: int = field(default=0, kw_only=True)
    output_tokens: int = field(default=0, kw_only=True)
    retries: dict[str, int] = field(default_factory=dict, kw_only=True)

    def to_record(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in (None, {})}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        return cls(**{name: record[name] for name in cls.__dataclass_fields__ if name in record})


@dataclass
class Reply(_Kept):
    """A text that a model wrote, or the reason why there is none.

    `retries` counts failed tries of a server by cause.
    """

    text: str = ""
    ended: bool = True  # False: cut off by max_new_tokens
    problem: str | None = None


@dataclass
class Decision(_Kept):
    """A judge's decision between two options: the probability of the first, or the reason for abstaining.

    `logps` are those of the options (of the deciding letter, from a server); `mass` is the share of probability that
    the two have at the place where they part: little of it means that the judge does not answer in this format.
    """

    p_first: float | None = None
    logps: tuple[float, float] | None = None
    mass: float | None = None
    text: str | None = None
    problem: str | None = None


class Model(Protocol):
    """Somebody who writes texts and decides between options; every answer is given out as soon as it is there.

    Both methods yield lists of (place in the sequence, answer), in any order: those that came together. They end early
    when the run is being stopped, and raise JudgeError when no more is to be had. Places in `known` have an answer
    already. The last bits of a local model's numbers depend on what shares a batch: its batches are those of the whole
    sequence, whatever is known, so that a run that was cut off ends like one that was not.
    """

    @property
    def identity(self) -> dict[str, Any]:
        """Facts that tell this model's answers from those of another one; part of every key."""

    @property
    def control_tokens(self) -> Sequence[str]:
        """Texts that the model takes for more than text."""

    @property
    def takes_prefill(self) -> bool:
        """Whether the model's turn can be begun for it."""

    def write(
        self, jobs: Sequence[Job], sampling: Sampling, known: Collection[int] = ()
    ) -> Iterator[list[tuple[int, Reply]]]:
        """Write a text for each job."""

    def decide(self, requests: Sequence[Request], known: Collection[int] = ()) -> Iterator[list[tuple[int, Decision]]]:
        """Decide each question between prompts.OPTIONS."""


def share_of_first(logps: tuple[float, float]) -> float:
    """Return the probability of the first of two options: the softmax of their log-probs (CAI section 4.1)."""
    return 1.0 / (1.0 + math.exp(min(max(logps[1] - logps[0], -700.0), 700.0)))


_BYTES_PER_TOKEN = 3.0  # fewer than most texts have


def count_tokens(text: str) -> int:
    """Estimate the tokens of a text, rather too many than too few: for limits, and for a server that counts nothing."""
    return math.ceil(len(text.encode("utf-8", "replace")) / _BYTES_PER_TOKEN)


class BudgetSpent(JudgeError):
    """The next request would exceed the budget."""


def how_to_go_on(error: JudgeError) -> str:
    """Say what to do after an end that kept everything."""
    return "run the same command to go on" + (", with a higher limit" if isinstance(error, BudgetSpent) else "")


class Spending:
    """Tokens, requests and money of one server, earlier sittings included, with the limits of the recipe."""

    def __init__(self, source: FeedbackModel) -> None:
        self._source = source
        self._reserved = 0.0  # tokens that requests under way may take
        self._reserved_cost = 0.0
        self._next = 0.0
        self.requests = 0
        self.input_tokens = self.output_tokens = 0
        self.retries: Counter[str] = Counter()

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    @property
    def cost(self) -> float | None:
        """The price of the tokens, None without `price`."""
        return None if self._source.price is None else self._cost(self.input_tokens, self.output_tokens)

    def add(self, input_tokens: int, output_tokens: int) -> None:
        """Count the tokens of a reply."""
        self.input_tokens += input_tokens
        self.output_tokens += output_tokens

    @contextmanager
    def reserve(self, input_tokens: int, output_tokens: int) -> Iterator[None]:
        """Hold room in the budget for a request under way; the numbers are what it may take at most.

        Raises BudgetSpent when there is no room.
        """
        tokens, cost = input_tokens + output_tokens, self._cost(input_tokens, output_tokens)
        self._require(tokens, cost)
        self._reserved += tokens
        self._reserved_cost += cost
        self.requests += 1
        try:
            yield
        finally:
            self._reserved -= tokens
            self._reserved_cost -= cost

    def seconds_to_turn(self) -> float:
        """Take the next place that `requests_per_minute` leaves, and return how long it is until then."""
        rate, now = self._source.requests_per_minute, time.monotonic()
        if rate is None:
            return 0.0
        at = max(self._next, now)
        self._next = at + 60.0 / rate
        return at - now

    def to_dict(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "retries": dict(self.retries),
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "cost": self.cost,
        }

    def _cost(self, input_tokens: float, output_tokens: float) -> float:
        price = self._source.price
        return 0.0 if price is None else (input_tokens * price.input + output_tokens * price.output) / 1e6

    def _require(self, tokens: int, cost: float) -> None:
        most, limit = self._source.max_tokens_total, self._source.max_cost
        if most is not None and self.tokens + self._reserved + tokens > most:
            raise BudgetSpent(
                f"{self.tokens} of max_tokens_total {most} tokens are spent, and the next request may take {tokens}"
                + (f" beside {self._reserved:.0f} of others under way" if self._reserved else "")
            )
        spent = self._cost(self.input_tokens, self.output_tokens)
        if limit is not None and spent + self._reserved_cost + cost > limit:
            raise BudgetSpent(
                f"{spent:.4f} of max_cost {limit:g} is spent, and the next request may cost {cost:.2g}"
                + (f" beside {self._reserved_cost:.2g} of others under way" if self._reserved_cost else "")
            )


def open_model(
    source: FeedbackModel, *, stop: Stop, spending: Spending, device: str, batch_size: int, trust_code: bool
) -> Model:
    """Return the model a source names, ready to be asked.

    Raises ModelError for weights that cannot be used, EnvironmentProblem for a package that is missing.
    """
    if source.url is not None:
        from alignkit.feedback.server import Endpoint

        return Endpoint(source, spending=spending, stop=stop.event)
    assert source.model is not None
    if source.engine == "vllm":
        from alignkit.feedback.vllm import VllmModel

        return VllmModel(source.model, stop=stop.event, trust_code=trust_code)
    from alignkit.feedback.local import LocalModel

    return LocalModel(source.model, device=device, batch_size=batch_size, trust_code=trust_code, stop=stop.event)


def own_model(stage: Stage) -> FeedbackModel:
    """Return the model a stage starts from, as a source."""
    return FeedbackModel(model=stage.start_dir or stage.model.path)


def speaks_chat(source: FeedbackModel) -> bool:
    """Tell whether a source is asked in turns of a chat: a server's chat API, or a model with a chat template."""
    if source.model is None:
        return source.api == "chat"
    from alignkit.models.causal import load_tokenizer_of

    return load_tokenizer_of(source.model).chat_template is not None


def describe_source(source: FeedbackModel) -> dict[str, Any]:
    """Describe what decides a source's answers, for the run's fingerprint: not how fast or how often it is asked."""
    if source.model is not None:
        from alignkit.models.causal import fingerprint_causal

        return {"model": fingerprint_causal(source.model), "engine": source.engine}
    if source.url is not None:
        return {"url": source.url, "name": source.name, "api": source.api, "logprobs": source.logprobs}
    assert source.replay is not None
    return {"replay": fingerprint_file(source.replay)}


def fingerprint_file(path: str) -> str:
    """Hash the bytes of a file; raises UsageError when it cannot be read."""
    import hashlib

    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=path) from None


def spent_before(source: FeedbackModel, records: Iterable[dict[str, Any]], by: Collection[str]) -> Spending:
    """Return the spending of a source, with what earlier sittings of this run have spent already."""
    spending = Spending(source)
    for record in records:
        if record.get("by") in by:
            spending.add(record.get("input_tokens", 0), record.get("output_tokens", 0))
            spending.requests += 1
            for cause, count in record.get("retries", {}).items():
                spending.retries[cause] += count
                spending.requests += count
    return spending


def describe_model(model: FeedbackModel, stage: Stage) -> str:
    """Return in words what answers or judges; of an address only its host."""
    if model.url is not None:
        return f"{model.name} at {urlsplit(model.url).netloc}"
    if model.replay is not None:
        return f"the labels of {model.replay}"
    assert model.model is not None
    return stage.source_stages.get(model.model, model.model)
