"""A model behind an OpenAI-compatible server: requests sent again while that may help, answers given out as they come.

Built on the openai client, which is loaded when it is needed. Its own retries know no budget and no limit of requests a
minute and wait 8 seconds at most, so tries are counted here. The key comes from the environment, goes to the recipe's
host and nowhere else, and is taken out of everything that is said or kept.
"""

import asyncio
import importlib.util
import json
import math
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from alignkit import console
from alignkit.data.rows import Message
from alignkit.errors import EnvironmentProblem, JudgeError, RecipeError
from alignkit.feedback.prompts import Request, cut_at
from alignkit.feedback.writer import Batches, Decision, Job, Reply, Sampling, Spending, TokenChances, read_decision
from alignkit.recipe.schema import FeedbackModel
from alignkit.runs.signals import pulse

ALLOWED = "ALIGNKIT_ALLOW_KEY"  # --allow-key, which every process of a run inherits
_SERVERS = json.loads(Path(__file__).with_name("servers.json").read_text(encoding="utf-8"))
FOREIGN_TOKENS = tuple(_SERVERS["control tokens of common templates"])  # a server's own tokenizer cannot be asked
_OPENAI = "https://api.openai.com"
# Variables that need no --allow-key, as long as they go to the host that gave out the key.
_OWN_KEYS: dict[str, str] = _SERVERS["variables of keys"]
_MAX_BYTES = 1 << 22  # of a reply, whatever its status
_BYTES_PER_TOKEN = 3.0  # fewer than most texts have: of what a server does not count rather too much is counted
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS, _LONGEST_RETRY_AFTER_SECONDS = 0.5, 60.0, 600.0
_SAID_SECONDS = 5.0  # a wait that is worth a line
_IN_A_ROW = 3  # requests that fail for good, without one answered between, mean that the server is down
_LISTEN_SECONDS = 0.2  # a signal is heard at least this often
_LAST_SECONDS = 0.5  # what requests under way have to end in after one
_OPTIONAL = ("seed", "logprobs", "top_logprobs", "temperature", "max_tokens")  # a server may not know them
# Sent to any host; the openai client looks for the last one in what was sent.
_HEADERS = {"accept", "connection", "content-length", "content-type", "host", "user-agent", "x-stainless-raw-response"}
_FOREIGN = "replies with something else than the protocol says ({})"
_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer", Reply, Decision)


class _Failed(Exception):
    """A try that failed: it may pass, without a cause in another form at once; `refused` is never answered."""

    def __init__(self, cause: str, what: str, wait_seconds: float | None = None) -> None:
        self.cause, self.what, self.wait_seconds = cause, what, wait_seconds  # the last: as the server wishes


class _Unanswered(Exception):
    """A request that was not answered in all of its tries; a later run asks it again."""


def place_of(url: str) -> str:
    """Shorten a server's address: no path and no credentials."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


def find_key(source: FeedbackModel, *, where: str | None = None, key: str = "judge") -> str | None:
    """Find the key for a server in the environment, None where there is none. Raises RecipeError for a variable that is
    named and not set; and for one that is not the host's own and was not allowed on the command line: a recipe alone
    cannot send somebody's variables away."""
    host = place_of(str(source.url))
    own = _OWN_KEYS.get(host, "")
    name = source.api_key_env or own
    value = os.environ.get(name, "").strip()  # a file that it came from may leave a line break
    if source.api_key_env is None and not value:
        return None
    if name != own and name not in os.environ.get(ALLOWED, "").split():
        what = f"would send {name} to {host}; if that is meant, give --allow-key {name} on the command line"
        raise RecipeError(f"{key}.api_key_env {what}", where=where)
    if not value:
        what = f"the environment variable {name} is not set; export {name}=... first"
        raise RecipeError(f"{key}.api_key_env: {what}", where=where)
    if not (value.isascii() and value.isprintable() and " " not in value):
        what = f"the environment variable {name} holds a blank or a character that is not ASCII, which no key has"
        raise RecipeError(f"{what}; export it anew", where=where)
    return value


def require_client() -> None:
    """Raise EnvironmentProblem where openai is not installed."""
    if importlib.util.find_spec("openai") is None:
        what = "a judge or generator with url: needs the openai package; install it with: pip install 'alignkit[judge]'"
        raise EnvironmentProblem(what)


class Endpoint:
    """A model at an OpenAI-compatible server; api: chat sends messages, api: completions the transcript."""

    control_tokens: Sequence[str] = FOREIGN_TOKENS

    def __init__(self, source: FeedbackModel, *, spending: Spending, stop: threading.Event) -> None:
        """Find the key and say where it goes; nothing is sent yet."""
        require_client()
        import openai

        self._source, self._stop, self._openai, self._spending = source, stop, openai, spending
        self.spending: Spending | None = spending
        self._is_chat, self.place = source.api == "chat", place_of(str(source.url))
        self.takes_prefill = not self._is_chat
        self.identity: dict[str, Any] = {"url": self.place, "name": source.name, "api": source.api}
        self._key, self._key_name = find_key(source), source.api_key_env or _OWN_KEYS.get(self.place)
        which = f"with the key in {self._key_name}" if self._key else "without a key"
        console.note(f"asking {source.name} at {self.place}, {which}")
        self._create: Callable[..., Any]  # sends a request; of the client of the event loop that is asking
        self._answered, self._quiet_until = False, 0.0
        self._left_out: set[str] = set()

    def write(self, jobs: Sequence[Job], sampling: Sampling, known: Collection[int] = ()) -> Batches[Reply]:
        async def write(job: Job) -> Reply:
            payload = self._payload(job.request, sampling.max_new_tokens, sampling.temperature)
            payload |= {"top_p": sampling.top_p} if sampling.top_p < 1 else {}
            payload |= {"extra_body": {"top_k": sampling.top_k}} if sampling.top_k else {}  # vLLM's, not the protocol's
            return await self._ask(payload | {"seed": job.seed % 2**31}, lambda choice: read(job, choice), Reply)

        def read(job: Job, choice: dict[str, Any]) -> Reply:
            if choice.get("finish_reason") == "content_filter":
                return Reply(problem="content filter")
            text, cut = cut_at(self._text(choice), () if self._is_chat else job.request.stops)
            text = text if job.request.is_plain and not self._is_chat else text.strip()
            return Reply(text, cut or choice.get("finish_reason") != "length")

        return self._ask_all(jobs, known, write)

    def decide(self, requests: Sequence[Request], known: Collection[int] = ()) -> Batches[Decision]:
        """Decide each question that is open, by log-probs where the server gives them, else by its text."""
        # Likeliest tokens: the most that the protocol allows.
        wanted = {"logprobs": True, "top_logprobs": 20} if self._is_chat else {"logprobs": 5}

        async def decide(request: Request) -> Decision:
            payload = self._payload(request, request.room, 0.0, closing=request.closing)
            payload |= wanted if self._source.logprobs else {}
            return await self._ask(payload, lambda choice: read(request, choice), Decision)

        def read(request: Request, choice: dict[str, Any]) -> Decision:
            text, _ = cut_at(self._text(choice), () if self._is_chat else request.stops)
            return read_decision(text, self._tokens(choice))

        return self._ask_all(requests, known, decide)

    def read_prompts(self, prompts: Sequence[Sequence[int]], num: int) -> dict[int, Any]:
        """Ask for the `num` likeliest tokens at each place of token ids: {id: {logprob, ...}} as vLLM has it."""

        async def ask(ids: Sequence[int]) -> Reply:
            payload = {"model": self._source.name, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0}
            return await self._ask(payload | {"extra_body": {"prompt_logprobs": num}}, read, Reply)

        def read(choice: dict[str, Any]) -> Reply:
            places = list(choice.get("prompt_logprobs") or ())
            if not places or min(map(len, places[1:])) < num:
                what = f"gives no {num} log-probabilities of each token of a prompt"
                raise JudgeError(f"{self.place} {what} (prompt_logprobs), as vLLM's server does")
            return Reply(places=places)

        found = {place: reply for pairs in self._ask_all(prompts, (), ask) for place, reply in pairs}
        if problem := next((reply.problem for reply in found.values() if reply.problem), None):
            raise JudgeError(f"{self.place} {problem}")
        return {place: reply.places for place, reply in found.items()}

    def _payload(self, request: Request, room: int, temperature: float, *, closing: str = "") -> dict[str, Any]:
        payload: dict[str, Any] = {"model": self._source.name, "max_tokens": room, "temperature": temperature}
        if not self._is_chat:
            return payload | {"prompt": request.transcript} | ({"stop": list(request.stops)} if request.stops else {})
        messages = list(request.messages or [Message(role="user", content=request.transcript)])
        if closing:
            *before, last = messages
            messages = [*before, Message(role=last["role"], content=f"{last['content']}\n\n{closing}")]
        return payload | {"messages": messages}

    def _text(self, choice: dict[str, Any]) -> str:
        """Read the answer out of a reply; raises TypeError where it is no text."""
        text = choice["message"].get("content") if self._is_chat else choice.get("text")
        if not isinstance(text, str | None):
            raise TypeError(f"{type(text).__name__} instead of a text")
        return self._scrub(text or "")

    def _tokens(self, choice: dict[str, Any]) -> list[TokenChances]:
        """Read the tokens of a reply with the likeliest at their places; none where the server gives no log-probs."""
        given, found = choice.get("logprobs") or {}, []
        items = [(it["token"], it.get("top_logprobs") or ()) for it in given.get("content") or ()]
        if not self._is_chat:
            items = list(zip(given.get("tokens") or (), given.get("top_logprobs") or (), strict=False))
        for token, top in items:
            pairs = [(it["token"], it["logprob"]) for it in top] if self._is_chat else (top or {}).items()
            # A little above 0 is what rounding makes of a certain token; -9999 is OpenAI's word for next to never.
            for text, logp in pairs:
                if not isinstance(text, str) or type(logp) not in (int, float) or not logp <= 1e-3:
                    raise ValueError(f"a log-probability of {logp!r}")
            if pairs:
                found.append(TokenChances(token, {text: max(float(logp), -9999.0) for text, logp in pairs}))
        return found

    def _scrub(self, said: object) -> str:
        """Take the key out of what a server says."""
        text = str(said)
        return console.redact(text.replace(self._key, "[redacted]") if self._key else text)

    # All requests of a call.

    def _ask_all(
        self, items: Sequence[_Item], known: Collection[int], work: Callable[[_Item], Coroutine[Any, Any, _Answer]]
    ) -> Batches[_Answer]:
        """Yield answers as they come; what is under way when an error ends it is waited for and given out first.
        After a signal that is half a second's wait, then requests are cut off. Raises JudgeError when the server gave
        up, when the budget is spent, or when some could not be answered."""
        waiting: dict[asyncio.Task[_Answer], int] = {}
        places = iter([place for place in range(len(items)) if place not in known])
        unanswered: list[str] = []
        in_a_row = 0
        failure: JudgeError | None = None
        loop = asyncio.new_event_loop()
        client = self._connect()
        try:
            while True:
                while not (failure or self._stop.is_set()) and len(waiting) < self._source.concurrency:
                    place = next(places, None)
                    if place is None:
                        break
                    waiting[loop.create_task(work(items[place]))] = place
                if not waiting:
                    break
                # Until one request is done, or now and then to listen; after a signal for all, but no longer.
                stopped = self._stop.is_set()
                seconds, until = (_LAST_SECONDS, "ALL_COMPLETED") if stopped else (_LISTEN_SECONDS, "FIRST_COMPLETED")
                done, _ = loop.run_until_complete(asyncio.wait(waiting, timeout=seconds, return_when=until))
                pulse("asking")
                answers = []
                for task in done:
                    place = waiting.pop(task)
                    try:
                        answers.append((place, task.result()))
                        in_a_row = 0
                    except _Unanswered as error:
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
            loop.run_until_complete(asyncio.wait({*waiting, loop.create_task(client.close())}, timeout=0.2))
            loop.close()
        if failure is not None:
            raise failure
        if unanswered:
            raise JudgeError(f"{len(unanswered)} of {len(items)} requests were not answered, first: {unanswered[0]}")

    def _connect(self) -> Any:
        key, seconds = self._key, self._source.timeout
        allowed = None if self.place == _OPENAI else _HEADERS

        class Client(self._openai.DefaultAsyncHttpxClient):  # type: ignore[name-defined]
            """Reads every reply whole and bounded, an error's too, and sends no header that the host need not see."""

            async def send(self, request: Any, **options: Any) -> Any:
                # The openai client adds OPENAI_ORG_ID, OPENAI_PROJECT_ID and OPENAI_CUSTOM_HEADERS for any host.
                for name in [name for name in request.headers if allowed and name.lower() not in allowed]:
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
                            raise _Failed("malformed", _FOREIGN.format(f"more than {_MAX_BYTES} bytes"))
                finally:
                    await response.aclose()
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise _Failed("malformed", _FOREIGN.format("a compressed body that was not asked for"))
                kept = ("content-type", "retry-after")
                headers = {name: response.headers[name] for name in kept if name in response.headers}
                return type(response)(response.status_code, headers=headers, content=bytes(body), request=request)

        # No proxy and no .netrc from the environment, and no other host by a redirect: the key goes to this address.
        http = Client(trust_env=False, follow_redirects=False, timeout=seconds)
        client = self._openai.AsyncOpenAI(
            api_key=key or "none", base_url=self._source.url, http_client=http, max_retries=0, timeout=seconds
        )
        self._create = (client.chat if self._is_chat else client).completions.with_raw_response.create
        return client

    # One request.

    async def _ask(
        self, payload: dict[str, Any], read: Callable[[dict[str, Any]], _Answer], kind: type[_Answer]
    ) -> _Answer:
        """Send a request until it is answered; a refused one is an answer that says why, in its `problem`.
        Raises _Unanswered for this request alone, JudgeError when none can be answered; `read` may raise ValueError or
        like."""
        estimate = _count_tokens(json.dumps(payload, ensure_ascii=False))
        retries: Counter[str] = Counter()
        charged = 0  # input tokens of tries that were sent and may be charged for
        while True:
            with self._spending.reserve(estimate, payload["max_tokens"]):
                await asyncio.sleep(self._spending.seconds_to_turn())
                try:
                    answer, said, usage = await self._try(payload, read)
                except _Failed as error:
                    failure = error
                    if failure.cause == "refused":
                        return kind(problem=failure.what, retries=dict(retries))
                else:
                    self._answered = True
                    sent = _sensible(usage, "prompt_tokens") or estimate
                    received = _sensible(usage, "completion_tokens") or _count_tokens(said)
                    self._spending.add(sent, received)
                    return replace(answer, input_tokens=charged + sent, output_tokens=received, retries=dict(retries))
            if not failure.cause:
                continue
            if failure.cause in ("timeout", "malformed"):
                self._spending.add(estimate, 0)
                charged += estimate
            retries[failure.cause] += 1
            self._spending.retries[failure.cause] += 1
            if retries.total() > self._source.retries:
                raise _Unanswered(f"{self.place} {failure.what} ({retries.total()} tries)")
            # Wait as the server wishes, else twice as long each time, scattered so that tries do not come together.
            wished, now = failure.wait_seconds, time.monotonic()
            seconds = min(wished or 0.0, _LONGEST_RETRY_AFTER_SECONDS) + random.uniform(0, 0.1)
            if wished is None:
                doubled = _FIRST_WAIT_SECONDS * 2 ** (retries.total() - 1)
                seconds = min(doubled, _LONGEST_WAIT_SECONDS) * random.uniform(0.5, 1.5)
            if seconds >= _SAID_SECONDS and now >= self._quiet_until:
                self._quiet_until = now + seconds
                longest = f" (it asks for {wished:.4g} s; longer is not waited)" if wished and wished > seconds else ""
                console.note(f"{self.place} {failure.what}; next try in {seconds:.0f} s{longest}")
            await asyncio.sleep(seconds)

    async def _try(
        self, payload: dict[str, Any], read: Callable[[dict[str, Any]], _Answer]
    ) -> tuple[_Answer, str, object]:
        """Ask once: the reply with its text and usage as the server gives them; raises _Failed for another try."""
        openai, seconds = self._openai, self._source.timeout
        sent = {key: value for key, value in payload.items() if key not in self._left_out}
        if "max_tokens" in self._left_out:
            sent["max_completion_tokens"] = payload["max_tokens"]
        try:
            async with asyncio.timeout(seconds):  # of the whole request; httpx's own is for each read
                response = await self._create(**sent)
        except (openai.APITimeoutError, TimeoutError):
            raise _Failed("timeout", f"gave no whole reply within {seconds:g} s") from None
        except openai.APIStatusError as error:
            raise self._explain_status(error, sent) from None
        except Exception as error:  # the HTTP library's own, which differs between versions of openai
            if not isinstance(error, openai.APIConnectionError) and not type(error).__module__.startswith("http"):
                raise
            root: BaseException = error
            while root.__cause__ is not None:
                root = root.__cause__
            raise _Failed("connection", f"cannot be reached ({self._scrub(root)[:200]})") from None
        try:
            data = json.loads(response.content)
            choice = data["choices"][0]
            said = json.dumps(choice.get("message") or choice.get("text"), ensure_ascii=False)
            return read(choice), said, data.get("usage")
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            what = f"{type(error).__name__}: {self._scrub(error)[:80]}"
            raise _Failed("malformed", _FOREIGN.format(what)) from None

    def _explain_status(self, error: Any, sent: dict[str, Any]) -> Exception:
        """Tell failures that may pass, those of one request, and those of all requests."""
        body = error.body if isinstance(error.body, dict) else {}
        inner = body.get("error", body)
        message = (inner.get("message") if isinstance(inner, dict) else inner) or error.message or "no reason given"
        status, said = error.status_code, " ".join(self._scrub(message).split())[:200]
        if status == 429 and getattr(error, "code", None) == "insufficient_quota":
            return JudgeError(f"{self.place}: the account has no credit left: {said}")
        if status in (408, 409, 425, 429) or status >= 500:
            given, wait = error.response.headers.get("retry-after"), math.nan
            with suppress(ValueError, TypeError, OverflowError):  # a date
                wait = parsedate_to_datetime(given).timestamp() - time.time()
            with suppress(ValueError, TypeError):  # or seconds
                wait = float(given)
            return _Failed(str(status), f"answers {status}: {said}", None if math.isnan(wait) else max(wait, 0.0))
        if status in (401, 403):
            name = self._key_name
            advice = f"set {name}" if name else "name its variable with api_key_env, and allow it with --allow-key"
            which = f"the key in {name}" if self._key else f"a request without a key ({advice})"
            return JudgeError(f"{self.place} refuses {which} ({status}): {said}")
        if status == 404:
            return JudgeError(f"{self.place} knows no model {self._source.name} at this url (404): {said}")
        if 300 <= status < 400:
            return JudgeError(f"{self.place} sends us to another address ({status}); give that as url:")
        unknown = next((name for name in _OPTIONAL if name in sent and re.search(rf"\b{name}\b", said)), None)
        if unknown is not None:
            both = {"logprobs", "top_logprobs"}
            if unknown in both and not both & self._left_out:
                console.note(f"{self.place} gives no log-probs; its verdicts are read from its text")
            self._left_out |= both if unknown in both else {unknown}
            return _Failed("", said)
        if self._answered or "context" in said:
            return _Failed("refused", f"refused ({status}): {said}")
        return JudgeError(f"{self.place} refuses the request ({status}): {said}")


def _count_tokens(text: str) -> int:
    """Estimate the tokens of a text, for limits and for a server that counts nothing."""
    return math.ceil(len(text.encode("utf-8", "replace")) / _BYTES_PER_TOKEN)


def _sensible(usage: object, name: str) -> int | None:
    """Read a count of the server's, None for one that no request of ours can have."""
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if type(count) is int and 0 < count < 1 << 20 else None
