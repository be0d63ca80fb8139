"""Sampling with random numbers that belong to an answer: the same answers in one process and in many, after a resume
and in any batch.

Deliberately holds no generator: what an answer draws follows from the run's seed and from which answer it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from alignkit.models.generation import plainly

Key = tuple[int, ...]  # which answers these are: the run's seed, what they are for, and their number


def draw_uniforms(key: Key, num_answers: int, num_tokens: int) -> Tensor:
    """Return numbers in [0, 1), float32 (num_answers, num_tokens): one for every token an answer may have."""
    return torch.from_numpy(np.random.default_rng(key).random((num_answers, num_tokens), dtype=np.float32))


class InverseTransform(LogitsProcessor):
    """Choose each token where the cumulative distribution passes the answer's own number; greedy search then takes it.

    A multinomial draw would depend on which other answers are in the batch.
    """

    def __init__(self, uniforms_BT: Tensor, *, temperature: float) -> None:
        self._uniforms_BT, self._temperature, self._step = uniforms_BT, temperature, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores, (B, vocabulary), that are 0 for the token drawn and -inf for all others."""
        cumulative_BV = (scores.float() / self._temperature).softmax(dim=-1).cumsum(dim=-1)
        total_B = cumulative_BV[:, -1]
        wanted_B = self._uniforms_BT[:, self._step].to(scores.device) * total_B
        wanted_B = torch.minimum(wanted_B, total_B.nextafter(torch.zeros_like(total_B)))  # rounding may reach the end
        tokens_B1 = torch.searchsorted(cumulative_BV, wanted_B[:, None], right=True)
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens_B1, 0.0)


@contextmanager
def drawing(model: Any, uniforms_BT: Tensor, *, temperature: float, in_step: bool = False) -> Iterator[None]:
    """Let `model.generate` draw with these numbers, whoever calls it; `in_step`: until all ranks have finished."""
    generate = model.generate
    processors = LogitsProcessorList([InverseTransform(uniforms_BT, temperature=temperature)])

    def drawn(*args: Any, **kwargs: Any) -> Any:
        with plainly(model):
            return generate(*args, logits_processor=processors, synced_gpus=in_step, **kwargs)

    model.generate = drawn
    try:
        yield
    finally:
        del model.generate


def in_batches(
    generate: Callable[[list[list[int]], Tensor], list[list[int]]],
    prompts: Sequence[list[int]],
    uniforms_BT: Tensor,
    *,
    batch_size: int,
) -> list[list[int]]:
    """Return the answers to all prompts, sampled a batch at a time; prompts of like length come together."""
    answers: list[list[int]] = [[]] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        found = generate([prompts[place] for place in places], uniforms_BT[places])
        for place, ids in zip(places, found, strict=True):
            answers[place] = ids
    return answers
