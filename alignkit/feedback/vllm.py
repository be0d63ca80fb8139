"""A model in vLLM, in this process, where vLLM is installed; it is not a dependency of ours.

The same prompts as `local`, encoded by the same means. An option is scored by its first own token alone, for vLLM gives
log-probabilities of what it samples: the closing bracket after the letter, certain for any judge that answers in the
format, is not counted. A vLLM server (`url:`) needs nothing of this.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from alignkit.errors import EnvironmentProblem
from alignkit.feedback.local import Encoder
from alignkit.feedback.prompts import Request, cut_at
from alignkit.feedback.writer import Decision, Job, Reply, Sampling, Spending, share_of_first
from alignkit.models.causal import fingerprint_causal, load_tokenizer_of

_BATCH = 512  # requests handed over at once; vLLM batches them itself


class VllmModel:
    """A language model that vLLM runs."""

    takes_prefill = True
    spending: Spending | None = None

    def __init__(self, source: str, *, stop: threading.Event, trust_code: bool = False) -> None:
        """Start the engine; raises EnvironmentProblem where vLLM is not installed."""
        try:
            self._vllm: Any = importlib.import_module("vllm")
        except ImportError:
            raise EnvironmentProblem(
                "engine: vllm needs the vllm package; install it, start its server and give url:, or use engine: "
                "transformers"
            ) from None
        self._engine = self._vllm.LLM(model=source, trust_remote_code=trust_code)
        self._stop = stop
        self._encoder = Encoder(load_tokenizer_of(source, trust_code=trust_code))
        self.control_tokens: Sequence[str] = self._encoder.control_tokens
        self.identity: dict[str, Any] = {"model": fingerprint_causal(source), "engine": "vllm"}

    def write(
        self, jobs: Sequence[Job], sampling: Sampling, known: Collection[int] = ()
    ) -> Iterator[list[tuple[int, Reply]]]:
        """Write a text for each job."""
        for start in self._batches(len(jobs), known):
            batch = jobs[start : start + _BATCH]
            settings = [
                self._vllm.SamplingParams(
                    temperature=sampling.temperature,
                    max_tokens=sampling.max_new_tokens,
                    seed=job.seed,
                    stop=list(self._encoder.stops(job.request)),
                    stop_token_ids=self._encoder.stop_ids,
                )
                for job in batch
            ]
            prompts = [{"prompt_token_ids": self._encoder.encode(job.request)} for job in batch]
            yield [
                (start + place, self._reply(job.request, output))
                for place, (job, output) in enumerate(zip(batch, self._generate(prompts, settings), strict=True))
            ]

    def decide(self, requests: Sequence[Request], known: Collection[int] = ()) -> Iterator[list[tuple[int, Decision]]]:
        """Score both options of each question by their first own token."""
        for start in self._batches(len(requests), known):
            split = [self._encoder.split(request) for request in requests[start : start + _BATCH]]
            settings = [
                self._vllm.SamplingParams(
                    temperature=0.0, max_tokens=1, logprobs=2, allowed_token_ids=[tail[0] for tail in tails]
                )
                for _, tails in split
            ]
            outputs = self._generate([{"prompt_token_ids": prefix} for prefix, _ in split], settings)
            yield [
                (start + place, _decision(output, [tail[0] for tail in tails], len(prefix)))
                for place, ((prefix, tails), output) in enumerate(zip(split, outputs, strict=True))
            ]

    def _batches(self, count: int, known: Collection[int]) -> Iterator[int]:
        """Yield where each batch starts that is not known whole, until a signal."""
        for start in range(0, count, _BATCH):
            if self._stop.is_set():
                return
            if not all(place in known for place in range(start, min(start + _BATCH, count))):
                yield start

    def _generate(self, prompts: list[dict[str, Any]], settings: list[Any]) -> list[Any]:
        outputs: list[Any] = self._engine.generate(prompts, settings, use_tqdm=False)
        return outputs

    def _reply(self, request: Request, output: Any) -> Reply:
        (completion,) = output.outputs
        text, cut = cut_at(completion.text, self._encoder.stops(request))
        ended = cut or completion.finish_reason == "stop"
        sent, received = len(output.prompt_token_ids), len(completion.token_ids)
        text = text if request.is_plain else text.strip()
        return Reply(text, ended, input_tokens=sent, output_tokens=received)


def _decision(output: Any, firsts: Sequence[int], input_tokens: int) -> Decision:
    chances = output.outputs[0].logprobs[0]
    found = [chances[token].logprob if token in chances else None for token in firsts]
    if found[0] is None or found[1] is None:
        return Decision(problem="the options are not among the likeliest tokens", input_tokens=input_tokens)
    logps = (found[0], found[1])
    return Decision(share_of_first(logps), logps, input_tokens=input_tokens, output_tokens=1)
