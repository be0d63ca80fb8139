"""Language models on this machine that write and judge, in batches, with transformers or in vLLM."""

from __future__ import annotations

import importlib
import math
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerFast

from alignkit.errors import EnvironmentProblem, ModelError
from alignkit.feedback.prompts import OPTIONS, Request, cut_at
from alignkit.feedback.writer import Batches, Decision, Job, Reply, Sampling, Spending, share_of_first
from alignkit.models.chat import Chat
from alignkit.models.files import find_model_dir, inspect_model_dir, is_builtin
from alignkit.models.frozen import fingerprint_causal, load_causal, load_tokenizer_of
from alignkit.models.generation import generate_answers
from alignkit.models.scoring import iter_scores
from alignkit.runs.signals import pulse


class Encoder:
    """Encodes for one tokenizer; chat models get messages, others the transcript."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self._chat = tokenizer, Chat(tokenizer)
        self.chat_template = tokenizer.chat_template
        self.control_tokens: Sequence[str] = self._chat.control_tokens
        self.stop_ids = self._chat.stop_ids

    def encode(self, request: Request, endings: Sequence[str] = ("",)) -> list[list[int]]:
        """Encode what a text is written after, with each of these endings."""
        if not self._speaks(request):
            return self._chat.encode_prompts([request.transcript + ending for ending in endings])
        (head,) = self._chat.encode_prompts([list(request.messages or ())])
        begun = [request.prefill + ending for ending in endings]
        return [head + (self.tokenizer(text, add_special_tokens=False).input_ids if text else []) for text in begun]

    def split(self, request: Request) -> tuple[list[int], tuple[list[int], list[int]]]:
        """Encode what a question has in common with either option, and the tokens of each, which stand at its end."""
        whole = self.encode(request, OPTIONS)
        same = len(os.path.commonprefix(whole))
        return whole[0][:same], (whole[0][same:], whole[1][same:])

    def stops(self, request: Request) -> tuple[str, ...]:
        """The texts at which a transcript ends; a chat ends with its end of turn."""
        return () if self._speaks(request) else request.stops

    def read_reply(self, request: Request, text: str, ended: bool, *, read: int, written: int) -> Reply:
        """Cut a text at the request's stops; `read` and `written` count its tokens."""
        text, cut = cut_at(text, self.stops(request))
        text = text if request.is_plain else text.strip()
        return Reply(text, cut or ended, input_tokens=read, output_tokens=written)

    def _speaks(self, request: Request) -> bool:
        return self._chat.has_template and request.messages is not None


_WINDOW = 32  # batches that are sorted by length together
_VLLM_BATCH = 512  # requests handed over at once; vLLM batches them itself


class LocalModel:
    """A frozen causal language model; chat models get messages, others the transcript."""

    takes_prefill = True
    spending: Spending | None = None

    def __init__(
        self, source: str, *, device: str = "auto", batch_size: int = 16, trust_code: bool = False,
        stop: threading.Event | None = None, continuous: bool = False,
    ) -> None:  # fmt: skip
        """Load the model; raises what `load_causal` raises. No batch is begun once `stop` is set."""
        loaded = load_causal(source, device=device, trust_code=trust_code)
        self._model = loaded.model
        self._positions = loaded.positions or 10**9
        self._encoder = Encoder(loaded.tokenizer)
        self._batch_size, self._continuous = batch_size, continuous
        self._stop = stop or threading.Event()
        self.control_tokens = self._encoder.control_tokens
        self.identity: dict[str, Any] = {"model": loaded.fingerprint, "template": self._encoder.chat_template}
        self.identity |= {"engine": "continuous"} if continuous else {}

    def write(self, jobs: Sequence[Job], sampling: Sampling, known: Collection[int] = ()) -> Batches[Reply]:
        """Write a text for each job; one whose prompt leaves no room is answered with a problem."""
        for start in range(0, len(jobs), _WINDOW * self._batch_size):
            window = jobs[start : start + _WINDOW * self._batch_size]
            prompts = [self._encoder.encode(job.request)[0] for job in window]
            room = self._positions - sampling.max_new_tokens
            advice = f"{max(room, 0)} fit, beside max_new_tokens; examples: none makes prompts shorter"
            if long := {place: len(ids) for place, ids in enumerate(prompts) if len(ids) > room}:
                said = "the prompt has {} tokens; {}"
                yield [(start + place, Reply(problem=said.format(size, advice))) for place, size in long.items()]
            order = sorted({*range(len(window))} - {*long}, key=lambda place: -len(prompts[place]))
            size = self._batch_size * (4 if self._continuous else 1)  # what a kill may lose
            for first in range(0, len(order), size):
                places = order[first : first + size]
                if all(start + place in known for place in places):
                    continue
                if self._stop.is_set():
                    return
                pulse("writing")
                ids = [prompts[place] for place in places]
                replies = list(self._write_batch([window[place] for place in places], ids, sampling))
                if self._stop.is_set():
                    return  # they may be cut short
                yield [(start + place, reply) for place, reply in zip(places, replies, strict=True)]

    def decide(self, requests: Sequence[Request], known: Collection[int] = ()) -> Batches[Decision]:
        """Score both options of each question; one that is too long for the model is abstained from."""
        for start in range(0, len(requests), _WINDOW * self._batch_size):
            asked = list(map(self._encoder.split, requests[start : start + _WINDOW * self._batch_size]))
            lengths = [len(prefix) + max(map(len, tails)) for prefix, tails in asked]
            long = [place for place, length in enumerate(lengths) if length > self._positions]
            said = "the question has {} tokens; {} fit"
            yield [(start + at, Decision(problem=said.format(lengths[at], self._positions))) for at in long]
            fitting = [place for place in range(len(asked)) if place not in long]
            pairs = [(asked[place][0], tail) for place in fitting for tail in asked[place][1]]
            there = {at for at in range(len(pairs)) if start + fitting[at // 2] in known}
            pad_id, size = self._encoder.tokenizer.pad_token_id, self._batch_size
            logps: dict[int, list[float]] = {}
            for batch in iter_scores(self._model, pairs, pad_id=pad_id, batch_size=size, known=there):
                logps.update(batch)
                decisions = []
                for at in sorted({at // 2 for at, _ in batch if at ^ 1 in logps}):  # both options are there
                    first, second, (prefix, tails) = logps[2 * at], logps[2 * at + 1], asked[fitting[at]]
                    mass, sums = min(math.exp(first[0]) + math.exp(second[0]), 1.0), (sum(first), sum(second))
                    tokens = len(prefix) + sum(map(len, tails))
                    decision = Decision(share_of_first(sums), sums, mass, input_tokens=tokens)
                    decisions.append((start + fitting[at], decision))
                yield decisions
                if self._stop.is_set():
                    return
                pulse("judging")

    def _write_batch(self, jobs: Sequence[Job], prompts: Sequence[list[int]], sampling: Sampling) -> Iterator[Reply]:
        encoder = self._encoder
        stops = {stop for job in jobs for stop in encoder.stops(job.request)}

        def decode(ids: list[int]) -> str:
            return str(encoder.tokenizer.decode(ids, skip_special_tokens=True))

        def is_over(tail: list[int]) -> bool:
            return self._stop.is_set() or any(stop in decode(tail) for stop in stops)

        answers = generate_answers(
            self._model, prompts, [job.seed for job in jobs], is_over=is_over, eos_ids=encoder.stop_ids,
            pad_id=encoder.tokenizer.pad_token_id, in_flight=self._batch_size if self._continuous else None,
            **sampling.settings,
        )  # fmt: skip
        for job, prompt, ids in zip(jobs, prompts, answers, strict=True):
            ended = bool(ids) and ids[-1] in encoder.stop_ids
            yield encoder.read_reply(job.request, decode(ids), ended, read=len(prompt), written=len(ids))


class VllmModel:
    """A language model that vLLM, no dependency of ours, runs in this process; a vLLM server (`url:`) needs nothing of
    it. An option is scored by its first own token alone, for vLLM gives log-probabilities of what it samples: the
    closing bracket after the letter, certain for any judge that answers in the format, is not counted."""

    takes_prefill = True
    spending: Spending | None = None

    def __init__(self, source: str, *, stop: threading.Event, trust_code: bool = False) -> None:
        """Start the engine; raises EnvironmentProblem where vLLM is not installed."""
        directory = None if is_builtin(source) else find_model_dir(source)
        if directory is not None and inspect_model_dir(directory, trust_code=trust_code).kind == "adapter":
            what = f"{source} is an adapter, and engine: vllm takes a whole model; make one with `alignkit merge`"
            raise ModelError(f"{what}, or use engine: transformers")
        try:
            self._vllm: Any = importlib.import_module("vllm")
        except ImportError:
            raise EnvironmentProblem(
                "engine: vllm needs the vllm package; install it, start its server and give url:, or use engine: "
                "transformers"
            ) from None
        # By default log-probabilities are those before `allowed_token_ids`, the two likeliest of all tokens.
        how = {"trust_remote_code": trust_code, "logprobs_mode": "processed_logprobs"}
        self._engine = self._vllm.LLM(model=source, **how)
        self._stop = stop
        self._encoder = Encoder(load_tokenizer_of(source, trust_code=trust_code))
        self.control_tokens = self._encoder.control_tokens
        self.identity: dict[str, Any] = {"model": fingerprint_causal(source), "engine": "vllm"}

    def write(self, jobs: Sequence[Job], sampling: Sampling, known: Collection[int] = ()) -> Batches[Reply]:
        """Write a text for each job."""
        common = {**sampling.settings, "stop_token_ids": self._encoder.stop_ids}
        common["max_tokens"] = common.pop("max_new_tokens")
        for start in self._batches(len(jobs), known):
            batch, replies = jobs[start : start + _VLLM_BATCH], []
            asked = ({"seed": job.seed, "stop": list(self._encoder.stops(job.request))} for job in batch)
            settings = [self._vllm.SamplingParams(**common, **own) for own in asked]
            outputs = self._generate([self._encoder.encode(job.request)[0] for job in batch], settings)
            for place, (job, output) in enumerate(zip(batch, outputs, strict=True), start):
                (written,) = output.outputs
                ended, counts = written.finish_reason == "stop", (len(output.prompt_token_ids), len(written.token_ids))
                reply = self._encoder.read_reply(job.request, written.text, ended, read=counts[0], written=counts[1])
                replies.append((place, reply))
            yield replies

    def decide(self, requests: Sequence[Request], known: Collection[int] = ()) -> Batches[Decision]:
        """Score both options of each question by their first own token."""
        for start in self._batches(len(requests), known):
            split = [self._encoder.split(request) for request in requests[start : start + _VLLM_BATCH]]
            make, decisions = partial(self._vllm.SamplingParams, temperature=0.0, max_tokens=1, logprobs=2), []
            settings = [make(allowed_token_ids=[tail[0] for tail in tails]) for _, tails in split]
            outputs = self._generate([prefix for prefix, _ in split], settings)
            for place, ((prefix, tails), output) in enumerate(zip(split, outputs, strict=True), start):
                chances = output.outputs[0].logprobs[0]
                logps = [chances[tail[0]].logprob for tail in tails if tail[0] in chances]
                if len(logps) == 2:
                    decision = Decision(share_of_first((logps[0], logps[1])), (logps[0], logps[1]), output_tokens=1)
                else:
                    decision = Decision(problem="the options are not among the likeliest tokens")
                decisions.append((place, replace(decision, input_tokens=len(prefix))))
            yield decisions

    def _batches(self, count: int, known: Collection[int]) -> Iterator[int]:
        """Yield where each batch starts that is not known whole, until a signal."""
        for start in range(0, count, _VLLM_BATCH):
            if self._stop.is_set():
                return
            if not all(place in known for place in range(start, min(start + _VLLM_BATCH, count))):
                yield start

    def _generate(self, prompts: list[list[int]], settings: list[Any]) -> list[Any]:
        return list(self._engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False))
