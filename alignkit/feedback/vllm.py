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
from alignkit.feedback.prompts import Request
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
        self.control_tokens = self._encoder.control_tokens
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
            replies = []
            outputs = self._generate([self._encoder.encode(job.request) for job in batch], settings)
            for place, (job, output) in enumerate(zip(batch, outputs, strict=True), start):
                (written,) = output.outputs
                reply = self._encoder.read_reply(
                    job.request, written.text, written.finish_reason == "stop", read=len(output.prompt_token_ids),
                    written=len(written.token_ids),
                )  # fmt: skip
                replies.append((place, reply))
            yield replies

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
            outputs = self._generate([prefix for prefix, _ in split], settings)
            decisions = []
            for place, ((prefix, tails), output) in enumerate(zip(split, outputs, strict=True), start):
                chances = output.outputs[0].logprobs[0]
                first, second = (chances[tail[0]].logprob if tail[0] in chances else None for tail in tails)
                if first is None or second is None:
                    problem = "the options are not among the likeliest tokens"
                    decisions.append((place, Decision(problem=problem, input_tokens=len(prefix))))
                    continue
                p_first, logps = share_of_first((first, second)), (first, second)
                decisions.append((place, Decision(p_first, logps, input_tokens=len(prefix), output_tokens=1)))
            yield decisions

    def _batches(self, count: int, known: Collection[int]) -> Iterator[int]:
        """Yield where each batch starts that is not known whole, until a signal."""
        for start in range(0, count, _BATCH):
            if self._stop.is_set():
                return
            if not all(place in known for place in range(start, min(start + _BATCH, count))):
                yield start

    def _generate(self, prompts: list[list[int]], settings: list[Any]) -> list[Any]:
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        outputs: list[Any] = self._engine.generate(asked, settings, use_tqdm=False)
        return outputs
