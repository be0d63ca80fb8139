"""What is asked of a model and what comes back; data only, the same for a local model and a server."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self

from alignkit.feedback.prompts import Request


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
    """What was asked of a model as the store keeps it: what it cost, and how to write and read it."""

    input_tokens: int = field(default=0, kw_only=True)
    output_tokens: int = field(default=0, kw_only=True)
    retries: dict[str, int] = field(default_factory=dict, kw_only=True)

    def to_record(self) -> dict[str, Any]:
        """Return plain data for the store."""
        return {name: value for name, value in asdict(self).items() if value not in (None, {})}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Return what `to_record` was made from."""
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
class Verdict(_Kept):
    """What a judge says of two options: the probability of the first, or the reason for abstaining.

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
        """What tells this model's answers from those of another one; it is part of every key."""

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

    def decide(self, requests: Sequence[Request], known: Collection[int] = ()) -> Iterator[list[tuple[int, Verdict]]]:
        """Decide each question between prompts.OPTIONS."""


def share_of_first(logps: tuple[float, float]) -> float:
    """Return the probability of the first of two options: the softmax of their log-probs (CAI section 4.1)."""
    return 1.0 / (1.0 + math.exp(min(max(logps[1] - logps[0], -700.0), 700.0)))
