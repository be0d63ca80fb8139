"""A model behind an OpenAI-compatible server: requests sent again while that may help, answers given out as they come.

Built on the openai client, which is loaded when it is needed. The key comes from the environment, goes to the recipe's
host and nowhere else, and is taken out of everything that is said or kept.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from alignkit import console
from alignkit.data.rows import Message
from alignkit.errors import EnvironmentProblem, JudgeError, RecipeError
from alignkit.feedback.choice import read_chat_tokens, read_decision, read_text_tokens
from alignkit.feedback.prompts import FOREIGN_TOKENS, Request, cut_at
from alignkit.feedback.writer import Decision, Job, Reply, Sampling, Spending, count_tokens
from alignkit.recipe.schema import FeedbackModel
from alignkit.runs.heartbeat import pulse

_Read = TypeVar("_Read")
NOT_INSTALLED = (
    "a judge or generator with url: needs the openai package; install it with: pip install 'alignkit[judge]'"
)
ALLOWED = "ALIGNKIT_ALLOW_KEY"  # --allow-key, which every process of a run inherits
_OPENAI = "https://api.openai.com"
# Variables that need no --allow-key, as long as they go to the host that gave out the key.
_OWN_KEYS = {
    _OPENAI: "OPENAI_API_KEY",
    "https://api.anthropic.com": "ANTHROPIC_API_KEY",
    "https://api.deepseek.com": "DEEPSEEK_API_KEY",
    "https://api.fireworks.ai": "FIREWORKS_API_KEY",
    "https://api.groq.com": "GROQ_API_KEY",
    "https://api.mistral.ai": "MISTRAL_API_KEY",
    "https://api.together.xyz": "TOGETHER_API_KEY",
    "https://generativelanguage.googleapis.com": "GEMINI_API_KEY",
    "https://openrouter.ai": "OPENROUTER_API_KEY",
    "https://router.huggingface.co": "HF_TOKEN",
}
_MAX_BYTES = 1 << 22  # of a reply, whatever its status
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS, _LONGEST_RETRY_AFTER_SECONDS = 0.5, 60.0, 600.0
_SAID_SECONDS = 5.0  # a wait that is worth a line
_OPTIONAL = ("seed", "logprobs", "top_logprobs", "temperature", "max_tokens")  # a server may not know them
_WITHOUT = "without"  # not a failure: the request is sent again without what the server does not know
_HEADERS = frozenset(
    {
        "accept", "connection", "content-length", "content-type", "host", "user-agent",
        "x-stainless-raw-response",  # the openai client looks for it in what was sent
    }
)  # fmt: skip


class Unanswered(Exception):
    """One request that could not be answered; others may be. `problem` is for good, else a later run asks again."""

    def __init__(self, what: str, *, problem: bool, retries: dict[str, int] | None = None) -> None:
        super().__init__(what)
        self.problem = problem
        self.retries = retries or {}


def place_of(url: str) -> str:
    """Return a server's address without path and credentials."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


def find_key(source: FeedbackModel, *, where: str | None = None, key: str = "judge") -> str | None:
    """Return the key for a server from the environment, None where there is none.

    Raises RecipeError for a variable that is not the host's own and was not allowed on the command line, so that a
    recipe alone cannot send somebody's variables away; and for one that is named and not set.
    """
    host, name = place_of(str(source.url)), source.api_key_env
    if name is None:
        name = _OWN_KEYS.get(host)
        return (os.environ.get(name) or None) if name else None
    if name != _OWN_KEYS.get(host) and name not in os.environ.get(ALLOWED, "").split():
        what = f"would send {name} to {host}; if that is meant, give --allow-key {name} on the command line"
        raise RecipeError(f"{key}.api_key_env {what}", where=where)
    if not os.environ.get(name, "").strip():
        what = f"the environment variable {name} is not set; export {name}=... first"
        raise RecipeError(f"{key}.api_key_env: {what}", where=where)
    return os.environ[name]


def require_client() -> None:
    """Raise EnvironmentProblem where openai is not installed."""
    if importlib.util.find_spec("openai") is None:
        raise EnvironmentProblem(NOT_INSTALLED)


class Server:
    """A server that is asked several things at a time; retries, waits and limits are the recipe's.

    `connect` and `close` stand around the requests of an event loop.
    """

    def __init__(self, source: FeedbackModel, spending: Spending) -> None:
        """Find the key; nothing is sent yet. Raises EnvironmentProblem without openai, RecipeError as `find_key`."""
        require_client()
        import openai

        self._source, self.spending, self._openai = source, spending, openai
        self.place = place_of(str(source.url))
        self._key = find_key(source)
        self._client: openai.AsyncOpenAI | None = None
        self._create: dict[bool, Callable[..., Any]] = {}  # of chats, of texts
        self._answered = self._introduced = False
        self._quiet_until = 0.0
        self._left_out: set[str] = set()

    def connect(self) -> None:
        """Make the client of the event loop that asks next, and say once where requests go."""
        import openai

        key, is_openai = self._key, self.place == _OPENAI
        if not self._introduced:
            name = self._source.api_key_env or _OWN_KEYS.get(self.place)
            which = f"with the key in {name}" if key else "without a key"
            console.note(f"asking {self._source.name} at {self.place}, {which}")
            self._introduced = True

        class Client(openai.DefaultAsyncHttpxClient):
            """Reads every reply whole and bounded, an error's too, and sends no header that the host need not see."""

            async def send(self, request: Any, **options: Any) -> Any:
                # The openai client adds OPENAI_ORG_ID, OPENAI_PROJECT_ID and OPENAI_CUSTOM_HEADERS for any host.
                for name in [] if is_openai else [name for name in request.headers if name.lower() not in _HEADERS]:
                    del request.headers[name]
                request.headers["accept-encoding"] = "identity"  # a body of a few bytes could unpack to gigabytes
                if key is not None:
                    request.headers["authorization"] = f"Bearer {key}"
                response = await super().send(request, **{**options, "stream": True})
                body = bytearray()
                try:
                    async for chunk in response.aiter_raw():
                        body += chunk
                        if len(body) > _MAX_BYTES:
                            raise _Malformed(f"more than {_MAX_BYTES} bytes")
                finally:
                    await response.aclose()
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise _Malformed("a compressed body that was not asked for")
                kept = ("content-type", "retry-after")
                headers = {name: response.headers[name] for name in kept if name in response.headers}
                return type(response)(response.status_code, headers=headers, content=bytes(body), request=request)

        # No proxy and no .netrc from the environment, and no other host by a redirect: the key goes to this address.
        http = Client(trust_env=False, follow_redirects=False, timeout=self._source.timeout)
        self._client = openai.AsyncOpenAI(
            api_key=key or "none", base_url=self._source.url, http_client=http, max_retries=0,
            timeout=self._source.timeout,
        )  # fmt: skip
        texts, chats = self._client.completions, self._client.chat.completions  # imported now, not in a request's time
        self._create = {False: texts.with_raw_response.create, True: chats.with_raw_response.create}

    async def close(self) -> None:
        """Let go of the connections."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def ask(
        self, payload: dict[str, Any], read: Callable[[dict[str, Any]], _Read], *, output_tokens: int
    ) -> tuple[_Read, dict[str, Any]]:
        """Send a request until it is answered; return what `read` makes of the choice, and what it took.

        The latter are `input_tokens`, `output_tokens` and `retries`, the failed tries by cause. Raises Unanswered for
        this request alone, JudgeError when no request can be answered. `read` raises ValueError or the like for what is
        not of the protocol.
        """
        took: dict[str, Any] = {"input_tokens": 0, "output_tokens": 0, "retries": {}}
        retries: dict[str, int] = took["retries"]
        estimate = count_tokens(json.dumps(payload, ensure_ascii=False))
        tries = 0
        while True:
            with self.spending.reserve(estimate, output_tokens):
                await asyncio.sleep(self.spending.seconds_to_turn())
                outcome = await self._try(payload, read)
            if not isinstance(outcome, _Failure):
                value, said, usage = outcome
                self._answered = True
                received = _sensible(usage, "completion_tokens") or count_tokens(said)
                self._count(took, _sensible(usage, "prompt_tokens") or estimate, received)
                return value, took
            if outcome.cause == _WITHOUT:
                continue
            if outcome.cause in ("timeout", "malformed"):  # it was sent, and may be charged for
                self._count(took, estimate, 0)
            tries += 1
            retries[outcome.cause] = retries.get(outcome.cause, 0) + 1
            self.spending.retries[outcome.cause] += 1
            if tries > self._source.retries:
                raise Unanswered(f"{self.place} {outcome.what} ({tries} tries)", problem=False, retries=retries)
            await self._wait(tries - 1, outcome)

    def _count(self, took: dict[str, Any], input_tokens: int, output_tokens: int) -> None:
        took["input_tokens"] += input_tokens
        took["output_tokens"] += output_tokens
        self.spending.add(input_tokens, output_tokens)

    async def _wait(self, attempt: int, failure: _Failure) -> None:
        """Wait as the server wishes, else twice as long each time, scattered so that tries do not come together."""
        seconds = min(_FIRST_WAIT_SECONDS * 2**attempt, _LONGEST_WAIT_SECONDS) * random.uniform(0.5, 1.5)
        wished = failure.wait_seconds
        if wished is not None:
            seconds = min(wished, _LONGEST_RETRY_AFTER_SECONDS) + random.uniform(0, 0.1)
        now = time.monotonic()
        if seconds >= _SAID_SECONDS and now >= self._quiet_until:
            self._quiet_until = now + seconds
            longest = f" (it asks for {wished:.4g} s; longer is not waited)" if wished and wished > seconds else ""
            console.note(f"{self.place} {failure.what}; next try in {seconds:.0f} s{longest}")
        await asyncio.sleep(seconds)

    async def _try(
        self, payload: dict[str, Any], read: Callable[[dict[str, Any]], _Read]
    ) -> tuple[_Read, str, object] | _Failure:
        """Ask once: the reply with its text and usage as the server gives them, or a failure worth another try."""
        openai, seconds = self._openai, self._source.timeout
        sent = {key: value for key, value in payload.items() if key not in self._left_out}
        if "max_tokens" in self._left_out:
            sent["max_completion_tokens"] = payload["max_tokens"]
        create = self._create["messages" in sent]
        try:
            async with asyncio.timeout(seconds):  # of the whole request; httpx's own is for each read
                response = await create(**sent)
            return _read_reply(response.content, read)
        except (openai.APITimeoutError, TimeoutError):
            return _Failure("timeout", f"gave no whole reply within {seconds:g} s")
        except openai.APIStatusError as error:
            return self._explain_status(error, sent)
        except _Malformed as error:
            return _Failure("malformed", f"replies with something else than the protocol says ({error})")
        except Exception as error:  # the HTTP library's own, which differs between versions of openai
            if not isinstance(error, openai.APIConnectionError) and not type(error).__module__.startswith("http"):
                raise
            return _Failure("connection", f"cannot be reached ({self.scrub(_root(error))[:200]})")

    def _explain_status(self, error: Any, sent: dict[str, Any]) -> _Failure:
        """Tell failures that may pass from those that will not; raises for the latter."""
        status, said = error.status_code, " ".join(self.scrub(_message(error)).split())[:200]
        if status == 429 and getattr(error, "code", None) == "insufficient_quota":
            raise JudgeError(f"{self.place}: the account has no credit left: {said}") from None
        if status in (408, 409, 425, 429) or status >= 500:
            return _Failure(str(status), f"answers {status}: {said}", _retry_after(error))
        if status in (401, 403):
            name = self._source.api_key_env or _OWN_KEYS.get(self.place)
            advice = f"set {name}" if name else "name its variable with api_key_env, and allow it with --allow-key"
            which = f"the key in {name}" if self._key else f"a request without a key ({advice})"
            raise JudgeError(f"{self.place} refuses {which} ({status}): {said}") from None
        if status == 404:
            raise JudgeError(f"{self.place} knows no model {self._source.name} at this url (404): {said}") from None
        if 300 <= status < 400:
            raise JudgeError(f"{self.place} sends us to another address ({status}); give that as url:") from None
        if any(re.search(rf"\b{name}\b", said) and self._leave_out(name, sent) for name in _OPTIONAL):
            return _Failure(_WITHOUT, said)
        if self._answered or "context" in said:
            raise Unanswered(f"refused ({status}): {said}", problem=True)
        raise JudgeError(f"{self.place} refuses the request ({status}): {said}") from None

    def _leave_out(self, name: str, sent: dict[str, Any]) -> bool:
        """Send what the server does not know no more; return whether the refused request had it."""
        if name in ("logprobs", "top_logprobs") and not {"logprobs", "top_logprobs"} & self._left_out:
            self._left_out |= {"logprobs", "top_logprobs"}
            console.note(f"{self.place} gives no log-probs; its verdicts are read from its text")
        self._left_out.add(name)
        return name in sent

    def scrub(self, said: object) -> str:
        """Return a text of the server's without the key."""
        text = str(said)
        return console.redact(text.replace(self._key, "[redacted]") if self._key else text)


class _Failure:
    """A try that failed, in a way that may pass."""

    def __init__(self, cause: str, what: str, wait_seconds: float | None = None) -> None:
        self.cause, self.what, self.wait_seconds = cause, what, wait_seconds  # the last: as the server wishes


class _Malformed(Exception):
    """A reply that is not what the protocol says."""


def _read_reply(body: bytes, read: Callable[[dict[str, Any]], _Read]) -> tuple[_Read, str, object]:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise _Malformed("not JSON") from None
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise _Malformed("no choices")
    try:
        value = read(choices[0])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise _Malformed(f"a choice with {type(error).__name__}: {str(error)[:80]}") from None
    return value, json.dumps(choices[0].get("message") or choices[0].get("text"), ensure_ascii=False), data.get("usage")


def _sensible(usage: object, name: str) -> int | None:
    """Return a count of the server's, None for one that no request of ours can have."""
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if type(count) is int and 0 < count < 1 << 20 else None


def _message(error: Any) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    inner = body.get("error", body)
    said = inner.get("message") if isinstance(inner, dict) else inner
    return str(said or error.message or "no reason given")


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _retry_after(error: Any) -> float | None:
    """Return the seconds a server asks to wait, given as a number or as a date."""
    given = error.response.headers.get("retry-after")
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(given).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return None if math.isnan(seconds) else max(seconds, 0.0)


_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer", Reply, Decision)
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

    def decide(self, requests: Sequence[Request], known: Collection[int] = ()) -> Iterator[list[tuple[int, Decision]]]:
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

    async def _decide(self, request: Request) -> Decision:
        payload = self._payload(request, request.room, 0.0, closing=True)
        if self._source.logprobs:
            top = _TOP[self._source.api]
            payload |= {"logprobs": True, "top_logprobs": top} if self._is_chat else {"logprobs": top}
        tokens = read_chat_tokens if self._is_chat else read_text_tokens

        def read(choice: dict[str, Any]) -> Decision:
            text, _ = cut_at(self._text(choice), () if self._is_chat else request.stops)
            return read_decision(text, tokens(choice))

        return await self._ask(payload, read, Decision, output_tokens=request.room)

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
