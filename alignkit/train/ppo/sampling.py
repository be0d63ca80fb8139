"""Answers of the policy: which prompts come when, which random numbers choose the tokens, and where an answer ends."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignkit.rewards.base import Answers

Key = tuple[int, ...]  # which answers these are: the run's seed, what they are for, and their number


def draw_uniforms(key: Key, num_answers: int, num_tokens: int) -> Tensor:
    """Numbers in [0, 1), float32 (num_answers, num_tokens): one for every token an answer may have."""
    return torch.from_numpy(np.random.default_rng(key).random((num_answers, num_tokens), dtype=np.float32))


@dataclass
class Rollout(Answers):
    """Answers of the policy, one entry per answer; the answers of one prompt stand together.

    `completion_ids` and `completions` are what a reward sees: cut by `truncate`, stop token included where one came.
    `sampled_ids` is everything that was sampled; the KL is taken over all of it.
    """

    prompt_ids: list[list[int]] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    sampled_ids: list[list[int]] = field(default_factory=list)
    engine_logps: list[list[float]] = field(default_factory=list)  # of sampled_ids, where another engine drew them

    def replace(self, rows: Sequence[int], others: Rollout) -> None:
        """Put other answers in the place of some; `columns` of one of the two alone become None in the other."""
        names = ("prompts", "completions", "ended", "prompt_ids", "completion_ids", "sampled_ids", "engine_logps")
        lists: list[tuple[Any, Any]] = [(getattr(self, name), getattr(others, name)) for name in names]
        columns: Any = self.columns
        for name in {**columns, **others.columns}:
            own = columns.setdefault(name, [None] * len(self))
            lists.append((own, others.columns.get(name, [None] * len(others))))
        for own, new in lists:
            for row, value in zip(rows, new, strict=False):  # an engine that is the trainer gives no log-probabilities
                own[row] = value

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt with everything sampled after it."""
        return [len(prompt) + len(ids) for prompt, ids in zip(self.prompt_ids, self.sampled_ids, strict=True)]

    @property
    def whole_ids(self) -> list[list[int]]:
        """Prompt and answer of each row in one list."""
        return [prompt + answer for prompt, answer in zip(self.prompt_ids, self.completion_ids, strict=True)]


@dataclass(frozen=True)
class Truncation:
    """Cut an answer after the first `token` at or after position `after` (Ziegler 2019: '.' after 16 tokens)."""

    token: int
    after: int


def cut_at_text(sampled: Sequence[int], stops: Sequence[str], decode: Callable[[Sequence[int]], str]) -> int | None:
    """Count the tokens up to the first that completes one of the texts `stops`, None where none comes."""

    def holds(count: int) -> bool:
        text = decode(sampled[:count])
        return any(stop in text for stop in stops)

    if not stops or not holds(len(sampled)):
        return None
    return bisect.bisect_left(range(len(sampled) + 1), True, key=holds)


def cut_answer(
    sampled: Sequence[int], *, stop_ids: Sequence[int], truncation: Truncation | None
) -> tuple[list[int], bool]:
    """Cut an answer to the tokens a reward sees, and tell whether it ended by itself.

    Without a truncation token an answer ends with a stop token; with one, only the truncation token counts.
    """
    if truncation is None:
        return list(sampled), bool(sampled) and sampled[-1] in stop_ids
    for position in range(truncation.after, len(sampled)):
        if sampled[position] == truncation.token:
            return list(sampled[: position + 1]), True
    return list(sampled), False


def repetition(answers: Sequence[Sequence[int]]) -> float:
    """Share of the bigrams that occurred before among all answers: 1 - distinct-2 (Li et al., arXiv 1510.03055)."""
    pairs = [pair for answer in answers for pair in zip(answer, answer[1:], strict=False)]
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def prompt_numbers(first: int, count: int, *, num_prompts: int, seed: int) -> list[int]:
    """Places `first` to `first + count` of the endless stream of prompts: one shuffled pass after the other."""
    numbers: list[int] = []
    order: dict[int, np.ndarray] = {}
    for place in range(first, first + count):
        turn, offset = divmod(place, num_prompts)
        if turn not in order:
            order[turn] = np.random.default_rng((seed, turn)).permutation(num_prompts)
        numbers.append(int(order[turn][offset]))
    return numbers


def answer_order(num_answers: int, *, seed: int, rollout: int, epoch: int) -> np.ndarray:
    """The order in which an epoch goes through a rollout, (R,).

    The first epoch keeps the rollout's own order: its prompts are in random order already, and the first minibatch is
    then computed as its log-probabilities were, so that its ratio is exactly 1.
    """
    if epoch == 0:
        return np.arange(num_answers)
    return np.random.default_rng((seed, rollout, epoch)).permutation(num_answers)


def sort_steps(rows: np.ndarray, lengths: Sequence[int], *, step_size: int) -> np.ndarray:
    """Sort the answers of each optimizer step by length, longest first: micro batches then hold little padding.

    A step's loss is a sum over its tokens, so that the order inside a step changes no more than rounding.
    """
    sizes = np.asarray(lengths)
    parts = [rows[start : start + step_size] for start in range(0, len(rows), step_size)]
    return np.concatenate([part[np.argsort(-sizes[part], kind="stable")] for part in parts])
