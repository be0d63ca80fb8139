"""One request to an OpenAI-compatible server: sent again while that may help, and every failure one clear line.

Built on the openai client, which is loaded when it is needed. The key comes from the environment and is taken out of
everything that is said. It knows nothing of constitutions or verdicts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import threading
import time
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from alignkit import console
from alignkit.errors import EnvironmentProblem, JudgeError, RecipeError
from alignkit.feedback.spending import Spending
from alignkit.recipe.schema import FeedbackModel
from alignkit.runs.record import redact

DEFAULT_KEY = "OPENAI_API_KEY"
NOT_INSTALLED = (
    "a judge or generator with url: needs the openai package; install it with: pip install 'alignkit[judge]'"
)
_MAX_BYTES = 1 << 22  # of a reply
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS, _LONGEST_RETRY_AFTER_SECONDS = 0.5, 60.0, 600.0
_OPTIONAL = ("seed", "logprobs", "top_logprobs", "temperature", "max_tokens")  # a server may not know them
_WITHOUT = "without"  # not a failure: the request is sent again without what the server does not know
_CHARS_PER_TOKEN = 3.0  # for the reserve: more tokens than most texts have


class Unanswered(Exception):
    """One request that could not be answered; others may be. `problem` is for good, else a later run asks again."""

    def __init__(self, what: str, *, problem: bool, retries: dict[str, int] | None = None) -> None:
        super().__init__(what)
        self.problem = problem
        self.retries = retries or {}


class Halted(Exception):
    """The run is being stopped."""


def find_key(source: FeedbackModel) -> str | None:
    """Return the key from the environment, None where there is none."""
    return os.environ.get(source.api_key_env or DEFAULT_KEY) or None


def require_key(source: FeedbackModel, key: str, *, where: str | None = None) -> None:
    """Raise RecipeError for a variable that is named and nobody has set; whether its key is right, the server knows."""
    name = source.api_key_env
    if name is not None and not os.environ.get(name, "").strip():
        what = f"{key}.api_key_env: the environment variable {name} is not set; export {name}=... first"
        raise RecipeError(what, where=where)


def require_client() -> None:
    """Raise EnvironmentProblem where openai is not installed."""
    if importlib.util.find_spec("openai") is None:
        raise EnvironmentProblem(NOT_INSTALLED)


class Server:
    """A server that is asked from several threads; retries, waits and limits are the recipe's."""

    def __init__(self, source: FeedbackModel, spending: Spending, stop: threading.Event) -> None:
        """Make the client; nothing is sent yet. Raises EnvironmentProblem without the openai package."""
        require_client()
        import openai

        assert source.url is not None
        self._source, self.spending, self.stop = source, spending, stop
        self._key = find_key(source)
        self._openai = openai
        self._answered = False
        self._left_out: set[str] = set()
        # No proxy and no .netrc from the environment, and no other host by a redirect: the key goes to this address.
        http = openai.DefaultHttpxClient(trust_env=False, follow_redirects=False, timeout=source.timeout)
        self._client = openai.OpenAI(
            api_key=self._key or "none", base_url=source.url, http_client=http, max_retries=0, timeout=source.timeout
        )

    @property
    def place(self) -> str:
        """The server's address without path and credentials."""
        parts = urlsplit(self._source.url or "")
        return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")

    def ask(self, payload: dict[str, Any], *, output_tokens: int) -> tuple[dict[str, Any], dict[str, int]]:
        """Send a request until it is answered; return the reply, counted, and the failed tries by cause.

        Raises Unanswered for this request alone, JudgeError when no request can be answered, Halted on `stop`.
        """
        retries: dict[str, int] = {}
        estimate = int(len(json.dumps(payload, ensure_ascii=False)) / _CHARS_PER_TOKEN)
        tries = 0
        while True:
            if self.stop.is_set():
                raise Halted
            with self.spending.reserve(estimate, output_tokens):
                self.spending.wait_for_turn(self.stop)
                outcome = self._try(payload)
            if isinstance(outcome, dict):
                self._answered = True
                return outcome, retries
            cause, wait_seconds, what = outcome
            if cause == _WITHOUT:
                continue
            tries += 1
            retries[cause] = retries.get(cause, 0) + 1
            self.spending.add_retry(cause)
            if tries > self._source.retries:
                raise Unanswered(f"{self.place} {what} ({tries} tries)", problem=False, retries=retries)
            self._wait(tries - 1, wait_seconds)

    def _wait(self, attempt: int, wished_seconds: float | None) -> None:
        """Wait as the server wishes, else twice as long each time, scattered so that threads do not come together."""
        seconds = min(_FIRST_WAIT_SECONDS * 2**attempt, _LONGEST_WAIT_SECONDS) * random.uniform(0.5, 1.5)
        if wished_seconds is not None:
            seconds = min(wished_seconds, _LONGEST_RETRY_AFTER_SECONDS) + random.uniform(0, 0.1)
        if self.stop.wait(seconds):
            raise Halted

    def _try(self, payload: dict[str, Any]) -> dict[str, Any] | tuple[str, float | None, str]:
        """Return the reply, or (cause, seconds the server asks to wait, what happened) for a failure that may pass."""
        openai = self._openai
        sent = {key: value for key, value in payload.items() if key not in self._left_out}
        if "max_tokens" in self._left_out:
            sent["max_completion_tokens"] = payload["max_tokens"]
        try:
            return self._read(self._fetch(sent))
        except openai.APITimeoutError:
            return "timeout", None, f"no reply within {self._source.timeout:g} s"
        except openai.APIStatusError as error:
            return self._explain_status(error, sent)
        except openai.APIConnectionError as error:
            return "connection", None, f"cannot be reached ({self._scrub(_root(error))})"
        except _Malformed as error:
            return "malformed", None, f"replies with something else than the protocol says ({error})"
        except Exception as error:  # the HTTP library's own, which differs between versions of openai
            if not type(error).__module__.startswith("http"):
                raise
            kind = "timeout" if "Timeout" in type(error).__name__ else "connection"
            return kind, None, f"the connection broke ({self._scrub(error)})"

    def _fetch(self, sent: dict[str, Any]) -> bytes:
        """Return the body of the reply, as long as it is of a sensible size and comes in time."""
        api = self._client.chat.completions if "messages" in sent else self._client.completions
        deadline = time.monotonic() + self._source.timeout
        with api.with_streaming_response.create(**sent) as response:
            body = bytearray()
            for chunk in response.iter_bytes(65536):
                body += chunk
                if len(body) > _MAX_BYTES:
                    raise _Malformed(f"more than {_MAX_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise self._openai.APITimeoutError(request=response.http_request)
        return bytes(body)

    def _read(self, body: bytes) -> dict[str, Any]:
        try:
            data = json.loads(body)
        except (ValueError, RecursionError):
            raise _Malformed("not JSON") from None
        choices = data.get("choices") if isinstance(data, dict) else None
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise _Malformed("no choices")
        usage = data.get("usage") or {}
        counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
        data["counts"] = tuple(count if isinstance(count, int) else 0 for count in counts)
        self.spending.add(*data["counts"])
        return data

    def _explain_status(self, error: Any, sent: dict[str, Any]) -> tuple[str, float | None, str]:
        """Tell failures that may pass from those that will not; raises for the latter."""
        status, said = error.status_code, self._scrub(_message(error))
        if status == 429 and getattr(error, "code", None) == "insufficient_quota":
            raise JudgeError(f"{self.place}: the account has no credit left: {said}") from None
        if status in (408, 409, 425, 429) or status >= 500:
            return str(status), _retry_after(error), f"answers {status}: {said}"
        if status in (401, 403):
            name = self._source.api_key_env or DEFAULT_KEY
            which = f"the key in {name}" if self._key else f"a request without a key (set {name})"
            raise JudgeError(f"{self.place} refuses {which} ({status}): {said}") from None
        if status == 404:
            raise JudgeError(f"{self.place} knows no model {self._source.name} at this url (404): {said}") from None
        if 300 <= status < 400:
            raise JudgeError(f"{self.place} sends us to another address ({status}); give that as url:") from None
        if any(re.search(rf"\b{name}\b", said) and self._leave_out(name, sent) for name in _OPTIONAL):
            return _WITHOUT, None, said
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

    def _scrub(self, said: object) -> str:
        """Return one short line without the key."""
        text = " ".join(str(said).split())
        if self._key:
            text = text.replace(self._key, "[redacted]")
        return redact(text)[:200]


class _Malformed(Exception):
    """A reply that is not what the protocol says."""


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
        return max(float(given), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(given).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return None
