"""A model behind a server, asked by several threads at a time; answers are given out as they come.

What one request needs is the business of `server`; this module turns questions into requests and replies into answers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from alignkit.data.rows import Message
from alignkit.errors import JudgeError
from alignkit.feedback.asking import Job, Reply, Sampling, Verdict
from alignkit.feedback.choice import read_chat_tokens, read_text_tokens, read_verdict
from alignkit.feedback.prompts import Request, cut_at
from alignkit.feedback.quoting import FOREIGN_TOKENS
from alignkit.feedback.server import Halted, Server, Unanswered
from alignkit.feedback.spending import Spending
from alignkit.recipe.schema import FeedbackModel
from alignkit.runs.heartbeat import pulse

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer", Reply, Verdict)
_IN_A_ROW = 3  # requests that fail for good, without one answered between, mean that the server is down
_TOP = {"chat": 20, "completions": 5}  # likeliest tokens: the most the protocol allows


class Endpoint:
    """A model at an OpenAI-compatible server; api: chat sends messages, api: completions the transcript."""

    takes_prefill = False
    control_tokens = FOREIGN_TOKENS

    def __init__(self, source: FeedbackModel, *, spending: Spending, stop: threading.Event) -> None:
        """Prepare the client; raises EnvironmentProblem without the openai package."""
        self._source, self.spending = source, spending
        self._server = Server(source, spending, stop)
        self._is_chat = source.api == "chat"
        self.takes_prefill = not self._is_chat
        self.identity: dict[str, Any] = {"url": self._server.place, "name": source.name, "api": source.api}

    def write(self, jobs: Sequence[Job], sampling: Sampling) -> Iterator[list[tuple[int, Reply]]]:
        """Write a text for each job."""
        return self._ask_all(jobs, lambda job: self._write(job, sampling))

    def decide(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Verdict]]]:
        """Decide each question, by log-probs where the server gives them, else by its text."""
        return self._ask_all(requests, self._decide)

    def _write(self, job: Job, sampling: Sampling) -> Reply:
        payload = self._payload(job.request, sampling.max_new_tokens, sampling.temperature, closing=False)
        payload["seed"] = job.seed % 2**31
        try:
            data, retries = self._server.ask(payload, output_tokens=sampling.max_new_tokens)
        except Unanswered as error:
            if not error.problem:
                raise
            return Reply(problem=str(error), retries=error.retries)
        choice = data["choices"][0]
        text, cut = cut_at(self._text(choice), () if self._is_chat else job.request.stops)
        problem = "content filter" if choice.get("finish_reason") == "content_filter" else None
        ended = cut or choice.get("finish_reason") != "length"
        sent, received = data["counts"]
        text = text if job.request.is_plain and not self._is_chat else text.strip()
        return Reply(
            "" if problem else text, ended, problem, input_tokens=sent, output_tokens=received, retries=retries
        )

    def _decide(self, request: Request) -> Verdict:
        payload = self._payload(request, request.room, 0.0, closing=True)
        if self._source.logprobs:
            top = _TOP[self._source.api]
            payload |= {"logprobs": True, "top_logprobs": top} if self._is_chat else {"logprobs": top}
        try:
            data, retries = self._server.ask(payload, output_tokens=request.room)
        except Unanswered as error:
            if not error.problem:
                raise
            return Verdict(problem=str(error), retries=error.retries)
        choice = data["choices"][0]
        text, _ = cut_at(self._text(choice), () if self._is_chat else request.stops)
        verdict = read_verdict(text, (read_chat_tokens if self._is_chat else read_text_tokens)(choice))
        verdict.input_tokens, verdict.output_tokens = data["counts"]
        verdict.retries = retries
        return verdict

    def _payload(self, request: Request, room: int, temperature: float, *, closing: bool) -> dict[str, Any]:
        payload: dict[str, Any] = {"model": self._source.name, "max_tokens": room, "temperature": temperature}
        if not self._is_chat:
            stops = list(request.stops)
            return payload | {"prompt": request.transcript} | ({"stop": stops} if stops else {})
        messages = list(request.messages or [Message(role="user", content=request.transcript)])
        if closing and request.closing:
            *before, last = messages
            content = f"{last['content']}\n\n{request.closing}"
            messages = [*before, Message(role=last["role"], content=content)]
        return payload | {"messages": messages}

    def _text(self, choice: dict[str, Any]) -> str:
        if not self._is_chat:
            return str(choice.get("text") or "")
        message = choice.get("message")
        return str((message or {}).get("content") or "") if isinstance(message, dict) else ""

    def _ask_all(self, items: Sequence[_Item], work: Callable[[_Item], _Answer]) -> Iterator[list[tuple[int, _Answer]]]:
        """Yield answers as they come; what is under way when an error ends it is waited for and given out first.

        Raises JudgeError when the server gave up, when the budget is spent, or when some could not be answered.
        """
        waiting: dict[Future[_Answer], int] = {}
        places = iter(range(len(items)))
        unanswered: list[str] = []
        in_a_row = 0
        failure: JudgeError | Halted | None = None
        with ThreadPoolExecutor(self._source.concurrency, thread_name_prefix="judge") as pool:
            try:
                while True:
                    while not (failure or self._server.stop.is_set()) and len(waiting) < self._source.concurrency:
                        place = next(places, None)
                        if place is None:
                            break
                        waiting[pool.submit(work, items[place])] = place
                    if not waiting:
                        break
                    done, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
                    pulse("asking")
                    answers = []
                    for future in done:
                        place = waiting.pop(future)
                        try:
                            answer = future.result()
                        except Unanswered as error:
                            unanswered.append(str(error))
                            in_a_row += 1
                            if in_a_row >= _IN_A_ROW:
                                failure = failure or JudgeError(f"{error}; {in_a_row} requests in a row have failed")
                        except (JudgeError, Halted) as error:
                            failure = failure or error
                        else:
                            in_a_row = 0
                            answers.append((place, answer))
                    if answers:
                        yield answers
            except GeneratorExit:
                self._server.stop.set()
                raise
        if isinstance(failure, JudgeError):
            raise failure
        if unanswered and failure is None:
            raise JudgeError(f"{len(unanswered)} of {len(items)} requests were not answered, first: {unanswered[0]}")
