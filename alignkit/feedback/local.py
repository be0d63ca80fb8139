"""A language model on this machine that writes and judges, in batches.

Two options are scored with one forward pass over the prompt they share: their few tokens of their own are read on top
of its key-value cache. It knows nothing of constitutions, stores or rows.

Legend: B questions, V vocabulary, L tokens of the longest tail, 2B tails of the questions' options.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.feedback.asking import Job, Reply, Sampling, Verdict, share_of_first
from alignkit.feedback.encoding import Encoder
from alignkit.feedback.prompts import Request, cut_at
from alignkit.models.causal import load_causal
from alignkit.models.generation import generate_greedy, generate_sampled
from alignkit.runs.heartbeat import pulse

_WINDOW = 32  # batches that are sorted by length together


@dataclass
class _Question:
    place: int
    prefix: list[int]  # what both options share
    tails: tuple[list[int], list[int]]  # one or more tokens each

    @property
    def whole(self) -> list[int]:
        """The question with its longer option."""
        return self.prefix + max(self.tails, key=len)


class LocalModel:
    """A frozen causal language model; chat models get messages, others the transcript."""

    takes_prefill = True

    def __init__(
        self,
        source: str,
        *,
        device: str = "auto",
        batch_size: int = 16,
        trust_code: bool = False,
        stop: threading.Event | None = None,
    ) -> None:
        """Load the model; raises what `load_causal` raises. No batch is begun once `stop` is set."""
        loaded = load_causal(source, device=device, trust_code=trust_code)
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._positions = loaded.positions or 10**9
        self._encoder = Encoder(loaded.tokenizer)
        self._batch_size = batch_size
        self._stop = stop or threading.Event()
        self.control_tokens = self._encoder.control_tokens
        self.identity: dict[str, Any] = {"model": loaded.fingerprint, "template": self._encoder.chat_template}
        inner = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        self._keeps_last = "logits_to_keep" in inspect.signature(inner.forward).parameters

    def write(self, jobs: Sequence[Job], sampling: Sampling) -> Iterator[list[tuple[int, Reply]]]:
        """Write a text for each job; one whose prompt leaves no room is answered with a problem."""
        for start in range(0, len(jobs), _WINDOW * self._batch_size):
            window = jobs[start : start + _WINDOW * self._batch_size]
            prompts = [self._encoder.encode(job.request) for job in window]
            room = self._positions - sampling.max_new_tokens
            long = [place for place, ids in enumerate(prompts) if len(ids) > room]
            if long:
                yield [(start + place, Reply(problem=_too_long("prompt", prompts[place], room))) for place in long]
            order = sorted({*range(len(window))} - {*long}, key=lambda place: -len(prompts[place]))
            for first in range(0, len(order), self._batch_size):
                places = order[first : first + self._batch_size]
                if self._stop.is_set():
                    return
                pulse("writing")
                yield self._write_batch(window, prompts, places, start, sampling)

    def decide(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Verdict]]]:
        """Score both options of each question; one that is too long for the model is abstained from."""
        for start in range(0, len(requests), _WINDOW * self._batch_size):
            window = requests[start : start + _WINDOW * self._batch_size]
            questions = [_Question(place, *self._encoder.split(request)) for place, request in enumerate(window, start)]
            long = [question for question in questions if len(question.whole) > self._positions]
            if long:
                problems = [_too_long("question", question.whole, self._positions) for question in long]
                yield [(question.place, Verdict(problem=what)) for question, what in zip(long, problems, strict=True)]
            questions = sorted(
                (question for question in questions if len(question.whole) <= self._positions),
                key=lambda question: -len(question.prefix),
            )
            for first in range(0, len(questions), self._batch_size):
                batch = questions[first : first + self._batch_size]
                if self._stop.is_set():
                    return
                pulse("judging")
                yield [(question.place, verdict) for question, verdict in zip(batch, self._score(batch), strict=True)]

    def _write_batch(
        self, jobs: Sequence[Job], prompts: list[list[int]], places: list[int], start: int, sampling: Sampling
    ) -> list[tuple[int, Reply]]:
        ids = [prompts[place] for place in places]
        stops = {stop for place in places for stop in self._encoder.stops(jobs[place].request)}
        settings: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens,
            "eos_ids": self._encoder.stop_ids,
            "pad_id": self._tokenizer.pad_token_id,
        }
        if sampling.temperature == 0:
            answers = generate_greedy(self._model, ids, **settings)
        else:
            seeds = [jobs[place].seed for place in places]
            is_over = (lambda tail: any(stop in self._encoder.decode(tail) for stop in stops)) if stops else None
            answers = generate_sampled(
                self._model, ids, seeds, temperature=sampling.temperature, is_over=is_over, **settings
            )
        replies = []
        for place, prompt, answer in zip(places, ids, answers, strict=True):
            text, cut = cut_at(self._encoder.decode(answer), self._encoder.stops(jobs[place].request))
            ended = cut or bool(answer and answer[-1] in self._encoder.stop_ids)
            text = text if jobs[place].request.is_plain else text.strip()
            replies.append((start + place, Reply(text, ended, None, len(prompt), len(answer))))
        return replies

    @torch.no_grad()
    def _score(self, questions: list[_Question]) -> list[Verdict]:
        """Return the log-probs of both options of each question, from their first own token on."""
        device = next(self._model.parameters()).device
        prefix_BT, mask_BT = _pad_left([question.prefix for question in questions], self._tokenizer.pad_token_id)
        positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
        keep = {"logits_to_keep": 1} if self._keeps_last else {}
        output = self._model(
            input_ids=prefix_BT.to(device),
            attention_mask=mask_BT.to(device),
            position_ids=positions_BT.to(device),
            use_cache=True,
            **keep,
        )
        next_BV = output.logits[:, -1].float().log_softmax(-1)
        firsts_B2 = torch.tensor([[tail[0] for tail in question.tails] for question in questions], device=device)
        first_B2 = next_BV.gather(1, firsts_B2)
        logps_B2 = first_B2 + self._score_rest(questions, output, mask_BT.to(device), positions_BT.to(device))
        masses = first_B2.exp().sum(1).tolist()
        return [
            Verdict(
                share_of_first((a, b)), (a, b), mass, input_tokens=len(question.prefix) + sum(map(len, question.tails))
            )
            for question, (a, b), mass in zip(questions, logps_B2.tolist(), masses, strict=True)
        ]

    def _score_rest(self, questions: list[_Question], output: Any, mask_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Return the log-probs of all but the first token of every tail, (B, 2), read on top of the prefixes' cache."""
        tails = [tail for question in questions for tail in question.tails]
        longest = max(map(len, tails)) - 1
        if not longest:
            return torch.zeros(len(questions), 2, device=mask_BT.device)
        fed_2BL = torch.full((len(tails), longest), self._tokenizer.pad_token_id, device=mask_BT.device)
        for row, tail in enumerate(tails):
            fed_2BL[row, : len(tail) - 1] = torch.tensor(tail[:-1])
        cache = output.past_key_values
        cache.batch_repeat_interleave(2)
        steps_L = torch.arange(1, longest + 1, device=mask_BT.device)
        logits_2BLV = self._model(
            input_ids=fed_2BL,
            attention_mask=torch.cat([mask_BT.repeat_interleave(2, 0), torch.ones_like(fed_2BL)], dim=1),
            position_ids=positions_BT[:, -1:].repeat_interleave(2, 0) + steps_L,
            past_key_values=cache,
            use_cache=True,
        ).logits
        logps_2BLV = logits_2BLV.float().log_softmax(-1)
        sums = [
            sum(float(logps_2BLV[row, i, token]) for i, token in enumerate(tail[1:])) for row, tail in enumerate(tails)
        ]
        return torch.tensor(sums, device=mask_BT.device).view(-1, 2)


def _too_long(what: str, ids: list[int], room: int) -> str:
    advice = ", beside max_new_tokens; examples: none makes prompts shorter" if what == "prompt" else ""
    return f"the {what} has {len(ids)} tokens; {max(room, 0)} fit{advice}"


def _pad_left(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids_BT = torch.full((len(rows), width), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    for number, row in enumerate(rows):
        ids_BT[number, width - len(row) :] = torch.tensor(row)
        mask_BT[number, width - len(row) :] = 1
    return ids_BT, mask_BT
