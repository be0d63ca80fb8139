"""A model behind a server, asked several things at a time; answers are given out as they come.

What one request needs is the business of `server`; this module turns questions into requests and replies into answers.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from alignkit.data.rows import Message
from alignkit.errors import JudgeError
from alignkit.feedback.asking import Job, Reply, Sampling, Verdict
from alignkit.feedback.choice import read_chat_tokens, read_text_tokens, read_verdict
from alignkit.feedback.prompts import Request, cut_at
from alignkit.feedback.quoting import FOREIGN_TOKENS
from alignkit.feedback.server import Server, Unanswered
from alignkit.feedback.spending import Spending
from alignkit.recipe.schema import FeedbackModel
from alignkit.runs.heartbeat import pulse

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer", Reply, Verdict)
_IN_A_ROW = 3  # requests that fail for good, without one answered between, mean that the server is down
_LISTEN_SECONDS = 0.2  # a signal is heard at least this often
_LAST_SECONDS = 0.5  # what requests under way have to end in after one
_TOP = {"chat": 20, "completions": 5}  # likeliest tokens: the most the protocol allows


class Endpoint:
    """A model at an OpenAI-compatible server; api: chat sends messages, api: completions the transcript."""

    takes_prefill = False
    control_tokens = FOREIGN_TOKENS

    def __init__(self, source: FeedbackModel, *, spending: Spending, stop: threading.Event) -> None:
        """Raises EnvironmentProblem without the openai package, RecipeError for a key that may not go there."""
        self._source, self.spending, self._stop = source, spending, stop
        self._server = Server(source, spending)
        self._is_chat = source.api == "chat"
        self.takes_prefill = not self._is_chat
        self.identity: dict[str, Any] = {"url": self._server.place, "name": source.name, "api": source.api}

    def write(
        self, jobs: Sequence[Job], sampling: Sampling, known: Collection[int] = ()
    ) -> Iterator[list[tuple[int, Reply]]]:
        """Write a text for each job that has none."""
        return self._ask_all(jobs, known, lambda job: self._write(job, sampling))

    def decide(self, requests: Sequence[Request], known: Collection[int] = ()) -> Iterator[list[tuple[int, Verdict]]]:
        """Decide each question that is open, by log-probs where the server gives them, else by its text."""
        return self._ask_all(requests, known, self._decide)

    async def _write(self, job: Job, sampling: Sampling) -> Reply:
        payload = self._payload(job.request, sampling.max_new_tokens, sampling.temperature, closing=False)
        payload["seed"] = job.seed % 2**31

        def read(choice: dict[str, Any]) -> Reply:
            text, cut = cut_at(self._text(choice), () if self._is_chat else job.request.stops)
            problem = "content filter" if choice.get("finish_reason") == "content_filter" else None
            ended = cut or choice.get("finish_reason") != "length"
            text = text if job.request.is_plain and not self._is_chat else text.strip()
            return Reply("" if problem else text, ended, problem)

        return await self._ask(payload, read, Reply, output_tokens=sampling.max_new_tokens)

    async def _decide(self, request: Request) -> Verdict:
        payload = self._payload(request, request.room, 0.0, closing=True)
        if self._source.logprobs:
            top = _TOP[self._source.api]
            payload |= {"logprobs": True, "top_logprobs": top} if self._is_chat else {"logprobs": top}
        tokens = read_chat_tokens if self._is_chat else read_text_tokens

        def read(choice: dict[str, Any]) -> Verdict:
            text, _ = cut_at(self._text(choice), () if self._is_chat else request.stops)
            return read_verdict(text, tokens(choice))

        return await self._ask(payload, read, Verdict, output_tokens=request.room)

    async def _ask(
        self,
        payload: dict[str, Any],
        read: Callable[[dict[str, Any]], _Answer],
        kind: type[_Answer],
        *,
        output_tokens: int,
    ) -> _Answer:
        """Return an answer with what it cost, or one that says why this question cannot be answered."""
        try:
            answer, took = await self._server.ask(payload, read, output_tokens=output_tokens)
        except Unanswered as error:
            if not error.problem:
                raise
            return kind(problem=str(error), retries=error.retries)
        return replace(answer, **took)

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
        """Read the answer out of a reply; raises TypeError where it is no text."""
        text = choice["message"].get("content") if self._is_chat else choice.get("text")
        if not isinstance(text, str | None):
            raise TypeError(f"{type(text).__name__} instead of a text")
        return self._server.scrub(text or "")

    def _ask_all(
        self,
        items: Sequence[_Item],
        known: Collection[int],
        work: Callable[[_Item], Coroutine[Any, Any, _Answer]],
    ) -> Iterator[list[tuple[int, _Answer]]]:
        """Yield answers as they come; what is under way when an error ends it is waited for and given out first.

        After a signal that is half a second's wait, then requests are cut off. Raises JudgeError when the server gave
        up, when the budget is spent, or when some could not be answered.
        """
        waiting: dict[asyncio.Task[_Answer], int] = {}
        places = iter([place for place in range(len(items)) if place not in known])
        unanswered: list[str] = []
        in_a_row = 0
        failure: JudgeError | None = None
        loop = asyncio.new_event_loop()
        try:
            self._server.connect()
            while True:
                while not (failure or self._stop.is_set()) and len(waiting) < self._source.concurrency:
                    place = next(places, None)
                    if place is None:
                        break
                    waiting[loop.create_task(work(items[place]))] = place
                if not waiting:
                    break
                stopped = self._stop.is_set()
                seconds = _LAST_SECONDS if stopped else _LISTEN_SECONDS
                done = loop.run_until_complete(_wait(waiting, seconds, all_of_them=stopped))
                pulse("asking")
                answers = []
                for task in done:
                    place = waiting.pop(task)
                    try:
                        answers.append((place, task.result()))
                        in_a_row = 0
                    except Unanswered as error:
                        unanswered.append(str(error))
                        in_a_row += 1
                        if in_a_row >= _IN_A_ROW:
                            failure = failure or JudgeError(f"{error}; {in_a_row} requests in a row have failed")
                    except JudgeError as error:
                        failure = failure or error
                if answers:
                    yield answers
                if stopped:
                    return
        finally:
            for task in waiting:
                task.cancel()
            loop.run_until_complete(_wait({*waiting, loop.create_task(self._server.close())}, 0.2, all_of_them=True))
            loop.close()
        if failure is not None:
            raise failure
        if unanswered:
            raise JudgeError(f"{len(unanswered)} of {len(items)} requests were not answered, first: {unanswered[0]}")


async def _wait(tasks: Collection[asyncio.Task[Any]], seconds: float, *, all_of_them: bool) -> set[asyncio.Task[Any]]:
    """Return the tasks that are done as soon as one is, or all are; none is waited for longer than that."""
    when = asyncio.ALL_COMPLETED if all_of_them else asyncio.FIRST_COMPLETED
    return (await asyncio.wait(tasks, timeout=seconds, return_when=when))[0]
