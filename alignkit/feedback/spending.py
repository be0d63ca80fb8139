"""What asking a server costs: requests, retries and tokens counted, a rate kept, a budget never knowingly exceeded.

Everything is counted in one thread.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from alignkit.errors import JudgeError
from alignkit.recipe.schema import FeedbackModel

_BYTES_PER_TOKEN = 3.0  # fewer than most texts have


def count_tokens(text: str) -> int:
    """Estimate the tokens of a text, rather too many than too few: for limits, and for a server that counts nothing."""
    return math.ceil(len(text.encode("utf-8", "replace")) / _BYTES_PER_TOKEN)


class BudgetSpent(JudgeError):
    """The next request would exceed the budget."""


def how_to_go_on(error: JudgeError) -> str:
    """Return what to do after an end that kept everything."""
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
        """What the tokens cost by `price`, None without one."""
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
        """Return what the report says of it."""
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
