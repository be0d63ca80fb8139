"""Questions asked through the store: what was answered before is not asked again, and every answer is kept at once.

It knows neither what the questions mean nor who answers them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from alignkit import console
from alignkit.feedback.asking import Job, Model, Reply, Sampling, Verdict
from alignkit.feedback.prompts import Request
from alignkit.feedback.stop import Stop
from alignkit.feedback.store import Store, key_of

_Answer = TypeVar("_Answer", Reply, Verdict)
_NOTE_SECONDS = 10.0
About = Mapping[str, Any]


class Desk:
    """Takes questions for models, in one run."""

    def __init__(self, name: str, store: Store, stop: Stop) -> None:
        self._name, self._store, self._stop = name, store, stop

    def write(
        self, model: Model, jobs: Sequence[Job], sampling: Sampling, *, kind: str, by: str, about: Sequence[About]
    ) -> list[Reply]:
        """Return a text for each job. `kind`, `by` and `about` are kept beside it, for people to read.

        Raises what the model raises, and Stopped after a signal; all that was answered by then is kept.
        """
        keys = [
            key_of(ask="write", model=model.identity, request=_digest(job.request), seed=job.seed, **asdict(sampling))
            for job in jobs
        ]
        first, known = self._look_up(keys)
        if len(known) < len(first):
            batches = model.write([jobs[place] for place in first], sampling, known)
            self._keep(batches, keys, first, known, {"kind": kind, "by": by}, about)
        return [Reply.from_record(self._store.get(key) or {}) for key in keys]

    def decide(self, model: Model, requests: Sequence[Request], *, by: str, about: Sequence[About]) -> list[Verdict]:
        """Return a verdict for each question; raises as `write` does."""
        keys = [_verdict_key(model, request) for request in requests]
        first, known = self._look_up(keys)
        if len(known) < len(first):
            batches = model.decide([requests[place] for place in first], known)
            self._keep(batches, keys, first, known, {"kind": "label", "by": by}, about)
        return self.known(model, requests)  # type: ignore[return-value]

    def known(self, model: Model, requests: Sequence[Request]) -> list[Verdict | None]:
        """Return the verdicts that are there, None for the others; nobody is asked."""
        records = [self._store.get(_verdict_key(model, request)) for request in requests]
        return [None if record is None else Verdict.from_record(record) for record in records]

    def _look_up(self, keys: Sequence[str]) -> tuple[list[int], frozenset[int]]:
        """Return the places of the first of each key, and which of those have an answer, by their number."""
        first: dict[str, int] = {}
        for place, key in enumerate(keys):
            first.setdefault(key, place)
        return list(first.values()), frozenset(number for number, key in enumerate(first) if key in self._store)

    def _keep(
        self,
        batches: Iterator[list[tuple[int, _Answer]]],
        keys: Sequence[str],
        asked: Sequence[int],
        known: frozenset[int],
        facts: About,
        about: Sequence[About],
    ) -> None:
        """Put answers into the store as they come; those that are there already stay."""
        say = _Progress(f"{self._name}: {facts['kind']}", len(asked) - len(known))
        for batch in batches:  # after a signal the model ends it, when what is under way has come
            records = [(asked[at], answer) for at, answer in batch]
            self._store.put_all(
                [(keys[place], {**facts, **about[place], **answer.to_record()}) for place, answer in records]
            )
            say(sum(at not in known for at, _ in batch))
        self._stop.check()


class _Progress:
    """Says now and then how far a long list of questions is."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._began = self._said = time.monotonic()

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._said >= _NOTE_SECONDS:
            self._said = now
            rate = self._done / (now - self._began)
            left = (self._total - self._done) / rate
            console.note(f"{self._what}: {self._done} of {self._total}, {rate:.3g} per second ({left:.0f} s left)")


def seed_of(*parts: Any) -> int:
    """Return a seed that depends on these parts only."""
    text = "\x1e".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=7).digest(), "little")


def _verdict_key(model: Model, request: Request) -> str:
    return key_of(ask="decide", model=model.identity, request=_digest(request))


def _digest(request: Request) -> str:
    return key_of(**asdict(request))
